"""never_slower: what loses on a mocked device goes back to high precision with its reason, alike
layers alike; what the user names stays; nothing happens without a profile."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from strategies import trace_joint
from torch import nn
from torch._subclasses import FakeTensorMode

from hadagraph.backend import Session
from hadagraph.config import Config
from hadagraph.device import CHIPS
from hadagraph.dump import graph_lines
from hadagraph.passes import PassState, run_pipeline
from hadagraph.passes.never_slower import never_slower
from hadagraph.passes.normalize import normalize
from hadagraph.passes.plan_precision import plan_precision
from hadagraph.plan import Plan
from hadagraph.reports import Collector, GraphReport
from hadagraph.verify import verify

H200 = CHIPS["H200"]
PROMPT = replace(H200.host, mm=0.0, scaled_mm=0.0, quantize_rows=0.0, quantize_columns=0.0)


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.tiny = nn.Linear(width, 64, bias=False)
        self.back = nn.Linear(64, width, bias=False)

    def forward(self, x):
        h = x.sin()
        y = x + self.down(self.gate(h) * self.up(h))
        return y + self.back(self.tiny(y.cos()))


def planned(layers=2, tokens=16384, width=4096, hidden=14336, **options):
    """The normalized joint graph in bf16, without data, and its plan."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = nn.Sequential(*[Layer(width, hidden) for _ in range(layers)])
            x = torch.empty(tokens, width, requires_grad=True)
            gm = trace_joint(model, x)
        finally:
            torch.set_default_dtype(torch.float32)
    normalize(gm.graph)
    return gm.graph, plan_precision(gm.graph, Config(keep=(), **options), (9, 0))


@pytest.fixture(scope="module")
def large():
    return planned()


def by_linear(plan):
    found = {}
    for decision in plan.decisions:
        layer, name = decision.site.name.split(".")
        found.setdefault(name, {})[layer, decision.site.role] = decision
    return found


def test_losers_go_and_alike_layers_are_alike(large):
    graph, plan = large
    before = graph_lines(graph)
    kept = by_linear(never_slower(graph, plan, H200))
    assert graph_lines(graph) == before
    for name in ("gate", "up", "down"):
        assert all(decision.lowered for decision in kept[name].values())
    for name in ("tiny", "back"):
        assert len(kept[name]) == 6
        for decision in kept[name].values():
            assert not decision.lowered and decision.rhs is None
            assert decision.reason.startswith("stays bf16: predicted ")


def test_the_note_says_what_is_predicted(large):
    plan = never_slower(*large, H200)
    assert plan.note.startswith(
        "predicted on H200 (measured on one H200): GEMMs and their operands, or the host, "
    )
    assert "; s" not in plan.note
    assert Plan.from_json(plan.to_json()) == plan
    report = GraphReport("training", False, plan)
    assert plan.note in report.text(400)


def test_reasons_are_logged(large, caplog):
    with caplog.at_level(logging.INFO, logger="hadagraph"):
        never_slower(*large, H200)
    assert "1.tiny grad_weight stays in high precision: stays bf16: predicted " in caplog.text


def test_a_small_model_stays_whole():
    graph, plan = planned(tokens=2048, width=576, hidden=1536)
    kept = never_slower(graph, plan, H200)
    assert len(kept.decisions) == 30 and not any(d.lowered for d in kept.decisions)
    assert all("stays bf16: " in d.reason for d in kept.decisions)


def test_overrides_lower_whatever_is_predicted():
    graph, plan = planned(layers=1, overrides=(("*.tiny:output", "fp8_rowwise"), ("*.up", "bf16")))
    kept = by_linear(never_slower(graph, plan, H200))
    assert kept["tiny"]["0", "output"].lhs.format == "fp8_e4m3"
    assert not kept["tiny"]["0", "grad_weight"].lowered
    reasons = {decision.reason for decision in kept["up"].values()}
    assert all(reason.startswith("override '*.up': bf16 leaves") for reason in reasons)


def test_decisions_follow_the_profile(large):
    """Where 8 bit is no faster, nothing is lowered; where quantizing is free, more is."""
    graph, plan = large
    rates = {rate.format: rate for rate in H200.gemms}
    slow = replace(H200, gemms=(rates["bf16"], replace(rates["bf16"], format="int8")))
    assert not any(d.lowered for d in never_slower(graph, plan, slow).decisions)
    fast = replace(
        H200,
        host=replace(PROMPT, quantize_both=0.0, kernel=0.0),
        copy_bytes_per_us=1e12,
        quantizers=tuple(replace(rate, fixed_us=0.0) for rate in H200.quantizers),
        gemms=(rates["bf16"], replace(rates["int8"], alone=1.0, ramp=0.0, edge=0.0, fixed_us=0.0)),
    )
    assert all(d.lowered for d in never_slower(graph, plan, fast).decisions)


def test_symbolic_sizes_count_as_traced():
    def model(x, w):
        return x.sin() @ w.t()

    w = torch.zeros(96, 64, requires_grad=True)
    x = torch.zeros(48, 64, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    gm = trace_joint(model, x, w)
    normalize(gm.graph)
    plan = plan_precision(gm.graph, Config())
    symbols = {decision.site.m for decision in plan.decisions} - {"96", "64"}
    kept = never_slower(gm.graph, plan, H200)
    assert len(symbols) == 1
    assert kept.note.endswith(f"; {symbols.pop()} = 48 as traced")
    assert all(d.reason.endswith(" = 48 as traced") for d in kept.decisions)


def test_without_gemms_there_is_nothing_to_predict():
    gm = trace_joint(lambda x: x.sin(), torch.ones(3))
    assert never_slower(gm.graph, Plan("int8_rotated"), H200) == Plan("int8_rotated")


def pipeline_plan(profile, **options):
    gm = trace_joint(nn.Linear(32, 48), torch.randn(64, 32, requires_grad=True))
    state = PassState(Config(**options), Plan("int8_rotated"), profile=profile)
    plan = run_pipeline(gm.graph, state)
    verify(gm.graph, "lower_precision", lowered=True)
    return plan


def test_in_the_pipeline():
    assert all(d.lowered for d in pipeline_plan(None).decisions)
    assert all(d.lowered for d in pipeline_plan(H200, never_slower=False).decisions)
    plan = pipeline_plan(H200)
    assert not any(d.lowered for d in plan.decisions) and plan.note
    mixed = pipeline_plan(H200, overrides=(("*:output", "int8"),))
    assert {d.site.role for d in mixed.decisions if d.lowered} == {"output"}


def test_captured_launches_cost_no_host_time(large, monkeypatch):
    slow = replace(H200, host=replace(H200.host, scaled_mm=1e5))
    assert not any(d.lowered for d in never_slower(*large, slow).decisions)
    assert any(d.lowered for d in never_slower(*large, slow, host=False).decisions)
    assert not Config().captures_launches
    assert Config(mode="reduce-overhead").captures_launches


def test_the_cache_key_covers_the_profile():
    profiles = (None, H200, replace(H200, copy_bytes_per_us=1.0))
    keys = {Session(Config(), (9, 0), Collector(), profile).uuid() for profile in profiles}
    assert len(keys) == 3
    assert Config().cache_key() != Config(never_slower=False).cache_key()
