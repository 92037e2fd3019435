"""fuse: producers go into quantizers where that saves bytes, the
regions say why not elsewhere, values stay."""

from __future__ import annotations

import pytest
import torch
from asserts import assert_graph_values_equal, assert_sqnr, run_graph
from strategies import copy_of, traced, values_for

from hadagraph import ops
from hadagraph.graph import aten, calls
from hadagraph.passes.fuse import fuse
from hadagraph.region import Chain
from hadagraph.verify import verify

ROWS, BY_COLUMN = "int8/per_kept_index/h16", "fp8_e4m3/per_kept_index"


def fused(function, *shapes, dtype=torch.float32, mode="fake", **options):
    """The graph before, the module after, and its regions; bitwise the same values."""
    inputs = [torch.randn(shape).to(dtype) for shape in shapes or [(20, 32)]]
    gm = traced(function, *inputs, mode=mode)
    gm.graph.eliminate_dead_code()
    before = copy_of(gm)
    regions = fuse(gm.graph, rounded=True, **options)
    gm.recompile()
    verify(gm.graph, "fuse")
    assert_graph_values_equal(before, gm, values_for(gm), bound=0)
    return gm.graph, regions


def quantizers(graph):
    return calls(graph, (*ops.QUANTIZERS, ops.quantize_chain))


def only_chain(graph):
    """The graph's one quantizer, and its chain."""
    (node,) = quantizers(graph)
    assert node.target is ops.quantize_chain
    return node, Chain.parse(node.args[1])


def product(codes, scale):
    return ops.scaled_mm(codes, codes, scale, scale, None, torch.float32)


def by_rows(x):
    return product(*ops.quantize_rows(x, ROWS))


def by_column(x):
    return product(*ops.quantize_columns(x, BY_COLUMN))


def both(x):
    outputs = ops.quantize_both(x, ROWS, BY_COLUMN)
    return product(*outputs[:2]), product(*outputs[2:])


# -------------------------------------------------------------------------- rewrites


@pytest.mark.parametrize("quantized", [by_rows, both, by_column])
def test_a_norm_is_scaled_by_its_quantizer(quantized):
    def function(x, weight):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return quantized((x * scale * weight).reshape(10, 32))

    graph, (region,) = fused(function, (2, 5, 32), (32,))
    node, chain = only_chain(graph)
    assert [each.shape for each in chain.inputs] == ["matrix", "rows", "columns"]
    assert [step.op for step in chain.steps] == ["mul", "mul"]
    assert region.chain == node.args[1] and region.fused < region.unfused
    assert not [n for n in calls(graph, (aten.mul.Tensor,)) if n.meta["val"].shape[-1] == 32]


def test_a_region_names_its_producers_and_its_gemms():
    def function(x):
        codes, scale = ops.quantize_rows(torch.exp(x.sin().neg()), ROWS)
        return product(codes, scale), product(codes, scale)

    graph, (region,) = fused(function)
    assert region.producers == ("neg", "exp")  # a chain knows no sine
    assert region.gemms == tuple(n.name for n in calls(graph, (ops.scaled_mm,)))
    assert str(region).startswith("quantize_chain_default computes neg, exp (")


def swiglu_backward(grad, gate, up):
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    return grad * silu, grad * up * sigmoid * (1 + gate * (1 - sigmoid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_outputs_of_the_same_matrices_are_one_kernel(dtype):
    def function(grad, gate, up):
        to_up, to_gate = swiglu_backward(grad, gate, up)
        return *both(to_up), *both(to_gate)

    graph, (region,) = fused(function, *[(20, 32)] * 3, dtype=dtype)
    node, chain = only_chain(graph)
    assert [each.shape for each in chain.inputs] == ["matrix"] * 3 and len(chain.outputs) == 2
    assert node.args[2:] == ([ROWS, ROWS], [BY_COLUMN, BY_COLUMN], [False, False])
    assert len(region.gemms) == 4


def test_rows_and_columns_of_one_matrix_are_one_output():
    def function(x):
        hidden = x.exp()
        return by_rows(hidden), product(*ops.quantize_columns(hidden, BY_COLUMN))

    graph, _ = fused(function)
    node, chain = only_chain(graph)
    assert len(chain.outputs) == 1 and node.args[2:] == ([ROWS], [BY_COLUMN], [False])


def test_a_value_that_others_read_is_one_more_output():
    graph, _ = fused(lambda x: (hidden := x.exp().neg(), *both(hidden)))
    node, _ = only_chain(graph)
    assert node.args[4] == [True]
    assert not calls(graph, (aten.neg.default,))


def test_a_value_keeps_its_shape():
    def function(x):
        hidden = x.exp().neg()
        return hidden, *both(hidden.flatten(0, 1))

    graph, _ = fused(function, (2, 5, 32))
    assert only_chain(graph)[0].args[4] == [True]


def test_a_value_may_be_read_before_it_is_quantized():
    def function(x):
        hidden = x.exp().neg()
        return hidden.cumsum(1), *both(hidden)

    graph, _ = fused(function)
    assert only_chain(graph)[0].args[4] == [True]


def test_a_cheap_producer_is_computed_twice():
    def function(x):
        wide = x.float()
        return by_rows((wide * 2).bfloat16()), wide.sum(1)

    graph, _ = fused(function, dtype=torch.bfloat16)
    _, chain = only_chain(graph)
    assert chain.inputs[0].dtype == "bf16"


def test_what_a_chain_reads_anyway_makes_shared_producers_cheap():
    def function(gate, grad):
        silu = gate * torch.sigmoid(gate)
        return by_rows(grad * silu + gate), silu.sum(0)

    graph, _ = fused(function, (20, 32), (20, 32))
    _, chain = only_chain(graph)
    assert len(chain.inputs) == 2


def test_constants_and_scalars():
    def function(x, scalar):
        half = torch.full((), 0.5)
        hidden = torch.clamp((1 - x.pow(3)) * half / scalar, min=-2.0, max=3.0)
        return both(hidden.pow(2).pow(1.0) + hidden.relu())

    graph, _ = fused(function, (20, 32), ())
    _, chain = only_chain(graph)
    assert [each.shape for each in chain.inputs] == ["matrix", "scalar"]
    assert "pow" not in {step.op for step in chain.steps}


def test_nodes_are_rounded_only_when_asked():
    def function(x):
        return by_rows(x.exp() * 0.3)

    chains = {}
    for rounded in (True, False):
        gm = traced(function, torch.randn(20, 32).bfloat16())
        before = copy_of(gm)
        fuse(gm.graph, rounded=rounded)
        gm.recompile()
        chains[rounded] = only_chain(gm.graph)[1]
        values = values_for(gm)
        # An 8-bit rounding in bf16 before one to 8 bits.
        assert_sqnr(run_graph(gm, values)[0], run_graph(before, values)[0], 35)
    assert [s.op for s in chains[True].steps] == ["exp", "cast_bf16", "mul", "cast_bf16"]
    assert [s.op for s in chains[False].steps] == ["exp", "mul"]


# -------------------------------------------------------------------------- refuses


def reason(function, *shapes, **options):
    graph, (region,) = fused(function, *shapes, **options)
    (node,) = quantizers(graph)
    assert node.target is not ops.quantize_chain and region.producers == ()
    return region.reason


def test_the_option_refuses_everything():
    assert reason(lambda x: by_rows(x.exp()), producers=False) == "option fuse=False"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (by_rows, "a graph input"),
        (lambda x: by_rows(x.sin()), "made by aten.sin.default, which no chain does"),
        (lambda x: by_rows(x.cumsum(1)), "made by aten.cumsum.default, which no chain does"),
        (lambda x: by_rows(torch.add(x, x, alpha=2)), "of operands that no chain reads"),
        (lambda x: by_rows(x.clamp(max=float("inf"))), "of operands that no chain reads"),
        (lambda x: by_rows(x * torch.arange(32)), "of operands that no chain reads"),
        (lambda x: by_rows(x.t().exp()), "has gaps"),
        (lambda x: by_rows(x[:, ::2].exp()), "has gaps"),
        (lambda x: by_rows(x[:, :1].expand(20, 32).clone()), "reads no matrix"),
        (lambda x: by_rows(x.exp().permute(1, 0)), "made by aten.permute.default"),
        (lambda x: by_rows(x.exp().reshape(40, 16)), "which regroups columns"),
    ],
)
def test_what_no_chain_can_do(function, why):
    assert why in reason(function)


def test_symbolic_columns_are_refused():
    assert (
        reason(lambda x: by_rows(x.exp()), mode="symbolic") == "the number of columns is symbolic"
    )


def test_a_partial_broadcast_is_refused():
    def function(x, position):
        return by_rows((x + position).flatten(0, 1))

    assert "of operands that no chain reads" in reason(function, (2, 5, 32), (5, 32))


def test_five_matrices_are_too_many():
    def function(*xs):
        return by_rows(sum(x.exp() for x in xs[1:]) * xs[0].relu())

    graph, (region,) = fused(function, *[(20, 32)] * 5)
    _, chain = only_chain(graph)
    assert len(chain.inputs) == 4 and len(region.producers) < 10


def test_what_saves_no_bytes_stays():
    def function(a, b, c):
        hidden = a * b * c
        return *both(hidden), hidden.sum(0), a.sum(), b.sum(), c.sum()

    graph, (region,) = fused(function, *[(20, 32)] * 3)
    assert [n.target for n in quantizers(graph)] == [ops.quantize_both]
    assert region.reason == "saves no bytes" and region.fused >= region.unfused > 0


def test_a_chain_that_needs_its_own_codes_is_not_joined():
    def function(x, other):
        first = by_rows(x.exp() * other)  # [20, 20]
        again = first @ torch.ones(20, 32) * other
        return by_rows(again * other)

    graph, regions = fused(function, (20, 32), (20, 32))
    assert [n.target for n in quantizers(graph)] == [ops.quantize_chain] * 2
    assert all(len(Chain.parse(region.chain).outputs) == 1 for region in regions)


def test_a_later_matrix_moves_the_quantizer():
    def function(x, other):
        hidden = x.exp() * other
        first = by_rows(hidden)
        late = other @ torch.ones(32, 32)
        second = by_rows(late * hidden.neg())
        return first, second, product(*ops.quantize_columns(late * hidden, BY_COLUMN))

    fused(function, (20, 32), (20, 32))


def test_a_joined_quantizer_stands_after_all_that_it_reads():
    def function(x, other):
        first = by_rows(x * other)
        late = other @ torch.ones(32, 32)
        return first, by_rows(x.neg() * other * late)

    graph, _ = fused(function, (20, 32), (20, 32))
    assert len(only_chain(graph)[1].outputs) == 2


def test_a_graph_without_quantizers_has_no_regions():
    _, regions = fused(lambda x: x.sin())
    assert regions == ()
