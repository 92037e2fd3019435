"""What a calibration changes in a recipe's rules, GEMM by GEMM. Knows no graph and no plan."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from hadagraph.error import operand_noise
from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Encoding
from hadagraph.profile import OperandStatistics, SiteStatistics
from hadagraph.rotation import Rotation, block_for
from hadagraph.rules import OPERANDS, OperandRule, Recipe

log = logging.getLogger(__name__)
Pair = tuple[OperandRule, OperandRule]
Selected = tuple[Pair | None, str]

ADAHOP_OUTLIERS = 64
"""Rows or columns that AdaHOP keeps apart (arXiv 2604.02525)."""
LQS_SHARE = 0.5
"""HOT takes scales per token only where their error is below this share of that per tensor
(arXiv 2503.21261)."""


def select_rules(recipe: Recipe, role: str, site: SiteStatistics | None) -> Selected:
    """The rules of a GEMM's (left, right) operand, or None where it is to stay in high precision;
    and why, "" where it is what the recipe says anyway.

    site: its statistics, the operands in the order of `rules.OPERANDS`; None without a calibration
    or where it did not see the GEMM: the recipe's own rules then, which is logged once a recipe.
    """
    pair = recipe.rules(role)
    if pair is None or not recipe.select:
        return pair, ""
    if site is None:
        _log_default(recipe.name)
        return pair, ""
    assert (site.lhs.kind, site.rhs.kind) == OPERANDS[role], site
    return _SELECTORS[recipe.select](pair, role, site)


@cache
def _log_default(name: str) -> None:
    log.warning(
        "recipe %s chooses by a calibration: without one (options profile, calibrate_steps) every "
        "matmul has the recipe's own rules",
        name,
    )


def pattern_pair(site: SiteStatistics) -> str:
    """AdaHOP's letters for A [M, C] B [C, N]: R where outliers lie in a few rows, C in a few
    columns, N in neither. The right operand's kept indices are its columns there."""
    left = {"row": "R", "column": "C", "none": "N"}[site.lhs.pattern]
    right = {"row": "C", "column": "R", "none": "N"}[site.rhs.pattern]
    return left + right


def _adahop(pair: Pair, role: str, site: SiteStatistics) -> Selected:
    """The inner rotation evens out outliers along the contracted dim. Rows of the left operand and
    columns of the right one it leaves as they are: those are kept apart."""
    letters = pattern_pair(site)
    left, right = pair
    if letters == "RN":
        return (replace(left, outliers=ADAHOP_OUTLIERS), right), f"pattern {letters}"
    if letters in ("RC", "NC", "CC"):
        return (left, replace(right, outliers=ADAHOP_OUTLIERS)), f"pattern {letters}"
    return pair, f"pattern {letters}"


def _adahop_lv2(pair: Pair, role: str, site: SiteStatistics) -> Selected:
    """As `adahop`, but that the pair which it is least good at stays in high precision."""
    if pattern_pair(site) == "CC":
        return None, "pattern CC stays in high precision at level 2"
    return _adahop(pair, role, site)


def _lqs(pair: Pair, role: str, site: SiteStatistics) -> Selected:
    """Scales per token for the gradient that grad_input reads, where they pay."""
    if role != "grad_input":
        return pair, ""
    per_token, per_tensor = (
        _error(site.lhs, replace(pair[0], granularity=granularity), (site.m, site.c))
        for granularity in (PER_KEPT_INDEX, PER_TENSOR)
    )
    share = per_token / per_tensor if per_tensor else 1.0
    granularity = PER_KEPT_INDEX if share < LQS_SHARE else PER_TENSOR
    why = f"error per token {share:.2f} of that per tensor"
    return (replace(pair[0], granularity=granularity), pair[1]), why


def _error(operand: OperandStatistics, rule: OperandRule, shape: tuple[int, int]) -> float:
    rotation = None
    if rule.max_block is not None:
        rotation = Rotation(block_for(shape[1], rule.max_block))
    encoding = Encoding(rule.format, rule.granularity, rotation, rule.scale, rule.rounding)
    return operand_noise(operand, encoding, shape).total


_SELECTORS: dict[str, Callable[[Pair, str, SiteStatistics], Selected]] = {
    "adahop": _adahop,
    "adahop_lv2": _adahop_lv2,
    "lqs": _lqs,
}
