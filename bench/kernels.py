"""Times the emitted kernels beside their baselines: quantizers against the measured copy bandwidth,
GEMMs against cuBLAS bf16, torch._scaled_mm and torch._int_mm; what an operator call costs the host;
`--tune` races the configurations.

    python bench/kernels.py --out bench/results/kernels.json [--quick] [--tune]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from record import save

from hadagraph import ops
from hadagraph.codegen import direct, launch, tune
from hadagraph.codegen.autotune import LOST
from hadagraph.codegen.choose import in_one_kernel, select_quantize
from hadagraph.codegen.spec import WIDTH
from hadagraph.codegen.tuned import MmChoice
from hadagraph.formats import Encoding

QUANTIZER_T = 16384
QUANTIZER_K = (2048, 4096, 14336)
# Of rows and of columns, which are rotated along the tokens.
ENCODINGS = {
    "int8_rotated": ("int8/per_kept_index/h128", "int8/per_kept_index/h32"),
    "fp8_rowwise": ("fp8_e4m3/per_kept_index",) * 2,
    "fp8_tensorwise": ("fp8_e4m3/per_tensor",) * 2,
}
LAUNCH_ERRORS = (RuntimeError, *LOST)
LAYOUTS = ("rows", "columns", "both")
GEMM_SHAPES = (
    (8192, 4096, 4096),
    (8192, 14336, 4096),
    (8192, 4096, 14336),
    (16384, 14336, 4096),
    (4096, 14336, 8192),
    (14336, 4096, 8192),
)
SMALL_T, SMALL_K = 4096, (576, 1536)  # SmolLM-135M at 4096 tokens
SMALL_GEMMS = ((4096, 576, 576), (4096, 1536, 576), (4096, 576, 1536), (576, 1536, 4096))
TUNED_GEMMS = (*GEMM_SHAPES[:3], (1024, 4096, 4096), (256, 4096, 4096), *SMALL_GEMMS)
HOST_CALLS = 1000
L2_BYTES = 1 << 27  # buffer sets are rotated until they exceed this
Row = dict[str, Any]


def median_ms(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median over `repeats` of the mean time of one pass through `calls` (each on its own buffers),
    measured with CUDA events behind a spin that hides launch overhead."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(400_000 * len(calls))
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def buffer_sets(bytes_each: int) -> int:
    return max(2, min(6, -(-2 * L2_BYTES // bytes_each)))


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second of a device copy, read plus write."""
    buffers = [torch.empty(1 << 29, dtype=torch.uint8, device="cuda") for _ in range(4)]
    calls = [lambda a=a, b=b: b.copy_(a) for a, b in (buffers[:2], buffers[2:])]
    return 2 * (1 << 29) / (median_ms(calls, repeats) * 1e-3)


def short(config: object) -> str:
    """A configuration as a few words: `128x128x128 4w 3s tma`."""
    if isinstance(config, tune.MmConfig):
        tile = f"{config.block_m}x{config.block_n}x{config.block_c}"
        group = "" if config.group == 8 else f" g{config.group}"
        how = config.schedule or ("tma" if config.descriptors else "ptr")
        return f"{tile} {config.warps}w {config.stages}s {how}{group}"
    if isinstance(config, tune.LibraryMm):
        return f"_scaled_mm {'fast' if config.fast_accumulation else 'slow'} accumulation"
    if isinstance(config, tune.RowsConfig):
        persistent = f" persistent {config.programs_per_sm}" if config.persistent else ""
        order = "" if config.fragment_order else " unordered"
        matrix = "" if config.width == WIDTH else f" H{config.width}"
        return f"{config.tile} {config.warps}w {config.stages}s{matrix}{persistent}{order}"
    if isinstance(config, tune.ColumnsConfig):
        return f"{short(config.amax)} / {short(config.write)}"
    if isinstance(config, tune.VectorsConfig):
        how = " backward" * config.backward + " tokens first" * config.tokens_first
        literal = " literal" * config.literal
        tile = f"{config.columns}x{config.tokens} {config.warps}w"
        return f"{tile} chunk {config.chunk}{literal}{how}"
    if isinstance(config, tune.TilesConfig):
        order = "" if config.fragment_order else " unordered"
        return f"{short(config.amax)} / {short(config.write)}{order}"
    if isinstance(config, tune.PassConfig):
        registers = f" {config.maxnreg}r" if config.maxnreg else ""
        how = " tma" if config.descriptors else ""
        return f"x{config.tiles} {config.warps}w {config.stages}s{how}{registers}"
    return "table"


def host_microseconds() -> list[Row]:
    """Host time of one operator call on a tiny problem, the mean of HOST_CALLS asynchronous ones,
    with kernels launched directly and through Triton; torch.mm beside them."""
    x = torch.randn(256, 256, dtype=torch.bfloat16, device="cuda")
    text, column = ENCODINGS["int8_rotated"]
    codes, scale = ops.quantize_rows(x, text)
    calls = {
        "torch.mm": lambda: torch.mm(x, x),
        "quantize_rows": lambda: ops.quantize_rows(x, text),
        "quantize_columns": lambda: ops.quantize_columns(x, column),
        "quantize_both": lambda: ops.quantize_both(x, text, column),
        "scaled_mm": lambda: ops.scaled_mm(codes, codes, scale, scale, None, torch.bfloat16),
    }
    results = []
    for name, call in calls.items():
        row = {"operator": name, "host_us": _host_us(call)}
        if name != "torch.mm":
            with mock.patch.object(direct, "_hooked", return_value=True):
                row["through_triton_us"] = _host_us(call)
        results.append(row)
    return results


def _host_us(call: Callable[[], object]) -> float:
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    spent = time.perf_counter() - began
    torch.cuda.synchronize()
    return spent / HOST_CALLS * 1e6


def time_quantizer(
    K: int,
    encodings: tuple[str, str],
    layouts: str,
    bandwidth: float,
    repeats: int,
    config: Any = None,
    T: int = QUANTIZER_T,
) -> Row:
    """One quantizer on [T, K] bf16, with its shares of copy bandwidth on the minimal
    bytes (one read, one write a layout) and on the bytes that its scheme moves."""
    row, column = map(Encoding.parse, encodings)
    rows = row if layouts != "columns" else None
    columns = column if layouts != "rows" else None
    capability = torch.cuda.get_device_capability()
    minimal = T * K * (2 + (rows is not None) + (columns is not None))
    pairs = [(rows, columns)]
    bf16 = torch.bfloat16
    if rows and columns and not in_one_kernel(rows, columns, bf16, capability, config):
        pairs = [(rows, None), (None, columns)]
    plans = [select_quantize(T, K, bf16, *pair, capability, config) for pair in pairs]
    specs = [spec for plan in plans for spec in plan.specs]
    scheme = sum(spec.bytes(T, K) for spec in specs)
    inputs = [
        torch.randn(T, K, dtype=torch.bfloat16, device="cuda")
        for _ in range(buffer_sets(T * K * 2))
    ]
    calls = [lambda x=x: launch.quantize(x, rows, columns, capability, config) for x in inputs]
    ms = median_ms(calls, repeats)
    return {
        "kernel": "quantize",
        "layouts": layouts,
        "encoding": " | ".join(str(each) for each in (rows, columns) if each),
        "T": T,
        "K": K,
        "ms": ms,
        "flops": sum(spec.flops(T, K) for spec in specs),
        "minimal_bytes": minimal,
        "scheme_bytes": scheme,
        "of_copy_minimal": minimal / (ms * 1e-3) / bandwidth,
        "of_copy_scheme": scheme / (ms * 1e-3) / bandwidth,
        "config": short(config),
    }


def gemm_operands(M: int, N: int, C: int, dtype: torch.dtype) -> list[torch.Tensor]:
    if dtype == torch.int8:
        return [torch.randint(-127, 128, s, dtype=dtype, device="cuda") for s in ((M, C), (N, C))]
    return [torch.randn(s, device="cuda").to(dtype) for s in ((M, C), (N, C))]


def gemm_calls(M: int, N: int, C: int) -> dict[str, list[Callable[[], object]]]:
    """Baselines and our kernels by name, each on two sets of random operands."""
    capability = torch.cuda.get_device_capability()
    a_scale, b_scale = torch.rand(M, device="cuda"), torch.rand(N, device="cuda")
    one, ones = torch.ones((), device="cuda"), torch.ones(1, device="cuda")
    bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn
    row, column = a_scale[:, None], b_scale[None, :]
    fast = {"out_dtype": bf16, "use_fast_accum": True}
    emitted = tune.scaled_mm_configuration(M, N, False, capability)
    calls: dict[str, list[Callable[[], object]]] = {}
    for _ in range(2):
        a, b = gemm_operands(M, N, C, bf16)
        fa, fb = gemm_operands(M, N, C, e4m3)
        ia, ib = gemm_operands(M, N, C, torch.int8)
        table = {
            "bf16 cuBLAS": lambda a=a, b=b: a @ b.t(),
            "_scaled_mm tensorwise": lambda a=fa, b=fb: torch._scaled_mm(
                a, b.t(), scale_a=one, scale_b=one, **fast
            ),
            "_scaled_mm rowwise": lambda a=fa, b=fb: torch._scaled_mm(
                a, b.t(), scale_a=row, scale_b=column, **fast
            ),
            "_int_mm": lambda a=ia, b=ib: torch._int_mm(a, b.t()),
            "hadagraph int8": lambda a=ia, b=ib: launch.scaled_mm(
                a, b, a_scale, b_scale, None, bf16, capability
            ),
            "hadagraph fp8_e4m3": lambda a=fa, b=fb: launch.scaled_mm(
                a, b, a_scale, b_scale, None, bf16, capability
            ),
            "hadagraph fp8_e4m3 emitted": lambda a=fa, b=fb: launch.scaled_mm(
                a, b, a_scale, b_scale, None, bf16, capability, emitted
            ),
            "hadagraph fp8_e4m3 tensorwise": lambda a=fa, b=fb: launch.scaled_mm(
                a, b, ones, ones, None, bf16, capability
            ),
            "hadagraph fp8_e4m3 tensorwise emitted": lambda a=fa, b=fb: launch.scaled_mm(
                a, b, ones, ones, None, bf16, capability, emitted
            ),
        }
        for name, call in table.items():
            calls.setdefault(name, []).append(call)
    return calls


def gemm_rows(shapes: tuple[tuple[int, int, int], ...], repeats: int) -> list[Row]:
    results = []
    for M, N, C in shapes:
        rates: dict[str, list[float]] = {}
        calls = gemm_calls(M, N, C)
        for _ in range(3):  # interleaved, so that clocks drift alike for all
            for name, sets in calls.items():
                rates.setdefault(name, []).append(median_ms(sets, repeats))
        for name, times in rates.items():
            ms = statistics.median(times)
            results.append(
                {
                    "kernel": name,
                    "M": M,
                    "N": N,
                    "C": C,
                    "ms": ms,
                    "flops": 2 * M * N * C,
                    "tflops": 2e-9 * M * N * C / ms,
                }
            )
    return results


def tune_rows(bandwidth: float, repeats: int) -> list[Row]:
    """Every candidate of every table, failures recorded with their message."""
    capability = torch.cuda.get_device_capability()
    results: list[Row] = []
    sizes = [(QUANTIZER_T, K) for K in QUANTIZER_K[1:]] + [(SMALL_T, SMALL_K[0])]
    for (T, K), layouts, name in product(sizes, LAYOUTS, ("int8_rotated", "fp8_rowwise")):
        candidates = {
            "rows": tune.rows_candidates,
            "columns": tune.columns_candidates,
            "both": tune.tiles_candidates,
        }[layouts]
        for config in candidates(capability):
            results.append(tried_quantizer(T, K, name, layouts, bandwidth, repeats, config))
    for (M, N, C), dtype in product(TUNED_GEMMS, (torch.int8, torch.float8_e4m3fn)):
        a, b = gemm_operands(M, N, C, dtype)
        scales = torch.rand(M, device="cuda"), torch.rand(N, device="cuda")
        configs = tune.scaled_mm_candidates(capability)
        candidates: list[MmChoice] = list(configs)
        if dtype != torch.int8:
            candidates = [config for config in configs if config.schedule is None]
            candidates += [tune.LibraryMm(fast) for fast in (True, False)]
        for config in candidates:
            row: Row = {"M": M, "N": N, "C": C, "dtype": str(dtype)[6:], "config": short(config)}
            try:
                call = [
                    lambda a=a, b=b, s=scales, c=config: launch.scaled_mm(
                        a, b, *s, None, torch.bfloat16, capability, c
                    )
                ]
                ms = median_ms(call * 2, repeats)
                row |= {"ms": ms, "tflops": 2e-9 * M * N * C / ms}
            except LAUNCH_ERRORS as error:
                row["error"] = str(error)[:200]
            results.append(row)
    return results


def tried_quantizer(
    T: int, K: int, name: str, layouts: str, bandwidth: float, repeats: int, config: object = None
) -> Row:
    """`time_quantizer`, or why it does not run."""
    try:
        return time_quantizer(K, ENCODINGS[name], layouts, bandwidth, repeats, config, T)
    except LAUNCH_ERRORS as error:
        row = {"T": T, "K": K, "encoding": " | ".join(ENCODINGS[name]), "layouts": layouts}
        return row | {"config": short(config), "error": str(error)[:200]}


def show(title: str, rows: list[Row], columns: tuple[str, ...]) -> None:
    """A compact table: one line a row."""
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}")
    for line in (columns, *cells):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.4f}" if value < 1 else f"{value:.2f}"
    return str(value)


def winners(rows: list[Row]) -> list[Row]:
    """The fastest configuration of each group of candidates."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row.get(k) for k in ("layouts", "encoding", "T", "K", "M", "N", "C", "dtype"))
        if "ms" in row and (key not in best or row["ms"] < best[key]["ms"]):
            best[key] = row
    return list(best.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and shapes")
    parser.add_argument("--tune", action="store_true", help="race the candidate configurations")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    began = time.time()
    repeats = 5 if options.quick else 15
    launch.prepare("cuda")
    bandwidth = copy_bandwidth(repeats)
    record: Row = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "copy_bytes_per_s": bandwidth,
    }

    def done(part: str, rows: list[Row]) -> list[Row]:
        """Keep what there is: a later part may be cut short."""
        record[part] = rows
        record["seconds"] = time.time() - began
        save(record, options.out)
        return rows

    widths = QUANTIZER_K[1:2] if options.quick else QUANTIZER_K
    quantizers = [
        tried_quantizer(QUANTIZER_T, K, name, layouts, bandwidth, repeats)
        for name in ENCODINGS
        for layouts in LAYOUTS
        for K in widths
    ]
    quantizers += [
        tried_quantizer(SMALL_T, K, name, layouts, bandwidth, repeats)
        for name in list(ENCODINGS)[:2]
        for layouts in LAYOUTS
        for K in SMALL_K
    ]
    done("quantizers", quantizers)
    gemms = done(
        "gemms", gemm_rows((*GEMM_SHAPES[: 2 if options.quick else None], *SMALL_GEMMS), repeats)
    )
    host = done("host", host_microseconds())
    shares = ("of_copy_minimal", "of_copy_scheme")
    show("quantizers", quantizers, ("encoding", "layouts", "T", "K", "ms", *shares))
    show("GEMM", gemms, ("M", "N", "C", "kernel", "ms", "tflops"))
    show("host time of an operator call", host, ("operator", "host_us", "through_triton_us"))
    if options.tune:
        best = winners(done("tune", tune_rows(bandwidth, 5)))
        quantizer_best = [row for row in best if "layouts" in row]
        gemm_best = [row for row in best if "dtype" in row]
        columns = ("encoding", "layouts", "T", "K", "ms", "of_copy_scheme", "config")
        show("fastest quantizers", quantizer_best, columns)
        show("fastest GEMMs", gemm_best, ("dtype", "M", "N", "C", "ms", "tflops", "config"))
        failed = [row for row in record["tune"] if "error" in row]
        show("failed", failed, ("encoding", "layouts", "dtype", "K", "M", "config", "error"))
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{record['device']}, {versions}, copy {bandwidth / 1e12:.2f} TB/s, ", end="")
    print(f"{record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
