"""Predicted against measured time of GEMMs and their quantizers, at the shapes that decide: large
GEMMs, Linears of TransformerEngine's benchmark, of 8B and 1B blocks, tensor-parallel shards and
small models. The share of shapes within 15 %, for the table's row of the chip and for the profile
that `hadagraph.measure_device` makes.

    python bench/time_model.py --out bench/results/time_model.json   # on a GPU, about 120 s
    python bench/time_model.py --read FILE     # predict what FILE holds (cost_grid's, too)
    python bench/time_model.py --fit FILE      # rows for hadagraph/device.py from FILE's points,
                                               # and shares before, after and held out
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cost_grid
import record as recording
import torch
from cost_grid import TARGET_GEMMS, Linear, Row
from rich.console import Console
from rich.table import Table
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from hadagraph import compat, measurement
from hadagraph.codegen import precompile
from hadagraph.cost import gemm_us, quantizer_us
from hadagraph.device import DeviceProfile, chip_profile

LIMIT = 0.15
GROUPS: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {  # (K, N) and tokens
    "TransformerEngine": (((4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096)), 15872),
    "8B block": (((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)), 16384),
    "8B block, half": (((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)), 8192),
    "1B block": (((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)), 8192),
    "shards": (((8192, 1280), (1024, 8192), (8192, 7168), (3584, 8192)), 8192),
    "SmolLM2-135M": (((576, 576), (576, 192), (576, 1536), (1536, 576)), 8192),
    "Qwen2.5-0.5B": (((896, 896), (896, 128), (896, 4864), (4864, 896)), 8192),
}
# How a GEMM's operands are written: its format, and the kind of its quantizers.
WAYS = {
    "bf16": ("bf16", None),
    "int8 rotated": ("int8", "rotated"),
    "fp8 rowwise": ("fp8", "plain"),
    "fp8 tensorwise": ("fp8", "per_tensor"),
}
BUSY_MS = 2.0
SETS = 4
"""Of operands that calls take turns on."""
MOST_TURNS = 8
"""Of a graph through the sets: it shall take BUSY_MS, too, for a replay's own time is in it."""
KINDS = ("rotated", "plain", "per_tensor")
Gemm = tuple[str, int, int, int]
"""Its role, M, N and C."""
Matrix = tuple[int, int]
Shape = tuple[list[Gemm], dict[Matrix, list[str]]]
"""Its GEMMs, and the quantizers of each matrix."""


@dataclass(frozen=True)
class Entry:
    """Microseconds of one shape in one way. `what`: `GEMM` with the quantizers of its two operands,
    or `Linear`: three GEMMs with what they share."""

    what: str
    group: str
    shape: tuple[int, int, int]
    way: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def linears() -> list[tuple[str, Linear]]:
    return [(g, Linear(T, K, N)) for g, (sizes, T) in GROUPS.items() for K, N in sizes]


# -------------------------------------------------------------------------- measuring


def work() -> Iterator[Shape]:
    """Shape by shape what makes its entries whole: its GEMMs, and for each matrix the quantizers
    that the entries read. The large GEMMs first, then the groups by turns."""
    rows = [f"rows {kind}" for kind in KINDS]
    columns = [f"columns {kind}" for kind in KINDS]
    both = [f"both {kind}" for kind in KINDS]
    of_weight = ["columns rotated weight", *columns[1:]]
    for M, N, C in TARGET_GEMMS:
        yield [("output", M, N, C)], {(M, C): rows, (N, C): rows}
    groups = [[each for g, each in linears() if g == group] for group in GROUPS]
    for turn in zip(*groups, strict=True):
        for each in turn:
            T, K, N = each.T, each.K, each.N
            wanted: dict[Matrix, list[str]] = {}
            for matrix, names in (
                ((T, K), rows + columns),
                ((T, N), rows + columns + both),
                ((N, K), rows + of_weight),
            ):
                wanted[matrix] = list(dict.fromkeys(wanted.get(matrix, []) + names))
            yield cost_grid.gemms_of([each]), wanted


def compile_ahead(every: Sequence[Shape]) -> int:
    """Let Inductor's workers compile the kernels of this work, in its order; how many kernels they
    took."""
    found: list[precompile.OperatorCall] = []
    for problems, matrices in every:
        for _, M, N, C in problems:
            for dtype in (torch.int8, torch.float8_e4m3fn):
                a, b = (torch.empty(size, C, dtype=dtype, device="meta") for size in (M, N))
                scales = (torch.empty(size, device="meta") for size in (M, N))
                found.append(("scaled_mm", (a, b, *scales, None, torch.bfloat16)))
        for (T, K), names in matrices.items():
            x = torch.empty(T, K, dtype=torch.bfloat16, device="meta")
            known = cost_grid.quantizers(T, K)
            for operator, encodings in (known[name] for name in names):
                found.append((operator._opname, (x, *encodings)))
    return precompile.compile_ahead(found, torch.cuda.get_device_capability())


@dataclass
class Clock:
    """What is left of two times: that of measuring, and of everything with compiling."""

    seconds: float
    until: float

    @property
    def over(self) -> bool:
        return self.seconds <= 0.0 or time.perf_counter() > self.until


def device_us(
    contenders: dict[str, cost_grid.Calls], rounds: int, clock: Clock
) -> dict[str, float]:
    """Median over rounds of each contender's mean time a call, replayed from a CUDA graph, so that
    no launch by the host is in it. A contender that the device refuses is left out. Takes from
    the clock what the replays take, not the first calls, which compile."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    launched: dict[str, int] = {}
    pool = torch.cuda.graph_pool_handle()  # their outputs may overlap
    for name, calls in contenders.items():
        try:
            calls[0]()
            torch.cuda.synchronize()
            turns = max(1, min(MOST_TURNS, round(1e3 * BUSY_MS / len(calls) / _us(calls[0]))))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                for call in calls * turns:
                    call()
        except (RuntimeError, CompilationError, OutOfResources) as error:
            Console().print(f"[red]{name}: {str(error)[:200]}[/red]")
            continue
        graphs[name], launched[name] = graph, len(calls) * turns
    began = time.perf_counter()
    repeats = {name: _repeats(graph.replay) for name, graph in graphs.items()}
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in graphs}
    for _ in range(rounds):  # without a pause between them, as in a training step
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats[name]):
                graph.replay()
            end.record()
            spans[name].append((start, end))
    torch.cuda.synchronize()
    clock.seconds -= time.perf_counter() - began
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in found)
        / (repeats[name] * launched[name])
        * 1e3
        for name, found in spans.items()
    }


def _repeats(replay: Callable[[], object]) -> int:
    """Replays that keep the device busy for BUSY_MS."""
    replay()
    return max(1, min(64, round(1e3 * BUSY_MS / _us(replay))))


def _us(call: Callable[[], object]) -> float:
    """Of one call, its launch by the host included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return max(1e3 * start.elapsed_time(end), 1.0)


def measured(options: argparse.Namespace) -> Row:
    """The points as `cost_grid` records them, of whole shapes; those that the time did not allow
    are left out."""
    began = time.perf_counter()
    clock = Clock(options.seconds, began + options.total_seconds)
    bandwidth = cost_grid.copy_bandwidth()
    torch.cuda.empty_cache()
    compat.settle_triton_cache(torch.cuda.current_device())
    pools = cost_grid.Pools()
    host, sustained = cost_grid.host_rows(pools), cost_grid.sustained_rows(pools)
    every = list(work())
    compile_ahead(every)  # not before: it keeps the host busy, whose times those are
    gemms: dict[tuple[str, Gemm], float] = {}
    quantizers: dict[tuple[str, Matrix], float] = {}
    shapes = 0
    for problems, matrices in every:
        if clock.over:
            break
        for problem in problems:
            calls = cost_grid.gemm_contenders(pools, *problem)
            wanted = {
                name: each[:SETS]
                for name, each in calls.items()
                if name in cost_grid.FORMATS and (name, problem) not in gemms
            }
            found = device_us(wanted, options.rounds, clock)
            gemms |= {(name, problem): us for name, us in found.items()}
        for matrix, names in matrices.items():
            calls = cost_grid.quantizer_contenders(pools, *matrix)
            wanted = {n: calls[n][:SETS] for n in names if (n, matrix) not in quantizers}
            found = device_us(wanted, options.rounds, clock)
            quantizers |= {(name, matrix): us for name, us in found.items()}
        shapes += 1
    return {
        "capability": torch.cuda.get_device_capability(),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "copy_bytes_per_s": bandwidth,
        "shapes": shapes,
        "skipped": len(every) - shapes,
        "steady": True,
        "seconds": time.perf_counter() - began,
        "measuring_seconds": options.seconds - clock.seconds,
        "host": host,
        "sustained": sustained,
        "quantizers": [
            {"kernel": name, "T": T, "K": K, "us": us} for (name, (T, K)), us in quantizers.items()
        ],
        "gemms": [
            {"kernel": name, "role": role, "M": M, "N": N, "C": C, "us": us}
            for (name, (role, M, N, C)), us in gemms.items()
        ],
    }


# -------------------------------------------------------------------------- comparing


def entries(points: Row, profile: DeviceProfile) -> Iterator[Entry]:
    """Every shape and way that the points hold whole."""
    profile = cost_grid.as_measured(profile, points)
    gemms = {(r["kernel"], r["role"], r["M"], r["N"], r["C"]): r["us"] for r in points["gemms"]}
    quantizers = {(r["kernel"], r["T"], r["K"]): r["us"] for r in points["quantizers"]}

    def gemm(format: str, role: str, M: int, N: int, C: int) -> tuple[float, float]:
        return gemm_us(profile, M, N, C, format), gemms[format, role, M, N, C]

    def quantizer(layouts: str, kind: str, T: int, K: int, of: str) -> tuple[float, float]:
        weight = of == "weight" and layouts == "columns" and kind == "rotated"
        name = f"{layouts} {kind}" + (" weight" if weight else "")
        return quantizer_us(profile, T, K, layouts, kind), quantizers[name, T, K]

    def entry(what: str, group: str, shape: Any, way: str, parts: Any) -> Iterator[Entry]:
        try:
            pairs = list(parts())
        except KeyError:  # not measured
            return
        predicted, took = (sum(pair[side] for pair in pairs) for side in (0, 1))
        yield Entry(what, group, shape, way, predicted, took)

    for way, (format, kind) in WAYS.items():
        for M, N, C in TARGET_GEMMS:

            def alone(M=M, N=N, C=C, format=format, kind=kind) -> Iterator[tuple[float, float]]:
                yield gemm(format, "output", M, N, C)
                for size in (M, N) if kind else ():
                    yield quantizer("rows", kind, size, C, "input")

            yield from entry("GEMM", "targets", (M, N, C), way, alone)
        for group, each in linears():
            T, K, N = each.T, each.K, each.N
            roles = {
                "output": ((T, N, K), ("rows", T, K, "input"), ("rows", N, K, "weight")),
                "grad_input": ((T, K, N), ("rows", T, N, "e"), ("columns", N, K, "weight")),
                "grad_weight": ((N, K, T), ("columns", T, N, "e"), ("columns", T, K, "input")),
            }
            for role, (shape, *operands) in roles.items():

                def one(
                    role=role, shape=shape, operands=operands, format=format, kind=kind
                ) -> Iterator[tuple[float, float]]:
                    yield gemm(format, role, *shape)
                    for layouts, rows, columns, of in operands if kind else ():
                        yield quantizer(layouts, kind, rows, columns, of)

                yield from entry("GEMM", group, shape, way, one)

            def whole(
                roles=roles, T=T, K=K, N=N, format=format, kind=kind
            ) -> Iterator[tuple[float, float]]:
                for role, (shape, *_) in roles.items():
                    yield gemm(format, role, *shape)
                if kind:
                    yield quantizer("both", kind, T, N, "e")
                    for rows, of in ((T, "input"), (N, "weight")):
                        for layouts in ("rows", "columns"):
                            yield quantizer(layouts, kind, rows, K, of)

            yield from entry("Linear", group, (T, K, N), way, whole)


def held_out(points: Row) -> list[Entry]:
    """Entries of each half of the shapes, predicted by the profile that is fitted to the points
    that the half does not hold."""
    every = list(work())
    found = []
    for half in (every[::2], every[1::2]):
        mine, others = divided(points, half)
        found += entries(mine, cost_grid.fitted(others))
    return found


def divided(points: Row, shapes: Sequence[Shape]) -> tuple[Row, Row]:
    """The record with the points of these shapes, and with all others."""
    gemms = {problem for problems, _ in shapes for problem in problems}
    matrices = {matrix for _, each in shapes for matrix in each}
    mine, others = dict(points), dict(points)
    for kind, held, names in (
        ("gemms", gemms, ("role", "M", "N", "C")),
        ("quantizers", matrices, ("T", "K")),
    ):
        keys = [tuple(row[name] for name in names) for row in points[kind]]
        mine[kind] = [row for row, key in zip(points[kind], keys, strict=True) if key in held]
        others[kind] = [row for row, key in zip(points[kind], keys, strict=True) if key not in held]
    return mine, others


def share(found: list[Entry]) -> float:
    """Of entries that are predicted within the limit. ValueError where there is none."""
    if not found:
        raise ValueError("no shape was measured whole: nothing can be said of the predictions")
    return sum(abs(each.ratio - 1) <= LIMIT for each in found) / len(found)


def summary(points: Row, profiles: dict[str, DeviceProfile], console: Console) -> Row:
    """Tables on the console; for every profile the entries and the shares."""
    results = {}
    for name, profile in profiles.items():
        found = list(entries(points, profile))
        table = Table(title=f"{name} ({profile.source}): share of shapes within {LIMIT:.0%}")
        for column in ("", "way", "shapes", "within", "worst: predicted over measured"):
            table.add_column(column)
        for what in ("GEMM", "Linear"):
            for way in WAYS:
                mine = [each for each in found if (each.what, each.way) == (what, way)]
                if not mine:
                    continue
                mine.sort(key=lambda each: -abs(each.ratio - 1))
                worst = ", ".join(f"{e.ratio:.2f} {e.group} {e.shape}" for e in mine[:2])
                table.add_row(what, way, str(len(mine)), f"{share(mine):.2f}", worst)
        console.print(table)
        kinds = dict.fromkeys(each.what for each in found)
        shares = {what: share([each for each in found if each.what == what]) for what in kinds}
        shares["all"] = share(found)
        console.print(f"{name}: {shares['all']:.3f} of {len(found)} within {LIMIT:.0%}; {shares}")
        results[name] = {
            "profile": json.loads(profile.to_json()),
            "share_within": shares,
            "entries": [asdict(each) | {"ratio": each.ratio} for each in found],
        }
    return results


def print_fit(points: Row, console: Console) -> None:
    """The fitted rows, and how well the table's row, they, and fits to the other half predict."""
    fitted = cost_grid.print_fit(points, console)
    table = chip_profile(points["device"], tuple(points["capability"]))
    assert table is not None  # else there was nothing to start a fit from
    found = {
        "table": list(entries(points, table)),
        "fitted": list(entries(points, fitted)),
        "fitted to the other half of the shapes": held_out(points),
    }
    for name, each in found.items():
        console.print(f"{name}: {share(each):.3f} of {len(each)} within {LIMIT:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--read", type=Path, help="measure nothing: compare with this file's points"
    )
    parser.add_argument("--fit", type=Path, help="measure nothing: fit a profile to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=45.0, help="of measuring, not compiling")
    parser.add_argument("--total-seconds", type=float, default=90.0, help="of points, all counted")
    parser.add_argument("--calibrate-seconds", type=float, default=20.0, help="of measure_device")
    options = parser.parse_args()
    console = Console(width=160, highlight=False)
    if options.fit is not None or options.read is not None:
        content = json.loads((options.fit or options.read).read_text())
        points = content.get("points", content) | {"device": content["device"]}
        if options.fit is not None:
            print_fit(points, console)
            return
        profiles = {"fitted to these points": cost_grid.fitted(points)}
    else:
        if not torch.cuda.is_available():
            parser.error("needs a CUDA device, or --read")
        content = recording.header("time_model", options)
        points = measured(options) | {"device": content["device"]}
        console.print(
            f"{points['shapes']} shapes measured, {points['skipped']} skipped: "
            f"{points['seconds']:.0f} s, {points['measuring_seconds']:.0f} s of it measuring"
        )
        profiles = {}
        if options.calibrate_seconds > 0:
            profile = measurement.measure(seconds=options.calibrate_seconds)
            profiles = {"measure_device": profile} if profile is not None else {}
    table = chip_profile(points["device"], tuple(points["capability"]))
    if table is not None:
        profiles = {"table": table, **profiles}
    content = content | {"limit": LIMIT, "points": points}
    recording.save(content, options.out)
    content["results"] = summary(points, profiles, console)
    recording.save(content, options.out)


if __name__ == "__main__":
    main()
