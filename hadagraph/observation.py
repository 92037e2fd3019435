"""Who watches GEMMs run: observers that add up the statistics of the operands they see, over
batches and ranks, into a profile. Knows nothing of graphs."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, distributed

from hadagraph.profile import Profile
from hadagraph.statistics import MAXIMA, SUMS, observed, site_statistics

FLAGS = SimpleNamespace()
"""For each observer with a number of steps, `done<number>`: what compiled code is guarded by."""
_OBSERVERS: dict[int, Observer] = {}
_STEP_OBSERVERS: dict[int, tuple[object, Observer]] = {}
_started = 0
_last: Profile | None = None


@dataclass(frozen=True)
class Key:
    """A GEMM that is watched: its site, and what its operands are."""

    name: str
    role: str
    lhs: str
    rhs: str


@dataclass
class Seen:
    """What was seen of it; sums and maxima on its device."""

    calls: int = 0
    sizes: tuple[int, int, int] = (0, 0, 0)
    sums: Tensor | None = None
    maxima: Tensor | None = None


class Observer:
    """Watches GEMMs: without `steps` until it is asked for the profile, with `steps` until each
    GEMM that was announced has run so often; only in training graphs, then. before: an earlier
    profile, which the new one is merged into."""

    def __init__(self, steps: int | None = None, before: Profile | None = None) -> None:
        global _started
        self.number = _started
        self.steps = steps
        self.before = before or Profile()
        self.keys: list[Key] = []
        self.seen: dict[Key, Seen] = {}
        self._profile: Profile | None = None
        _started += 1
        _OBSERVERS[self.number] = self
        if steps is not None:
            setattr(FLAGS, self.flag, False)

    @property
    def flag(self) -> str:
        """The attribute of FLAGS that says whether it is done."""
        return f"done{self.number}"

    @property
    def done(self) -> bool:
        return bool(getattr(FLAGS, self.flag, False))

    def announce(self, key: Key) -> int:
        """The number by which a GEMM's runs are recorded."""
        self.keys.append(key)
        self.seen.setdefault(key, Seen())
        return len(self.keys) - 1

    def record(self, gemm: int, lhs: Tensor, rhs: Tensor, product: Tensor) -> None:
        """One run of a GEMM; nothing once it ran as often as was asked."""
        seen = self.seen[self.keys[gemm]]
        if self.steps is not None and seen.calls >= self.steps:
            return
        if 0 in (*lhs.shape, *rhs.shape):
            return
        sums, maxima = observed(lhs, rhs, product)
        if seen.sums is not None and seen.maxima is not None:
            sums, maxima = sums + seen.sums, torch.maximum(maxima, seen.maxima)
        seen.sums, seen.maxima = sums, maxima
        seen.sizes = lhs.shape[0], rhs.shape[0], lhs.shape[1]
        seen.calls += 1
        if self.steps is not None and seen.calls == self.steps:
            done = all(each.calls >= self.steps for each in self.seen.values())
            setattr(FLAGS, self.flag, done)

    def profile(self) -> Profile:
        """What was seen, over all ranks where torch.distributed is initialized (each must ask),
        merged into what was known before. The observer forgets its sums."""
        global _last
        if self._profile is None:
            found = _over_ranks({k: s for k, s in self.seen.items() if s.sums is not None})
            sites = []
            for key, seen in found.items():
                assert seen.sums is not None and seen.maxima is not None
                kinds = key.lhs, key.rhs
                sites.append(
                    site_statistics(key.name, key.role, kinds, seen.sizes, seen.sums, seen.maxima)
                )
            self._profile = self.before.merged(Profile(tuple(s for s in sites if s is not None)))
            _last = self._profile
            self.seen = {key: Seen(calls=seen.calls) for key, seen in self.seen.items()}
        return self._profile

    def close(self) -> None:
        """Stop: code that still records with it fails."""
        del _OBSERVERS[self.number]


def observer_numbered(number: int) -> Observer:
    """The observer of that number."""
    return _OBSERVERS[number]


def step_observer(owner: object, steps: int, before: Profile | None) -> Observer:
    """The observer of the first steps of what was compiled with these options: one for each
    `torch.compile(..., options=owner)`, told apart by identity."""
    if id(owner) not in _STEP_OBSERVERS:
        _STEP_OBSERVERS[id(owner)] = owner, Observer(steps, before)
    return _STEP_OBSERVERS[id(owner)][1]


def last_profile() -> Profile | None:
    """The profile of the last calibration of this process: `hadagraph.calibrate`'s, or that of
    `calibrate_steps`, once the model has been compiled with it. None before."""
    return _last


def _over_ranks(found: dict[Key, Seen]) -> dict[Key, Seen]:
    """Sums and maxima of all ranks, the same on each; a rank may lack some GEMMs."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return found
    ranks: list[dict[Key, tuple[int, int, int]]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(ranks, {key: seen.sizes for key, seen in found.items()})
    sizes = {key: size for rank in reversed(ranks) for key, size in rank.items()}
    keys = sorted(sizes, key=lambda key: (key.name, key.role))
    if not keys:
        return found
    device = torch.device("cpu")
    if distributed.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    sums = torch.zeros(len(keys), SUMS, dtype=torch.float64)
    maxima = torch.zeros(len(keys), MAXIMA, dtype=torch.float64)
    for index, key in enumerate(keys):
        seen = found.get(key, Seen())
        if seen.sums is not None and seen.maxima is not None:
            sums[index], maxima[index] = seen.sums.cpu(), seen.maxima.cpu()
    sums, maxima = sums.to(device), maxima.to(device)
    distributed.all_reduce(sums)
    distributed.all_reduce(maxima, distributed.ReduceOp.MAX)
    return {key: Seen(0, sizes[key], sums[index], maxima[index]) for index, key in enumerate(keys)}
