"""Recipes: the table says what it should, aliases lead to it, impossible rows are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Encoding, format_named
from hadagraph.recipes import (
    DEFAULT_RECIPE,
    OPERANDS,
    RECIPES,
    ROLES,
    OperandRule,
    Recipe,
    recipe_named,
)
from hadagraph.rotation import Fixed


def formats_of(name):
    return {role: tuple(rule.format for rule in RECIPES[name].rules(role) or ()) for role in ROLES}


def test_the_recipes():
    assert set(RECIPES) == {"bf16", "int8_rotated", "fp8_rowwise", "fp8_tensorwise"}
    assert DEFAULT_RECIPE == "int8_rotated"
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
    ],
)
def test_granularity_and_rotation(name, granularity, blocks):
    rules = [rule for role in ROLES for rule in RECIPES[name].rules(role)]
    assert [rule.max_block for rule in rules] == blocks
    assert {rule.granularity for rule in rules} == {granularity}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_every_row_is_complete_and_can_be_carried_out(recipe):
    assert RECIPES[recipe.name] is recipe
    assert recipe.summary and recipe.source
    for role in ROLES:
        for rule in recipe.rules(role) or ():
            Encoding(rule.format, rule.granularity)


def test_aliases():
    assert recipe_named("int8") is RECIPES["int8_rotated"]
    assert recipe_named("fp8") is RECIPES["fp8_rowwise"]
    names = [name for r in RECIPES.values() for name in (r.name, *r.aliases)]
    assert len(names) == len(set(names))


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match=r"recipe must be one of bf16, .*int8.* got 'nvfp4'"):
        recipe_named("nvfp4")
    with pytest.raises(ValueError, match="option x must be one of"):
        recipe_named("nvfp4", option="option x")


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"role must be one of output, .*got 'dgrad'"):
        RECIPES["bf16"].rules("dgrad")


RULE = OperandRule("int8", PER_KEPT_INDEX, 64)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "other",
    [replace(RULE, max_block=None), replace(RULE, max_block=32), replace(RULE, signs=Fixed(1))],
)
def test_rotations_that_would_not_cancel_are_refused(role, other):
    with pytest.raises(ValueError, match=f"'bad', role '{role}': the inner rotation must be"):
        Recipe("bad", "", "", **{role: (RULE, other)})


def test_products_that_no_gemm_computes_are_refused():
    with pytest.raises(ValueError, match="no GEMM multiplies int8 by fp8_e4m3"):
        Recipe("bad", "", "", output=(RULE, replace(RULE, format="fp8_e4m3")))


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="format must be one of"):
        OperandRule("int4", PER_TENSOR)
    assert format_named("int8").name == "int8"
