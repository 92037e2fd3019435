"""compress_saved: what is saved in few bits and what is left alone, the forward's values kept to
the last bit, the backward's within the codes' error."""

from __future__ import annotations

import pytest
import torch
from asserts import run_graph
from models import decibels
from strategies import copy_of, trace_joint, values_for
from torch.nn import functional as F

from hadagraph import compat
from hadagraph.graph import tensor
from hadagraph.passes.compress_saved import compress_saved

T, K = 48, 64


class Halves:
    """The forward and the backward of a function's joint graph, before and after."""

    def __init__(self, function, *inputs, memory="balanced", edit=lambda graph: None):
        joint = trace_joint(function, *inputs)
        edit(joint.graph)
        primals = [n for n in joint.graph.nodes if n.name.startswith("primals")]
        self.outputs = len(joint.graph.output_node().args[0]) - len(primals)
        self.forward, self.backward = compat.min_cut_partition(
            joint, None, num_fwd_outputs=self.outputs
        )
        self.before = copy_of(self.forward), copy_of(self.backward)
        self.names = compress_saved(self.forward.graph, self.backward.graph, self.outputs, memory)
        for half in (self.forward, self.backward):
            half.graph.lint()
            half.recompile()

    def run(self, *halves, seed=0):
        """Outputs and gradients, as flat lists."""
        forward, backward = halves or (self.forward, self.backward)
        made = run_graph(forward, values_for(forward, seed=seed))
        saved = made[self.outputs :]
        read = backward.graph.find_nodes(op="placeholder")[len(saved) :]
        tangents = [torch.linspace(-1, 1, tensor(n).numel()).view(tensor(n).shape) for n in read]
        tangents = [t.to(tensor(n).dtype) for t, n in zip(tangents, read, strict=True)]
        gradients = run_graph(backward, [*saved, *tangents])
        return made[: self.outputs], [g for g in gradients if g is not None]

    def saved(self):
        returned = self.forward.graph.output_node().args[0][self.outputs :]
        return {n.name: str(tensor(n).dtype).removeprefix("torch.") for n in returned}


def matrices(*shapes, dtype=torch.bfloat16):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes or ((T, K), (K, K))]


def swish(x, w):
    """One product whose result only silu's backward reads."""
    return F.silu(x @ w)


@pytest.mark.parametrize(("memory", "floor_db"), [("balanced", 35), ("min", 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pointwise_inputs_become_codes(memory, floor_db, dtype):
    halves = Halves(swish, *matrices(dtype=dtype), memory=memory)
    assert halves.names == ("mm",)
    bits, code = (8, "int8") if memory == "balanced" else (4, "uint8")
    saved = halves.saved()
    assert saved[f"mm_{bits}bit"] == code and saved[f"mm_{bits}bit_scale"] == "bfloat16"
    (want,), exact = halves.run(*halves.before)
    (got,), gradients = halves.run()
    assert torch.equal(got, want)
    for have, gradient in zip(gradients, exact, strict=True):
        assert have.dtype == gradient.dtype
        assert floor_db < decibels(have, gradient) < 60


def test_the_input_of_a_norm_keeps_8_bits():
    norm = torch.nn.RMSNorm(K).bfloat16()
    halves = Halves(lambda x, w: norm((x @ w) * 2).sin(), *matrices(), memory="min")
    assert "int8" in halves.saved().values()


def test_what_a_product_reads_keeps_8_bits():
    halves = Halves(lambda x, w: (x @ w).cumsum(0) @ w, *matrices(), memory="min")
    assert set(halves.saved().values()) >= {"int8"} and "uint8" not in halves.saved().values()


def gated(step):
    """One product that silu's backward and a function with steps read."""
    return lambda x, w: F.silu(y := x @ w) * step(y).to(y.dtype).detach()


def checkpointed(graph):
    for node in graph.nodes:
        if "mm" in node.name:
            node.meta["ac_graph_id"] = 1


@pytest.mark.parametrize(
    ("function", "inputs", "edit"),
    [
        (lambda x, w: F.silu(x) * 1, matrices(), None),  # a graph input
        (lambda x, w: ((y := x @ w), F.silu(y)), matrices(), None),  # an output of the user's
        (lambda x, w: ((y := x @ w).t(), F.silu(y)), matrices(), None),  # a view of one
        (swish, matrices((4, 16), (16, 16)), None),  # small
        (lambda x, w: F.dropout(x @ w, 0.5), matrices(), None),  # a mask
        (lambda x, w: (x @ w).softmax(-1), matrices(), None),
        (lambda x, w: F.cross_entropy(x @ w, torch.arange(T)), matrices(), None),
        (lambda x, w: (x @ w).amax(0).sin(), matrices(), None),
        (gated(lambda y: y - y.floor()), matrices(), None),
        (gated(lambda y: y.remainder(1.0)), matrices(), None),
        (gated(lambda y: y // 1.0), matrices(), None),
        (gated(lambda y: y.logical_not()), matrices(), None),
        (gated(torch.tan), matrices(), None),
        (gated(lambda y: y.int()), matrices(), None),
        (gated(lambda y: y.bool()), matrices(), None),
        (lambda x, w: torch.lgamma(x @ w), matrices(dtype=torch.float32), None),
        (swish, matrices(dtype=torch.float64), None),
        (swish, matrices(), checkpointed),
    ],
    ids=[
        *("input", "output", "view", "small", "mask", "softmax", "cross_entropy", "amax"),
        *(
            "floor",
            "remainder",
            "floor_divide",
            "logical_not",
            "tan",
            "int",
            "bool",
            "lgamma",
            "fp64",
            "checkpointed",
        ),
    ],
)
def test_what_is_left_alone(function, inputs, edit):
    halves = Halves(function, *inputs, memory="min", edit=edit or (lambda graph: None))
    assert halves.names == ()
    assert not {"int8", "uint8"} & set(halves.saved().values())


def attention(x, w):
    q, k, v = (x @ w).view(1, T, 2, 3, 16).permute(3, 0, 2, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("memory", ["balanced", "min"])
def test_attention_keeps_its_operands_unless_memory_is_min(memory):
    halves = Halves(attention, *matrices((T, K), (K, 96)), memory=memory)
    assert [n for n in halves.backward.graph.nodes if "attention" in n.name], "none is fused here"
    assert bool(halves.names) == (memory == "min")
    statistics = [n for n, dtype in halves.saved().items() if dtype == "float32"]
    assert len(statistics) == 1  # the log-sum-exp
    assert "uint8" not in halves.saved().values()


def test_a_mask_of_attention_is_no_operand_of_its():
    """Also where it has as many columns as a head."""

    def masked(x, w):
        q, k, v = (x @ w * 0.1).view(1, T, 2, 3, T).permute(3, 0, 2, 1, 4).unbind(0)
        mask = torch.zeros(1, 1, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        mask = mask + torch.rand(1, 1, T, T)  # drawn: kept, not computed again
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    halves = Halves(masked, *matrices((T, K), (K, 6 * T), dtype=torch.float32), memory="min")
    assert [n for n in halves.backward.graph.nodes if "attention" in n.name], "none is fused here"
    assert halves.names
    torch.manual_seed(0)
    _, exact = halves.run(*halves.before)
    torch.manual_seed(0)
    _, gradients = halves.run()
    assert min(decibels(h, w) for h, w in zip(gradients, exact, strict=True)) > 25


def test_views_that_cover_their_base_are_saved_as_the_base():
    def function(x, w):
        gate, up = (x @ w).chunk(2, -1)
        return F.silu(gate) * up

    halves = Halves(function, *matrices((T, K), (K, 128)))
    assert halves.names == ("mm",)
    assert list(halves.saved().values()).count("int8") == 1
    _, exact = halves.run(*halves.before)
    _, gradients = halves.run()
    assert min(decibels(h, w) for h, w in zip(gradients, exact, strict=True)) > 35


def test_one_view_of_a_base_is_packed_alone():
    def function(x, w):
        gate, up = (x @ w).chunk(2, -1)
        return F.silu(gate.sin()) + up

    halves = Halves(function, *matrices((T, K), (K, 128)))
    (codes,) = [n for n, dtype in halves.saved().items() if dtype == "int8"]
    (node,) = [n for n in halves.forward.graph.nodes if n.name == codes]
    assert tensor(node).shape == (T, 64)


@pytest.mark.parametrize(
    ("function", "unchecked", "count"),
    [
        (lambda x, w: F.silu((x + 1) @ w), ("mm",), 2),
        (lambda x, w: F.silu(x.cumsum(0) @ w), ("mm", "permute", "permute_1"), 5),
    ],
    ids=["packed", "base"],
)
def test_tensors_without_a_version_check_stay_behind_the_others(function, unchecked, count):
    def edit(graph):
        for node in graph.nodes:
            if node.name in unchecked:
                node.meta["saved_tensor_with_no_vc_check"] = True

    halves = Halves(function, *matrices(), edit=edit)
    returned = halves.forward.graph.output_node().args[0][halves.outputs :]
    flags = [n.meta.get("saved_tensor_with_no_vc_check", False) for n in returned]
    assert sum(flags) == count and flags == sorted(flags)
    described = halves.forward.graph.output_node().meta["desc"]
    assert len(described) == halves.outputs + len(returned)


def test_both_halves_agree_on_the_order():
    halves = Halves(lambda x, w: F.silu(x @ w) * torch.tanh((x @ w).sin() @ w), *matrices())
    returned = halves.forward.graph.output_node().args[0][halves.outputs :]
    read = [n.name for n in halves.backward.graph.find_nodes(op="placeholder")]
    assert [n.name for n in returned] == read[: len(returned)]


def test_a_symbolic_batch_stays_one():
    x, w = torch.randn(6, 20, K).requires_grad_(), torch.randn(K, K).requires_grad_()
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    halves = Halves(lambda x, w: F.silu(x @ w), x, w)
    assert len(halves.names) == 1
    sizes = [tuple(tensor(n).shape) for n in halves.backward.graph.nodes if n.name.endswith("8bit")]
    assert not all(isinstance(size, int) for shape in sizes for size in shape)
