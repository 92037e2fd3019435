"""Rules of recipes: what no GEMM can carry out is refused, with recipe, role, field and value."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Granularity
from hadagraph.rotation import Fixed
from hadagraph.rules import PER_GEMM, ROLES, OperandRule, Recipe

RULE = OperandRule("int8", PER_KEPT_INDEX, 64)
PLAIN = OperandRule("int8")
MXFP4 = OperandRule("fp4_e2m1", Granularity("block_contracted", 32), scale="e8m0")
CLIPPED = replace(MXFP4, max_block=32, fit="mse")
FORWARD = replace(MXFP4, max_block=32, reads="forward")
VALUE = replace(FORWARD, reads="value")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "other",
    [replace(RULE, max_block=None), replace(RULE, max_block=32), replace(RULE, signs=Fixed(1))],
)
def test_rotations_that_would_not_cancel_are_refused(role, other):
    with pytest.raises(ValueError, match=f"'bad', role '{role}': the inner rotation must be"):
        Recipe("bad", "", "", **{role: (RULE, other)})


RULES_REFUSED = [
    ({"format": "int3"}, "format must be one of bf16, int8, .*got 'int3'"),
    ({"granularity": "per_tensor"}, "granularity must be a Granularity, got 'per_tensor'"),
    ({"max_block": 48}, "max_block must be None or one of 16, 32, 64, 128, got 48"),
    ({"max_block": 256}, "max_block must be None or one of .*got 256"),
    ({"outer_block": 8}, "outer_block must be None or one of .*got 8"),
    ({"outer_block": True}, "outer_block must be None or one of .*got True"),
    ({"signs": Fixed(1)}, r"signs=Fixed\(seed=1\) are those of the inner rotation, but max_block"),
    ({"signs": "random", "max_block": 32}, "signs must be None.*got 'random'"),
    ({"scale": "e4m3"}, "scale format of an encoding must be one of fp32, e8m0, .*got 'e4m3'"),
    ({"scale": "e8m0"}, "scale format e8m0 is for block granularities, got per_kept_index"),
    ({"prescale": True}, "prescale is for scales of few exponents, got scale format fp32"),
    ({"rounding": "up"}, "rounding of an encoding must be one of nearest, stochastic, got 'up'"),
    ({"fit": "best"}, "fit of an encoding must be one of amax, .*got 'best'"),
    ({"fit": "ceil"}, "fit='ceil' is about how scales are rounded, and scale='fp32' rounds none"),
    ({"fit": "four_six"}, "fit='four_six' is about how scales are rounded"),
    ({"outliers": -1}, "outliers must be a number of indices, at least 0, got -1"),
    ({"outliers": True}, "outliers must be a number of indices, at least 0, got True"),
    ({"outlier_axis": "rows"}, "outlier_axis must be one of kept, contracted, got 'rows'"),
    ({"reads": "codes"}, "reads must be one of value, forward, got 'codes'"),
    ({"tokens_kept": (17, 16)}, r"tokens_kept must be \(r, b\) with 0 < r <= b .*got \(17, 16\)"),
    ({"tokens_kept": (3, 12)}, r"b one of 16, 32, 64, 128, got \(3, 12\)"),
    ({"outer_tokens_kept": (0, 16)}, r"outer_tokens_kept must be \(r, b\) .*got \(0, 16\)"),
    (
        {"tokens_kept": (8, 16), "max_block": 16},
        r"tokens_kept=\(8, 16\) projects, and allows no rotation besides: max_block=16",
    ),
    (
        {"outer_tokens_kept": (8, 16), "outer_block": 16},
        "projects, and allows no rotation besides: outer_block=16",
    ),
    ({"format": "bf16", "max_block": 32}, "max_block=32 is for quantized formats .*format='bf16'"),
    ({"format": "bf16", "outliers": 4}, "outliers=4 is for quantized formats .*format='bf16'"),
    (
        {"format": "bf16", "rounding": "stochastic"},
        "rounding='stochastic' is for quantized formats .*format='bf16'",
    ),
    (
        {"fit": "four_six", "granularity": Granularity("block_contracted", 16), "scale": "ue4m3"},
        "fit four_six is for fp4_e2m1, got int8",
    ),
]


@pytest.mark.parametrize(
    ("fields", "message"), RULES_REFUSED, ids=[str(f) for f, _ in RULES_REFUSED]
)
def test_a_rule_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OperandRule(**{"format": "int8", **fields})


KEPT = OperandRule("int8", tokens_kept=(8, 16))
RECIPES_REFUSED = [
    (
        {"output": (RULE, replace(RULE, format="fp8_e4m3"))},
        "role 'output': no GEMM multiplies int8 by fp8_e4m3; use two integer or two",
    ),
    (
        {"grad_input": (OperandRule("bf16"), PLAIN)},
        "role 'grad_input': no GEMM multiplies bf16 by int8; quantize both operands or none",
    ),
    (
        {"grad_weight": (KEPT, PLAIN)},
        r"role 'grad_weight': tokens_kept must be the same .*got \(8, 16\) and None",
    ),
    (
        {"output": (KEPT, KEPT)},
        r"role 'output': tokens_kept=\(8, 16\) projects tokens .*only 'grad_weight' contracts",
    ),
    (
        {"grad_input": (PLAIN, replace(PLAIN, outer_tokens_kept=(8, 16)))},
        "outer_tokens_kept.* of the right operand: weight keeps no tokens here",
    ),
    (
        {"grad_weight": (replace(PLAIN, outer_tokens_kept=(8, 16)), PLAIN)},
        "outer_tokens_kept.* of the left operand: grad_output keeps no tokens here",
    ),
    (
        {"output": (replace(PLAIN, outliers=4), replace(PLAIN, outer_block=64))},
        "role 'output': outliers=4 go through a GEMM of their own .*outer_block must be None",
    ),
    (
        {"output": (replace(PLAIN, reads="forward"), PLAIN)},
        "reads='forward' of the left operand: input of output is not among what the forward",
    ),
    (
        {"output": (PLAIN, PLAIN), "grad_input": (replace(PLAIN, reads="forward"), PLAIN)},
        "reads='forward' of the left operand: grad_output of grad_input is not among",
    ),
    (
        {"grad_input": (PLAIN, replace(PLAIN, reads="forward"))},
        "reads='forward' of the right operand needs rules for 'output' that quantize its weight",
    ),
    (
        {
            "output": (VALUE, VALUE),
            "grad_input": (VALUE, replace(FORWARD, outer_block=32)),
        },
        "role 'grad_input': outer_block=32 of the right operand: what the forward made of it is",
    ),
    (  # also where the forward did not rotate
        {
            "output": (PLAIN, PLAIN),
            "grad_input": (PLAIN, replace(PLAIN, reads="forward", outer_block=32)),
        },
        "role 'grad_input': outer_block=32 of the right operand: what the forward made of it is",
    ),
    (
        {
            "output": (VALUE, replace(VALUE, outliers=4)),
            "grad_input": (VALUE, FORWARD),
        },
        "role 'grad_input': reads='forward' .*: codes alone are read, so outliers .*got 4",
    ),
    (
        {
            "output": (VALUE, replace(VALUE, outer_block=64)),
            "grad_input": (VALUE, FORWARD),
        },
        "role 'grad_input': reads='forward' .*so outer_block of its weight in 'output' must",
    ),
    ({"select": "best"}, "select must be one of '', 'adahop', 'adahop_lv2', 'lqs', got 'best'"),
    (
        {"clip_masked": True, "output": (RULE, RULE)},
        "clip_masked=True needs an output operand that is clipped: fit='mse'",
    ),
    ({"clip_masked": True}, "clip_masked=True needs an output operand that is clipped"),
    (
        {
            "clip_masked": True,
            "output": (CLIPPED, CLIPPED),
            "grad_input": (VALUE, VALUE),
            "grad_weight": (VALUE, FORWARD),
        },
        "the right operand of grad_input must have reads='forward', got OperandRule",
    ),
    (
        {
            "clip_masked": True,
            "output": (CLIPPED, CLIPPED),
            "grad_input": (VALUE, FORWARD),
        },
        "the right operand of grad_weight must have reads='forward', got None",
    ),
    ({"name": "my recipe"}, "name of a recipe must be letters, digits, .*got 'my recipe'"),
]


@pytest.mark.parametrize(("fields", "message"), RECIPES_REFUSED)
def test_rules_that_no_gemm_carries_out_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe(**{"name": "bad", "summary": "", "source": "", **fields})
    assert re.match("recipe 'bad'|name of a recipe", str(caught.value))


def test_what_is_allowed():
    made = Recipe(
        "fine", "", "",
        output=(CLIPPED, CLIPPED),
        grad_input=(VALUE, FORWARD),
        grad_weight=(replace(VALUE, signs=PER_GEMM), replace(FORWARD, signs=PER_GEMM)),
        clip_masked=True,
    )  # fmt: skip
    assert made.rule_of_forward("weight") == CLIPPED
    int4_by_int8 = OperandRule("int4", PER_TENSOR), OperandRule("int8", PER_TENSOR)
    assert Recipe("mixed", "", "", output=int4_by_int8).rule_of_forward("input") == int4_by_int8[0]
