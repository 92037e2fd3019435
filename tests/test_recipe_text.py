"""A recipe of one's own: shorthands, what is taken from the base, refusals that name the place."""

from __future__ import annotations

import pytest

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Granularity
from hadagraph.published import BLOCK_FORMATS
from hadagraph.recipe_text import recipe_from_mapping, recipe_from_toml, recipe_to_mapping
from hadagraph.recipes import RECIPES, load_recipe, recipe_named
from hadagraph.rotation import Fixed, PerStep
from hadagraph.rules import OperandRule, Recipe

TOML = """
name = "mine"
summary = "weights and gradients apart"
source = "me"

[output]
left = "mxfp8"
right = {format = "mxfp6", fit = "ceil"}

[grad_input]
format = "int8"
granularity = "per_tensor"
max_block = 64
signs = "per_step(mine)"
right.granularity = "per_kept_index"
left.outer_block = 128

[grad_weight]
format = "nvfp4"
max_block = 16
signs = "fixed(3)"
left.rounding = "stochastic"
right.granularity = "block_2d(16)"
right.outliers = 4
right.outlier_axis = "contracted"
"""


def test_a_recipe_in_toml():
    nvfp4 = BLOCK_FORMATS["nvfp4"] | {"max_block": 16, "signs": Fixed(3)}
    int8 = {"format": "int8", "max_block": 64, "signs": PerStep("mine")}
    tiles = Granularity("block_2d", 16)
    want = Recipe(
        "mine",
        "weights and gradients apart",
        "me",
        output=(
            OperandRule(**BLOCK_FORMATS["mxfp8"]),
            OperandRule(**BLOCK_FORMATS["mxfp6"], fit="ceil"),
        ),
        grad_input=(
            OperandRule(**int8, granularity=PER_TENSOR, outer_block=128),
            OperandRule(**int8, granularity=PER_KEPT_INDEX),
        ),
        grad_weight=(
            OperandRule(**nvfp4, rounding="stochastic"),
            OperandRule(**(nvfp4 | {"granularity": tiles}), outliers=4, outlier_axis="contracted"),
        ),
    )
    assert recipe_from_toml(TOML, recipe_named) == want
    assert recipe_from_mapping(recipe_to_mapping(want), recipe_named) == want


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_the_name_of_a_block_format_is_a_whole_rule(name):
    made = load_recipe({"output": name})
    assert made.output == (OperandRule(**BLOCK_FORMATS[name]),) * 2
    assert made.grad_input is None and made.grad_weight is None
    assert recipe_to_mapping(made)["output"] == {"format": name}


def test_what_is_not_said_stays_as_in_the_base():
    base = RECIPES["hot"]
    made = load_recipe(
        {
            "base": "hot",
            "output": "mxfp8",
            "grad_input": {"left": {"granularity": "per_kept_index"}, "rounding": "nearest"},
        }
    )
    assert made.grad_weight == base.grad_weight
    assert (made.select, made.source) == ("lqs", base.source)
    left, right = made.grad_input
    assert left == OperandRule("int4", PER_KEPT_INDEX, max_block=16)
    assert right == OperandRule("int4", PER_TENSOR, max_block=16)
    assert made.aliases == ()


def test_a_new_format_takes_its_granularity_along_and_none_takes_away():
    made = load_recipe({"base": "int8", "output": {"format": "mxfp4", "max_block": "none"}})
    assert made.output == (OperandRule(**BLOCK_FORMATS["mxfp4"]),) * 2
    made = load_recipe({"base": "int8", "output": {"format": "mxfp4", "max_block": None}})
    assert made.output == (OperandRule(**BLOCK_FORMATS["mxfp4"]),) * 2
    kept = load_recipe({"base": "nvfp4", "select": "", "grad_weight": {"signs": "none"}})
    assert [rule.signs for rule in kept.grad_weight] == [None, None]
    assert kept.grad_weight[0].max_block == 16


REFUSED = [
    ({"outputs": {}}, r"recipe 'custom': unknown field 'outputs' \(did you mean 'output'\?\)"),
    ({"name": 3}, "recipe 3: name must be str, got 3"),
    ({"clip_masked": 1}, "recipe 'custom': clip_masked must be bool, got 1"),
    ({"output": 8}, "role 'output' must be a format or a table, got 8"),
    ({"output": "int9"}, "role 'output', left operand: format must be one of .*nvfp4, got 'int9'"),
    ({"output": {"left": 3, "right": "int8"}}, "left operand must be a format or a table, got 3"),
    (
        {"output": {"left": "int8"}},
        "role 'output', right operand needs a format: one of bf16, int8",
    ),
    (
        {"output": {"format": "int8", "right": {"roundng": "nearest"}}},
        r"right operand: unknown field 'roundng' \(did you mean 'rounding'\?\)",
    ),
    (
        {"output": {"format": "int8", "rounding": "up"}},
        "role 'output', left operand: rounding of an encoding must be one of nearest",
    ),
    ({"output": {"format": "int8", "rounding": 1}}, "rounding must be text, got 1"),
    (
        {"output": {"format": "int8", "max_block": "32"}},
        "max_block must be a whole number or 'none'",
    ),
    (
        {"output": {"format": "int8", "max_block": True}},
        "max_block must be a whole number or 'none'",
    ),
    ({"output": {"format": "int8", "prescale": 1}}, "prescale must be true or false, got 1"),
    (
        {"output": {"format": "int8", "granularity": "per_row"}},
        "left operand: granularity must be one of per_tensor, .*got 'per_row'",
    ),
    ({"output": {"format": "int8", "granularity": 3}}, "granularity must be text like"),
    (
        {"output": {"format": "int8", "max_block": 16, "signs": "random"}},
        "signs must be 'none', 'per_gemm', 'fixed.<seed>.' or 'per_step.<stream>.', got 'random'",
    ),
    (
        {"grad_weight": {"format": "int8", "tokens_kept": [8]}},
        r"tokens_kept must be two whole numbers \[r, b\] or 'none', got \[8\]",
    ),
    (
        {"grad_weight": {"format": "int8", "tokens_kept": [8, 16.0]}},
        r"tokens_kept must be two whole numbers",
    ),
]


@pytest.mark.parametrize(("mapping", "message"), REFUSED)
def test_refusals_name_the_place(mapping, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(mapping, "option recipe")
    assert str(caught.value).startswith("option recipe: recipe ")
