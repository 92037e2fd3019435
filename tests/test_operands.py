"""From rules to plans: rotations and streams made concrete, what the forward's codes imply, what a
device emulates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hadagraph.formats import PER_TENSOR, Granularity
from hadagraph.operands import has_native_gemm, operand_plans, stream_name
from hadagraph.plan import Decision, GemmSite, Plan, treatment
from hadagraph.recipes import PER_GEMM, RECIPES, OperandRule
from hadagraph.rotation import Fixed, PerStep, Rotation

INT8 = OperandRule("int8")
FP8 = OperandRule("fp8_e4m3")
MXFP4 = OperandRule("fp4_e2m1", Granularity("block_contracted", 32), scale="e8m0")
NVFP4 = OperandRule("fp4_e2m1", Granularity("block_contracted", 16), scale="ue4m3", prescale=True)


def site(role="output", name="block.0.up"):
    left, right = {
        "output": ("input", "weight"),
        "grad_input": ("grad_output", "weight"),
        "grad_weight": ("grad_output", "input"),
    }[role]
    return GemmSite(name, role, "gemm", "96", "80", "48", "bfloat16", left, right)


def plans(left, right=None, role="output", capability=None, **more):
    pair = (left, right or left)
    return operand_plans(pair, site(role), (96, 80), 48, capability, **more)


def test_blocks_divide_the_dims():
    left, right = plans(replace(INT8, max_block=128, outer_block=64, signs=Fixed(2)))
    assert left.rotation == right.rotation == Rotation(16, Fixed(2))  # 48 = 3 x 16
    assert (left.outer, right.outer) == (Rotation(32), Rotation(16))  # 96 = 3 x 32, 80 = 5 x 16


def test_signs_of_a_gemm_are_a_stream_of_its_own():
    rule = replace(INT8, max_block=16, signs=PER_GEMM)
    left, right = plans(rule)
    assert left.rotation == right.rotation == Rotation(16, PerStep("block.0.up.output"))
    other = stream_name(site("grad_input", "block#1.up"))
    assert other == "block_1.up.grad_input"
    assert Rotation.parse(str(Rotation(16, PerStep(other)))).signs.stream == other


def test_what_reads_the_forward_is_in_its_basis():
    forward = Decision(site(), *plans(replace(MXFP4, max_block=16)))
    rule = replace(MXFP4, reads="forward")
    left, right = plans(MXFP4, rule, role="grad_input", forward=forward)
    assert (left.outer, right.outer) == (None, Rotation(16))
    assert plans(MXFP4, rule, role="grad_input", forward=Decision(site()))[1].outer is None


@pytest.mark.parametrize(
    "weight",
    [
        replace(MXFP4, outer_block=16),
        replace(MXFP4, outliers=4),
        OperandRule("bf16", outer_tokens_kept=(8, 16)),
    ],
)
def test_codes_that_are_not_all_of_a_tensor_are_not_read(weight):
    """An override may give the forward any rules."""
    forward = Decision(site(), *plans(weight))
    rule = replace(MXFP4, reads="forward")
    _, right = plans(MXFP4, rule, role="grad_input", forward=forward)
    assert (right.reads, right.outer) == ("value", None)


def test_only_the_forward_is_masked():
    assert all(plan.clip_masked for plan in plans(MXFP4, clip_masked=True))
    for role in ("grad_input", "grad_weight"):
        assert not any(plan.clip_masked for plan in plans(MXFP4, role=role, clip_masked=True))


def test_what_is_saved():
    assert [p.saved for p in plans(MXFP4)] == [None, None]
    assert [p.saved for p in plans(MXFP4, role="grad_input")] == [None, "recompute"]
    assert [p.saved for p in plans(MXFP4, role="grad_weight")] == [None, "codes"]


@pytest.mark.parametrize(
    ("left", "right", "capability", "native"),
    [
        (INT8, INT8, (9, 0), True),
        (INT8, INT8, None, True),
        (replace(INT8, rounding="stochastic"), INT8, (9, 0), True),
        (OperandRule("int4"), INT8, (9, 0), False),
        (MXFP4, MXFP4, (9, 0), False),
        (MXFP4, MXFP4, None, False),
        (MXFP4, MXFP4, (10, 0), True),
        (NVFP4, NVFP4, (12, 0), True),
        (NVFP4, MXFP4, (10, 0), False),
        (OperandRule("fp6_e2m3", MXFP4.granularity, scale="e8m0"),) * 2 + ((10, 0), False),
        (replace(FP8, rounding="stochastic"), FP8, (8, 0), False),
        (replace(FP8, rounding="stochastic"), FP8, (8, 9), True),
        (OperandRule("bf16"), OperandRule("bf16"), (8, 0), True),
    ],
)
def test_emulated(left, right, capability, native):
    one, other = plans(left, right, capability=capability)
    assert has_native_gemm(one, other, capability) == native
    assert one.emulated == other.emulated == (not native)


def test_plans_survive_json():
    for recipe in RECIPES.values():
        decisions = []
        for role in ("output", "grad_input", "grad_weight"):
            pair = recipe.rules(role)
            if pair is not None:
                forward = decisions[0] if decisions and role != "output" else None
                found = operand_plans(pair, site(role), (96, 80), 48, (9, 0), forward)
                decisions.append(Decision(site(role), *found, forward=forward and "gemm"))
        plan = Plan(recipe.name, tuple(decisions))
        assert Plan.from_json(plan.to_json()) == plan


def test_a_treatment_says_everything():
    rule = replace(
        MXFP4, max_block=16, outer_block=16, outliers=3, rounding="stochastic", signs=PER_GEMM
    )
    text = treatment(plans(rule, capability=(9, 0))[0])
    assert text == (
        "fp4_e2m1/block_contracted(32)/h16:per_step(block.0.up.output)/e8m0/stochastic, outer h16, "
        "3 kept outliers in high precision, emulated"
    )
    kept = OperandRule("bf16", tokens_kept=(8, 16))
    assert treatment(plans(kept)[0]) == "bf16, keep8of16"
    assert treatment(plans(OperandRule("int8", PER_TENSOR))[0]) == "int8/per_tensor"
