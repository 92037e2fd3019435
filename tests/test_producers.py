"""Pointwise chains read off graphs: random programs give, as a chain that is printed and parsed,
bitwise what running them op by op gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, traced

from hadagraph import ops
from hadagraph.graph import aten
from hadagraph.producers import EMIT_RULES, chain_of, grow, is_dense, seen_as
from hadagraph.reference import STEPS, chain_reference
from hadagraph.region import ARITY, COLUMNS, MATRIX, ROWS, SCALAR, Chain

T, K = 64, 64  # whole vectors: the scalar code for the rest rounds otherwise
SHAPES = {MATRIX: (T, K), ROWS: (T, 1), COLUMNS: (K,), SCALAR: ()}
BINARY = (torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum)
UNARY = (
    torch.neg,
    torch.abs,
    torch.square,
    torch.reciprocal,
    torch.sqrt,
    torch.rsqrt,
    torch.exp,
    torch.log,
    torch.sigmoid,
    torch.tanh,
    lambda x: torch.erf(x.float()),  # in low precision PyTorch takes another library's
    torch.relu,
    lambda x: x * 0.3,
    lambda x: 1.5 - x,
    lambda x: 2.0 / x,
    lambda x: torch.rsub(x, 2.0),
    lambda x: x.pow(2),
    lambda x: x.pow(0.5),
    lambda x: x.pow(-1.0),
    lambda x: x.pow(1.75),  # a constant that bf16 has
    lambda x: x.clamp(-0.5, 0.75),
    lambda x: x.clamp_min(0.1),
    lambda x: x.clamp_max(0.1),
    lambda x: x.to(torch.bfloat16),
    lambda x: x.to(torch.float32),
    lambda x: x.unsqueeze(0).squeeze(0),
    lambda x: x.clone(),
)


@st.composite
def programs(draw):
    """A function of tensors of every shape and dtype, ending in a matrix, and its inputs."""
    shapes = [MATRIX, *draw(st.lists(st.sampled_from(tuple(SHAPES)), max_size=3))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    inputs = [
        torch.randn(SHAPES[shape], generator=generator).to(draw(st.sampled_from(FLOATS)))
        for shape in shapes
    ]
    steps = draw(
        st.lists(
            st.tuples(st.sampled_from(BINARY + UNARY), st.integers(0, 9), st.integers(0, 9)),
            min_size=1,
            max_size=8,
        )
    )

    def function(*inputs):
        values, x = list(inputs), inputs[0]
        for op, left, right in steps:
            a, b = values[left % len(values)], values[right % len(values)]
            values.append(op(a, b) if op in BINARY else op(a))
            x = torch.add(x, values[-1].expand(T, K))
        return x

    return function, inputs


@settings(deadline=None)
@given(programs())
def test_a_chain_computes_what_its_nodes_compute(program):
    function, inputs = program
    gm = traced(function, *inputs)
    (output,) = gm.graph.find_nodes(op="output")
    root = output.args[0]
    made = chain_of(grow((root,), {output}), rounded=True)
    known = _values_by_node(gm, inputs)
    shaped = [_shaped(known[read.node], read.shape) for read in made.inputs]
    chain = Chain.parse(str(made.chain))
    assert chain == made.chain
    (got,) = chain_reference(chain, shaped)
    want = function(*inputs)
    assert got.dtype == want.dtype
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


class _Record(torch.fx.Interpreter):
    def run_node(self, n):
        self.known[n] = super().run_node(n)
        return self.known[n]


def _values_by_node(gm, inputs):
    interpreter = _Record(gm)
    interpreter.known = {}
    interpreter.run(*inputs)
    return interpreter.known


def _shaped(value, shape):
    return value.reshape({MATRIX: (T, K), ROWS: (T,), COLUMNS: (K,), SCALAR: ()}[shape])


def test_every_step_has_a_reference():
    assert set(STEPS) == set(ARITY)


def test_every_rule_is_of_a_pointwise_op_or_a_view():
    views = {aten.expand.default, aten._to_copy.default}
    for target in EMIT_RULES:
        pointwise = torch.Tag.pointwise in target.tags
        assert pointwise or target.is_view or target in views or "view" in target.name(), target


@pytest.mark.parametrize(
    ("shape", "full", "seen"),
    [
        ((2, 5, 16), (2, 5, 16), MATRIX),
        ((2, 5, 1), (2, 5, 16), ROWS),
        ((16,), (2, 5, 16), COLUMNS),
        ((1, 1, 16), (2, 5, 16), COLUMNS),
        ((), (2, 5, 16), SCALAR),
        ((1, 1, 1), (2, 5, 16), SCALAR),
        ((5, 16), (2, 5, 16), None),
        ((5, 1), (2, 5, 16), None),
        ((1, 16), (1, 16), MATRIX),
        ((5, 1), (5, 1), MATRIX),
    ],
)
def test_shapes_seen_by_the_matrix(shape, full, seen):
    assert seen_as(shape, full) == seen


def test_dense_tensors():
    def views(x):
        return x, x[:, :8], x.t(), x[::2], x.reshape(2, 2, 16), x.reshape(2, 2, 16)[:, :, :8]

    gm = traced(views, torch.randn(4, 16))
    nodes = gm.graph.find_nodes(op="output")[0].args[0]
    assert [is_dense(n) for n in nodes] == [True, False, False, False, True, False]
    as_rows = [is_dense(n, any_row_stride=True) for n in nodes]
    assert as_rows == [True, True, False, True, True, False]


def test_lists_that_do_not_fit_the_chain_are_refused():
    x = torch.randn(4, 16)
    chain = "in fp32 matrix; exp %0; out %1 fp32"
    encoding = "int8/per_kept_index/h16"
    with pytest.raises(ValueError, match="inputs must be 1 tensors, got 2"):
        ops.quantize_chain([x, x], chain, [encoding], [""], [False])
    with pytest.raises(ValueError, match="columns must be 1 long, got 0"):
        ops.quantize_chain([x], chain, [encoding], [], [False])


def test_chain_text_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"chain operation must be one of add, .*, got 'sin'"):
        Chain.parse("in fp32 matrix; sin %0; out %1 fp32")
    with pytest.raises(ValueError, match="%2 is used before it is made"):
        Chain.parse("in fp32 matrix; exp %2; out %1 fp32")
    with pytest.raises(ValueError, match="got 'fp64' 'matrix'"):
        Chain.parse("in fp64 matrix; out %0 fp32")
    with pytest.raises(ValueError, match="at least one matrix"):
        Chain.parse("in fp32 rows; out %0 fp32")
    with pytest.raises(ValueError, match="exp takes 1 operands, got 2"):
        Chain.parse("in fp32 matrix; exp %0 %0; out %1 fp32")


def test_a_number_on_another_device_ends_a_chain():
    graph = torch.fx.Graph()
    x, number = graph.placeholder("x"), graph.placeholder("number")
    x.meta["val"] = torch.empty(T, K, device="meta")
    number.meta["val"] = torch.tensor(2.0)
    root = graph.call_function(aten.mul.Tensor, (x, number))
    root.meta["val"] = torch.empty(T, K, device="meta")
    output = graph.output((root,))
    assert grow((root,), {output}) is None
    number.meta["val"] = torch.empty((), device="meta")
    assert grow((root,), {output}) is not None
