"""Hypothesis strategies and tracing: matrices in every layout, and joint forward+backward graphs of
small models with the metadata that torch.compile gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from hadagraph import compat, ops
from hadagraph.formats import PER_KEPT_INDEX
from hadagraph.graph import create, gemms
from hadagraph.plan import Decision, GemmSite, OperandPlan, Plan
from hadagraph.rotation import Fixed, Rotation

SIZES = (0, 1, 2, 3, 15, 16, 17, 31, 32, 48, 100, 128, 130)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "expanded_columns")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROTATIONS = (Rotation(2), Rotation(16), Rotation(16, Fixed(5)), Rotation(64))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The matrix in other strides: equal values, except that the expanded layouts repeat their
    first row or column."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        return F.pad(x, (1, 2, 1, 0))[1:, 1 : 1 + x.shape[1]]
    if layout == "expanded" and x.shape[0]:
        return x[:1].expand_as(x)
    if layout == "expanded_columns" and x.shape[1]:
        return x[:, :1].expand_as(x)
    return x.contiguous()


@st.composite
def matrices(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = FLOATS) -> torch.Tensor:
    """[T, K] of integers up to 256, exact in every dtype and under every rotation in fp32."""
    rows, columns = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randint(-256, 257, (rows, columns), generator=generator)
    return laid_out(x.to(draw(st.sampled_from(dtypes))), draw(st.sampled_from(LAYOUTS)))


# -------------------------------------------------------------------------- joint graphs


class _Traced(Exception):
    """Leaves the compiler once the joint graph is known."""


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own nodes and metadata dicts."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def trace_joint(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """The joint graph of `function(*inputs)` as the backend's first pass sees it; of a function
    without a gradient, the inference graph."""
    traced: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, *_: Any, **__: Any) -> Any:
        traced.append(copy_of(gm))
        raise _Traced

    backend = compat.aot_autograd(
        fw_compiler=keep,
        partition_fn=keep,
        inference_compiler=keep,
        decompositions=compat.select_decomp_table(),
    )
    torch.compiler.reset()
    try:
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    except Exception:  # Dynamo wraps what a backend raises
        if not traced:
            raise
    return traced[0]


def traced(function: Callable[..., Any], *inputs: torch.Tensor, mode: str = "fake") -> Any:
    """A hand-written graph by make_fx, with fake metadata; `mode` "symbolic" makes every size a
    symbol. Arguments named `tangents...` mark the backward."""
    return make_fx(function, tracing_mode=mode)(*inputs)


def values_for(gm: fx.GraphModule, seed: int = 0, tokens: int | None = None) -> list[Any]:
    """Random inputs for a graph: normal floats in the strides of the trace. Symbols take their
    traced size, or `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        _value(n.meta["val"], generator, tokens) for n in gm.graph.nodes if n.op == "placeholder"
    ]


def _value(fake: Any, generator: torch.Generator, tokens: int | None) -> Any:
    if not isinstance(fake, torch.Tensor):
        return _size(fake, tokens)
    shape = [_size(size, tokens) for size in fake.shape]
    stride = [_size(step, tokens) for step in fake.stride()]
    value = torch.empty_strided(shape, stride, dtype=fake.dtype)
    if value.numel():
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        for dim in (dim for dim, step in enumerate(stride) if step == 0 and shape[dim] > 1):
            drawn = drawn.narrow(dim, 0, 1).expand(shape).clone()
        base = value.as_strided([s if t else 1 for s, t in zip(shape, stride, strict=True)], stride)
        base.copy_(drawn[tuple(slice(0, s) for s in base.shape)])
    return value


def _size(size: int | torch.SymInt, tokens: int | None) -> int:
    if isinstance(size, int):
        return size
    if tokens is None:
        return compat.static_hint(size)
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, tokens)))


@dataclass(frozen=True)
class Case:
    """A small training graph: which model, its sizes, and what needs a gradient."""

    kind: str
    tokens: int
    width: int
    hidden: int
    layout: str = "contiguous"
    bias: bool = True
    weight_grad: bool = True
    input_grad: bool = True
    dynamic: bool = False
    dtype: torch.dtype = torch.float64

    def trace(self) -> fx.GraphModule:
        """The joint graph."""
        torch.manual_seed(0)
        t, k, n = self.tokens, self.width, self.hidden

        def weight(*shape: int) -> torch.Tensor:
            w = torch.randn(shape, dtype=self.dtype)
            return w.requires_grad_(self.weight_grad)

        x = laid_out(torch.randn(t, k, dtype=self.dtype), self.layout).detach()
        x.requires_grad_(self.input_grad)
        if self.dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        weights = [weight(n, k) for _ in range(3)] + [weight(k, n), weight(n)]
        bias = weights[-1] if self.bias else None
        return trace_joint(MODELS[self.kind], x, *weights[:-1], bias)


def _attention(x, q, k, v, out, bias):  # type: ignore[no-untyped-def]
    heads = [F.linear(x, w, bias).unflatten(1, (2, -1)).transpose(0, 1) for w in (q, k, v)]
    scores = torch.bmm(heads[0], heads[1].transpose(1, 2)).softmax(-1)
    mixed = torch.bmm(scores, heads[2]).transpose(0, 1).flatten(1)
    return x + F.linear(mixed, out)


MODELS: dict[str, Callable[..., Any]] = {
    "linear": lambda x, a, b, c, d, bias: F.linear(x, a, bias),
    "qkv": lambda x, a, b, c, d, bias: tuple(F.linear(x, w, bias) for w in (a, b, c)),
    "gate_up": lambda x, a, b, c, d, bias: (
        x + F.linear(F.silu(F.linear(x, a, bias)) * (x @ b.T), d)
    ),
    "three_dims": lambda x, a, b, c, d, bias: F.linear(x.unflatten(1, (1, -1)), a, bias).relu(),
    "transposed_weight": lambda x, a, b, c, d, bias: torch.tanh(x @ d) @ a,
    "own_mm": lambda x, a, b, c, d, bias: torch.mm(x.cos(), torch.mm(d, b).sin()),
    "gram": lambda x, a, b, c, d, bias: torch.mm(x, x.T) @ F.linear(x, a),
    "tied": lambda x, a, b, c, d, bias: F.linear(F.linear(x, a, bias).sin(), a.T),
    "addmm_kwargs": lambda x, a, b, c, d, bias: (
        torch.addmm(a[:1, :1] * x[:, :1], x, d, alpha=2, beta=0.5)
        + torch.addmm(a[:, 0], x, b.T, beta=0.25)
        + torch.addmm(x @ c.T, x, a.T)
    ),
    "attention": _attention,
}


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Case:
    """Every model, size, layout and choice of what needs a gradient."""
    dynamic = draw(st.booleans())
    weight_grad = draw(st.booleans())
    return Case(
        kind=draw(st.sampled_from(sorted(MODELS))),
        tokens=draw(st.sampled_from((6, 17, 48) if dynamic else (0, 1, 3, 16, 17, 48))),
        width=draw(st.sampled_from((16, 20, 32, 33))),
        hidden=draw(st.sampled_from((2, 16, 24, 34, 64))),
        layout="contiguous" if dynamic else draw(st.sampled_from(LAYOUTS)),
        bias=draw(st.booleans()),
        weight_grad=weight_grad,
        input_grad=not weight_grad or draw(st.booleans()),
        dynamic=dynamic,
        dtype=dtype,
    )


# -------------------------------------------------------------------------- plans and rotations


def plan_of(graph: fx.Graph, rotations: Sequence[Rotation | None]) -> Plan:
    """A plan that gives the graph's GEMMs these inner rotations in turn, whatever the recipes."""
    decisions = []
    for number, node in enumerate(gemms(graph)):
        operand = OperandPlan("int8", PER_KEPT_INDEX, rotations[number % len(rotations)])
        site = GemmSite("", "output", node.name, "", "", "", "", "input", "weight")
        decisions.append(Decision(site, operand, operand))
    return Plan("drawn", tuple(decisions))


def sprinkle(graph: fx.Graph, rotation: Rotation, every: int) -> int:
    """x -> unrotate(rotate(x)) on one dim of every n-th tensor of static size; returns how many."""
    changed = 0
    for number, node in enumerate(list(graph.nodes)):
        value = node.meta.get("val")
        tensor = node.op != "output" and isinstance(value, torch.Tensor)
        if number % every or not tensor or not value.dtype.is_floating_point or not value.dim():
            continue
        dim = (number // every) % value.dim()
        if not isinstance(value.shape[dim], int):
            continue
        place = node
        while place.next.op == "placeholder":
            place = place.next
        with graph.inserting_after(place):
            turned = create(graph, ops.rotate, (node, dim, str(rotation)), node)
        with graph.inserting_after(turned):
            args = (turned, dim, str(rotation), value.shape[dim])
            back = create(graph, ops.unrotate, args, node)
        node.replace_all_uses_with(back, delete_user_cb=lambda user, own=turned: user is not own)
        changed += 1
    return changed
