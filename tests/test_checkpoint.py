"""torch.utils.checkpoint, compiled with the model and around compiled code: less is saved, the
gradients are the same, and what is run again draws what it drew before."""

from __future__ import annotations

import logging

import pytest
import torch
from models import Mlp, decibels, gradients, tiny_llama, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import hadagraph
from hadagraph import seeds

CPU = torch.device("cpu")
INSIDE = {"use_reentrant": False}
AROUND = {"use_reentrant": False, "context_fn": seeds.checkpoint_contexts}

transformers = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


pytestmark = pytest.mark.usefixtures("uncached")


@pytest.fixture(autouse=True)
def _fresh():
    seeds._warn_of_new_draws.cache_clear()


def compiled(function, precision, executor="eager"):
    options = {"recipe": precision, "executor": executor, "debug": True}
    return torch.compile(function, backend="hadagraph", options=options)


def two_steps(model, loss):
    """Losses and gradients, by name."""
    torch.compiler.reset()
    torch.manual_seed(7)
    seeds.restart()
    found = []
    for _ in range(2):
        value = loss()
        value.backward()
        found.append({"loss": value.detach(), **gradients(model)})
    return found


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert [name for name in other if not torch.equal(one[name], other[name])] == []


def batch():
    return torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(5))


class Stack(nn.Module):
    """Blocks that draw signs and roundings, each compiled, with a checkpoint around it if its
    options are given."""

    def __init__(self, **checkpointed):
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(2))
        self.steps = [compiled(block, "fp4_rht_sr") for block in self.blocks]
        self.checkpointed = checkpointed

    def forward(self, x):
        for step in self.steps:
            x = checkpoint(step, x, **self.checkpointed) if self.checkpointed else step(x)
        return x

    def loss(self):
        return self(batch()).square().mean()


# ------------------------------------------------------------- compiled with the model


RECIPES = ("int8_rotated", "fp8_rowwise", "auto", "nvfp4", "fp4_rht_sr", "quartet", "hot")


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        *((precision, INSIDE) for precision in RECIPES),
        *(("fp4_rht_sr", options) for options in (AROUND, {"use_reentrant": True})),
    ],
)
def test_compiled_checkpoints_save_a_seed_at_most_and_change_no_gradient(precision, options):
    model = Mlp()
    steps = (lambda x: x + checkpoint(model.inner, x, **options), model)
    found = []
    for step in steps:
        step = compiled(step, precision)
        found.append(two_steps(model, lambda step=step: step(batch()).square().mean()))
    assert_same(*found)
    checkpointed, plain = hadagraph.report()
    assert {name for name, _, _ in checkpointed.saved} <= {"next_seed_default"}
    assert plain.saved_bytes > 8


def llama_steps(precision, **checkpointed):
    model = tiny_llama().train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointed)
    step = compiled(model, precision, "inductor")
    return two_steps(model, lambda: step(input_ids=tokens(), labels=tokens()).loss)


# Inductor fuses other ops around the matmuls: fp32 sums are rounded elsewhere (137 dB), which now
# and then moves a value to the next code (70 dB).
@pytest.mark.slow
@transformers
def test_the_checkpoints_of_transformers():
    got, want = llama_steps("nvfp4", **INSIDE), llama_steps("nvfp4")
    for one, other in zip(got, want, strict=True):
        assert {name for name in other if decibels(one[name], other[name]) < 60} == set()
    checkpointed, plain = hadagraph.report()
    assert checkpointed.saved_bytes < 0.4 * plain.saved_bytes


# ------------------------------------------------------------- around compiled code


def test_compiled_code_in_a_checkpoint_draws_the_same_again(monkeypatch, caplog):
    want = two_steps(plain := Stack(), plain.loss)
    monkeypatch.setattr(seeds, "_COUNTERS", {})  # made within the first checkpoint
    assert_same(two_steps(model := Stack(**AROUND), model.loss), want)
    assert "context_fn" not in caplog.text


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_other_draws_are_warned_of_once(use_reentrant, caplog):
    model = Stack(use_reentrant=use_reentrant)
    x = batch().requires_grad_()
    with caplog.at_level(logging.WARNING, logger="hadagraph"):
        for _ in range(2):
            model(x).sum().backward()
    assert caplog.text.count("context_fn=hadagraph.seeds.checkpoint_contexts") == 1


def drawing(x, drawn):
    drawn.append(int(seeds.next_seed(CPU)))
    return x.sin()


@pytest.fixture
def expected():
    """What the sequence of the seed 7 begins with."""
    torch.manual_seed(7)
    seeds.restart()
    found = [int(seeds.next_seed(CPU)) for _ in range(6)]
    seeds.restart()
    return found


def test_the_sequence_goes_on_after_each_backward(expected):
    drawn, x = [], torch.ones(2, requires_grad=True)
    y = x
    for _ in range(3):
        y = checkpoint(drawing, y, drawn, **AROUND)
    one, two, three = expected[:3]
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert drawn == [one, two, three, *[three, two, one] * 2]
    assert int(seeds.next_seed(CPU)) == expected[3]


def test_nested_checkpoints_draw_the_same_again(expected):
    drawn, x = [], torch.ones(2, requires_grad=True)

    def outer(x):
        y = checkpoint(drawing, drawing(x, drawn), drawn, **AROUND)
        return drawing(y, drawn)

    checkpoint(outer, x, **AROUND).sum().backward()
    assert drawn[:3] == expected[:3]
    assert set(drawn[3:]) == set(expected[:3])
    assert int(seeds.next_seed(CPU)) == expected[3]


@pytest.mark.parametrize("first_use", [True, False])
@pytest.mark.parametrize("preserve", [True, False])
def test_a_seed_given_between_forward_and_backward_keeps_its_sequence(
    expected, preserve, first_use, monkeypatch
):
    if first_use:
        monkeypatch.setattr(seeds, "_COUNTERS", {})
    drawn, x = [], torch.ones(2, requires_grad=True)
    torch.manual_seed(8)
    y = checkpoint(drawing, x, drawn, preserve_rng_state=preserve, **AROUND)
    torch.manual_seed(7)
    assert int(seeds.next_seed(CPU)) == expected[0]
    y.sum().backward()
    assert drawn[0] == drawn[1]
    assert int(seeds.next_seed(CPU)) == expected[1]


@pytest.mark.slow
@transformers
def test_the_checkpoints_of_transformers_around_compiled_layers():
    found = []
    for kwargs in (AROUND, {}):
        model = tiny_llama().train()
        if kwargs:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        for layer in model.model.layers:
            layer.compile(backend="hadagraph", options={"recipe": "nvfp4"})
        found.append(two_steps(model, lambda m=model: m(input_ids=tokens(), labels=tokens()).loss))
    assert_same(*found)


@pytest.mark.gpu
def test_a_captured_graph_that_is_replayed_in_the_backward_draws_the_same_again():
    device = torch.device("cuda")
    seeds.counter(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed = seeds.next_seed(device)

    def replay(x, drawn):
        graph.replay()
        drawn.append(int(seed))
        return x.sin()

    drawn, y = [], torch.ones(2, device=device, requires_grad=True)
    for _ in range(2):
        y = checkpoint(replay, y, drawn, **AROUND)
    y.sum().backward()
    replay(y, drawn)
    one, two, *again, three = drawn
    assert again == [two, one]
    assert len({one, two, three}) == 3
