"""plan_precision: roles, names, rotations and what is saved; every GEMM that stays has a reason."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from strategies import Case, cases, trace_joint
from torch import nn

from hadagraph.config import Config
from hadagraph.dump import graph_lines
from hadagraph.graph import gemms
from hadagraph.passes.normalize import normalize
from hadagraph.passes.plan_precision import plan_precision
from hadagraph.plan import Plan
from hadagraph.rotation import Rotation

ROLES = ("output", "grad_input", "grad_weight")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        self.layers = nn.ModuleList([nn.Linear(48, 64), nn.Linear(64, 32)])
        self.lm_head = nn.Linear(32, 80)

    def forward(self, x):
        h = (self.q(x) * self.k(x)).relu()
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(h)


@pytest.fixture(scope="module")
def block_graph():
    gm = trace_joint(Block(), torch.randn(2, 24, 32, requires_grad=True))
    normalize(gm.graph)
    return gm.graph


def planned(case, **options):
    gm = case.trace()
    normalize(gm.graph)
    return plan_precision(gm.graph, Config(**options))


def fp32(kind="linear", **fields):
    return Case(kind, **{"tokens": 48, "width": 32, "hidden": 64, "dtype": torch.float32, **fields})


def roles(plan):
    return sorted(decision.site.role for decision in plan.decisions)


def only(plan, role):
    (decision,) = [d for d in plan.decisions if d.site.role == role]
    return decision


def test_the_three_gemms_of_a_linear():
    plan = planned(fp32())
    assert all(decision.lowered for decision in plan.decisions)
    found = {
        role: (
            (site := only(plan, role).site).m,
            site.n,
            site.c,
            {site.lhs, site.rhs},
            only(plan, role).lhs.rotation,
        )
        for role in ROLES
    }
    assert found["output"] == ("48", "64", "32", {"input", "weight"}, Rotation(32))
    assert found["grad_input"] == ("48", "32", "64", {"grad_output", "weight"}, Rotation(64))
    assert found["grad_weight"][2:] == ("48", {"grad_output", "input"}, Rotation(16))


def test_what_is_saved():
    plan = planned(fp32())
    for decision in plan.decisions:
        for named, operand in (
            (decision.site.lhs, decision.lhs),
            (decision.site.rhs, decision.rhs),
        ):
            expected = {("grad_weight", "input"): "codes", ("grad_input", "weight"): "recompute"}
            assert operand.saved == expected.get((decision.site.role, named))


@pytest.mark.parametrize("kind", ["linear", "three_dims", "transposed_weight"])
def test_tensorwise_fp8_follows_the_operands_not_the_sides(kind):
    for decision in planned(fp32(kind), recipe="fp8_tensorwise").decisions:
        for named, operand in (
            (decision.site.lhs, decision.lhs),
            (decision.site.rhs, decision.rhs),
        ):
            assert operand.format == ("fp8_e5m2" if named == "grad_output" else "fp8_e4m3")
            assert operand.rotation is None


def test_names_come_from_the_modules_and_tell_q_from_k(block_graph):
    plan = plan_precision(block_graph, Config())
    names = {role: {d.site.name for d in plan.decisions if d.site.role == role} for role in ROLES}
    everything = {"q", "k", "layers.0", "layers.1", "lm_head"}
    assert names == dict.fromkeys(ROLES, everything)
    assert len(plan.decisions) == 15


def test_the_head_stays_unless_it_is_asked_for(block_graph):
    plan = plan_precision(block_graph, Config())
    head = [d for d in plan.decisions if d.site.name == "lm_head"]
    assert {d.reason for d in head} == {"option keep: module path matches 'lm_head'"}
    assert all(d.lowered for d in plan.decisions if d not in head)
    asked = plan_precision(block_graph, Config(overrides=(("lm_head", "fp8_rowwise"),)))
    assert {d.lhs.format for d in asked.decisions if d.site.name == "lm_head"} == {"fp8_e4m3"}


def test_overrides_by_glob_and_role(block_graph):
    overrides = (
        ("layers.*", "fp8_rowwise"),
        ("layers.1:grad_weight", "bf16"),
        ("[qk]:output", "bf16"),
    )
    plan = plan_precision(block_graph, Config(overrides=overrides))
    found = {(d.site.name, d.site.role): d for d in plan.decisions}
    assert found["layers.0", "grad_weight"].lhs.format == "fp8_e4m3"
    reason = "override 'layers.1:grad_weight': bf16 leaves grad_weight as it is"
    assert found["layers.1", "grad_weight"].reason == reason
    assert not found["q", "output"].lowered and not found["k", "output"].lowered
    assert found["q", "grad_input"].lhs.format == "int8"


def test_reasons_are_logged(block_graph, caplog):
    with caplog.at_level(logging.INFO, logger="hadagraph"):
        plan_precision(block_graph, Config(recipe="bf16"))
    for role in ROLES:
        assert f"q {role} stays in high precision: recipe: bf16 leaves {role}" in caplog.text


REASONS = {
    "fp64": (fp32(dtype=torch.float64), {}, "operands are torch.float64 and torch.float64"),
    "few tokens": (fp32(tokens=3), {}, "=3 is below min_size=16"),
    "narrow": (fp32(hidden=2), {}, "=2 is below min_size=16"),
    "min_size": (fp32(), {"min_size": 49}, "is below min_size=49"),
    "recipe": (fp32(), {"recipe": "bf16"}, "recipe: bf16 leaves"),
}


@pytest.mark.parametrize("name", REASONS)
def test_every_gemm_that_stays_has_a_reason(name):
    case, options, reason = REASONS[name]
    for decision in planned(case, **options).decisions:
        assert not decision.lowered and decision.rhs is None
        assert reason in decision.reason


def test_a_device_without_the_instructions_keeps_its_gemms():
    gm = fp32().trace()
    normalize(gm.graph)
    config = Config(recipe="fp8_rowwise")
    for decision in plan_precision(gm.graph, config, (8, 0)).decisions:
        assert decision.reason == "fp8_e4m3 needs compute capability (8, 9), have (8, 0)"
    assert all(d.lowered for d in plan_precision(gm.graph, config, (9, 0)).decisions)


def test_a_tied_head_stays():
    embedding = nn.Embedding(40, 32)
    gm = trace_joint(
        lambda ids: nn.functional.linear(embedding(ids).relu(), embedding.weight),
        torch.randint(0, 40, (24,)),
    )
    normalize(gm.graph)
    plan = plan_precision(gm.graph, Config())
    assert len(plan.decisions) == 3
    assert {d.reason for d in plan.decisions} == {
        "its weight is an embedding's too: a tied language-model head"
    }


def test_inference_graphs_follow_eval():
    gm = trace_joint(nn.Linear(32, 48).requires_grad_(False), torch.randn(24, 32))
    normalize(gm.graph)
    assert only(plan_precision(gm.graph, Config()), "output").lowered
    kept = only(plan_precision(gm.graph, Config(eval="bf16")), "output")
    assert kept.reason == "option eval='bf16'"
    assert only(planned(fp32(), eval="bf16"), "output").lowered


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weight_grad": False}, ["grad_input", "output"]),
        ({"input_grad": False, "bias": False}, ["grad_weight", "output"]),
    ],
)
def test_roles_where_only_one_gradient_is_needed(fields, expected):
    assert roles(planned(fp32(**fields))) == expected


@pytest.mark.parametrize(
    ("kind", "linears"),
    [
        ("qkv", 3),
        ("gate_up", 3),
        ("transposed_weight", 2),
        ("three_dims", 1),
        ("tied", 2),
        ("attention", 4),
    ],
)
def test_every_gemm_finds_its_role(kind, linears):
    found = [role for role in roles(planned(fp32(kind))) if role in ROLES]
    assert sorted(found) == sorted(ROLES * linears)


def test_batched_matmuls_are_listed_with_a_reason():
    left = [d for d in planned(fp32("attention")).decisions if d.site.role == "bmm"]
    assert left and all("batched" in d.reason for d in left)


def test_a_symbolic_batch_takes_the_largest_block():
    plan = planned(fp32(dynamic=True))
    assert only(plan, "grad_weight").lhs.rotation == Rotation(32)  # the recipe's, for tokens
    assert only(plan, "output").lhs.rotation == Rotation(32)
    assert not only(plan, "output").site.m.isdigit()


@given(cases(torch.float32))
@settings(max_examples=10)
def test_an_analysis_that_decides_every_gemm_and_changes_nothing(case):
    gm = case.trace()
    normalize(gm.graph)
    before = graph_lines(gm.graph)
    plan = plan_precision(gm.graph, Config())
    assert graph_lines(gm.graph) == before
    decided = [d.site.node for d in plan.decisions]
    names = [node.name for node in gemms(gm.graph)]
    assert decided[: len(names)] == names
    assert all(d.reason for d in plan.decisions[len(names) :])
    for decision in plan.decisions:
        assert decision.lowered == (decision.reason is None)
        if decision.lowered:
            assert decision.lhs.rotation == decision.rhs.rotation
    assert Plan.from_json(plan.to_json()) == plan
