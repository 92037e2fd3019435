"""Producer fusion through the backend: with it and without it models compute the same numbers, and
the producers that it is meant for are inside quantizers."""

from __future__ import annotations

import pytest
import torch
from models import Mlp, decibels, gradients, tiny_llama, tokens
from torch import nn
from torch.nn import functional

import hadagraph
from hadagraph.region import Chain

pytestmark = pytest.mark.usefixtures("uncached")


class SwiGlu(nn.Module):
    """A residual RMSNorm and SwiGLU layer, without biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.down = nn.Linear(96, 64, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Gelu(SwiGlu):
    def forward(self, x):
        h = functional.layer_norm(x, (64,))
        return x + self.down(functional.gelu(self.up(h), approximate="tanh"))


def llama_step(model, call):
    ids = tokens()
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), gradients(model)


def layer_step(model, call):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, next(model.parameters()).shape[-1], generator=generator)
    x = x.to(next(model.parameters()).dtype).requires_grad_(True)
    loss = call(x).float().square().mean()
    loss.backward()
    return loss.detach(), {**gradients(model), "x": x.grad}


MODELS = {
    "llama": (tiny_llama, llama_step),
    "swiglu": (SwiGlu, layer_step),
    "gelu": (Gelu, layer_step),
    "layer_norm": (lambda: Mlp(width=64), layer_step),
    "checkpointed": (lambda: Mlp(width=64, checkpointed=True), layer_step),
}


def both_ways(name, dtype, **options):
    """(loss, gradients) unfused and fused, and the fused chains."""
    make, step = MODELS[name]
    results = []
    for fuse in (False, True):
        torch._dynamo.reset()
        hadagraph.reset_report()
        model = make().to(dtype)
        compiled = torch.compile(
            model, backend="hadagraph", options={"fuse": fuse, "debug": True, **options}
        )
        results.append(step(model, compiled))
    (report,) = hadagraph.report()
    return *results, [Chain.parse(region.chain) for region in report.regions if region.chain]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_fusing_changes_no_bit_of_eager_execution(name, dtype):
    unfused, fused, chains = both_ways(name, dtype, executor="eager")
    assert chains
    assert torch.equal(unfused[0], fused[0])
    for parameter, gradient in unfused[1].items():
        assert torch.equal(gradient, fused[1][parameter]), parameter


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_fusing_under_inductor_stays_within_rounding(name):
    unfused, fused, chains = both_ways(name, torch.bfloat16)
    assert chains
    assert torch.allclose(unfused[0], fused[0], rtol=1e-2)
    for parameter, gradient in unfused[1].items():
        # Reductions see tensors rounded to bf16 that one kernel kept in fp32; codes move by one.
        assert decibels(fused[1][parameter], gradient) > 30, parameter


@pytest.mark.parametrize("executor", ["eager", "inductor"])
def test_norms_swiglu_and_its_backward_are_fused(executor):
    _, _, chains = both_ways("swiglu", torch.bfloat16, executor=executor)
    norms = [c for c in chains if [i.shape for i in c.inputs] == ["matrix", "rows", "columns"]]
    assert norms
    outputs = sum(len(c.outputs) for c in chains if c not in norms)
    matrices = {sum(i.shape == "matrix" for i in c.inputs) for c in chains if c not in norms}
    # silu(gate) * up, and the gradients of gate and of up.
    assert outputs >= 3 and matrices <= {2, 3} and 3 in matrices


def test_a_dynamic_sequence_is_fused_in_one_graph():
    model = SwiGlu()
    compiled = torch.compile(model, backend="hadagraph", dynamic=True)
    for sequence in (24, 40, 17):
        x = torch.randn(2, sequence, 64, requires_grad=True)
        compiled(x).square().mean().backward()
        got = {**gradients(model), "x": x.grad.clone()}
        x.grad = None
        model(x).square().mean().backward()
        for name, want in {**gradients(model), "x": x.grad}.items():
            assert decibels(got[name], want) > 20, name
    (report,) = hadagraph.report()
    assert len([region for region in report.regions if region.chain]) >= 3


def test_an_autocast_weight_is_cast_by_its_quantizer():
    model, x = SwiGlu(), torch.randn(48, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.compile(model, backend="hadagraph", options={"executor": "eager"})(x).sum().backward()
    (report,) = hadagraph.report()
    cast = "in fp32 matrix; cast_bf16 %0; out %1 bf16"
    assert len([region for region in report.regions if region.chain == cast]) >= 3


def test_regions_are_reported(tmp_path):
    explanation = str(
        hadagraph.explain(SwiGlu(), torch.randn(48, 64), options={"dump": str(tmp_path)})
    )
    assert "quantize_chain_default computes " in explanation
    assert " bytes an element)" in explanation
    assert "computes no producer: a graph input" in explanation
    assert "quantize_chain_default computes " in (tmp_path / "graph_00" / "plan.txt").read_text()


def test_measured_errors_are_those_without_fusion():
    x = torch.randn(48, 64, requires_grad=True)
    found = []
    for fuse in (False, True):
        options = {"fuse": fuse}
        found.append(
            hadagraph.measure_sqnr(SwiGlu(), x, options=options, loss=lambda y: y.square().mean())
        )
    assert found[0] == found[1] and found[0]["output"]
