"""lower_precision: one quantization a tensor, the right layouts, what the backward gets, and
numbers equal to quantizing each operand by hand."""

from __future__ import annotations

from collections import Counter

import by_hand
import pytest
import torch
from asserts import assert_graph_values_equal, run_graph
from hypothesis import given, settings
from strategies import Case, cases, copy_of, trace_joint, traced, values_for
from torch import fx
from torch.nn import functional as F

from hadagraph import ops
from hadagraph.compat import CheckpointPolicy
from hadagraph.config import Config
from hadagraph.dump import graph_lines
from hadagraph.graph import aten, backward_nodes, calls
from hadagraph.passes import PassState, run_pipeline
from hadagraph.plan import Plan
from hadagraph.verify import verify

RECOMPUTE = CheckpointPolicy.PREFER_RECOMPUTE


def lowered(case_or_gm, **options):
    """(graph module, plan, original module) after the pipeline, verified after each pass."""
    gm = case_or_gm.trace() if isinstance(case_or_gm, Case) else case_or_gm
    before = copy_of(gm)

    def check(name, graph):
        if name != "input":
            verify(graph, name, lowered=name == "lower_precision")

    plan = run_pipeline(gm.graph, PassState(Config(**options), Plan("")), check)
    return gm, plan, before


def fp32(kind="linear", **fields):
    return Case(kind, **{"tokens": 48, "width": 32, "hidden": 64, "dtype": torch.float32, **fields})


def counts(gm):
    targets = (*ops.QUANTIZERS, ops.scaled_mm, aten.mm.default, aten.addmm.default)
    found = Counter(node.target for node in calls(gm.graph, targets))
    return tuple(found[target] for target in (*ops.QUANTIZERS, ops.scaled_mm))


def test_a_linear_as_text():
    gm = traced(
        lambda x, w, b: F.linear(x, w, b), torch.randn(20, 33), torch.randn(24, 33), torch.randn(24)
    )
    lowered(gm)
    assert [line.partition(" = ")[2] for line in graph_lines(gm.graph)][3:-1] == [
        "hadagraph.quantize_rows.default(x_1, int8/per_kept_index/h16)",
        "<built-in function getitem>(quantize_rows_default, 0)",
        "<built-in function getitem>(quantize_rows_default, 1)",
        "hadagraph.quantize_rows.default(w_1, int8/per_kept_index/h16)",
        "<built-in function getitem>(quantize_rows_default_1, 0)",
        "<built-in function getitem>(quantize_rows_default_1, 1)",
        "hadagraph.scaled_mm.default(getitem_1, getitem_3, getitem, getitem_2, b_1, torch.float32)",
    ]


# (quantize_rows, quantize_columns, quantize_both, scaled_mm) of models whose input is computed, so
# that its codes are worth saving: an input of the graph is there in the backward anyway.
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # x by one op a layout (a graph input), w forward and backward apart, the gradient both.
        ("linear", (2, 2, 1, 3)),
        ("qkv", (1 + 3, 1 + 3, 3, 9)),
        # x and hidden, which silu and a product make again; three weights; three gradients.
        ("gate_up", (2 + 3, 2 + 3, 3, 9)),
        ("transposed_weight", (2 + 2, 2 + 2, 2, 6)),
    ],
)
def test_each_tensor_is_quantized_once(kind, expected):
    gm, _, _ = lowered(fp32(kind))
    assert counts(gm) == expected
    sources = Counter((n.target, n.args) for n in calls(gm.graph, ops.QUANTIZERS))
    assert set(sources.values()) == {1}


def test_a_computed_activation_shared_by_three_linears():
    weights = [torch.randn(64, 32, requires_grad=True) for _ in range(3)]
    x = torch.randn(48, 32, requires_grad=True)

    def function(x, *weights):
        hidden = x.cumsum(0)
        return tuple(F.linear(hidden, w) for w in weights)

    gm, _, _ = lowered(trace_joint(function, x, *weights))
    assert counts(gm) == (3, 3, 1 + 3, 9)
    (activation,) = [
        n for n in calls(gm.graph, (ops.quantize_both,)) if n.args[0].target is aten.cumsum.default
    ]
    assert {len(output.users) for output in activation.users} == {3}


def test_weights_are_quantized_apart_and_again_in_the_backward():
    gm, _, _ = lowered(fp32())
    columns = {n.args[0].op: n for n in calls(gm.graph, (ops.quantize_columns,))}
    for node in calls(gm.graph, (ops.quantize_columns,)):
        assert node.meta["recompute"] == RECOMPUTE
        assert all(user.meta["recompute"] == RECOMPUTE for user in node.users)
    assert set(columns) == {"placeholder"}
    for node in calls(gm.graph, (ops.quantize_rows, ops.quantize_both)):
        assert "recompute" not in node.meta


def saved_of(plan, role, named):
    (decision,) = [d for d in plan.decisions if d.site.role == role]
    sides = {decision.site.lhs: decision.lhs, decision.site.rhs: decision.rhs}
    return sides[named].saved


def test_the_plan_says_what_the_backward_gets():
    _, plan, _ = lowered(fp32())
    assert saved_of(plan, "grad_weight", "input") == "recompute"  # a graph input
    assert saved_of(plan, "grad_input", "weight") == "recompute"
    x, w = torch.randn(48, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
    _, plan, _ = lowered(trace_joint(lambda x, w: F.linear(x.cumsum(0), w), x, w))
    assert saved_of(plan, "grad_weight", "input") == "codes"
    assert saved_of(plan, "grad_input", "weight") == "recompute"


def test_a_computed_weight_saves_its_codes_and_says_so():
    x, w = torch.randn(48, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
    gm, plan, _ = lowered(trace_joint(lambda x, w: F.linear(x, w.cumsum(0)), x, w))
    sources = {n.args[0].target for n in calls(gm.graph, (ops.quantize_both,))}
    assert aten.cumsum.default in sources
    assert saved_of(plan, "grad_input", "weight") == "codes"


def test_the_cast_of_a_weight_is_made_again():
    x, w = torch.randn(48, 32).bfloat16().requires_grad_(), torch.randn(64, 32, requires_grad=True)
    gm, _, _ = lowered(trace_joint(lambda x, w: F.linear(x.cumsum(0), w.bfloat16()), x, w))
    (columns,) = calls(gm.graph, (ops.quantize_columns,))
    assert columns.args[0].meta["recompute"] == RECOMPUTE


def test_what_attention_saves_anyway_is_quantized_again():
    def attention(x, q, w):
        heads = F.linear(x, q).view(1, 48, 2, 16).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads)
        return F.linear(mixed.transpose(1, 2).reshape(48, 32), w)

    inputs = [torch.randn(shape, requires_grad=True) for shape in ((48, 32), (32, 32), (32, 32))]
    gm, _, _ = lowered(trace_joint(attention, *inputs))
    assert [n for n in gm.graph.nodes if "attention" in str(n.target)], "no fused attention here"
    computed = [
        n for n in calls(gm.graph, (ops.quantize_columns,)) if n.args[0].op != "placeholder"
    ]
    assert computed and all(n.meta["recompute"] == RECOMPUTE for n in computed)


def tagged(graph):
    return [n for n in graph.nodes if n.meta.get("recompute") == RECOMPUTE]


def columns_of_computed(gm):
    """The column quantizers of what the forward computes, gradients left out."""
    backward = backward_nodes(gm.graph)
    found = calls(gm.graph, (ops.quantize_columns,))
    return [n for n in found if n.args[0].op != "placeholder" and n.args[0] not in backward]


NORM = torch.nn.RMSNorm(32)


@pytest.mark.parametrize(
    ("function", "again"),
    [
        # The backward of each reads x, gate or up: nothing is added to what it gets.
        (lambda x, w: F.linear(F.silu(x.cumsum(0)), w), True),
        (lambda x, w: F.linear(F.gelu(x.cumsum(0)), w), True),
        (lambda x, w: F.linear(F.gelu(x.cumsum(0), approximate="tanh"), w), True),
        (lambda x, w: F.linear(F.silu(x.cumsum(0)) * x.cumsum(1), w), True),
        (lambda x, w: F.linear(NORM(x.cumsum(0)), w), True),
        (lambda x, w: F.linear(F.layer_norm(x.cumsum(0), (32,)), w), True),
        # What relu, a clamp or a sum is made of, its backward does not read.
        (lambda x, w: F.linear(x.cumsum(0).relu(), w), False),
        (lambda x, w: F.linear(x.cumsum(0).clamp(-1, 1), w), False),
        (lambda x, w: F.linear(x.cumsum(0) + x.cumsum(1), w), False),
        (lambda x, w: F.linear(x.cumsum(0), w), False),
        (lambda x, w: F.linear(x.cumsum(0).flip(0), w), False),
    ],
)
def test_what_pointwise_ops_make_of_what_is_there_is_made_again(function, again):
    x, w = torch.randn(48, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
    gm, plan, _ = lowered(trace_joint(function, x, w))
    assert saved_of(plan, "grad_weight", "input") == ("recompute" if again else "codes")
    assert [n.meta.get("recompute") for n in columns_of_computed(gm)] == [RECOMPUTE] * again
    for node in tagged(gm.graph):
        assert node.target not in (aten.cumsum.default, aten.mean.dim, aten.var_mean.correction)


def test_what_the_user_checkpoints_is_left_to_the_policy():
    x, w = torch.randn(48, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
    gm = trace_joint(lambda x, w: F.linear(F.silu(x.cumsum(0)), w), x, w)
    for node in gm.graph.nodes:
        if "sigmoid" in node.name or "neg" in node.name or "exp" in node.name:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    before = {n.name: n.meta.get("recompute") for n in gm.graph.nodes}
    lowered(gm)
    for node in gm.graph.nodes:
        if before.get(node.name) is not None:
            assert node.meta["recompute"] == before[node.name]


def attention_with_residual(x, q, w):
    heads = F.linear(x, q).view(1, 48, 2, 16).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(heads, heads, heads)
    # The backward reads the exponential and the sum.
    stream = x.exp() + F.linear(mixed.transpose(1, 2).reshape(48, 32), w)
    return stream.sin()


@pytest.mark.parametrize("memory", ["fast", "exact", "balanced"])
def test_only_exact_repeats_the_projection_of_attentions_output(memory):
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((48, 32), (32, 32), (32, 32))]
    gm, _, _ = lowered(trace_joint(attention_with_residual, *inputs), memory=memory)
    repeated = [n for n in tagged(gm.graph) if n.target is ops.scaled_mm]
    assert len(repeated) == (memory == "exact")
    sums = [n for n in tagged(gm.graph) if n.target is aten.add.Tensor]
    assert len(sums) == len(repeated)


@pytest.mark.parametrize("memory", ["exact", "balanced"])
def test_operands_of_gemms_that_stay_are_made_again_where_memory_is_short(memory):
    x, w = torch.randn(48, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
    gm = trace_joint(lambda x, w: F.linear(F.silu(x.cumsum(0)), w), x, w)
    lowered(gm, recipe="bf16", memory=memory)
    assert bool(tagged(gm.graph)) == (memory == "balanced")


def test_a_branch_that_stays_shares_what_is_made_again():
    def lora(x, w, a, b):
        h = F.silu(x.cumsum(0))
        return F.linear(h, w) + F.linear(F.linear(h, a), b)

    inputs = [torch.randn(s, requires_grad=True) for s in ((48, 32), (64, 32), (8, 32), (64, 8))]
    gm, plan, _ = lowered(trace_joint(lora, *inputs))
    assert {d.lowered for d in plan.decisions} == {True, False}
    assert [n.meta.get("recompute") for n in columns_of_computed(gm)] == [RECOMPUTE]
    kept = [n for n in calls(gm.graph, (aten.mm.default,)) if n in backward_nodes(gm.graph)]
    reads = {operand for node in kept for operand in node.all_input_nodes}
    assert any(n.meta.get("recompute") == RECOMPUTE for n in reads)


def test_frozen_weights_make_no_column_codes_of_the_input():
    gm, _, _ = lowered(fp32(weight_grad=False))
    assert counts(gm) == (3, 1, 0, 2)


def test_a_matrix_times_its_transpose_is_quantized_once():
    gm = traced(lambda x: torch.mm(x, x.T), torch.randn(20, 32))
    lowered(gm)
    assert counts(gm) == (1, 0, 0, 1)


def test_operands_that_differ_in_encoding_are_quantized_apart():
    x, w = torch.randn(48, 32), torch.randn(64, 32)
    gm = traced(lambda x, w: (torch.mm(x, w.T), torch.mm(x.T, x)), x, w)
    lowered(gm)
    assert counts(gm) == (1, 0, 1, 2)


@given(cases())
@settings(max_examples=10)
def test_gemms_that_stay_are_restored_bit_for_bit(case):
    gm, plan, before = lowered(case)  # fp64: everything stays
    assert not any(decision.lowered for decision in plan.decisions)
    assert not calls(gm.graph, (ops.gemm, ops.rotate, ops.scaled_mm, *ops.QUANTIZERS))
    for target in (aten.mm.default, aten.addmm.default):
        assert len(calls(gm.graph, (target,))) == len(calls(before.graph, (target,)))
    # The same calls on the same strides, but equal layout ops merged.
    assert_graph_values_equal(before, gm, values_for(gm))


class Emulator(fx.Interpreter):
    """Runs an unlowered graph with every mm and addmm replaced by quantizing both operands by hand
    and multiplying the codes as integers."""

    def call_function(self, target, args, kwargs):
        if target not in (aten.mm.default, aten.addmm.default):
            return super().call_function(target, args, kwargs)
        bias, a, b = (None, *args) if target is aten.mm.default else args
        block = min(128, a.shape[1] & -a.shape[1])
        left, right = (by_hand.quantize(m, "int8", block=max(16, block)) for m in (a, b.t()))
        out = by_hand.scaled_mm(left[0], right[0], left[1], right[1])
        return out if bias is None else out + bias


@pytest.mark.parametrize("kind", ["linear", "qkv", "three_dims"])
@pytest.mark.parametrize("tokens", [16, 48, 20])
@pytest.mark.parametrize("bias", [False, True])
def test_numbers_are_those_of_quantizing_by_hand(kind, tokens, bias):
    gm, plan, before = lowered(fp32(kind, tokens=tokens, bias=bias))
    assert all(decision.lowered for decision in plan.decisions)
    # Integers, which every order of summation rotates exactly: equal to the last bit.
    values = [(value * 50).round().clamp(-256, 256) for value in values_for(gm)]
    expected = list(torch.utils._pytree.tree_leaves(Emulator(before).run(*values)))
    for have, want in zip(run_graph(gm, values), expected, strict=True):
        if want is not None and have is not None:
            assert torch.equal(have, want)


@given(cases(torch.float32))
@settings(max_examples=10)
def test_every_graph_type_checks_and_stays_close(case):
    gm, _, before = lowered(case)
    values = values_for(gm)
    if case.kind not in ("linear", "qkv"):
        return  # chains of products and nonlinearities amplify; the types are what is checked
    for have, want in zip(run_graph(gm, values), run_graph(before, values), strict=True):
        if isinstance(want, torch.Tensor) and want.numel():
            # int8 with rotation keeps about 40 dB an operand: 1 % of the largest output.
            assert (have - want).abs().max() <= 0.05 * want.abs().max()


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_tensorwise"])
@pytest.mark.parametrize("kind", ["linear", "gate_up", "transposed_weight"])
def test_the_other_recipes_lower_too(recipe, kind):
    gm, plan, _ = lowered(fp32(kind), recipe=recipe)
    assert all(decision.lowered for decision in plan.decisions)
    assert not calls(gm.graph, (aten.mm.default, aten.addmm.default))


def test_measuring_multiplies_the_unquantized_operands_too():
    gm, _, _ = lowered(fp32(bias=False), measure=True, executor="eager")
    ops.MEASURED.clear()
    run_graph(gm, values_for(gm))
    found = {name.rpartition(":")[2]: value for name, value in ops.MEASURED.items()}
    ops.MEASURED.clear()
    assert set(found) == {"output", "grad_input", "grad_weight"}
    assert all(35 < value < 50 for value in found.values()), found  # rotated int8 on normal data


def test_a_symbolic_batch_runs_at_other_sizes():
    gm, plan, before = lowered(fp32("gate_up", dynamic=True))
    assert all(decision.lowered for decision in plan.decisions)
    for tokens in (1, 5, 130):
        values = values_for(gm, tokens=tokens)
        assert [t.shape for t in run_graph(gm, values) if t is not None] == [
            t.shape for t in run_graph(before, values) if t is not None
        ]
