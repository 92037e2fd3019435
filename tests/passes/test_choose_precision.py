"""choose_precision: candidates become one treatment or high precision, with the reason; times come
from the profile, precisions from priors or a calibration; alike layers are decided alike."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from strategies import trace_joint
from torch import nn
from torch._subclasses import FakeTensorMode

from hadagraph import alternatives
from hadagraph.config import Config
from hadagraph.device import CHIPS
from hadagraph.dump import graph_lines
from hadagraph.error import prior_sqnr
from hadagraph.passes import PassState, run_pipeline
from hadagraph.passes.choose_precision import choose_precision
from hadagraph.passes.never_slower import never_slower
from hadagraph.passes.normalize import normalize
from hadagraph.passes.plan_precision import plan_precision
from hadagraph.plan import Plan
from hadagraph.verify import verify

H200, B200 = CHIPS["H200"], CHIPS["B200"]


def planned(layers=2, tokens=16384, width=4096, hidden=14336, **options):
    """The normalized joint graph in bf16, without data, and its plan with candidates."""
    config = Config(recipe="auto", keep=(), **options)
    target = CHIPS[config.target] if config.target else H200
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            blocks = [
                nn.Sequential(
                    nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width)
                )
                for _ in range(layers)
            ]
            model = nn.Sequential(*blocks)
            x = torch.empty(tokens, width, requires_grad=True)
            gm = trace_joint(model, x)
        finally:
            torch.set_default_dtype(torch.float32)
    normalize(gm.graph)
    return gm.graph, plan_precision(gm.graph, config, target.capability)


@pytest.fixture(scope="module")
def large():
    return planned()


def encodings(plan):
    return {str(d.lhs.encoding) if d.lowered else "bf16" for d in plan.decisions}


def test_the_graph_is_left_alone_and_every_gemm_has_its_reason(large):
    graph, plan = large
    before = graph_lines(graph)
    chosen = choose_precision(graph, plan, H200, budget=30.0)
    assert graph_lines(graph) == before
    assert encodings(chosen) == {"int8/per_kept_index/h128", "int8/per_kept_index/h32"}
    for decision in chosen.decisions:
        assert decision.reason is None and not decision.candidates
        assert decision.why.startswith("int8 h"), decision.why
        assert "dB < 30 dB, " in decision.why and "high precision, +" in decision.why
    assert chosen.note == "auto: every GEMM at 30 dB or more, predicted by priors (no calibration)"
    assert Plan.from_json(chosen.to_json()) == chosen


def test_the_same_as_int8_rotated_without_a_profile(large):
    """So that nothing changes where nothing is known."""
    graph, plan = large
    chosen = choose_precision(graph, plan, None, budget=30.0)
    fixed = plan_precision(graph, Config(recipe="int8_rotated", keep=()), (9, 0))
    for mine, theirs in zip(chosen.decisions, fixed.decisions, strict=True):
        assert (mine.lhs, mine.rhs) == (theirs.lhs, theirs.rhs)


def test_below_the_budget_everything_stays(large):
    graph, plan = large
    chosen = choose_precision(graph, plan, H200, budget=45.0)
    assert encodings(chosen) == {"bf16"}
    for decision in chosen.decisions:
        assert decision.reason.startswith("nothing else reaches the error budget: high precision, ")
        assert "< 45 dB" in decision.reason


def test_a_low_budget_takes_fp8_where_it_is_faster(large):
    graph, plan = large
    rate = H200.gemm("fp8")
    fast = replace(rate, tflops=1.3 * rate.tflops, sustained=1.3 * rate.sustained)
    profile = replace(H200, gemms=(H200.gemm("bf16"), H200.gemm("int8"), fast))
    chosen = choose_precision(graph, plan, profile, budget=24.0)
    assert encodings(chosen) == {"fp8_e4m3/per_kept_index"}
    chosen = choose_precision(graph, plan, profile, budget=15.0)
    assert encodings(chosen) <= {
        "fp8_e4m3/per_kept_index", "fp8_e4m3/per_tensor", "fp8_e5m2/per_tensor",
        "int8/per_kept_index",
    }  # fmt: skip


class Statistics:
    """A calibration that has seen the sites of one name."""

    def __init__(self, name, role):
        self.key = name, role

    def site(self, name, role, lhs=None):
        return self if (name, role) == self.key else None


def test_recipes_come_in_the_order_that_was_measured(large):
    """bench/results/auto.json, 8B-shaped blocks: int8_rotated before fp8_rowwise before
    fp8_tensorwise, by 2 % in all; so that `auto` at 24 dB takes none that loses to int8_rotated."""
    graph, plan = large
    us = {}
    for recipe in ("int8_rotated", "fp8_rowwise", "fp8_tensorwise"):
        fixed = plan_precision(graph, Config(recipe=recipe, keep=()), (9, 0))
        us[recipe] = never_slower(graph, fixed, H200).predicted.all_us
    assert us["int8_rotated"] < us["fp8_rowwise"] < us["fp8_tensorwise"]
    chosen = never_slower(graph, choose_precision(graph, plan, H200, budget=24.0), H200)
    assert chosen.predicted.us <= us["int8_rotated"]


def test_a_calibration_decides_per_site(large, monkeypatch):
    """One GEMM's outliers lie along the rotated dim: its rotation is left out, all others' kept."""

    def measured(site, lhs, rhs):
        return 25.1 if lhs.rotation else 31.0 if lhs.format == "int8" else 28.0

    monkeypatch.setattr(alternatives, "predicted_sqnr", measured)
    graph, plan = large
    chosen = choose_precision(
        graph, plan, H200, budget=30.0, statistics=Statistics("1.0", "grad_weight")
    )
    unrotated = [d for d in chosen.decisions if d.lhs.rotation is None]
    ((name, role),) = {(d.site.name, d.site.role) for d in unrotated}
    assert (name, role) == ("1.0", "grad_weight")
    assert unrotated[0].why.startswith("int8 unrotated 31.0 dB, ")
    assert chosen.note.endswith("predicted from a calibration, 11 of 12 GEMMs by priors")


def test_a_better_rotation_is_taken_where_it_is_clearly_better(large, monkeypatch):
    def measured(site, lhs, rhs):
        block = lhs.rotation.block if lhs.rotation else 0
        return {16: 39.0, 32: 36.0, 64: 35.0, 128: 34.0}.get(block, 20.0)

    monkeypatch.setattr(alternatives, "predicted_sqnr", measured)
    graph, plan = large
    chosen = choose_precision(
        graph, plan, H200, budget=30.0, statistics=Statistics("0.2", "output")
    )
    blocks = {d.lhs.rotation.block for d in chosen.decisions if d.site.role == "output"}
    assert blocks == {128, 16}


def test_what_was_asked_for_is_not_chosen_again():
    graph, plan = planned(layers=1, overrides=(("0.0", "fp8_tensorwise"), ("0.2:output", "bf16")))
    chosen = choose_precision(graph, plan, H200, budget=30.0)
    by_site = {(d.site.name, d.site.role): d for d in chosen.decisions}
    for role in ("output", "grad_input", "grad_weight"):
        decision = by_site["0.0", role]
        assert decision.rhs.format == "fp8_e4m3" and decision.asked and not decision.why
    assert by_site["0.2", "output"].reason.startswith("override '0.2:output'")
    assert by_site["0.2", "grad_weight"].lhs.format == "int8"


def test_capabilities_limit_the_candidates(large):
    graph, _ = large
    plan = plan_precision(graph, Config(recipe="auto", keep=()), (8, 0))
    names = {candidate.name for d in plan.decisions for candidate in d.candidates}
    assert names and all(name.startswith("int8") for name in names)
    assert encodings(choose_precision(graph, plan, CHIPS["A100"], budget=15.0)) != {"bf16"}


def test_block_scales_are_for_chips_that_have_them(large):
    graph, plan = planned(layers=1, target="B200")
    names = {candidate.name for d in plan.decisions for candidate in d.candidates}
    assert {"mxfp8", "mxfp4", "nvfp4"} <= names
    chosen = choose_precision(graph, plan, B200, budget=10.0)
    assert any("fp4_e2m1/block" in text for text in encodings(chosen))
    _, here = large
    assert not {c.name for d in here.decisions for c in d.candidates} & {"mxfp8", "nvfp4", "mxfp4"}
    anywhere = plan_precision(graph, Config(recipe="auto", keep=()), None)
    assert not {c.name for d in anywhere.decisions for c in d.candidates} & {"mxfp8", "nvfp4"}


def test_block_scales_run_where_they_were_planned_for():
    """A device of a chip's capability has the candidates that a plan for the chip has."""
    graph, planned_for = planned(layers=1, target="RTX 5090")
    on_device = plan_precision(graph, Config(recipe="auto", keep=()), (12, 0))
    assert on_device.decisions == planned_for.decisions
    for decision in choose_precision(graph, on_device, CHIPS["RTX 5090"], budget=10.0).decisions:
        assert not decision.lhs.emulated


def test_mxfp8_is_chosen_where_it_alone_is_precise_enough(monkeypatch):
    def measured(site, lhs, rhs):
        return 26.0 if str(lhs) == "fp8_e4m3/block_contracted(32)/e8m0/ceil" else 15.0

    monkeypatch.setattr(alternatives, "predicted_sqnr", measured)
    graph, plan = planned(layers=1, target="B200")
    statistics = Statistics("0.2", "output")
    chosen = choose_precision(graph, plan, B200, budget=24.0, statistics=statistics)
    by_site = {(d.site.name, d.site.role): d for d in chosen.decisions}
    assert str(by_site["0.2", "output"].lhs.encoding) == "fp8_e4m3/block_contracted(32)/e8m0/ceil"
    assert by_site["0.0", "output"].lhs.encoding.granularity.block is None


def test_alike_layers_are_decided_alike():
    graph, plan = planned(layers=3)
    chosen = never_slower(graph, choose_precision(graph, plan, H200, budget=25.0), H200)
    by_site = {}
    for decision in chosen.decisions:
        _, name = decision.site.name.split(".")
        by_site.setdefault((name, decision.site.role), []).append(decision)
    for decisions in by_site.values():
        assert len({(d.lhs, d.rhs, d.why) for d in decisions}) == 1


def test_in_the_pipeline(caplog):
    gm = trace_joint(nn.Linear(32, 48), torch.randn(64, 32, requires_grad=True))
    state = PassState(Config(recipe="auto", error_budget_db=31.5), Plan("auto"))
    plan = run_pipeline(gm.graph, state)
    verify(gm.graph, "lower_precision", lowered=True)
    assert all(decision.lowered and decision.why for decision in plan.decisions)
    gm = trace_joint(nn.Linear(32, 48), torch.randn(64, 32, requires_grad=True))
    state = PassState(Config(recipe="auto", error_budget_db=50.0), Plan("auto"))
    with caplog.at_level(logging.INFO, logger="hadagraph"):
        assert not any(decision.lowered for decision in run_pipeline(gm.graph, state).decisions)
    assert "stays in high precision: nothing else reaches the error budget" in caplog.text


def test_priors_let_rotated_int8_pass_the_default_budget():
    assert Config().error_budget_db == 30.0
    recipe = plan_precision(planned(layers=1)[0], Config(recipe="int8_rotated", keep=()), (9, 0))
    for decision in recipe.decisions:
        operands = decision.site.lhs, decision.site.rhs
        db = prior_sqnr(decision.site.role, operands, decision.lhs.encoding, decision.rhs.encoding)
        assert 30.0 <= db <= 36.0


def test_what_the_profile_has_no_figures_for_is_not_chosen():
    graph, plan = planned(layers=1, overrides=(("0.0", "fp8_rowwise"),))
    rates = {rate.format: rate for rate in H200.gemms}
    only = replace(H200, gemms=(rates["bf16"], rates["int8"]))
    chosen = never_slower(graph, choose_precision(graph, plan, only, budget=10.0), only)
    formats = {(d.site.name, d.lhs.format) for d in chosen.decisions}
    assert formats == {("0.0", "fp8_e4m3"), ("0.2", "int8")}
