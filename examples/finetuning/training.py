"""One fine-tuning run: a compiled loss, AdamW, and what is measured on the way."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from finetuning.text import Corpus, batches, held_out_windows

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP_STEPS = 2  # compilation and first launches: not part of the time per step
LR_RAMP_SHARE = 0.1  # of the steps, over which the learning rate rises to its value


@dataclass(frozen=True)
class Settings:
    """What both runs share. Weights are fp32; bf16 and fp16 compute under autocast."""

    steps: int
    batch: int
    sequence: int
    lr: float
    clip: float
    seed: int
    device: str
    dtype: str
    recipe: str
    held_out_windows: int
    evaluate_every: int
    evaluate: str

    def precision(self) -> AbstractContextManager[object]:
        """The autocast context of the forward pass."""
        dtype = AUTOCAST_DTYPES[self.dtype]
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None)


@dataclass(frozen=True)
class HeldOut:
    """Mean held-out loss, in nats per token, after `step` steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class Step:
    """One optimizer step: its training loss, wall time, and peak of GPU memory (0 on a CPU)."""

    loss: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class RunResult:
    """What one backend did: losses in nats per token, times in seconds, sizes in bytes.

    `saved_bytes` is None where it was not measured. The peak of GPU memory is that of the warm
    steps, 0 on a CPU.
    """

    backend: str
    train_loss: tuple[float, ...]
    held_out: tuple[HeldOut, ...]
    step_s: tuple[float, ...]
    saved_bytes: int | None
    peak_memory_bytes: int

    @property
    def start(self) -> float:
        """Held-out loss before the first step."""
        return self.held_out[0].loss

    @property
    def end(self) -> float:
        """Held-out loss after the last step."""
        return self.held_out[-1].loss

    @property
    def first_step_s(self) -> float:
        """The first step, compilation included."""
        return self.step_s[0]

    @property
    def median_step_s(self) -> float | None:
        """The median step once warm; None where no step was."""
        warm = self.step_s[WARM_UP_STEPS:]
        return statistics.median(warm) if warm else None


def train(
    backend: str,
    compiled: torch.nn.Module,
    plain: torch.nn.Module,
    corpus: Corpus,
    settings: Settings,
    on_step: Callable[[int, float], None],
    measure_saved: bool = True,
) -> RunResult:
    """Train `plain`'s weights through `compiled`, which shares them, starting from a fixed seed.

    A loss that is no number ends the run there. `measure_saved` counts the bytes saved for the
    backward afterwards, which compiles once more.
    """
    torch.manual_seed(settings.seed)
    windows = held_out_windows(corpus.held_out, settings.held_out_windows, settings.sequence)
    evaluated = compiled if settings.evaluate == "compiled" else plain
    held_out = [HeldOut(0, evaluate(evaluated, windows, settings))]
    steps: list[Step] = []
    for step in _steps(compiled, plain, corpus, settings):
        steps.append(step)
        done = len(steps)
        on_step(done, step.loss)
        if math.isnan(step.loss):
            held_out.append(HeldOut(done, step.loss))
            break
        every = settings.evaluate_every
        if done == settings.steps or (every and done % every == 0):
            held_out.append(HeldOut(done, evaluate(evaluated, windows, settings)))
    saved: int | None = None
    if measure_saved:
        ids = next(batches(corpus.train, 1, settings.batch, settings.sequence, settings.seed))
        saved = saved_for_backward(compiled, ids.to(settings.device), settings)
    return RunResult(
        backend=backend,
        train_loss=tuple(step.loss for step in steps),
        held_out=tuple(held_out),
        step_s=tuple(step.seconds for step in steps),
        saved_bytes=saved,
        peak_memory_bytes=max((step.peak_bytes for step in steps[WARM_UP_STEPS:]), default=0),
    )


def _steps(
    compiled: torch.nn.Module, plain: torch.nn.Module, corpus: Corpus, settings: Settings
) -> Iterator[Step]:
    """The optimizer steps, each timed until its loss can be read on the host."""
    on_gpu = settings.device.startswith("cuda")
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr)
    ramp = max(1, round(settings.steps * LR_RAMP_SHARE))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / ramp))
    scaler = torch.amp.GradScaler(
        torch.device(settings.device).type, enabled=settings.dtype == "fp16"
    )
    drawn = batches(corpus.train, settings.steps, settings.batch, settings.sequence, settings.seed)
    for ids in drawn:
        plain.train()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(settings.device)
        started = time.perf_counter()
        with settings.precision():
            loss = compiled(ids.to(settings.device))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(settings.device) if on_gpu else 0
        yield Step(value, seconds, peak)
        schedule.step()


@torch.no_grad()
def evaluate(loss: torch.nn.Module, windows: torch.Tensor, settings: Settings) -> float:
    """Mean loss in nats per token over `windows` [W, S], in batches of the training size."""
    loss.eval()
    total = 0.0
    for ids in windows.split(settings.batch):
        with settings.precision():
            total += loss(ids.to(settings.device)).item() * ids.shape[0]
    return total / windows.shape[0]


def saved_for_backward(loss: torch.nn.Module, ids: torch.Tensor, settings: Settings) -> int:
    """Bytes that one forward keeps for its backward: storages, without parameters and inputs."""
    owned = {p.untyped_storage().data_ptr() for p in loss.parameters()}
    owned |= {b.untyped_storage().data_ptr() for b in loss.buffers()}
    owned.add(ids.untyped_storage().data_ptr())
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    loss.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with settings.precision():
            value = loss(ids)  # its graph keeps every storage alive, so no address comes twice
        del value
    return sum(kept.values())
