"""Decide for every GEMM what happens to its operands, from the recipe, the overrides and what the
GEMM is. An analysis: changes nothing but the log."""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hadagraph.auto import AUTO, BLOCK_SCALED, CANDIDATES
from hadagraph.config import Config
from hadagraph.formats import BLOCK_SCALED_CAPABILITY, format_named
from hadagraph.graph import (
    Operand,
    arguments,
    aten,
    backward_nodes,
    calls,
    gemms,
    layout_source,
    module_path,
    operand,
    tensor,
)
from hadagraph.operands import operand_plans
from hadagraph.plan import Candidate, Decision, GemmSite, OperandPlan, Plan
from hadagraph.recipes import OPERANDS, OperandRule, Recipe, load_recipe
from hadagraph.selectors import select_rules

log = logging.getLogger(__name__)
_NOT_OURS = "not a plain product of two floating-point matrices"
REASONS: dict[Any, str] = {
    aten.mm.default: _NOT_OURS,
    aten.addmm.default: "addmm with alpha, beta or a bias that is not one number a column",
    aten.bmm.default: "a batched matmul; attention is recognized by Inductor from it",
    aten.baddbmm.default: "a batched matmul; attention is recognized by Inductor from it",
}
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Gemm:
    """A GEMM node with its operands and, for a gradient, the forward GEMM it belongs to."""

    node: fx.Node
    lhs: Operand
    rhs: Operand
    role: str | None
    forward: fx.Node | None


def plan_precision(
    graph: fx.Graph, config: Config, capability: tuple[int, int] | None = None
) -> Plan:
    """The plan for a normalized graph.

    `capability` is the CUDA device's compute capability, None for the CPU, where every format is
    emulated. Each GEMM left in high precision is logged with its reason.
    """
    found = group_linears(graph)
    training = any(gemm.role not in ("output", None) for gemm in found) or bool(
        backward_nodes(graph)
    )
    decisions = []
    by_node: dict[fx.Node, Decision] = {}
    for gemm, site in zip(found, _sites(found), strict=True):
        forward = by_node.get(gemm.forward) if gemm.forward is not None else None
        by_node[gemm.node] = _decide(gemm, site, config, training, capability, forward)
        decisions.append(by_node[gemm.node])
    _warn_of_idle_overrides(config, [decision.site for decision in decisions])
    decisions += _left_alone(graph)
    for decision in decisions:
        if decision.reason:
            name, role = decision.site.name, decision.site.role
            log.info("%s %s stays in high precision: %s", name, role, decision.reason)
    return Plan(config.recipe_name, tuple(decisions))


def group_linears(graph: fx.Graph) -> list[Gemm]:
    """Every GEMM with its role; a gradient's forward GEMM is the one with the same operand.

    A gradient is recognized through any chain of transposes: `grad_input` contracts the kept dim of
    the forward's right operand, `grad_weight` the kept dim of the forward's left one. Where several
    Linears share an operand (q, k and v), the autograd sequence number tells them apart.
    """
    backward = backward_nodes(graph)
    forward: list[Gemm] = []
    by_operand: dict[Operand, list[Gemm]] = defaultdict(list)
    found = []
    for node in gemms(graph):
        lhs, rhs = (operand(arg) for arg in arguments(node)[:2])
        if node not in backward:
            gemm = Gemm(node, lhs, rhs, "output", None)
            forward.append(gemm)
            by_operand[lhs].append(gemm)
            by_operand[rhs].append(gemm)
        else:
            gemm = _gradient(node, lhs, rhs, by_operand)
        found.append(gemm)
    return found


def _gradient(
    node: fx.Node, lhs: Operand, rhs: Operand, by_operand: dict[Operand, list[Gemm]]
) -> Gemm:
    candidates = []
    for side in (rhs, lhs):
        other_way = Operand(side.base, 1 - side.contracted_dim)
        for forward in by_operand.get(other_way, ()):
            role = "grad_input" if forward.rhs == other_way else "grad_weight"
            candidates.append((role, forward))
    if not candidates:
        return Gemm(node, lhs, rhs, None, None)
    sequence = node.meta.get("seq_nr")
    same = [c for c in candidates if c[1].node.meta.get("seq_nr") == sequence]
    role, forward = (same or candidates)[0]
    return Gemm(node, lhs, rhs, role, forward.node)


def _sites(found: list[Gemm]) -> list[GemmSite]:
    """Sites, no two alike in name and role: the module path, with a number where a module has
    several forward GEMMs. A gradient has the name of its forward GEMM."""
    owners = [gemm.forward or gemm.node for gemm in found]
    paths = {owner: module_path(owner) for owner in owners}
    by_path: dict[str, list[fx.Node]] = defaultdict(list)
    for owner, path in paths.items():
        by_path[path].append(owner)
    seen: Counter[tuple[str, str | None]] = Counter()
    sites = []
    for gemm, owner in zip(found, owners, strict=True):
        same = by_path[paths[owner]]
        name = paths[owner] + (f"#{same.index(owner)}" if len(same) > 1 else "")
        seen[name, gemm.role] += 1
        if (again := seen[name, gemm.role]) > 1:
            name += f"#{again}"
        sites.append(_site(gemm, name))
    return sites


def _site(gemm: Gemm, name: str) -> GemmSite:
    lhs, rhs = (tensor(arg) for arg in arguments(gemm.node)[:2])
    left, right = OPERANDS.get(gemm.role or "", ("left", "right"))
    if _is_transposed_gradient(gemm):
        left, right = right, left
    return GemmSite(
        name=name,
        role=gemm.role or "unknown",
        node=gemm.node.name,
        m=str(lhs.shape[0]),
        n=str(rhs.shape[0]),
        c=str(lhs.shape[1]),
        dtype=str(lhs.dtype).removeprefix("torch."),
        lhs=left,
        rhs=right,
    )


def _is_transposed_gradient(gemm: Gemm) -> bool:
    """Whether a gradient GEMM computes the transpose, with the output's gradient on the right, as
    autograd does for column-major operands: X^T E for E^T X, or W^T E^T for E W."""
    if gemm.forward is None:
        return False
    side = 1 if gemm.role == "grad_input" else 0
    return operand(arguments(gemm.forward)[side]).base is gemm.lhs.base


def _left_alone(graph: fx.Graph) -> list[Decision]:
    """The matmuls that are no GEMM of ours, each with its reason."""
    decisions = []
    for node in calls(graph, tuple(REASONS)):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        site = GemmSite(
            name=module_path(node),
            role=getattr(node.target, "_opname", ""),
            node=node.name,
            m=str(value.shape[-2]),
            n=str(value.shape[-1]),
            c=str(tensor(arguments(node)[-1]).shape[-2]),
            dtype=str(value.dtype).removeprefix("torch."),
            lhs="left",
            rhs="right",
        )
        decisions.append(Decision(site, reason=REASONS[node.target]))
    return decisions


def _warn_of_idle_overrides(config: Config, sites: list[GemmSite]) -> None:
    for pattern, _ in config.overrides:
        module, colon, _ = pattern.rpartition(":")
        paths = {site.name.partition("#")[0] for site in sites}
        if sites and not any(fnmatch.fnmatchcase(p, module if colon else pattern) for p in paths):
            log.warning("overrides[%r] matches no GEMM of this graph", pattern)


def _decide(
    gemm: Gemm,
    site: GemmSite,
    config: Config,
    training: bool,
    capability: tuple[int, int] | None,
    forward: Decision | None,
) -> Decision:
    recipe, override = _recipe_for(site, config)
    reason = _structural_reason(gemm, config) or _kept(gemm, site, config, override)
    if reason is None and not training and config.eval == "bf16":
        reason = "option eval='bf16'"
    if reason is not None:
        return Decision(site, reason=reason)
    seen = None
    if config.profile is not None:
        seen = config.profile.site(site.name, site.role, OPERANDS[site.role][0])
    pair, why = select_rules(recipe, site.role, seen)
    if pair is None:
        where = f"override {override!r}" if override else "recipe"
        why = why or f"{recipe.name} leaves {site.role} as it is"
        return Decision(site, reason=f"{where}: {why}")
    left, right = _plans(pair, gemm, site, capability, forward, recipe.clip_masked)
    if left.is_plain and right.is_plain:
        for rule in pair:
            needed = format_named(rule.format).min_capability
            if capability is not None and capability < needed:
                reason = f"{rule.format} needs compute capability {needed}, have {capability}"
                return Decision(site, reason=reason)
    _log_what_the_forward_lacks(site, pair, (left, right), forward)
    candidates: tuple[Candidate, ...] = ()
    if recipe.name == AUTO:
        candidates = _candidates(gemm, site, config, capability)
    return Decision(
        site,
        left,
        right,
        asked=override is not None,
        why=why,
        candidates=candidates,
        forward=None if forward is None else forward.site.node,
    )


def _log_what_the_forward_lacks(
    site: GemmSite,
    pair: tuple[OperandRule, OperandRule],
    plans: tuple[OperandPlan, OperandPlan],
    forward: Decision | None,
) -> None:
    """Where forward and gradient have rules of different recipes."""
    if "forward" in (plan.reads for plan in plans):
        return
    if "forward" in (rule.reads for rule in pair):
        log.info(
            "%s %s reads values: its forward has no codes that are all of them",
            site.name,
            site.role,
        )
    masked = forward is not None and any(
        plan is not None and plan.clip_masked for plan in (forward.lhs, forward.rhs)
    )
    if masked:
        log.info(
            "%s %s is not masked where the forward clipped: it does not read the forward's codes",
            site.name,
            site.role,
        )


def _plans(
    pair: tuple[OperandRule, OperandRule],
    gemm: Gemm,
    site: GemmSite,
    capability: tuple[int, int] | None,
    forward: Decision | None = None,
    clip_masked: bool = False,
) -> tuple[OperandPlan, OperandPlan]:
    if _is_transposed_gradient(gemm):
        pair = pair[1], pair[0]
    left, right = (tensor(argument).shape for argument in arguments(gemm.node)[:2])
    kept = left[0], right[0]
    return operand_plans(pair, site, kept, left[1], capability, forward, clip_masked)


def _candidates(
    gemm: Gemm,
    site: GemmSite,
    config: Config,
    capability: tuple[int, int] | None,
) -> tuple[Candidate, ...]:
    """What recipe `auto` chooses from for this GEMM, the recipe's own rules first."""
    found = []
    block_scaled = capability is not None and capability >= BLOCK_SCALED_CAPABILITY
    for name, pairs in (CANDIDATES | BLOCK_SCALED if block_scaled else CANDIDATES).items():
        pair = pairs[site.role]
        least = max(format_named(rule.format).min_capability for rule in pair)
        if capability is not None and capability < least:
            continue
        found.append(Candidate(name, *_plans(pair, gemm, site, capability)))
    return tuple(found)


def _structural_reason(gemm: Gemm, config: Config) -> str | None:
    """Why this GEMM cannot be lowered, whatever the recipe."""
    lhs, rhs = (tensor(arg) for arg in arguments(gemm.node)[:2])
    if gemm.role is None:
        return "a backward GEMM that belongs to no forward GEMM"
    if lhs.dtype not in INPUT_DTYPES or rhs.dtype != lhs.dtype:
        return f"operands are {lhs.dtype} and {rhs.dtype}"
    if lhs.device.type not in ("cpu", "cuda"):
        return f"no kernels for device {lhs.device.type}"
    for axis, size in (("M", lhs.shape[0]), ("N", rhs.shape[0]), ("C", lhs.shape[1])):
        if isinstance(size, int) and size < config.min_size:
            return f"{axis}={size} is below min_size={config.min_size}"
    return None


def _kept(gemm: Gemm, site: GemmSite, config: Config, override: str | None) -> str | None:
    """Why a GEMM that could be lowered stays unless asked for."""
    if override is not None:
        return None
    path = site.name.partition("#")[0]
    for pattern in config.keep:
        if fnmatch.fnmatchcase(path, pattern):
            return f"option keep: module path matches {pattern!r}"
    if _is_tied_head(gemm):
        return "its weight is an embedding's too: a tied language-model head"
    return None


def _is_tied_head(gemm: Gemm) -> bool:
    forward = gemm.forward or gemm.node
    weight = layout_source(arguments(forward)[1])
    return any(user.target is aten.embedding.default for user in weight.users)


def _recipe_for(site: GemmSite, config: Config) -> tuple[Recipe, str | None]:
    """The site's recipe, and the override that set it."""
    recipe, chosen = load_recipe(config.recipe), None
    path = site.name.partition("#")[0]
    for pattern, other in config.overrides:
        module, colon, role = pattern.rpartition(":")
        if colon and role != site.role:
            continue
        if fnmatch.fnmatchcase(path, module if colon else pattern):
            recipe, chosen = load_recipe(other), pattern
    return recipe, chosen
