"""The seed of each step's random draws: a counter on the device, begun from torch's initial seed.
The state of the user's generators is neither read nor advanced.

Hence unnoticed: a `torch.manual_seed` of the number that was given before (no generator tells it
from none, unless something was drawn in between; `restart` is for it), and any while a captured
CUDA graph is replayed. A function that torch.utils.checkpoint runs again around compiled code draws
anew, where compiled together with its checkpoint it does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GOLDEN = -7046029254386353131
"""2^64 divided by the golden ratio, as a signed number: seeds of neighboring steps differ in about
half of their bits."""


@dataclass
class _Counter:
    begun_from: int
    value: torch.Tensor


_COUNTERS: dict[torch.device, _Counter] = {}


def next_seed(device: torch.device) -> torch.Tensor:
    """int64 [1] on the device, another at each call; the same sequence from the same
    `torch.initial_seed()`, begun anew when that is another and by `restart`. Only adds on the
    device, so that a CUDA graph's replays draw anew."""
    value = counter(device)
    seed = value * _GOLDEN
    value.add_(1)
    return seed


def counter(device: torch.device) -> torch.Tensor:
    """The device's counter, which the next seed is made from; begun anew when
    `torch.initial_seed()` is another, but not while a CUDA graph is captured, each replay of which
    would begin anew. Call it before any capture."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    begun_from = torch.initial_seed()
    known = _COUNTERS.get(device)
    if known is None:
        with torch.inference_mode(False):  # a tensor made under it could not be added to later
            start = torch.tensor([_start(begun_from)], dtype=torch.int64, device=device)
        known = _COUNTERS[device] = _Counter(begun_from, start)
    elif known.begun_from != begun_from and not _is_capturing(device):
        known.value.fill_(_start(begun_from))
        known.begun_from = begun_from
    return known.value


def restart() -> None:
    """The sequences of all devices begin anew, in place, so that captured CUDA graphs see it."""
    begun_from = torch.initial_seed()
    for known in _COUNTERS.values():
        known.value.fill_(_start(begun_from))
        known.begun_from = begun_from


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _start(seed: int) -> int:
    """Where a counter begins, as int64: far from where neighboring seeds begin, lest their
    sequences be the same but for a step. The mixing of SplitMix64 (Steele et al., OOPSLA 2014)."""
    mask = (1 << 64) - 1
    seed &= mask
    seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & mask
    seed = (seed ^ seed >> 27) * 0x94D049BB133111EB & mask
    seed ^= seed >> 31
    return seed - (1 << 64) if seed >> 63 else seed
