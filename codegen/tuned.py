"""The matmul configurations that won a race on this machine (`hadagraph.codegen.autotune`), kept in
one JSON file a device, torch, triton and source of the kernels. Races and launches nothing."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from hadagraph.codegen.spec import Capability
from hadagraph.codegen.store import source_directory
from hadagraph.codegen.tune import LibraryMm, MmConfig

log = logging.getLogger(__name__)
TENSORWISE, ROWWISE, MIXED = "tensorwise", "rowwise", "mixed"
"""One scale a tensor on both sides, one a kept index on both, or one of each."""


@dataclass(frozen=True)
class MmProblem:
    """out [M, N] of a scaled matmul over C, by what its speed depends on."""

    M: int
    N: int
    C: int
    a_format: str
    b_format: str
    scales: str
    out_dtype: str

    def bucket(self) -> MmProblem:
        """The problem that stands for all of its bucket: sizes rounded up to 2^n or 1.5 * 2^n."""
        sizes = {name: _rounded_up(getattr(self, name)) for name in ("M", "N", "C")}
        return MmProblem(**(asdict(self) | sizes))


MmChoice = MmConfig | LibraryMm
Winners = dict[MmProblem, MmChoice]


def _rounded_up(size: int) -> int:
    power = 1 << (size - 1).bit_length() if size > 1 else 1
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def is_current(capability: Capability) -> bool:
    """Whether the current device is of this capability, and not one that is only planned for."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == capability


def winner(problem: MmProblem, capability: Capability) -> MmChoice | None:
    """What won the problem's bucket on the current device; None if that was never raced or the
    device is not of this capability."""
    if not is_current(capability):
        return None
    return winners_on(torch.cuda.get_device_name()).get(problem.bucket())


@cache
def winners_on(device_name: str) -> Winners:
    """All winners of the device, read once; empty, with a warning, if the file is damaged."""
    path = winners_path(device_name)
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())["winners"]
        return {MmProblem(**row["problem"]): _choice(row["choice"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): the static tables are used", path, error)
        return {}


def _choice(row: dict[str, Any]) -> MmChoice:
    return LibraryMm(**row) if "fast_accumulation" in row else MmConfig(**row)


def keep_winners(device_name: str, won: Winners) -> Path:
    """Adds to the device's file and to this process; returns the path. Launches that are ready keep
    their configuration."""
    winners_on.cache_clear()  # another process may have tuned meanwhile
    every = winners_on(device_name) | won
    rows = [{"problem": asdict(p), "choice": asdict(choice)} for p, choice in every.items()]
    path = winners_path(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump({"device": device_name, **_versions(), "winners": rows}, file, indent=1)
    os.replace(temporary, path)
    winners_on.cache_clear()
    return path


def winners_path(device_name: str) -> Path:
    key = repr((device_name, _versions(), _source_hash()))
    return source_directory() / f"tuned_{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def fingerprint() -> str:
    """A text that differs where other winners are in use on the current device."""
    if not torch.cuda.is_available():
        return ""
    won = winners_on(torch.cuda.get_device_name())
    return hashlib.sha256(repr(sorted(won.items(), key=repr)).encode()).hexdigest() if won else ""


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": triton.__version__}


@cache
def _source_hash() -> str:
    """Of every file of this package: a changed kernel or table starts anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
