"""The table of docs/recipes.md is what the rows say, and words say every field."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from hadagraph.config import parse_options
from hadagraph.formats import PER_TENSOR, Granularity
from hadagraph.published import BLOCK_FORMATS, ROWS
from hadagraph.recipe_table import recipe_table, words_of
from hadagraph.recipe_text import recipe_from_toml
from hadagraph.recipes import recipe_named
from hadagraph.rotation import Fixed
from hadagraph.rules import OperandRule

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
BEGIN, END = "<!-- recipes: begin -->\n", "<!-- recipes: end -->\n"


def test_the_page_has_every_row(update_golden):
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    want = recipe_table(recipe for recipe in ROWS if recipe.name != "auto")
    if update_golden:
        PAGE.write_text(before + BEGIN + want + END + after)
        table = want
    assert table == want, "changed on purpose? then pytest --update-golden"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_what_the_page_shows_can_be_said():
    (toml,) = blocks("toml")
    made = recipe_from_toml(toml, recipe_named)
    assert (made.name, made.grad_input) == ("mine", None)
    options = re.findall(r"options=(\{.*?\}),?\s*\)", "".join(blocks("python")), re.DOTALL)
    assert len(options) == 3
    for text in options:
        given = ast.literal_eval(text)
        if given["recipe"] != "mine.toml":
            parse_options(None, given)


MXFP4 = OperandRule(**BLOCK_FORMATS["mxfp4"])
OTHER = {
    "format": "int8",
    "granularity": Granularity("block_contracted", 64),
    "max_block": 32,
    "scale": "ue5m3",
    "rounding": "stochastic",
    "fit": "three_quarters",
    "tokens_kept": (4, 16),
    "outer_block": 64,
    "outer_tokens_kept": (4, 16),
    "outliers": 8,
    "reads": "forward",
}


@pytest.mark.parametrize("name", OTHER)
def test_words_tell_rules_apart(name):
    assert words_of(replace(MXFP4, **{name: OTHER[name]})) != words_of(MXFP4)


def test_words_tell_signs_prescale_and_granularities_apart():
    rotated = replace(MXFP4, max_block=32)
    nvfp4 = OperandRule(**BLOCK_FORMATS["nvfp4"])
    rules = [
        MXFP4,
        rotated,
        replace(rotated, signs=Fixed(1)),
        replace(rotated, signs="per_gemm"),
        nvfp4,
        replace(nvfp4, prescale=False),
        replace(nvfp4, granularity=Granularity("block_2d", 16)),
        replace(nvfp4, fit="four_six"),
        OperandRule("int8"),
        OperandRule("int8", PER_TENSOR),
        OperandRule("bf16"),
    ]
    assert len({tuple(words_of(rule)) for rule in rules}) == len(rules)


def test_every_field_is_told():
    elsewhere = {"signs", "prescale", "outlier_axis"}
    assert {field.name for field in fields(OperandRule)} == set(OTHER) | elsewhere
