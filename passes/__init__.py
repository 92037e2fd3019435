"""The passes of the compiler and their order. Each file holds one; none knows another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from hadagraph.config import Config
from hadagraph.device import DeviceProfile
from hadagraph.observation import observer_numbered
from hadagraph.passes.cancel_rotations import cancel_rotations
from hadagraph.passes.choose_precision import choose_precision
from hadagraph.passes.compress_saved import compress_saved
from hadagraph.passes.fuse import fuse
from hadagraph.passes.guard_sizes import guard_sizes
from hadagraph.passes.insert_rotations import insert_rotations
from hadagraph.passes.lower_precision import lower_precision
from hadagraph.passes.narrow_quantizers import narrow_quantizers
from hadagraph.passes.never_slower import never_slower
from hadagraph.passes.normalize import normalize
from hadagraph.passes.observe_operands import observe_operands
from hadagraph.passes.plan_precision import plan_precision
from hadagraph.plan import Plan

__all__ = [
    "PIPELINE",
    "PassState",
    "compress_saved",
    "fuse",
    "narrow_quantizers",
    "plan_only",
    "run_pipeline",
]


@dataclass
class PassState:
    """What the passes of one graph hand on: the options, what is known of the device, and the plan
    once it is made; `undecided`, with what recipe auto chooses from."""

    config: Config
    plan: Plan
    capability: tuple[int, int] | None = None
    profile: DeviceProfile | None = None
    undecided: Plan | None = None


def _normalize(graph: fx.Graph, state: PassState) -> None:
    normalize(graph)


def _plan(graph: fx.Graph, state: PassState) -> None:
    state.plan = plan_precision(graph, state.config, state.capability)


def _choose(graph: fx.Graph, state: PassState) -> None:
    state.undecided = state.plan
    state.plan = choose_precision(
        graph,
        state.plan,
        state.profile,
        budget=state.config.error_budget_db,
        statistics=state.config.profile,
        host=not state.config.captures_launches,
        fused=state.config.fuse,
    )


def _give_back(graph: fx.Graph, state: PassState) -> None:
    if state.profile is not None and state.config.never_slower:
        host = not state.config.captures_launches
        fused = state.config.fuse
        state.plan = never_slower(graph, state.plan, state.profile, host=host, fused=fused)


def _observe(graph: fx.Graph, state: PassState) -> None:
    if state.config.observer is not None:
        observer = observer_numbered(state.config.observer)
        state.plan = observe_operands(graph, state.plan, observer)


def _guard(graph: fx.Graph, state: PassState) -> None:
    observing = state.config.observer is not None
    if observing or state.profile is None or state.undecided is None:
        return
    state.plan = guard_sizes(
        graph,
        state.plan,
        state.undecided,
        state.profile,
        budget=state.config.error_budget_db,
        statistics=state.config.profile,
        host=not state.config.captures_launches,
        fused=state.config.fuse,
        never_slower=state.config.never_slower,
    )


def _insert(graph: fx.Graph, state: PassState) -> None:
    insert_rotations(graph, state.plan)


def _cancel(graph: fx.Graph, state: PassState) -> None:
    cancel_rotations(graph)


def _lower(graph: fx.Graph, state: PassState) -> None:
    config = state.config
    state.plan = lower_precision(graph, state.plan, measure=config.measure, memory=config.memory)


Pass = Callable[[fx.Graph, PassState], None]
PIPELINE: tuple[tuple[str, Pass], ...] = (
    ("normalize", _normalize),  # first: every later pass knows one GEMM form only
    ("plan_precision", _plan),  # needs the GEMMs grouped by Linear; decides before anyone acts
    ("choose_precision", _choose),  # recipe auto's choice, before its losers are given back
    ("never_slower", _give_back),  # corrects the plan by cost, while nobody has acted on it
    ("guard_sizes", _guard),  # once decided; guards are taken as long as the graph is joint
    ("observe_operands", _observe),  # when calibrating: exact, and nothing is left to carry out
    ("insert_rotations", _insert),  # exact, where the plan says
    ("cancel_rotations", _cancel),  # exact; before lowering, which wants one rotation a tensor
    ("lower_precision", _lower),  # the only pass that changes numerics
)


def plan_only(graph: fx.Graph, state: PassState) -> Plan:
    """The plan for a joint or an inference graph, which is normalized and otherwise left alone."""
    for run in (_normalize, _plan, _choose, _give_back):
        run(graph, state)
    return state.plan


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
