"""Plans: JSON there and back, look-up by node, and the table's cells."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Granularity
from hadagraph.plan import PLAN_COLUMNS, Decision, GemmSite, OperandPlan, Plan, plan_rows
from hadagraph.rotation import Fixed, PerStep, Rotation

text = st.text(max_size=8)
sites = st.builds(GemmSite, *[text] * 9)
signs = st.sampled_from((None, Fixed(3), PerStep("layers.0")))
operands = st.builds(
    OperandPlan,
    format=st.sampled_from(("int8", "fp8_e4m3", "bf16")),
    granularity=st.sampled_from((PER_TENSOR, PER_KEPT_INDEX, Granularity("block_2d", 128))),
    rotation=st.one_of(st.none(), st.builds(Rotation, st.sampled_from((16, 128)), signs)),
    rotation_place=st.sampled_from(("inner", "outer")),
    rounding=st.sampled_from(("nearest", "stochastic")),
    prescale=st.booleans(),
    outliers=st.integers(0, 64),
    tokens_kept=st.one_of(st.none(), st.tuples(st.integers(1, 8), st.integers(8, 16))),
    saved=st.sampled_from((None, "codes", "recompute")),
)
decisions = st.one_of(
    st.builds(Decision, sites, operands, operands),
    st.builds(Decision, sites, reason=text),
)
plans = st.builds(Plan, text, st.lists(decisions, max_size=3).map(tuple))


@given(plans)
def test_json_round_trip(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["recipe"] == plan.recipe


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
