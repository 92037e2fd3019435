"""Recipes: the table says what it should, aliases lead to it, a user's own are found."""

from __future__ import annotations

import re

import pytest

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR
from hadagraph.published import BLOCK_FORMATS, ROWS
from hadagraph.recipe_text import recipe_from_toml
from hadagraph.recipes import (
    DEFAULT_RECIPE,
    OPERANDS,
    RECIPES,
    ROLES,
    load_recipe,
    recipe_named,
    recipe_to_toml,
)
from hadagraph.rotation import Fixed
from hadagraph.rules import PER_GEMM

every_recipe = pytest.mark.parametrize("recipe", ROWS, ids=lambda recipe: recipe.name)


def formats_of(name):
    return {role: tuple(rule.format for rule in RECIPES[name].rules(role) or ()) for role in ROLES}


def rules_of(name):
    return [rule for role in ROLES for rule in RECIPES[name].rules(role) or ()]


def test_the_recipes():
    ours = {"bf16", "int8_rotated", "fp8_rowwise", "fp8_tensorwise", "mxfp8", "mxfp6", "mxfp4"}
    halo = {f"halo{level}_{suffix}" for level in (0, 1, 2) for suffix in ("int8", "fp8", "fp6")}
    published = {
        "hot", "hlq", "lbp_wht", "adahop", "adahop_lv2", "fp4_rht_sr", "mxfp4_rht_sr", "quartet",
        "quartet2", "tetrajet", "nvfp4",
    }  # fmt: skip
    assert set(RECIPES) >= ours | halo | published
    assert DEFAULT_RECIPE in RECIPES
    assert formats_of("bf16") == dict.fromkeys(ROLES, ())
    assert formats_of("int8_rotated") == dict.fromkeys(ROLES, ("int8", "int8"))
    assert formats_of("fp8_rowwise") == dict.fromkeys(ROLES, ("fp8_e4m3", "fp8_e4m3"))


def test_tensorwise_fp8_gives_gradients_the_wider_range():
    found = formats_of("fp8_tensorwise")
    for role in ROLES:
        for operand, name in zip(OPERANDS[role], found[role], strict=True):
            assert name == ("fp8_e5m2" if operand == "grad_output" else "fp8_e4m3")


@pytest.mark.parametrize(
    ("name", "granularity", "blocks"),
    [
        ("int8_rotated", PER_KEPT_INDEX, [128, 128, 128, 128, 32, 32]),
        ("fp8_rowwise", PER_KEPT_INDEX, [None] * 6),
        ("fp8_tensorwise", PER_TENSOR, [None] * 6),
        ("halo0", PER_TENSOR, [None] * 6),
        ("halo1", PER_TENSOR, [128, 128, None, None, None, None]),
        ("halo2_fp8", PER_TENSOR, [128, 128, None, None, None, None]),
        ("mxfp4_rht_sr", BLOCK_FORMATS["mxfp4"]["granularity"], [64] * 4),
        ("adahop", BLOCK_FORMATS["mxfp4"]["granularity"], [32] * 6),
    ],
)
def test_granularity_and_inner_rotation(name, granularity, blocks):
    rules = [rule for role in ROLES for rule in recipe_named(name).rules(role) or ()]
    assert [rule.max_block for rule in rules] == blocks
    assert {rule.granularity for rule in rules} == {granularity}


@pytest.mark.parametrize(
    ("level", "outer"), [(0, [None] * 4), (1, [None, 128] * 2), (2, [128, 128, None, 128])]
)
def test_outer_rotations_of_halo(level, outer):
    recipe = RECIPES[f"halo{level}_int8"]
    assert [rule.outer_block for rule in recipe.grad_input + recipe.grad_weight] == outer
    assert [rule.outer_block for rule in recipe.output] == [None, None]


def test_who_rounds_stochastically():
    def stochastic(name):
        return [rule.rounding == "stochastic" for rule in rules_of(name)]

    assert stochastic("hot") == [True, True, False, False]
    assert stochastic("nvfp4") == [False, False, True, False, True, False]
    assert stochastic("quartet") == [False, False, True, True, True, True]
    assert stochastic("tetrajet") == stochastic("quartet2") == stochastic("quartet")
    assert stochastic("mxfp4_rht_sr") == [True] * 4
    assert stochastic("fp4_rht_sr") == [True] * 6


def test_signs():
    assert {rule.signs for rule in RECIPES["nvfp4"].grad_weight} == {Fixed(16)}
    for name in ("mxfp4_rht_sr", "fp4_rht_sr"):
        assert {rule.signs for rule in rules_of(name)} == {PER_GEMM}
    drawn = {name for name in RECIPES if any(rule.signs == PER_GEMM for rule in rules_of(name))}
    assert drawn == {"mxfp4_rht_sr", "fp4_rht_sr", "quartet", "quartet2"}


def test_gradients_of_what_the_forward_quantized():
    for name in ("quartet", "quartet2", "tetrajet"):
        reads = [rule.reads for rule in rules_of(name)]
        assert reads == ["value", "value", "value", "forward", "value", "forward"]
    assert [name for name, recipe in RECIPES.items() if recipe.clip_masked] == ["quartet"]


@every_recipe
def test_every_row_says_where_it_is_from(recipe):
    assert RECIPES[recipe.name] is recipe
    assert recipe.summary and recipe.source
    if recipe.name not in ("bf16", "int8_rotated", "fp8_rowwise", "auto"):
        assert re.search(r"arXiv \d{4}\.\d{5}$", recipe.source)


@every_recipe
def test_every_row_reads_back_from_its_text(recipe):
    assert recipe_from_toml(recipe_to_toml(recipe), recipe_named) == recipe


def test_text_of_the_rows(assert_golden):
    text = "\n".join(f"# {'-' * 70}\n{recipe_to_toml(recipe)}" for recipe in ROWS)
    assert_golden("recipes.txt", text)


def test_aliases():
    assert recipe_named("int8") is RECIPES["int8_rotated"]
    assert recipe_named("fp8") is RECIPES["fp8_rowwise"]
    assert recipe_named("halo2") is RECIPES["halo2_int8"]
    names = [name for r in ROWS for name in (r.name, *r.aliases)]
    assert len(names) == len(set(names))


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match=r"recipe must be one of adahop, .*int8.* got 'nvfp8'"):
        recipe_named("nvfp8")
    with pytest.raises(ValueError, match="option x must be one of"):
        recipe_named("nvfp8", option="option x")


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"role must be one of output, .*got 'dgrad'"):
        RECIPES["bf16"].rules("dgrad")


def test_what_a_recipe_is_loaded_from(tmp_path):
    mine = {"base": "int8_rotated", "grad_input": "bf16"}
    path = tmp_path / "mine.toml"
    path.write_text('base = "int8_rotated"\ngrad_input = "bf16"\n')
    from_mapping, from_file = load_recipe(mine), load_recipe(str(path))
    assert from_mapping.output == RECIPES["int8_rotated"].output
    assert from_mapping.grad_input is None
    assert (from_mapping.name, from_file.name) == ("custom", "mine")
    assert from_file.rules("grad_weight") == from_mapping.rules("grad_weight")
    assert load_recipe(path) == from_file
    assert load_recipe(from_file) is from_file
    assert load_recipe("halo1") is RECIPES["halo1_int8"]


def test_what_no_recipe_is_loaded_from(tmp_path):
    with pytest.raises(ValueError, match=r"option recipe must be a name, a mapping.*got int: 8"):
        load_recipe(8, "option recipe")
    with pytest.raises(ValueError, match=r"option recipe must be a file .*no\.toml.*No such file"):
        load_recipe(tmp_path / "no.toml", "option recipe")
    (tmp_path / "bad.toml").write_text("output = [")
    with pytest.raises(ValueError, match=r"option recipe: recipe 'bad' is not TOML"):
        load_recipe(str(tmp_path / "bad.toml"), "option recipe")
    with pytest.raises(ValueError, match=r"recipe: base must be one of adahop.*got 'int9'"):
        load_recipe({"base": "int9"})
