"""Times the GEMMs of many Linears in bf16, int8 and fp8, and the quantizers of their operands: the
measured points that hadagraph's cost model is fitted to and tested against.

    python bench/cost_grid.py --out FILE [--quick]
    python bench/cost_grid.py --fit FILE   # rows for hadagraph/device.py
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import hadagraph  # noqa: F401  registers the kernels
from hadagraph import fitting, ops
from hadagraph.cost import gemm_us, quantizer_us
from hadagraph.device import DeviceProfile, HostTimes, chip_profile
from hadagraph.rotation import block_for

TARGET_GEMMS = (
    (8192, 4096, 4096),
    (8192, 14336, 4096),
    (8192, 4096, 14336),
    (16384, 14336, 4096),
    (4096, 14336, 8192),
    (14336, 4096, 8192),
)
# (K, N) of Linears and the tokens T that they see.
TRANSFORMER_ENGINE = ((4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096)), (15872,)
SHARDS = ((8192, 1280), (1024, 8192), (8192, 7168), (3584, 8192)), (512, 2048, 4096, 8192, 16384)
MODELS = {  # width, hidden, width of keys and values
    "SmolLM2-135M": (576, 1536, 192),
    "SmolLM2-360M": (960, 2560, 320),
    "Qwen2.5-0.5B": (896, 4864, 128),
    "Llama-3.2-1B": (2048, 8192, 512),
    "Qwen2.5-1.5B": (1536, 8960, 256),
}
MODEL_TOKENS = (2048, 4096, 8192, 16384)
FORMATS = ("bf16", "int8", "fp8")
POOL_BYTES = 1 << 30
SETS_BYTES = 1 << 27  # operand sets are rotated until they exceed this: no L2 holds them
SPIN_CYCLES = 300_000  # a call, longer than its launches take the host
HOST_CALLS = 500
Calls = list[Callable[[], object]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Linear:
    """x [T, K] times a weight [N, K]."""

    T: int
    K: int
    N: int


def linears() -> list[Linear]:
    found = [Linear(T, K, N) for sizes, tokens in (TRANSFORMER_ENGINE, SHARDS) for K, N in sizes
             for T in tokens]  # fmt: skip
    for width, hidden, kv in MODELS.values():
        sizes = ((width, width), (width, kv), (width, hidden), (hidden, width))
        found += [Linear(T, K, N) for K, N in sizes for T in MODEL_TOKENS]
    return list(dict.fromkeys(found))


class Pools:
    """Random data of each dtype; operands are views at successive places of it."""

    def __init__(self) -> None:
        normal = torch.randn(POOL_BYTES // 2, dtype=torch.bfloat16, device="cuda")
        self.pools = {
            torch.bfloat16: normal,
            torch.int8: (normal * 32).clamp(-127, 127).to(torch.int8),
            torch.float8_e4m3fn: (normal * 100).clamp(-448, 448).to(torch.float8_e4m3fn),
        }
        self.place = dict.fromkeys(self.pools, 0)

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        pool, size = self.pools[dtype], rows * columns
        if self.place[dtype] + size > pool.numel():
            self.place[dtype] = 0
        start = self.place[dtype]
        self.place[dtype] = start + -(-size // 256) * 256
        return pool[start : start + size].view(rows, columns)


def sets(bytes_each: int) -> int:
    return max(2, min(20, -(-SETS_BYTES // bytes_each)))


def median_us(contenders: dict[str, Calls], rounds: int) -> dict[str, float]:
    """Median over `rounds` of each contender's mean time a call, the contenders interleaved; a spin
    hides the launches. A contender that the device refuses is left out."""
    for name, calls in list(contenders.items()):
        try:
            calls[0]()
        except (RuntimeError, CompilationError, OutOfResources) as error:
            Console().print(f"[red]{name}: {str(error)[:200]}[/red]")
            del contenders[name]
    events = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, calls in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SPIN_CYCLES * len(calls))
            start.record()
            for call in calls:
                call()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: statistics.median(s.elapsed_time(e) for s, e in pairs) / len(contenders[name]) * 1e3
        for name, pairs in events.items()
    }


def gemm_contenders(pools: Pools, role: str, M: int, N: int, C: int) -> dict[str, Calls]:
    """out [M, N], contracting C: bf16 as autograd lays the operands out, 8-bit codes K-major."""
    bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn
    row, column = (torch.rand(size, device="cuda") for size in (M, N))
    one = torch.ones((), device="cuda")
    fast = {"out_dtype": bf16, "use_fast_accum": True}
    by_row = {"scale_a": row[:, None], "scale_b": column[None, :]}
    calls: dict[str, Calls] = {}
    for _ in range(sets((M + N) * C)):
        a = pools.matrix(C, M, bf16).t() if role == "grad_weight" else pools.matrix(M, C, bf16)
        b = pools.matrix(N, C, bf16).t() if role == "output" else pools.matrix(C, N, bf16)
        fa, fb = (pools.matrix(size, C, e4m3) for size in (M, N))
        ia, ib = (pools.matrix(size, C, torch.int8) for size in (M, N))
        table: dict[str, Callable[[], object]] = {
            "bf16": lambda a=a, b=b: torch.mm(a, b),
            "int8": lambda a=ia, b=ib: ops.scaled_mm(a, b, row, column, None, bf16),
            "fp8": lambda a=fa, b=fb: ops.scaled_mm(a, b, row, column, None, bf16),
            "_scaled_mm rowwise": lambda a=fa, b=fb: torch._scaled_mm(a, b.t(), **by_row, **fast),
            "_scaled_mm tensorwise": lambda a=fa, b=fb: torch._scaled_mm(
                a, b.t(), scale_a=one, scale_b=one, **fast
            ),
        }
        for name, call in table.items():
            calls.setdefault(name, []).append(call)
    half = len(calls["bf16"]) // 2 if len(calls["bf16"]) > 3 else len(calls["bf16"])
    calls["bf16"] = calls["bf16"][:half]  # twice the bytes of the codes
    return calls


def quantizers(T: int, K: int) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """The operator and its encodings for x [T, K] as input or grad_output (columns rotated along
    the tokens by 32) and as weight."""
    rows = f"int8/per_kept_index/h{block_for(K)}"
    tokens = f"int8/per_kept_index/h{block_for(T, 32)}"
    weight_columns = f"int8/per_kept_index/h{block_for(T)}"
    fp8, per_tensor = "fp8_e4m3/per_kept_index", "fp8_e4m3/per_tensor"
    return {
        "rows rotated": (ops.quantize_rows, (rows,)),
        "columns rotated": (ops.quantize_columns, (tokens,)),
        "columns rotated weight": (ops.quantize_columns, (weight_columns,)),
        "both rotated": (ops.quantize_both, (rows, tokens)),
        "rows plain": (ops.quantize_rows, (fp8,)),
        "columns plain": (ops.quantize_columns, (fp8,)),
        "both plain": (ops.quantize_both, (fp8, fp8)),
        "rows per_tensor": (ops.quantize_rows, (per_tensor,)),
        "columns per_tensor": (ops.quantize_columns, (per_tensor,)),
        "both per_tensor": (ops.quantize_both, (per_tensor, per_tensor)),
    }


def quantizer_contenders(pools: Pools, T: int, K: int) -> dict[str, Calls]:
    """Calls of all quantizers on x [T, K]."""
    calls: dict[str, Calls] = {}
    for _ in range(sets(T * K * 3)):
        x = pools.matrix(T, K, torch.bfloat16)
        for name, (operator, encodings) in quantizers(T, K).items():
            call = lambda x=x, op=operator, texts=encodings: op(x, *texts)  # noqa: E731
            calls.setdefault(name, []).append(call)
    return calls


def sustained_rows(pools: Pools) -> list[Row]:
    """TFLOP/s of a large GEMM of each kernel in the second half of 0.4 s without a pause: what the
    power limit leaves, beside the short bursts of the other points."""
    M, N, C = TARGET_GEMMS[1]
    rows = []
    for name, calls in gemm_contenders(pools, "output", M, N, C).items():
        count = max(2, round(0.2 / (median_us({name: calls}, 3)[name] * 1e-6)))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for half in (0, 1):
            if half:
                start.record()
            for index in range(count):
                calls[index % len(calls)]()
        end.record()
        torch.cuda.synchronize()
        tflops = 2e-9 * M * N * C * count / start.elapsed_time(end)
        rows.append({"kernel": name, "M": M, "N": N, "C": C, "tflops": tflops})
    return rows


def host_rows(pools: Pools) -> list[Row]:
    """Host time of one call on a small problem, behind a spin: nothing waits for the device."""
    x, out = (pools.matrix(256, 256, torch.bfloat16) for _ in range(2))
    out = out.clone()
    text = "int8/per_kept_index/h128"
    codes, scale = ops.quantize_rows(x, text)
    calls = {
        "mm": lambda: torch.mm(x, x, out=out),  # as Inductor's code calls it
        "scaled_mm": lambda: ops.scaled_mm(codes, codes, scale, scale, None, torch.bfloat16),
        "quantize_rows": lambda: ops.quantize_rows(x, text),
        "quantize_columns": lambda: ops.quantize_columns(x, text),
        "quantize_both": lambda: ops.quantize_both(x, text, "int8/per_kept_index/h32"),
    }
    results = []
    for name, call in calls.items():
        times = []
        for _ in range(5):
            call()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(HOST_CALLS // 5):
                call()
            times.append((time.perf_counter() - began) / (HOST_CALLS // 5) * 1e6)
        torch.cuda.synchronize()
        results.append({"operator": name, "us": statistics.median(times)})
    return results


def copy_bandwidth() -> float:
    """Bytes per second of a device copy, read plus write."""
    buffers = [torch.empty(1 << 29, dtype=torch.uint8, device="cuda") for _ in range(4)]
    calls: Calls = [lambda a=a, b=b: b.copy_(a) for a, b in (buffers[:2], buffers[2:])]
    return 2 * (1 << 29) / (median_us({"copy": calls}, 9)["copy"] * 1e-6)


def gemms_to_time(every: list[Linear]) -> list[tuple[str, int, int, int]]:
    found = [("output", *shape) for shape in TARGET_GEMMS]
    return list(dict.fromkeys(found + gemms_of(every)))


def gemms_of(every: list[Linear]) -> list[tuple[str, int, int, int]]:
    """The three GEMMs of each Linear: role, M, N and C."""
    found = []
    for each in every:
        T, K, N = each.T, each.K, each.N
        found += [("output", T, N, K), ("grad_input", T, K, N), ("grad_weight", N, K, T)]
    return found


def matrices_to_time(every: list[Linear]) -> list[tuple[int, int]]:
    found = [shape for e in every for shape in ((e.T, e.K), (e.T, e.N), (e.N, e.K))]
    return list(dict.fromkeys(found))


def measured(options: argparse.Namespace, console: Console) -> Row:
    """Every point, or those that the time allows: quantizers first, both lists spread evenly."""
    began = time.perf_counter()
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    pools = Pools()
    host = host_rows(pools)
    sustained = sustained_rows(pools)
    every = linears()[:: 8 if options.quick else 1]
    matrices, gemms = matrices_to_time(every), gemms_to_time(every)
    work = [("quantizer", shape) for shape in matrices] + [("gemm", shape) for shape in gemms]
    # By turns from all over the list, so that a cut-off leaves every kind of shape measured.
    work = [work[i] for first in range(7) for i in range(first, len(work), 7)]
    rows: dict[str, list[Row]] = {"quantizer": [], "gemm": []}
    skipped = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("points", total=len(work))
        for kind, shape in work:
            if time.perf_counter() - began > options.seconds:
                skipped += 1
                continue
            if kind == "quantizer":
                T, K = shape
                times = median_us(quantizer_contenders(pools, T, K), options.rounds)
                rows[kind] += [{"kernel": n, "T": T, "K": K, "us": us} for n, us in times.items()]
            else:
                role, M, N, C = shape
                times = median_us(gemm_contenders(pools, role, M, N, C), options.rounds)
                rows[kind] += [
                    {"kernel": n, "role": role, "M": M, "N": N, "C": C, "us": us}
                    for n, us in times.items()
                ]
            progress.update(task, advance=1, description=f"{kind} {shape}")
    return {
        "benchmark": "cost_grid",
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
        },
        "copy_bytes_per_s": bandwidth,
        "skipped": skipped,
        "seconds": time.perf_counter() - began,
        "host": host,
        "sustained": sustained,
        "quantizers": rows["quantizer"],
        "gemms": rows["gemm"],
    }


def points(
    record: Row,
) -> tuple[list[fitting.GemmPoint], list[fitting.QuantizerPoint]]:
    """The record's points of what hadagraph runs: torch._scaled_mm is there to compare with."""
    gemms = [
        fitting.GemmPoint(row["kernel"], row["M"], row["N"], row["C"], row["us"])
        for row in record["gemms"]
        if row["kernel"] in FORMATS
    ]
    quantizers = []
    for row in record["quantizers"]:
        layouts, kind, *_ = row["kernel"].split()  # one rate for all blocks of a rotation
        quantizers.append(fitting.QuantizerPoint(layouts, kind, row["T"], row["K"], row["us"]))
    return gemms, quantizers


def fitted(record: Row) -> DeviceProfile:
    """The profile that comes nearest to the record, the device's row in the table to start from."""
    prior = chip_profile(record["device"], tuple(record["capability"]))
    if prior is None:
        raise SystemExit(f"hadagraph.device.CHIPS has no row like {record['device']}")
    host = {row["operator"]: row["us"] for row in record["host"]}
    prior = replace(
        prior,
        multiprocessors=record["sms"],
        copy_bytes_per_us=record["copy_bytes_per_s"] / 1e6,
        host=HostTimes(**{**asdict(prior.host), **host}),
    )
    held = {row["kernel"]: row["tflops"] for row in record.get("sustained", ())}
    rates = [replace(r, sustained=held.get(r.format, r.sustained)) for r in prior.gemms]
    prior = replace(prior, gemms=tuple(rates))
    return fitting.fit(prior, *points(record), steady=record.get("steady", False))


def as_measured(profile: DeviceProfile, record: Row) -> DeviceProfile:
    """The profile for what the record's points are: short bursts, unless it says `steady`, which
    the power limit does not reach."""
    if record.get("steady", False):
        return profile
    rates = tuple(replace(rate, sustained=math.inf) for rate in profile.gemms)
    return replace(profile, gemms=rates)


def print_fit(record: Row, console: Console) -> DeviceProfile:
    """The fitted rows, each with its mean error, as `hadagraph/device.py` holds them; the profile
    that they are of."""
    profile, (gemms, quantizers) = fitted(record), points(record)
    measured_as = as_measured(profile, record)
    for rate in profile.gemms:
        ratios = [
            gemm_us(measured_as, p.M, p.N, p.C, p.format) / p.us
            for p in gemms
            if p.format == rate.format
        ]
        console.print(rounded(rate), f" # {off(ratios)}", soft_wrap=True)
    for each in profile.quantizers:
        ratios = [
            quantizer_us(profile, p.T, p.K, p.layouts, p.kind) / p.us
            for p in quantizers
            if (p.layouts, p.kind) == (each.layouts, each.kind)
        ]
        console.print(rounded(each), f" # {off(ratios)}", soft_wrap=True)
    console.print(rounded(profile.host))
    console.print(f"copy_bytes_per_us={profile.copy_bytes_per_us:.4g}")
    return profile


def rounded(row: Any) -> str:
    figures = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(row).items()}
    return repr(replace(row, **figures))


def off(ratios: list[float]) -> str:
    if not ratios:
        return "not measured"
    errors = sorted(abs(math.log(ratio)) for ratio in ratios)
    return f"off by {statistics.mean(errors):.1%} in the mean, {errors[-1]:.0%} at worst"


def summary(record: Row) -> Table:
    """Mean rates of the kernels, by the size of the problem."""
    table = Table(title=f"{record['device']}: TFLOP/s, mean over shapes")
    limits = (1e10, 1e11, 1e12, float("inf"))
    for column in ("kernel", "< 10 GFLOP", "< 100 GFLOP", "< 1 TFLOP", "more"):
        table.add_column(column)
    for kernel in dict.fromkeys(row["kernel"] for row in record["gemms"]):
        cells = []
        for low, high in zip((0.0, *limits), limits, strict=False):
            rates = [
                flops / row["us"] * 1e-6
                for row in record["gemms"]
                if row["kernel"] == kernel
                and low <= (flops := 2.0 * row["M"] * row["N"] * row["C"]) < high
            ]
            cells.append(f"{statistics.mean(rates):.0f}" if rates else "")
        table.add_row(kernel, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the points here as JSON")
    parser.add_argument("--fit", type=Path, help="measure nothing: fit a profile to this file")
    parser.add_argument("--quick", action="store_true", help="an eighth of the Linears")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repeats")
    parser.add_argument("--seconds", type=float, default=140.0, help="stop measuring after this")
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    if options.fit is not None:
        print_fit(json.loads(options.fit.read_text()), console)
        return
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    record = measured(options, console)
    console.print(summary(record))
    host = ", ".join(f"{row['operator']} {row['us']:.1f}" for row in record["host"])
    console.print(f"host us a call: {host}")
    held = ", ".join(f"{row['kernel']} {row['tflops']:.0f}" for row in record["sustained"])
    console.print(f"sustained TFLOP/s: {held}")
    console.print(
        f"copy {record['copy_bytes_per_s'] / 1e12:.2f} TB/s, {len(record['gemms'])} GEMM points, "
        f"{len(record['quantizers'])} quantizer points, {record['skipped']} shapes skipped, "
        f"{record['seconds']:.0f} s"
    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
