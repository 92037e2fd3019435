"""guard_sizes: a plan holds for a range of a symbolic size, found exactly; inside it nothing
compiles again, outside it the plan is made anew; the graph is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategies import trace_joint
from torch import nn

import hadagraph
from hadagraph import backend
from hadagraph.config import Config
from hadagraph.device import CHIPS
from hadagraph.dump import graph_lines
from hadagraph.passes import PassState, run_pipeline
from hadagraph.passes.choose_precision import choose_precision
from hadagraph.passes.guard_sizes import LARGEST, LEAST_LOSS, _last, _range, guard_sizes
from hadagraph.passes.never_slower import never_slower
from hadagraph.passes.normalize import normalize
from hadagraph.passes.plan_precision import plan_precision
from hadagraph.plan import Plan

H200 = CHIPS["H200"]
RATES = {rate.format: rate for rate in H200.gemms}
# A device on which int8 takes a tenth of bf16's time, and quantizers what they take on an H200.
SLOW = replace(
    H200,
    multiprocessors=1,
    gemms=tuple(
        replace(
            RATES[format], tflops=tflops, sustained=1e9, ramp=0.0, edge=0.0, alone=1.0,
            tiles=((16, 64),), splits=1,
        )
        for format, tflops in (("bf16", 0.16), ("int8", 1.6), ("fp8", 1.0))
    ),
    host=replace(
        H200.host, mm=0.0, scaled_mm=0.0, quantize_rows=0.0, quantize_columns=0.0,
        quantize_both=0.0, kernel=0.0, step=0.0,
    ),
)  # fmt: skip


def compiled(monkeypatch, model, profile=SLOW, **options):
    monkeypatch.setattr(backend, "_profile", lambda inputs: profile)
    torch.compiler.reset()
    hadagraph.reset_report()
    return torch.compile(model, backend="hadagraph", options={"executor": "eager", **options})


def step(function, *sizes):
    """One forward and backward with the leading dims dynamic; the number of graphs so far and
    whether GEMMs of the last one are lowered."""
    x = torch.randn(*sizes, 64, requires_grad=True)
    for dim in range(len(sizes)):
        torch._dynamo.mark_dynamic(x, dim)
    function(x).sum().backward()
    reports = hadagraph.report()
    return len(reports), any(decision.lowered for decision in reports[-1].plan.decisions)


def bounds(plan):
    """(low, high) from the plan's note."""
    *_, line = plan.note.splitlines()
    assert line.startswith("the plan holds for "), line
    words = line.removeprefix("the plan holds for ").split(" <= ")
    return int(words[0]), int(words[2]) if len(words) == 3 else None


@pytest.mark.parametrize("recipe", ["auto", "int8_rotated"])
def test_crossing_the_bound_compiles_anew_and_inside_it_does_not(monkeypatch, recipe):
    torch.manual_seed(0)
    function = compiled(monkeypatch, nn.Linear(64, 64, bias=False), recipe=recipe)
    assert step(function, 24) == (1, False)
    low, bound = bounds(hadagraph.report()[-1].plan)
    assert low == 2 and 24 < bound < 1000
    assert step(function, bound) == (1, False)
    assert step(function, bound + 1) == (2, True)
    low, high = bounds(hadagraph.report()[-1].plan)
    assert 17 < low <= bound + 1 and (high is None or high > bound)
    assert step(function, high or 4 * low) == (2, True)
    assert step(function, 17) == (2, True)  # the first graph's again


def test_the_product_of_batch_and_sequence_is_one_variable(monkeypatch):
    torch.manual_seed(0)
    function = compiled(monkeypatch, nn.Linear(64, 64, bias=False), recipe="auto")
    assert step(function, 3, 8) == (1, False)
    _, bound = bounds(hadagraph.report()[-1].plan)
    assert "*" in hadagraph.report()[-1].plan.note.splitlines()[-1]
    assert step(function, 4, bound // 4) == (1, False)
    assert step(function, 5, bound // 4) == (2, True)


def dynamic_graph(tokens=24, recipe="auto"):
    x = torch.randn(tokens, 64, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    gm = trace_joint(nn.Linear(64, 64, bias=False), x)
    normalize(gm.graph)
    config = Config(recipe=recipe)
    return gm.graph, config, plan_precision(gm.graph, config)


def microseconds(plan):
    """(of the plan, of bf16) as never_slower predicted them."""
    (line,) = [line for line in plan.note.splitlines() if line.startswith("predicted on ")]
    words = line.split()
    at = [index for index, word in enumerate(words) if word.startswith("us")]
    return float(words[at[0] - 1]), float(words[at[2] - 1])


def test_the_bound_is_where_another_plan_is_clearly_faster():
    """A plan of bf16 alone, against planning at the sizes on both sides of the bound."""
    graph, config, undecided = dynamic_graph()

    def decide():
        chosen = choose_precision(graph, undecided, SLOW, budget=config.error_budget_db)
        return never_slower(graph, chosen, SLOW)

    before = graph_lines(graph)
    plan = guard_sizes(graph, decide(), undecided, SLOW, budget=config.error_budget_db)
    assert graph_lines(graph) == before
    assert not any(decision.lowered for decision in plan.decisions)
    _, bound = bounds(plan)
    gains = []
    for tokens in (bound, bound + 1):
        graph, _, undecided = dynamic_graph(tokens)
        best, high_precision = microseconds(decide())
        gains.append(high_precision / best - 1)
    assert gains[0] <= LEAST_LOSS + 0.01 and gains[1] >= LEAST_LOSS - 0.01


def test_a_fixed_plan_holds_for_all_sizes():
    graph, config, undecided = dynamic_graph()
    plan = guard_sizes(
        graph, undecided, undecided, SLOW, budget=config.error_budget_db, never_slower=False
    )
    assert bounds(plan) == (2, None)


def test_static_graphs_are_left_alone():
    gm = trace_joint(nn.Linear(64, 64), torch.randn(24, 64, requires_grad=True))
    plan = run_pipeline(gm.graph, PassState(Config(recipe="auto"), Plan("auto"), profile=SLOW))
    assert "holds for" not in plan.note


def test_without_a_profile_there_is_no_bound(monkeypatch):
    function = compiled(monkeypatch, nn.Linear(64, 64, bias=False), None, recipe="auto")
    assert step(function, 24) == (1, True)
    assert step(function, 2400) == (1, True)
    assert "holds for" not in hadagraph.report()[-1].plan.note


@pytest.mark.parametrize("low", [2, 5, 100])
@pytest.mark.parametrize("high", [101, 1000, LARGEST + 10])
def test_ranges_are_exact(low, high):
    tried = []

    def holds(size):
        tried.append(size)
        return low <= size <= high

    found = _range(holds, 100, 2, None)
    assert found == (low, high if high <= LARGEST else None)
    assert len(tried) < 60


def test_what_guards_allow_already_is_the_limit():
    assert _range(lambda size: True, 100, 2, 5000) == (2, 5000)
    assert _range(lambda size: size > 50, 100, 60, 5000) == (60, 5000)
    assert _last(lambda size: size < 77, 10, 100) == 76
    assert _last(lambda size: size > 77, 100, 10) == 78
