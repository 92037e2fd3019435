"""What every benchmark's JSON states besides its figures: the device, the versions, the options.
Written as a whole after each stage, so that a run cut short leaves what it had."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hadagraph.codegen.tuned import winners_on


def device_name() -> str:
    """The GPU, or the CPU's architecture."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()})"


def versions() -> dict[str, str | None]:
    """Versions of what decides the figures; None where a package is missing."""
    found: dict[str, str | None] = {"torch": torch.__version__}
    for package in ("triton", "torchao"):
        try:
            found[package] = importlib.import_module(package).__version__
        except ImportError:
            found[package] = None
    return found


def header(benchmark: str, args: argparse.Namespace) -> dict[str, Any]:
    """The first entries of a benchmark's JSON."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings.pop("out", None)
    found = {
        "benchmark": benchmark,
        "device": device_name(),
        "versions": versions(),
        "settings": settings,
    }
    tuned = tuned_matmuls()
    return found | {"tuned_matmuls": tuned} if tuned else found


def tuned_matmuls() -> list[dict[str, Any]]:
    """What won races on this machine, and so is launched in place of the tables' choice."""
    if not torch.cuda.is_available():
        return []
    winners = winners_on(torch.cuda.get_device_name())
    return [{"problem": asdict(p), "choice": asdict(choice)} for p, choice in winners.items()]


def shard_of(text: str) -> tuple[int, int]:
    """`i/n`: every n-th job, from the i-th on, counted from 0."""
    index, slash, count = text.partition("/")
    if not slash or not index.isdigit() or not count.isdigit() or int(index) >= int(count):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N - 1")
    return int(index), int(count)


def save(content: dict[str, Any], path: Path | None) -> None:
    """Write or replace the file as a whole; nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(temporary, path)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one call, over `repeats` in a row: by device events where there is a
    device, whose time includes waiting for the host."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> Any:
    """Name -> milliseconds of each round; a round runs every call, so that clocks drift alike."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(milliseconds(call, repeats))
    return found


def median(rounds: list[float]) -> float:
    """The median, or 0 of nothing."""
    return statistics.median(rounds) if rounds else 0.0
