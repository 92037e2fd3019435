"""Races schedules and configurations of chain kernels (`codegen/choose_chains`) on a GPU, beside
the same work unfused: the chain compiled by Inductor, then the quantizers of its outputs. All are
timed in turns: alone, and each call behind GEMMs, at whose lower clock kernels run in a step.

    python bench/chain_race.py --out bench/results/chain_race.json [--quick] [--cases NAME ...]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from kernels import LAUNCH_ERRORS, buffer_sets, copy_bandwidth, median_ms
from record import header, save

from hadagraph.codegen import launch, tune, workers
from hadagraph.codegen.calls import noted
from hadagraph.codegen.chains import chain_call
from hadagraph.codegen.choose_chains import (
    SCHEDULES,
    ChainPlan,
    ChainSchedule,
    select_chain,
    wanted_of,
)
from hadagraph.codegen.spec import Capability
from hadagraph.compat import settle_triton_cache
from hadagraph.formats import Encoding
from hadagraph.reference import CHAIN_DTYPES
from hadagraph.region import MATRIX, Chain

T = 16384
ROWS, COLUMNS = "int8/per_kept_index/h128", "int8/per_kept_index/h32"
FP8 = "fp8_e4m3/per_kept_index"
# As in a Llama block under Inductor: gate, up -> silu(gate) * up; with grad_output -> grad_up,
# grad_gate, and between them silu(gate) * up again, which is of torch 2.13, and by exp of 2.11.
SILU_MUL = (
    "in bf16 matrix; in bf16 matrix; neg %0; exp %2; add %3 1.0; div %0 %4; mul %5 %1; out %6 bf16"
)
SILU_MUL_BACKWARD = (
    "in bf16 matrix; in bf16 matrix; in bf16 matrix; neg %0; exp %3; add %4 1.0; div %0 %5; "
    "mul %2 %6; mul %2 %1; sigmoid %0; mul %8 %9; sub 1.0 %9; mul %0 %11; add %12 1.0; "
    "mul %10 %13; out %7 bf16; out %14 bf16"
)
SILU_MUL_THREE = (
    "in bf16 matrix; in bf16 matrix; in bf16 matrix; neg %0; exp %3; add %4 1.0; div %0 %5; "
    "mul %6 %1; mul %2 %6; mul %2 %1; sigmoid %0; mul %9 %10; sub 1.0 %10; mul %0 %12; "
    "add %13 1.0; mul %11 %14; out %8 bf16; out %7 bf16; out %15 bf16"
)
SILU_MUL_THREE_BY_EXP = (
    "in bf16 matrix; in bf16 matrix; in bf16 matrix; neg %0; exp %3; add %4 1.0; div %0 %5; "
    "mul %6 %1; mul %2 %6; mul %2 %1; reciprocal %5; mul %10 1.0; mul %9 %11; sub 1.0 %11; "
    "mul %0 %13; add %14 1.0; mul %12 %15; out %8 bf16; out %7 bf16; out %16 bf16"
)
RMS_NORM = "in bf16 matrix; in fp32 rows; in bf16 columns; mul %0 %1; mul %3 %2; out %4 bf16"
ADD = "in bf16 matrix; in bf16 matrix; add %0 %1; out %2 bf16"
GEMMS_BEFORE = 3
WARMING_GEMMS = 150  # until the clock has settled
Call = Callable[[], object]
Options = tuple[tune.RowsConfig | tune.ColumnsConfig | None, ChainSchedule | None]


@dataclass(frozen=True)
class Case:
    """A chain, its matrices' columns, and the encodings of rows and of columns of all its outputs,
    or of each."""

    name: str
    chain: str
    K: int
    rows: str | tuple[str, ...]
    columns: str | tuple[str, ...]
    value: bool = False

    @property
    def wanted(self) -> tuple[list[str], list[str], list[bool]]:
        """Rows, columns and value of each output."""
        count = len(Chain.parse(self.chain).outputs)
        rows, columns = (
            [each] * count if isinstance(each, str) else list(each)
            for each in (self.rows, self.columns)
        )
        return rows, columns, [self.value] * count


CASES = (
    Case("silu_mul rows", SILU_MUL, 14336, ROWS, ""),
    Case("silu_mul rows fp8", SILU_MUL, 14336, FP8, ""),
    Case("silu_mul columns", SILU_MUL, 14336, "", COLUMNS),
    Case("silu_mul backward", SILU_MUL_BACKWARD, 14336, ROWS, COLUMNS),
    Case("silu_mul backward fp8", SILU_MUL_BACKWARD, 14336, FP8, FP8),
    Case("silu_mul backward, again", SILU_MUL_THREE, 14336, (ROWS, "", ROWS), COLUMNS),
    Case(
        "silu_mul backward, again, by exp",
        SILU_MUL_THREE_BY_EXP,
        14336,
        (ROWS, "", ROWS),
        COLUMNS,
    ),
    Case("silu_mul backward rows", SILU_MUL_BACKWARD, 14336, ROWS, ""),
    Case("silu_mul both", SILU_MUL, 14336, ROWS, COLUMNS),
    Case("rms_norm rows", RMS_NORM, 4096, ROWS, ""),
    Case("rms_norm columns", RMS_NORM, 4096, "", COLUMNS),
    Case("rms_norm both", RMS_NORM, 4096, ROWS, COLUMNS),
    Case("add both, value", ADD, 4096, ROWS, COLUMNS, True),
)


def inputs_of(chain: Chain, K: int, device: str = "cuda") -> list[torch.Tensor]:
    shapes = {MATRIX: (T, K), "rows": (T,), "columns": (K,), "scalar": ()}
    return [
        torch.randn(shapes[each.shape], device=device).to(CHAIN_DTYPES[each.dtype])
        for each in chain.inputs
    ]


def eager(chain: Chain, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The chain as Inductor is given it: `CASES` use these operations only."""
    functions: dict[str, Any] = {
        "add": torch.add,
        "sub": lambda a, b: a - b,
        "mul": torch.mul,
        "div": torch.div,
        "neg": torch.neg,
        "exp": torch.exp,
        "sigmoid": torch.sigmoid,
        "reciprocal": torch.reciprocal,
    }
    values = [
        x.float()[:, None] if each.shape == "rows" else x.float()
        for x, each in zip(inputs, chain.inputs, strict=True)
    ]
    for step in chain.steps:
        operands = [
            each if isinstance(each, float) else values[each.index] for each in step.operands
        ]
        values.append(functions[step.op](*operands))
    return [values[out.value.index].to(CHAIN_DTYPES[out.dtype]) for out in chain.outputs]


def unfused(
    compiled: Any, inputs: list[torch.Tensor], rows: list[str], columns: list[str]
) -> list[Any]:
    capability = torch.cuda.get_device_capability()
    results = []
    for x, *texts in zip(compiled(*inputs), rows, columns, strict=True):
        encodings = [Encoding.parse(text) if text else None for text in texts]
        results.append(launch.quantize(x, *encodings, capability))
    return results


def candidates(case: Case, capability: Capability, quick: bool) -> dict[ChainPlan, Options]:
    """What is raced: the table's configuration under every schedule, and others, of the kernels
    that compute the chain, under the schedule that is chosen; one a plan, the table's first."""
    chain = Chain.parse(case.chain)
    rest = (case.K, chain, wanted_of(*case.wanted), capability)
    options: list[Options] = [(None, None), *((None, schedule) for schedule in SCHEDULES)]
    if not quick:
        rows, columns, _ = case.wanted
        configs = [*(tune.chain_rows_candidates(capability) if any(rows) else ())]
        configs += tune.columns_candidates(capability) if any(columns) else ()
        options += [(config, None) for config in configs]
    plans: dict[ChainPlan, Options] = {}
    for config, schedule in options:
        plans.setdefault(select_chain(T, *rest, config, schedule), (config, schedule))
    return plans


def compile_ahead(case: Case, capability: Capability, options: Iterable[Options]) -> None:
    """Starts compiling what the race will launch, in worker processes."""
    chain = Chain.parse(case.chain)
    inputs = inputs_of(chain, case.K, "meta")
    target = triton.runtime.driver.active.get_current_target()
    for config, schedule in options:
        with noted() as requests:
            chain_call(inputs, chain, wanted_of(*case.wanted), capability, config, schedule)
        for request in requests:
            workers.submit(request, target)


def gemm() -> Callable[[], object]:
    """A GEMM of a Llama-3-8B's feed-forward, of int8 codes."""
    a, b = (torch.randint(-127, 128, (n, 4096), device="cuda").to(torch.int8) for n in (T, 14336))
    scales = (torch.rand(T, device="cuda"), torch.rand(14336, device="cuda"))
    capability = torch.cuda.get_device_capability()
    return lambda: launch.scaled_mm(a, b, *scales, None, torch.bfloat16, capability)


def behind_ms(calls: dict[str, list[Call]], multiply: Call, rounds: int) -> dict[str, float]:
    """Median time of one call behind GEMMS_BEFORE GEMMs, all in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARMING_GEMMS):
        multiply()
    for turn in range(rounds):
        events = {}
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(GEMMS_BEFORE):
                multiply()
            start.record()
            calls[name][turn % len(calls[name])]()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def alone_ms(calls: dict[str, list[Call]], rounds: int) -> dict[str, float]:
    """Median over `rounds` of a call's time among others of its kind, all in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, each in calls.items():
            times[name].append(median_ms(each, 3))
    return {name: statistics.median(each) for name, each in times.items()}


def race(case: Case, copy: float, rounds: int, quick: bool) -> dict[str, Any]:
    chain = Chain.parse(case.chain)
    capability = torch.cuda.get_device_capability()
    plans = candidates(case, capability, quick)
    compile_ahead(case, capability, plans.values())
    matrices = sum(each.shape == MATRIX for each in chain.inputs)
    sets = [inputs_of(chain, case.K) for _ in range(buffer_sets(T * case.K * 2 * matrices))]
    compiled = torch.compile(partial(eager, chain), dynamic=False)
    rows, columns, _ = case.wanted
    calls: dict[str, list[Call]] = {
        "unfused": [partial(unfused, compiled, inputs, rows, columns) for inputs in sets]
    }
    entries: dict[str, dict[str, Any]] = {"unfused": {"how": "unfused"}}
    for number, (plan, options) in enumerate(plans.items()):
        entry: dict[str, Any] = {
            "how": "outputs stored" if plan.stored else "outputs made again",
            "config": str(options[0] or "table"),
            "table": number == 0,
            "bytes": plan.bytes(T, case.K),
        }
        settings = (*case.wanted, capability, *options)
        each = [partial(launch.quantize_chain, x, case.chain, *settings) for x in sets]
        try:
            for call in each:
                call()
            torch.cuda.synchronize()
        except LAUNCH_ERRORS as error:
            entry["error"] = str(error)[:200]
        else:
            calls[str(number)] = each
        entries[str(number)] = entry
    alone = alone_ms(calls, rounds)
    behind = behind_ms(calls, gemm(), 2 * rounds - 1)
    for name in calls:
        entry = entries[name]
        entry["ms"], entry["ms_behind_gemms"] = alone[name], behind[name]
        if "bytes" in entry:
            entry["share_of_copy"] = entry["bytes"] / (entry["ms"] * 1e-3) / copy
    raced = sorted(entries.values(), key=lambda each: each.get("ms_behind_gemms", float("inf")))
    print(f"\n{case.name} [{T} x {case.K}]: ms behind GEMMs, alone, share of copy")
    for entry in raced:
        if "error" in entry:
            print(f"  {entry['error'][:60]}  {entry['config']}", flush=True)
            continue
        share = f"{entry['share_of_copy']:.2f}" if "share_of_copy" in entry else "    "
        mark = "*" if entry.get("table") else " "
        took = f"{entry['ms_behind_gemms']:.4f}  {entry['ms']:.4f}  {share}"
        print(f" {mark}{took}  {entry['how']} {entry.get('config', '')}", flush=True)
    return {"case": case.name, "T": T, "K": case.K, "entries": raced}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="the tables' configurations only")
    parser.add_argument("--rounds", type=int, default=5, help="all entries in turns")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="NAME")
    args = parser.parse_args()
    settle_triton_cache(torch.cuda.current_device())
    copy = copy_bandwidth(15)
    content = header("chain_race", args) | {"copy_bytes_per_s": copy, "cases": []}
    print(f"copy {copy / 1e12:.2f} TB/s")
    for case in (case for case in CASES if case.name in args.cases):
        content["cases"].append(race(case, copy, args.rounds, args.quick))
        save(content, args.out)


if __name__ == "__main__":
    main()
