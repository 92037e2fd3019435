"""Whole models on a GPU, through Inductor and the emitted kernels: losses and gradients beside
eager PyTorch's."""

from __future__ import annotations

import pytest
import torch
from models import Mlp, decibels, gradients, tiny_llama, tokens

import hadagraph
from hadagraph import compat
from hadagraph.codegen import launch, matrices

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("uncached")]
LOWERED = {"never_slower": False}  # models this small are faster in bf16


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
    compiled = torch.compile(
        model, backend="hadagraph", options=LOWERED | {"recipe": recipe, "debug": True}
    )
    got = step(compiled, model, ids)
    assert abs(got[0] - want[0]) <= 0.02 * abs(want[0])
    for name, gradient in got[1].items():
        assert decibels(gradient, want[1][name]) >= floor_db, name
    (report,) = hadagraph.report()
    assert not report.emulated and sum(site.lowered for site in report.sites) == 42


def test_kernels_and_references_agree_on_a_whole_model():
    """The same graph on the CPU and the GPU, op by op: only fp32 orders of summation differ."""
    options = LOWERED | {"executor": "eager"}
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


@pytest.mark.parametrize(
    ("dynamic", "mode", "shapes"),
    [
        (True, {}, ((2, 24), (3, 17), (5, 33))),
        (False, {"mode": "reduce-overhead"}, ((4, 32),) * 4),
    ],
    ids=["dynamic shapes", "CUDA graphs"],
)
def test_gradients_of_later_steps_match_eager(dynamic, mode, shapes):
    model = tiny_llama().to("cuda", torch.bfloat16)
    options = LOWERED | mode
    compiled = torch.compile(model, backend="hadagraph", dynamic=dynamic, options=options)
    for seed, (batch, sequence) in enumerate(shapes):
        ids = tokens(batch, sequence, seed).cuda()
        want = step(model, model, ids)
        torch.compiler.cudagraph_mark_step_begin()
        got = step(compiled, model, ids)
        for name, gradient in got[1].items():
            assert decibels(gradient, want[1][name]) >= 19, name


# Inductor's tuning of reductions, by time, may choose another order of summation in another run.
UNTUNED = {"deterministic": True} if "deterministic" in compat.inductor_option_names() else {}
STEPS = 7  # CUDA graphs: two runs to warm up, one that records, then replays


def trained(options, batches):
    """Losses of a run over the batches, one step each, and the weights that it ends with. No op in
    it adds in an order of its own (attention's and embeddings' backwards would)."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(Mlp(), Mlp(64, 96), torch.nn.Linear(64, 48))
    model[0].down = torch.nn.Linear(80, 64)
    model[0].forward = model[0].inner
    model = model.to("cuda", torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    compiled = torch.compile(
        lambda x, y: (model(x).float() - y).square().mean(),
        backend="hadagraph",
        options={**LOWERED, **UNTUNED, **options},
    )
    x, y = (torch.empty(96, 48, device="cuda", dtype=d) for d in (torch.bfloat16, torch.float32))
    losses = []
    for batch in batches:
        x.copy_(batch)
        y.copy_(batch.roll(1, 0))
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach().clone())
    torch.cuda.synchronize()
    return torch.stack(losses), [p.detach().clone() for p in model.parameters()]


def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(96, 48, generator=generator) for _ in range(STEPS)]


def assert_same_training(one, other):
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("recipe", ["int8_rotated", "fp8_rowwise", "fp8_tensorwise"])
def test_cuda_graphs_train_as_without_them(recipe, monkeypatch):
    """Bit for bit, over steps that warm up, record and replay, each with its own data."""
    monkeypatch.setattr(launch, "_READY", {})
    monkeypatch.setattr(matrices, "_MATRICES", {})
    launch.prepare("cuda")
    prepared = set(matrices._MATRICES)
    graphs = trained({"recipe": recipe, "mode": "reduce-overhead"}, batches())
    assert set(matrices._MATRICES) == prepared  # nothing was left to make in a capture
    plain = trained({"recipe": recipe}, batches())
    assert_same_training(graphs, plain)
    assert len(set(plain[0].tolist())) == STEPS  # the data did change
    assert all(any(site.lowered for site in report.sites) for report in hadagraph.report())


def test_cuda_graphs_do_replay():
    """The losses above would agree as well if Inductor had refused to capture."""
    replays = []
    original = torch.cuda.CUDAGraph.replay

    class Counted(torch.cuda.CUDAGraph):
        def replay(self):
            replays.append(self)
            return original(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "CUDAGraph", Counted)
        trained({"mode": "reduce-overhead"}, batches())
    assert len(replays) >= 2 * (STEPS - 3)  # a forward and a backward each


def test_two_runs_give_the_same_bits():
    assert_same_training(trained({}, batches()), trained({}, batches()))


def test_gradscaler_sees_an_overflow():
    model, x = Mlp().cuda(), torch.randn(2, 16, 48, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40, growth_interval=1000)
    compiled = torch.compile(model, backend="hadagraph", options=LOWERED)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cuda", dtype=torch.float16):
        out = compiled(x)
    scaler.scale(out.float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
