"""Answer what hadagraph would do with a model, and how precise it would be, by compiling it once
aside without caches. Changes neither the model nor what is compiled already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    is a scalar; ValueError otherwise). Parameters' gradients are left as they were.
    """
    config = parse_options(None, {**_eager(options), "measure": True})
    ops.MEASURED.clear()
    _, output = _run_once(model, inputs, kwargs, config)
    scalar = loss(output) if loss is not None else getattr(output, "loss", output)
    if not isinstance(scalar, torch.Tensor) or scalar.numel() != 1:
        raise ValueError("measure_sqnr: the model's output is no scalar; pass loss=function")
    leaves = [p for p in getattr(model, "parameters", list)() if p.requires_grad]
    torch.autograd.grad(scalar, leaves, allow_unused=True)
    found: dict[str, dict[str, float]] = {role: {} for role in ROLES}
    for name, decibels in ops.MEASURED.items():
        site, _, role = name.rpartition(":")
        found[role][site] = decibels
    return found


def _eager(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**(options or {}), "executor": "eager"}


def _run_once(
    model: Callable[..., Any], inputs: tuple[Any, ...], kwargs: dict[str, Any], config: Config
) -> tuple[Collector, Any]:
    collector = Collector()

    def backend(gm: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        return compile_graph(gm, example, config, collector)

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), compat.without_caches():
        output = torch.compile(model, backend=backend)(*inputs, **kwargs)
    return collector, output
