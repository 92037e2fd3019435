"""The seed of each step's random draws: a counter on the device, begun from torch's initial seed.
The state of the user's generators is neither read nor advanced.

Hence unnoticed: a `torch.manual_seed` of the number that was given before (no generator tells it
from none, unless something was drawn in between; `restart` is for it), and any while a captured
CUDA graph is replayed. Nor do the states of the generators, which torch.utils.checkpoint restores
to run a function again, tell where the sequence was: around compiled code it needs
`checkpoint_contexts`, where compiled together with its checkpoint it does not."""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from hadagraph import compat

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
log = logging.getLogger(__name__)
State = dict[str, tuple[int, torch.Tensor]]
"""By device, the initial seed that its sequence was begun from and its counter, int64 [1]."""
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
    if torch._C._current_graph_task_id() != -1 and not _REPEATING:  # a backward is under way
        _warn_of_new_draws()
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
    elif known.begun_from != begun_from and not _REPEATING and not _is_capturing(device):
        known.value.fill_(_start(begun_from))
        known.begun_from = begun_from
    return known.value


def restart() -> None:
    """The sequences of all devices begin anew, in place, so that captured CUDA graphs see it."""
    _begin(torch.initial_seed())


def _begin(begun_from: int) -> None:
    for known in _COUNTERS.values():
        known.value.fill_(_start(begun_from))
        known.begun_from = begun_from


def get_state() -> State:
    """Where the sequences are, for `set_state`; on the devices, without waiting for them."""
    return {str(d): (known.begun_from, known.value.clone()) for d, known in _COUNTERS.items()}


def set_state(state: State) -> None:
    """Go on from where `get_state` was called, as long as `torch.initial_seed()` is what it was
    then, in place, so that captured CUDA graphs see it; the sequences of devices that were not in
    use begin anew. Tensors may have been moved to other devices, as by `torch.load`."""
    _go_on(state, torch.initial_seed())


def _go_on(state: State, elsewhere: int) -> None:
    """From the state; on devices without one from the start of this seed's sequence."""
    _begin(elsewhere)
    for name, (begun_from, value) in state.items():
        device = torch.device(name)
        counter(device).copy_(value)
        _COUNTERS[device].begun_from = begun_from


def checkpoint_contexts() -> Contexts:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` around
    compiled code: what is run again in the backward draws what it drew in the forward. A
    checkpoint that is compiled itself needs none of it, and recomputes as it would without."""
    if compat.detect_fake_mode() is not None:
        contexts: Contexts = create_selective_checkpoint_contexts([])
        return contexts
    forward = _Forward()
    return forward, _Recomputation(forward)


class _Forward(AbstractContextManager[None]):
    def __init__(self) -> None:
        self.begun_from = 0
        self.state: State = {}

    def __enter__(self) -> None:
        self.begun_from = torch.initial_seed()
        for device in _COUNTERS:
            counter(device)  # begun anew where the seed is another
        self.state = get_state()

    def __exit__(self, *_: object) -> None:
        pass


class _Recomputation(AbstractContextManager[None]):
    """Entered once for each backward of the same forward."""

    def __init__(self, forward: _Forward) -> None:
        self.forward = forward
        self.present: State = {}

    def __enter__(self) -> None:
        self.present = get_state()
        _go_on(self.forward.state, self.forward.begun_from)
        _REPEATING.append(self)

    def __exit__(self, *_: object) -> None:
        _REPEATING.remove(self)
        set_state(self.present)


_REPEATING: list[_Recomputation] = []


@functools.cache
def _warn_of_new_draws() -> None:
    """Once a process."""
    log.warning(
        "compiled code that draws random numbers runs in a backward. If torch.utils.checkpoint "
        "runs it again there, it draws others than in the forward: give the checkpoint "
        "use_reentrant=False and context_fn=hadagraph.seeds.checkpoint_contexts"
    )


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
