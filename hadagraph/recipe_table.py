"""Recipes as a Markdown table, in words: the one of docs/recipes.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Granularity
from hadagraph.published import BLOCK_FORMATS
from hadagraph.rotation import Fixed
from hadagraph.rules import OPERANDS, ROLES, OperandRule, Recipe

COLUMNS = ("name", *ROLES, "besides", "source")
LETTERS = {"input": "X", "weight": "W", "grad_output": "E"}
FITS = {
    "amax": "",
    "ceil": "scales rounded up",
    "three_quarters": "3/4 of it",
    "mse": "clipped",
    "four_six": "scaled to 4 or 6",
}


def recipe_table(recipes: Iterable[Recipe]) -> str:
    """One line a recipe; `-` is a GEMM in high precision, and what is said of one operand alone
    follows its letter."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for recipe in recipes:
        names = ", ".join(f"`{name}`" for name in (recipe.name, *recipe.aliases))
        cells = (_cell(role, recipe) for role in ROLES)
        source = re.sub(r".*arXiv (\S+)$", r"[\1](https://arxiv.org/abs/\1)", recipe.source)
        lines.append(_line([names, *cells, _besides(recipe), source]))
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(role: str, recipe: Recipe) -> str:
    pair = recipe.rules(role)
    if pair is None:
        return "-"
    left, right = map(words_of, pair)
    shared = [word for word in left if word in right] if left[0] == right[0] else []
    cells = [", ".join(shared)] if shared else []
    for operand, words in zip(OPERANDS[role], (left, right), strict=True):
        own = [word for word in words if word not in shared]
        cells += [f"{LETTERS[operand]}: {', '.join(own)}"] if own else []
    return "<br>".join(cells)


def _besides(recipe: Recipe) -> str:
    told = ["clip mask"] if recipe.clip_masked else []
    told += [f"by calibration: {recipe.select}"] if recipe.select else []
    return ", ".join(told) or "-"


def words_of(rule: OperandRule) -> list[str]:
    """What happens to one operand, in words, the format first."""
    format: str = rule.format
    implied: dict[str, Any] = {"granularity": None, "scale": "fp32"}
    for name, meaning in BLOCK_FORMATS.items():
        if all(getattr(rule, key) == meaning[key] for key in ("format", "scale", "prescale")):
            format, implied = name, meaning
    words = [format]
    if rule.is_quantized and rule.granularity != implied["granularity"]:
        words.append(_granularity(rule.granularity))
    if rule.scale != implied["scale"]:
        words.append(f"{rule.scale} scales" + (" and one of the tensor" if rule.prescale else ""))
    if rule.max_block is not None:
        words.append(f"H{rule.max_block}{_signs(rule)}")
    if rule.outer_block is not None:
        words.append(f"outer H{rule.outer_block}")
    for place, kept in (("", rule.tokens_kept), ("outer ", rule.outer_tokens_kept)):
        words += ["{}{} of {} tokens".format(place, *kept)] if kept else []
    words += [FITS[rule.fit]] if FITS[rule.fit] else []
    words += ["stochastic"] if rule.rounding == "stochastic" else []
    words += [f"{rule.outliers} outliers apart"] if rule.outliers else []
    words += ["what the forward made of it"] if rule.reads == "forward" else []
    return words


def _granularity(granularity: Granularity) -> str:
    if granularity == PER_TENSOR:
        return "per tensor"
    if granularity == PER_KEPT_INDEX:
        return "per kept index"
    if granularity.kind == "block_2d":
        return f"{granularity.block} x {granularity.block} tiles"
    return f"blocks of {granularity.block}"


def _signs(rule: OperandRule) -> str:
    if rule.signs is None:
        return ""
    return " with fixed signs" if isinstance(rule.signs, Fixed) else " with random signs"
