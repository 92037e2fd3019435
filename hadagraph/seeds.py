"""The seed of each step's random draws: a counter on the device, begun from torch's initial seed.
The state of the user's generators is neither read nor advanced. (Hence a `torch.manual_seed` of the
number that was given before goes unnoticed: `restart` is for that.)"""

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
    `torch.initial_seed()` is another. Call it before any capture of a CUDA graph."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    begun_from = torch.initial_seed()
    known = _COUNTERS.get(device)
    if known is None:
        with torch.inference_mode(False):  # a tensor made under it could not be added to later
            start = torch.tensor([_signed(begun_from)], dtype=torch.int64, device=device)
        known = _COUNTERS[device] = _Counter(begun_from, start)
    elif known.begun_from != begun_from:
        known.value.fill_(_signed(begun_from))
        known.begun_from = begun_from
    return known.value


def restart() -> None:
    """The sequences of all devices begin anew, in place, so that captured CUDA graphs see it."""
    begun_from = torch.initial_seed()
    for known in _COUNTERS.values():
        known.value.fill_(_signed(begun_from))
        known.begun_from = begun_from


def _signed(seed: int) -> int:
    """The seed as int64 holds it."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed
