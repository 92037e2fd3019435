"""Predicted against measured time of GEMMs and their quantizers, at the shapes that decide: large
GEMMs, Linears of TransformerEngine's benchmark, of 8B and 1B blocks, tensor-parallel shards and
small models. The share of shapes within 15 %, for the table's row of the chip and for the profile
that `hadagraph.measure_device` makes.

    python bench/time_model.py --out bench/results/time_model.json   # on a GPU, under 90 s
    python bench/time_model.py --read FILE     # predict what FILE holds (cost_grid's, too)
    python bench/time_model.py --fit FILE      # rows for hadagraph/device.py from FILE's points
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
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

from hadagraph import measurement
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


def device_us(contenders: dict[str, cost_grid.Calls], rounds: int) -> dict[str, float]:
    """Median over rounds of each contender's mean time a call, replayed from a CUDA graph, so that
    no launch by the host is in it. A contender that the device refuses is left out."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, calls in contenders.items():
        try:
            calls[0]()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except (RuntimeError, CompilationError, OutOfResources) as error:
            Console().print(f"[red]{name}: {str(error)[:200]}[/red]")
            continue
        graphs[name] = graph
    repeats = {name: _repeats(graph) for name, graph in graphs.items()}
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
    return {
        name: statistics.median(start.elapsed_time(end) for start, end in found)
        / (repeats[name] * len(contenders[name]))
        * 1e3
        for name, found in spans.items()
    }


def _repeats(graph: torch.cuda.CUDAGraph) -> int:
    """Replays that keep the device busy for BUSY_MS."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return max(1, min(64, round(BUSY_MS / max(start.elapsed_time(end), 1e-3))))


def measured(options: argparse.Namespace) -> Row:
    """The points as `cost_grid` records them; what the time did not allow is left out."""
    began = time.perf_counter()
    bandwidth = cost_grid.copy_bandwidth()
    torch.cuda.empty_cache()
    pools = cost_grid.Pools()
    host, sustained = cost_grid.host_rows(pools), cost_grid.sustained_rows(pools)
    every = [each for _, each in linears()]
    gemms = cost_grid.gemms_to_time(every)
    matrices = cost_grid.matrices_to_time(every)
    matrices += [(size, C) for M, N, C in TARGET_GEMMS for size in (M, N)]
    rows: dict[str, list[Row]] = {"quantizers": [], "gemms": []}
    skipped = 0
    for T, K in dict.fromkeys(matrices):
        if time.perf_counter() - began > options.seconds:
            skipped += 1
            continue
        calls = {n: c[:SETS] for n, c in cost_grid.quantizer_contenders(pools, T, K).items()}
        found = device_us(calls, options.rounds)
        rows["quantizers"] += [{"kernel": n, "T": T, "K": K, "us": us} for n, us in found.items()]
    for role, M, N, C in gemms:
        if time.perf_counter() - began > options.seconds:
            skipped += 1
            continue
        calls = cost_grid.gemm_contenders(pools, role, M, N, C)
        calls = {n: c[:SETS] for n, c in calls.items() if n in cost_grid.FORMATS}
        found = device_us(calls, options.rounds)
        rows["gemms"] += [
            {"kernel": n, "role": role, "M": M, "N": N, "C": C, "us": us} for n, us in found.items()
        ]
    return {
        "capability": torch.cuda.get_device_capability(),
        "sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "copy_bytes_per_s": bandwidth,
        "skipped": skipped,
        "seconds": time.perf_counter() - began,
        "host": host,
        "sustained": sustained,
        **rows,
    }


# -------------------------------------------------------------------------- comparing


def entries(points: Row, profile: DeviceProfile) -> Iterator[Entry]:
    """Every shape and way that the points hold whole."""
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


def share(found: list[Entry]) -> float:
    """Of entries that are predicted within the limit."""
    return sum(abs(each.ratio - 1) <= LIMIT for each in found) / max(len(found), 1)


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
                mine.sort(key=lambda each: -abs(each.ratio - 1))
                worst = ", ".join(f"{e.ratio:.2f} {e.group} {e.shape}" for e in mine[:2])
                table.add_row(what, way, str(len(mine)), f"{share(mine):.2f}", worst)
        console.print(table)
        shares = {
            what: share([each for each in found if each.what == what])
            for what in ("GEMM", "Linear")
        }
        shares["all"] = share(found)
        console.print(f"{name}: {shares['all']:.3f} of {len(found)} within {LIMIT:.0%}; {shares}")
        results[name] = {
            "profile": json.loads(profile.to_json()),
            "share_within": shares,
            "entries": [asdict(each) | {"ratio": each.ratio} for each in found],
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--read", type=Path, help="measure nothing: compare with this file's points"
    )
    parser.add_argument("--fit", type=Path, help="measure nothing: fit a profile to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring points, at most")
    parser.add_argument("--calibrate-seconds", type=float, default=20.0, help="of measure_device")
    options = parser.parse_args()
    console = Console(width=160, highlight=False)
    if options.fit is not None or options.read is not None:
        content = json.loads((options.fit or options.read).read_text())
        points = content.get("points", content) | {"device": content["device"]}
        if options.fit is not None:
            cost_grid.print_fit(points, console)
            return
        profiles = {"fitted to these points": cost_grid.fitted(points)}
    else:
        if not torch.cuda.is_available():
            parser.error("needs a CUDA device, or --read")
        content = recording.header("time_model", options)
        points = measured(options) | {"device": content["device"]}
        profiles = {}
        if options.calibrate_seconds > 0:
            profile = measurement.measure(seconds=options.calibrate_seconds)
            profiles = {"measure_device": profile} if profile is not None else {}
    table = chip_profile(points["device"], tuple(points["capability"]))
    if table is not None:
        profiles = {"table": table, **profiles}
    results = summary(points, profiles, console)
    content = content | {"limit": LIMIT, "points": points, "results": results}
    recording.save(content, options.out)


if __name__ == "__main__":
    main()
