"""One timed step of a compiled model: forward and backward on fixed inputs, or a whole training
step with its loss and AdamW; its gradients and its memory; and calls as CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def captured(call: Callable[[], object], warmup: int = 1) -> Callable[[], None]:
    """The call as one CUDA graph: what it costs without the host. `warmup` calls come before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@dataclass(frozen=True)
class Memory:
    """Bytes on the device; 0 on the CPU.

    saved: allocated between forward and backward beyond what was before the step, the output left
    out. peak: max_memory_allocated() during the step (with the optimizer, if there is one) minus
    memory_allocated() before it: parameters, optimizer state, buffers and inputs are not in it,
    gradients are. peak_without_parameters: the same with the optimizer's state counted in, that is,
    max_memory_allocated() minus the parameters, buffers and inputs.
    """

    saved: int = 0
    peak: int = 0
    peak_without_parameters: int = 0


class Step:
    """Forward and backward on fixed inputs.

    `compiled(*inputs)` gives the output, `gradient` is its gradient, or None for a scalar loss. An
    optimizer, where there is one, steps at the end. Gradients are gone afterwards.
    """

    def __init__(
        self,
        compiled: Any,
        parameters: list[nn.Parameter],
        inputs: tuple[Tensor, ...],
        gradient: Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.compiled, self.parameters, self.inputs = compiled, parameters, inputs
        self.gradient, self.optimizer = gradient, optimizer

    def __call__(self) -> None:
        self.compiled(*self.inputs).backward(self.gradient)
        if self.optimizer is not None:
            self.optimizer.step()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for leaf in (*self.parameters, *self.inputs):
            leaf.grad = None

    def gradients(self) -> list[Tensor]:
        """The parameters' gradients on the host; no optimizer step."""
        self.compiled(*self.inputs).backward(self.gradient)
        found = [p.grad.cpu() for p in self.parameters if p.grad is not None]
        self._drop_gradients()
        return found

    def memory(self) -> Memory:
        """What one step needs; run a step before, so that the optimizer has its state."""
        if not torch.cuda.is_available():
            return Memory()
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = self.compiled(*self.inputs)
        saved = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
        out.backward(self.gradient)
        del out
        if self.optimizer is not None:
            self.optimizer.step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        self._drop_gradients()
        return Memory(saved, peak, peak + self._state_bytes())

    def _state_bytes(self) -> int:
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors if t.is_cuda)


def activations(shape: tuple[int, ...], device: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A bf16 input that requires its gradient, and a gradient of the same shape, both random."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device).bfloat16().requires_grad_()
    return x, torch.randn(shape, generator=generator, device=device).bfloat16() / 100


def relative_difference(got: list[Tensor], want: list[Tensor]) -> float:
    """|got - want| / |want| over all tensors together."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    difference = norm = 0.0
    for g, w in zip(got, want, strict=True):
        wanted = w.to(device).float()
        difference += float((g.to(device).float() - wanted).square().sum())
        norm += float(wanted.square().sum())
    return (difference / norm) ** 0.5
