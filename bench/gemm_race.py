"""Races every int8 matmul that is emitted for this GPU on the GEMMs of a Llama-3-8B block, beside
cuBLAS: bf16, int8 through torch._int_mm (no scales), fp8 with row scales through torch._scaled_mm.

    python bench/gemm_race.py --out bench/results/gemm_race_emitted.json [--quick] [--only pingpong]

Launches follow one another without a pause, all candidates in turns, at the clock that a step
leaves them. A candidate must first reproduce exact integer sums, scaled and rounded as the
reference does, bit for bit; one that does not compile or fit, or is wrong, is dropped, its reason
in the results.
Legend: out [M, N] = (a [M, C] @ b [N, C]^T) * a_scale [M] * b_scale [N].
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernels import gemm_operands, short
from record import header, median, save
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hadagraph.codegen import launch
from hadagraph.codegen.autotune import LOST, candidates
from hadagraph.codegen.choose_mm import problem_of
from hadagraph.codegen.tune import MmConfig

Shape = tuple[int, int, int]
# (M, N, C) and how often each occurs in a step of one Llama-3-8B block on 16384 tokens.
T = 16384
SHAPES: dict[Shape, int] = {
    (T, 14336, 4096): 3,
    (T, 4096, 14336): 3,
    (14336, 4096, T): 2,
    (4096, 14336, T): 1,
    (T, 4096, 4096): 4,
    (4096, 4096, T): 2,
    (T, 1024, 4096): 2,
    (T, 4096, 1024): 2,
    (1024, 4096, T): 2,
}
QUICK = 3
BLOCKS = 4
CHECKED: tuple[Shape, ...] = ((200, 328, 400), (8, 1032, 16), (1544, 2056, 4112), (T, 4096, 1024))
CHECKED_ROWS = 2048  # of the largest output, at random: fp64 products are slow
SETS_BYTES = 1 << 28  # operand sets are rotated until they exceed this: no L2 holds them
BF16, INT_MM, FP8 = "cuBLAS bf16", "torch._int_mm", "torch._scaled_mm fp8"
BASELINES = (BF16, INT_MM, FP8)
Calls = list[Callable[[], object]]


def configurations(capability: tuple[int, int], only: str) -> dict[str, MmConfig]:
    """By name, those of the tables whose name contains `only`."""
    problem = problem_of((T, 4096, 4096), ("int8", "int8"), (False, False), torch.bfloat16)
    found = [c for c in candidates(problem, capability) if isinstance(c, MmConfig)]
    return {short(config): config for config in found if only in short(config)}


def int8_operands(M: int, N: int, C: int) -> list[torch.Tensor]:
    """Codes as rotated rows have them: of a normal distribution, the largest about four sigma."""
    return [
        (32 * torch.randn(rows, C, device="cuda")).round_().clamp_(-127, 127).to(torch.int8)
        for rows in (M, N)
    ]


def scales_of(M: int, N: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(M, device=device) + 0.5, torch.rand(N, device=device) + 0.5


def wrong_elements(multiply: Callable[..., torch.Tensor], a: torch.Tensor, b: torch.Tensor) -> int:
    """How many elements of `multiply(a, b, a_scale, b_scale)`, in bf16, are not the reference's."""
    a_scale, b_scale = scales_of(a.shape[0], b.shape[0], str(a.device))
    out = multiply(a, b, a_scale, b_scale)
    rows = torch.randperm(a.shape[0], device=a.device)[:CHECKED_ROWS]
    sums = (a[rows].double() @ b.double().t()).float()  # below 2^24 or rounded once, as int32 is
    expected = sums * a_scale[rows][:, None] * b_scale[None, :]
    return int((out[rows] != expected.bfloat16()).sum())


def emitted(config: MmConfig, capability: tuple[int, int]) -> Callable[..., torch.Tensor]:
    def multiply(
        a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor
    ) -> torch.Tensor:
        operands = (a, b, a_scale, b_scale, None)
        return launch.scaled_mm(*operands, torch.bfloat16, capability, config)

    return multiply


def refusal(multiply: Callable[..., torch.Tensor], shapes: Sequence[Shape]) -> str | None:
    """Why a candidate is not raced, if it isn't."""
    for M, N, C in shapes:
        try:
            count = wrong_elements(multiply, *gemm_operands(M, N, C, torch.int8))
        except LOST as error:
            return f"{type(error).__name__}: {error}"[:300]
        if count:
            return f"{count} elements of {M} x {N} x {C} are wrong"
    return None


def baseline(name: str, M: int, N: int, C: int) -> Callable[[], object]:
    if name == BF16:
        a, b = gemm_operands(M, N, C, torch.bfloat16)
        return lambda: a @ b.t()
    if name == INT_MM:
        a, b = int8_operands(M, N, C)
        return lambda: torch._int_mm(a, b.t())
    a, b = gemm_operands(M, N, C, torch.float8_e4m3fn)
    a_scale, b_scale = scales_of(M, N, "cuda")
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    scales = {"scale_a": a_scale[:, None], "scale_b": b_scale[None, :]}
    return lambda: torch._scaled_mm(a, b.t(), **scales, **options)


def busy_ms(calls: dict[str, Calls], rounds: int, launches: int) -> dict[str, list[float]]:
    """By name, each round's mean milliseconds of that many launches, rounds in mixed order, the GPU
    never idle."""
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for each in calls.values():
        for call in each:
            call()
    order = list(calls)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for i in range(launches):
                calls[name][i % len(calls[name])]()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) / launches for start, end in pairs]
        for name, pairs in marks.items()
    }


def race(
    shape: Shape, multiplies: dict[str, Callable[..., torch.Tensor]], rounds: int, launches: int
) -> list[dict[str, Any]]:
    """The median time of every candidate and baseline."""
    M, N, C = shape
    sets = max(2, min(4, -(-SETS_BYTES // ((M + N) * C))))
    calls: dict[str, Calls] = {n: [baseline(n, *shape) for _ in range(sets)] for n in BASELINES}
    operands = [(*int8_operands(*shape), *scales_of(M, N, "cuda")) for _ in range(sets)]
    for name, multiply in multiplies.items():
        calls[name] = [partial(multiply, *each) for each in operands]
    times = busy_ms(calls, rounds, launches)
    return [
        {"name": name, "M": M, "N": N, "C": C, "ms": median(each)}
        | {"spread": max(each) / min(each), "flops": 2 * M * N * C}
        | {"tflops": 2e-9 * M * N * C / median(each)}
        for name, each in times.items()
    ]


def step_ms(rows: list[dict[str, Any]], name: str) -> float | None:
    """Time of all GEMMs of a step with one candidate; None where a shape is missing."""
    found = {(r["M"], r["N"], r["C"]): r["ms"] for r in rows if r["name"] == name}
    if any(shape not in found for shape in SHAPES):
        return None
    return BLOCKS * sum(count * found[shape] for shape, count in SHAPES.items())


def table(rows: list[dict[str, Any]]) -> Table:
    """TFLOP/s, one line a candidate and one column a shape; milliseconds of a step at the end."""
    shapes = list(dict.fromkeys((r["M"], r["N"], r["C"]) for r in rows))
    rates = {(r["name"], r["M"], r["N"], r["C"]): r["tflops"] for r in rows}
    shown = Table(title="TFLOP/s")
    for column in ("", *("x".join(map(str, shape)) for shape in shapes), "step, ms"):
        shown.add_column(column, justify="right" if column else "left")
    steps = {name: step_ms(rows, name) for name in dict.fromkeys(r["name"] for r in rows)}
    for name in sorted(steps, key=lambda each: steps[each] or 0.0):
        step = steps[name]
        cells = [f"{rates[name, *shape]:.0f}" for shape in shapes]
        shown.add_row(name, *cells, "" if step is None else f"{step:.2f}")
    return shown


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK} shapes")
    parser.add_argument("--only", default="", help="candidates whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--launches", type=int, default=12, help="of a candidate in each round")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    console = Console(width=200)
    capability = torch.cuda.get_device_capability()
    configs = configurations(capability, args.only)
    multiplies = {name: emitted(config, capability) for name, config in configs.items()}
    content = header("gemm_race", args) | {"dropped": {}, "rows": []}
    content["configurations"] = {name: asdict(config) for name, config in configs.items()}
    for name in track(list(multiplies), "checking", console=console, transient=True):
        reason = refusal(multiplies[name], CHECKED)
        if reason is not None:
            content["dropped"][name] = reason
            del multiplies[name]
            console.print(f"dropped {name}: {reason}", markup=False)
    shapes = list(SHAPES)[: QUICK if args.quick else None]
    for shape in track(shapes, "racing", console=console, transient=True):
        content["rows"] += race(shape, multiplies, args.rounds, args.launches)
        save(content, args.out)
    console.print(table(content["rows"]))


if __name__ == "__main__":
    main()
