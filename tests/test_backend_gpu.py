"""Whole models on a GPU, through Inductor and the emitted kernels: losses and gradients beside
eager PyTorch's."""

from __future__ import annotations

import pytest
import torch
from models import Mlp, decibels, gradients, tiny_llama, tokens

import hadagraph
from hadagraph import compat

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    hadagraph.reset_report()
    with compat.without_caches():
        yield
    torch._dynamo.reset()


def step(call, model, ids):
    loss = call(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), gradients(model)


# As on the CPU: several ~40 dB (int8) or ~30 dB (fp8) GEMMs in a row, and bf16 on both sides.
@pytest.mark.parametrize(
    ("recipe", "dtype", "floor_db"),
    [
        ("int8_rotated", torch.bfloat16, 20),
        ("int8_rotated", torch.float32, 22),
        ("int8_rotated", torch.float16, 22),
        ("fp8_rowwise", torch.bfloat16, 16),
        ("fp8_tensorwise", torch.bfloat16, 11),
    ],
)
def test_gradients_of_a_llama_match_eager(recipe, dtype, floor_db):
    model, ids = tiny_llama().to("cuda", dtype), tokens(4, 40).cuda()
    want = step(model, model, ids)
    compiled = torch.compile(model, backend="hadagraph", options={"recipe": recipe, "debug": True})
    got = step(compiled, model, ids)
    assert abs(got[0] - want[0]) <= 0.02 * abs(want[0])
    for name, gradient in got[1].items():
        assert decibels(gradient, want[1][name]) >= floor_db, name
    (report,) = hadagraph.report()
    assert not report.emulated and sum(site.lowered for site in report.sites) == 42


def test_kernels_and_references_agree_on_a_whole_model():
    """The same graph on the CPU and the GPU, op by op: only fp32 orders of summation differ."""
    options = {"executor": "eager"}
    results = []
    for device in ("cpu", "cuda"):
        torch._dynamo.reset()
        model, x = Mlp().to(device), torch.randn(50, 48, generator=torch.Generator().manual_seed(1))
        out = torch.compile(model, backend="hadagraph", options=options)(x.to(device))
        out.square().sum().backward()
        results.append({name: g.cpu() for name, g in gradients(model).items()})
    for name, gradient in results[0].items():
        # A code that falls on the other side of a tie is 1/127 of its group's largest value.
        assert decibels(results[1][name], gradient) > 45, name


def test_dynamic_shapes_and_cuda_graphs():
    model = tiny_llama().to("cuda", torch.bfloat16)
    for options, shapes in (
        ({}, ((2, 24), (3, 17), (5, 33))),
        ({"mode": "reduce-overhead"}, ((4, 32),) * 4),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="hadagraph", dynamic=not options, options=options)
        for seed, (batch, sequence) in enumerate(shapes):
            ids = tokens(batch, sequence, seed).cuda()
            want = step(model, model, ids)
            torch.compiler.cudagraph_mark_step_begin()
            got = step(compiled, model, ids)
            for name, gradient in got[1].items():
                assert decibels(gradient, want[1][name]) >= 19, (options, name)


def test_gradscaler_sees_an_overflow():
    model, x = Mlp().cuda(), torch.randn(2, 16, 48, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=1000)
    compiled = torch.compile(model, backend="hadagraph")
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cuda", dtype=torch.float16):
        out = compiled(x)
    scaler.scale(out.float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
