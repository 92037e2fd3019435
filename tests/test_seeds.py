"""Seeds of steps: another at each call, the same sequence from the same `torch.manual_seed`, and
the user's generators left alone."""

from __future__ import annotations

import pytest
import torch

from hadagraph import ops, seeds

CPU = torch.device("cpu")


def drawn(count: int = 4, device: torch.device = CPU) -> list[int]:
    return [int(seeds.next_seed(device)) for _ in range(count)]


@pytest.fixture(autouse=True)
def _own_seed():
    torch.manual_seed(1234)
    seeds.restart()


def test_each_call_differs():
    assert len(set(drawn(100))) == 100


def test_another_manual_seed_begins_anew_and_the_same_gives_the_same():
    first = drawn()
    torch.manual_seed(5)
    assert drawn() != first
    torch.manual_seed(1234)
    assert drawn() == first


def test_restart_begins_anew():
    first = drawn()
    assert drawn() != first
    torch.manual_seed(1234)  # the same number as before, which alone goes unnoticed
    seeds.restart()
    assert drawn() == first


def test_restart_keeps_the_tensor_that_a_captured_graph_reads():
    before = seeds.counter(CPU)
    seeds.restart()
    torch.manual_seed(77)
    assert seeds.counter(CPU) is before


def test_a_state_that_is_saved_is_where_another_process_goes_on(monkeypatch, tmp_path):
    drawn(3)
    torch.save({"seeds": seeds.get_state(), "torch": torch.get_rng_state()}, tmp_path / "state")
    following = drawn()
    torch.manual_seed(9)
    monkeypatch.setattr(seeds, "_COUNTERS", {})
    state = torch.load(tmp_path / "state", map_location="cpu", weights_only=True)
    torch.set_rng_state(state["torch"])
    seeds.set_state(state["seeds"])
    assert drawn() == following


def test_a_state_is_kept_apart_and_set_in_place():
    first = drawn()
    seeds.restart()
    state, before = seeds.get_state(), seeds.counter(CPU)
    for _ in range(2):
        seeds.set_state(state)
        assert drawn() == first
    assert seeds.counter(CPU) is before


def test_what_a_state_does_not_know_begins_anew():
    first = drawn()
    seeds.set_state({})
    assert drawn() == first


def test_the_users_generator_is_not_advanced():
    state = torch.get_rng_state()
    drawn()
    ops.next_seed(CPU)
    seeds.restart()
    seeds.set_state(seeds.get_state())
    assert torch.equal(torch.get_rng_state(), state)


def test_drawing_from_the_users_generator_changes_nothing():
    first = drawn()
    seeds.restart()
    torch.rand(1000)
    assert drawn() == first


@pytest.mark.parametrize("number", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_is_taken(number):
    torch.manual_seed(number)
    assert len(set(drawn())) == 4


def test_neighboring_numbers_give_other_sequences():
    """Not the same ones a step later."""
    first = drawn(20)
    torch.manual_seed(1235)
    assert not set(first) & set(drawn(20))


def test_neighboring_seeds_differ_in_about_half_of_their_bits():
    values = [value & ((1 << 64) - 1) for value in drawn(101)]
    flipped = [(a ^ b).bit_count() for a, b in zip(values[1:], values[:-1], strict=True)]
    assert 20 < sum(flipped) / 100 < 44


def test_shape_and_dtype():
    seed = seeds.next_seed(CPU)
    assert (seed.shape, seed.dtype, seed.device) == ((1,), torch.int64, CPU)
    following = seeds.next_seed(CPU)
    assert seed.data_ptr() != following.data_ptr()  # a kept seed does not change


def test_begun_under_inference_mode(monkeypatch):
    monkeypatch.setattr(seeds, "_COUNTERS", {})
    with torch.inference_mode():
        first = drawn()
    following = drawn()
    assert len(set(first + following)) == 8


def test_a_capture_does_not_begin_anew(monkeypatch):
    """A fill that is captured would give each replay the same seed."""
    torch.manual_seed(5)
    following = drawn(2)[1]
    torch.manual_seed(5)
    seeds.restart()
    drawn(1)
    torch.manual_seed(6)
    with monkeypatch.context() as patch:
        patch.setattr(seeds, "_is_capturing", lambda device: True)
        assert drawn(1) == [following]
    assert drawn(1) != [following]


@pytest.mark.gpu
def test_a_captured_graph_draws_anew_at_each_replay():
    device = torch.device("cuda")
    state = torch.cuda.get_rng_state()
    expected = drawn(4, device)
    seeds.restart()
    seeds.counter(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed = seeds.next_seed(device)
    got = []
    for _ in range(4):
        graph.replay()
        got.append(int(seed))
    assert got == expected
    assert expected == drawn_on_cpu(4)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def drawn_on_cpu(count: int) -> list[int]:
    seeds.restart()
    return drawn(count)
