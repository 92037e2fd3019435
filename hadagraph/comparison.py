"""What recipes would do with a model on a chip, from its shapes alone: its joint graphs are traced
once, and every recipe is planned on them. Carries nothing out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from hadagraph import compat
from hadagraph.alternatives import sqnr_of
from hadagraph.config import Config
from hadagraph.device import DeviceProfile
from hadagraph.graph import backward_nodes
from hadagraph.passes import PassState, plan_only
from hadagraph.plan import Decision, OperandPlan, Plan, Predicted
from hadagraph.recipes import Recipe
from hadagraph.reports import GraphReport


@dataclass(frozen=True)
class Comparison:
    """One recipe: the plans of a model's graphs, what they take, the least predicted precision of a
    lowered GEMM with its `site:role`, and how many of the lowered GEMMs the chip only emulates."""

    recipe: str
    reports: tuple[GraphReport, ...]
    predicted: Predicted | None
    worst_db: float
    worst_site: str
    emulated: int


def trace(model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> list[fx.Graph]:
    """The joint graphs of `model(*inputs, **kwargs)` (the inference graphs of one without a
    gradient). Under `compat.without_data()` nothing is computed. ValueError if there is none."""
    graphs: list[fx.Graph] = []

    def run(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        return compat.boxed(gm.forward)

    def keep_and_run(gm: fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(_copy(gm.graph))
        return run(gm, example)

    def partition(
        joint: fx.GraphModule, joint_inputs: Sequence[object], **others: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        graphs.append(_copy(joint.graph))
        return compat.min_cut_partition(joint, joint_inputs, **others)

    backend = compat.aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        inference_compiler=keep_and_run,
        partition_fn=partition,
        decompositions=compat.select_decomp_table(),
    )
    with compat.without_caches():
        torch.compile(model, backend=backend)(*inputs, **kwargs)
    if not graphs:
        raise ValueError("torch.compile found no graph in this model")
    return graphs


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def compare(
    graphs: Sequence[fx.Graph],
    config: Config,
    recipes: Sequence[str | Recipe],
    profile: DeviceProfile | None,
) -> list[Comparison]:
    """These recipes on traced graphs, which are left alone; options besides from `config`.

    profile: of the chip that is planned for; None for a CPU, without predicted times.
    """
    return [_compare(graphs, replace(config, recipe=recipe), profile) for recipe in recipes]


def _compare(
    graphs: Sequence[fx.Graph], config: Config, profile: DeviceProfile | None
) -> Comparison:
    reports = []
    for graph in graphs:
        capability = profile.capability if profile else None
        state = PassState(config, Plan(config.recipe_name), capability, profile)
        plan = plan_only(_copy(graph), state)
        kind = "training" if backward_nodes(graph) else "inference"
        target = profile.name if profile else None
        reports.append(GraphReport(kind, emulated=profile is None, plan=plan, target=target))
    lowered = [d for report in reports for d in report.plan.decisions if d.lowered]
    levels = {f"{d.site.name}:{d.site.role}": _sqnr(d, config) for d in lowered}
    worst = min(levels, key=lambda name: levels[name], default="")
    return Comparison(
        config.recipe_name,
        tuple(reports),
        _total([report.plan.predicted for report in reports]),
        levels.get(worst, math.inf),
        worst,
        sum(d.lhs is not None and d.lhs.emulated for d in lowered),
    )


def _sqnr(decision: Decision, config: Config) -> float:
    def encoding(plan: OperandPlan | None) -> Any:
        return plan.encoding if plan is not None and plan.is_quantized else None

    return sqnr_of(decision.site, encoding(decision.lhs), encoding(decision.rhs), config.profile)


def _total(predicted: Sequence[Predicted | None]) -> Predicted | None:
    known = [each for each in predicted if each is not None]
    if not known:
        return None
    return Predicted(
        sum(each.us for each in known),
        sum(each.all_us for each in known),
        sum(each.none_us for each in known),
    )
