"""The passes of the compiler and their order. Each file holds one; none knows another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from hadagraph.config import Config
from hadagraph.passes.cancel_rotations import cancel_rotations
from hadagraph.passes.fuse import fuse
from hadagraph.passes.insert_rotations import insert_rotations
from hadagraph.passes.lower_precision import lower_precision
from hadagraph.passes.normalize import normalize
from hadagraph.passes.plan_precision import plan_precision
from hadagraph.plan import Plan

__all__ = ["PIPELINE", "PassState", "fuse", "run_pipeline"]


@dataclass
class PassState:
    """What the passes of one graph hand on: the options, and the plan once it is made."""

    config: Config
    plan: Plan
    capability: tuple[int, int] | None = None


def _normalize(graph: fx.Graph, state: PassState) -> None:
    normalize(graph)


def _plan(graph: fx.Graph, state: PassState) -> None:
    state.plan = plan_precision(graph, state.config, state.capability)


def _insert(graph: fx.Graph, state: PassState) -> None:
    insert_rotations(graph, state.plan)


def _cancel(graph: fx.Graph, state: PassState) -> None:
    cancel_rotations(graph)


def _lower(graph: fx.Graph, state: PassState) -> None:
    state.plan = lower_precision(graph, state.plan, measure=state.config.measure)


Pass = Callable[[fx.Graph, PassState], None]
PIPELINE: tuple[tuple[str, Pass], ...] = (
    ("normalize", _normalize),  # first: every later pass knows one GEMM form only
    ("plan_precision", _plan),  # needs the GEMMs grouped by Linear; decides before anyone acts
    ("insert_rotations", _insert),  # exact, where the plan says
    ("cancel_rotations", _cancel),  # exact; before lowering, which wants one rotation a tensor
    ("lower_precision", _lower),  # the only pass that changes numerics
)


def run_pipeline(
    graph: fx.Graph,
    state: PassState,
    observe: Callable[[str, fx.Graph], None] = lambda name, graph: None,
) -> Plan:
    """Run every pass over a joint or an inference graph, in place; `observe(name, graph)` sees the
    graph before the first (as `input`) and after each. Returns the plan that was carried out."""
    observe("input", graph)
    for name, run in PIPELINE:
        run(graph, state)
        observe(name, graph)
    return state.plan
