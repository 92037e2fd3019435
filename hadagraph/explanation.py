"""Answer what hadagraph would do with a model, and how precise it would be, by compiling it once
aside without caches. Changes neither the model nor what is compiled already."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hadagraph import compat, ops
from hadagraph.backend import compile_graph
from hadagraph.config import Config, parse_options
from hadagraph.recipes import ROLES
from hadagraph.reports import Collector, GraphReport


@dataclass(frozen=True)
class Explanation:
    """The reports of a model's graphs; `str` prints them."""

    reports: tuple[GraphReport, ...]

    def __str__(self) -> str:
        return "\n".join(report.text() for report in self.reports)

    @property
    def saved_bytes(self) -> int:
        """Bytes saved for the backward over all graphs, parameters and inputs left out."""
        return sum(report.saved_bytes or 0 for report in self.reports)


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Explanation:
    """What hadagraph does with `model(*inputs, **kwargs)`: each GEMM's site, formats, rotations,
    who shares them, what is saved, and why it stays in high precision where it does.

    Runs the forward once (in eager mode), with the random state put back. ValueError if the model
    reached no graph at all.
    """
    collector, _ = _run_once(model, inputs, kwargs, parse_options(None, _eager(options)))
    if not collector.reports:
        raise ValueError("explain: torch.compile found no graph in this model")
    return Explanation(tuple(collector.reports))


def measure_sqnr(
    model: Callable[..., Any],
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    **kwargs: Any,
) -> dict[str, dict[str, float]]:
    """SQNR in dB of every quantized GEMM of one forward and backward, against fp64 on the same
    operands: role -> site -> dB.

    `loss` makes a scalar of the model's output (by default its `.loss`, or the output itself if it
    is a scalar; ValueError otherwise). Parameters' gradients are left as they were; without a
    parameter or an input that requires one, only the forward is measured.
    """
    config = parse_options(None, {**_eager(options), "measure": True})
    ops.MEASURED.clear()
    with training_mode():
        _, output = _run_once(model, inputs, kwargs, config)
        run_backward("measure_sqnr", model, inputs, kwargs, output, loss)
    found: dict[str, dict[str, float]] = {role: {} for role in ROLES}
    for name, decibels in ops.MEASURED.items():
        site, _, role = name.rpartition(":")
        found[role][site] = decibels
    return found


def _eager(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**(options or {}), "executor": "eager"}


def run_backward(
    caller: str,
    model: Callable[..., Any],
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
    loss: Callable[[Any], torch.Tensor] | None,
) -> None:
    """The backward of a scalar of the output, into no `.grad`. ValueError, with the caller's name,
    where there is no scalar."""
    scalar = loss(output) if loss is not None else getattr(output, "loss", output)
    if not isinstance(scalar, torch.Tensor) or scalar.numel() != 1:
        raise ValueError(f"{caller}: the model's output is no scalar; pass loss=function")
    given = [*getattr(model, "parameters", list)(), *inputs, *kwargs.values()]
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
    if leaves:
        torch.autograd.grad(scalar, leaves, allow_unused=True)


def _run_once(
    model: Callable[..., Any], inputs: tuple[Any, ...], kwargs: dict[str, Any], config: Config
) -> tuple[Collector, Any]:
    collector = Collector()
    with same_state(model):
        output = compiled_aside(model, config, collector)(*inputs, **kwargs)
    return collector, output


def compiled_aside(
    model: Callable[..., Any], config: Config, collector: Collector
) -> Callable[..., Any]:
    """The model compiled beside whatever else it is compiled to."""

    def backend(gm: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        return compile_graph(gm, example, config, collector)

    def call(*inputs: Any, **kwargs: Any) -> Any:
        return model(*inputs, **kwargs)

    # Compiled code is kept by code object: on one of its own it uses up no recompilation of the
    # model's.
    own = types.FunctionType(
        call.__code__.replace(), globals(), "call", call.__defaults__, call.__closure__
    )
    compiled: Callable[..., Any] = torch.compile(own, backend=backend)
    return compiled


@contextmanager
def training_mode() -> Iterator[None]:
    """Record gradients, also where the caller has turned that off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def same_state(model: Callable[..., Any]) -> Iterator[None]:
    """Put the random state and the module's buffers (running statistics, caches) back afterwards;
    compile without caches."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices), compat.without_caches():
            yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                if not torch.equal(buffer, old):
                    buffer.copy_(old)
