"""Plans: JSON there and back, look-up by node, and the table's cells."""

from __future__ import annotations

import json
from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from hadagraph.formats import (
    FITS,
    FORMATS,
    PER_KEPT_INDEX,
    PER_TENSOR,
    ROUNDINGS,
    SCALE_FORMATS,
    Encoding,
    Granularity,
)
from hadagraph.plan import PLAN_COLUMNS, Decision, GemmSite, OperandPlan, Plan, plan_rows
from hadagraph.rotation import Fixed, PerStep, Rotation
from hadagraph.rules import AXES, READS

text = st.text(max_size=8)
sites = st.builds(GemmSite, *[text] * 9)
signs = st.sampled_from((None, Fixed(3), PerStep("layers.0")))
rotations = st.one_of(st.none(), st.builds(Rotation, st.sampled_from((16, 128)), signs))
kept = st.one_of(st.none(), st.tuples(st.integers(1, 8), st.integers(8, 16)))
FIELDS = {
    "format": st.sampled_from(tuple(FORMATS)),
    "granularity": st.sampled_from((PER_TENSOR, PER_KEPT_INDEX, Granularity("block_2d", 128))),
    "rotation": rotations,
    "scale": st.sampled_from(tuple(SCALE_FORMATS)),
    "rounding": st.sampled_from(ROUNDINGS),
    "fit": st.sampled_from(FITS),
    "prescale": st.booleans(),
    "tokens_kept": kept,
    "outer": rotations,
    "outer_tokens_kept": kept,
    "outliers": st.integers(0, 64),
    "outlier_axis": st.sampled_from(AXES),
    "reads": st.sampled_from(READS),
    "clip_masked": st.booleans(),
    "saved": st.sampled_from((None, "codes", "recompute")),
    "emulated": st.booleans(),
}
operands = st.builds(OperandPlan, **FIELDS)
decisions = st.one_of(
    st.builds(Decision, sites, operands, operands, asked=st.booleans(), why=text, forward=text),
    st.builds(Decision, sites, reason=text),
)
plans = st.builds(Plan, text, st.lists(decisions, max_size=3).map(tuple))


@given(plans)
def test_json_round_trip(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["recipe"] == plan.recipe


def test_every_field_of_an_operand_is_drawn():
    assert set(FIELDS) == {each.name for each in fields(OperandPlan)}


def test_the_encoding_is_of_all_its_fields():
    kept = OperandPlan("int4", PER_TENSOR, rounding="stochastic", tokens_kept=(8, 16))
    assert kept.encoding == Encoding.parse("int4/per_tensor/stochastic/keep8of16")
    text = "fp4_e2m1/block_contracted(16)/h16:fixed(3)/ue4m3/four_six/prescale"
    made = Encoding.parse(text)
    plan = OperandPlan(
        made.format,
        made.granularity,
        made.rotation,
        made.scale,
        fit=made.fit,
        prescale=made.prescale,
    )
    assert plan.encoding == made


SITE = GemmSite("mlp.up", "output", "gemm", "s0", "64", "32", "bfloat16", "input", "weight")
INT8 = OperandPlan("int8", PER_KEPT_INDEX, Rotation(32), saved="codes")


def test_by_node():
    decision = Decision(SITE, INT8, INT8)
    assert Plan("int8", (decision,)).by_node() == {"gemm": decision}


def test_lowered_means_that_there_is_a_plan():
    assert Decision(SITE, INT8, INT8).lowered
    assert not Decision(SITE, reason="too small").lowered


def test_rows():
    weight = OperandPlan("int8", PER_TENSOR, saved="recompute")
    site = GemmSite("", *list(vars(SITE).values())[1:])
    rows = plan_rows([Decision(SITE, INT8, weight), Decision(site, reason="too small")])
    assert rows == [
        (
            "mlp.up",
            "output",
            "s0",
            "64",
            "32",
            "input int8/per_kept_index/h32",
            "weight int8/per_tensor",
            "input: codes, weight: recompute",
            "",
        ),
        ("(no module)", "output", "s0", "64", "32", "input", "weight", "", "too small"),
    ]
    assert all(len(row) == len(PLAN_COLUMNS) for row in rows)
