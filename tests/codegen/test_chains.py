"""Chains into quantizers, in Triton's interpreter against their references: no GPU needed. As in
`test_interpreter`, one ordinary test runs this file again in a process of its own."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from again import assert_passes_interpreted, interpreter, starts_interpreter
from kernel_checks import CHAINS, chain_inputs, check_chain
from models import DecoderBlocks

import hadagraph
from hadagraph.codegen import calls, chains, launch, tune
from hadagraph.codegen.choose import pass_fields
from hadagraph.codegen.choose_chains import ChainSchedule, restricted, select_chain, wanted_of
from hadagraph.region import Chain

SM90 = (9, 0)
ROTATED, PLAIN = "int8/per_kept_index/h128", "int8/per_kept_index"
H32 = "int8/per_kept_index/h32"
CHAIN_LAYOUTS = {"rows": (ROTATED, ""), "columns": ("", H32), "both": (ROTATED, H32)}


@pytest.mark.slow
@starts_interpreter
def test_interpreter_process():
    assert_passes_interpreted(__file__)


def bytes_of(name: str, row: str, column: str, value: bool) -> tuple[bool, float]:
    """Whether outputs are stored first, and the bytes moved for one element of each output."""
    chain = Chain.parse(CHAINS[name])
    count = len(chain.outputs)
    wanted = wanted_of([row] * count, [column] * count, [value] * count)
    T, K = 1 << 14, 1 << 12
    plan = select_chain(T, K, chain, wanted, SM90)
    assert len(plan.specs) == len(plan.rows) + len(plan.columns) + (plan.first is not None)
    return plan.stored, round(plan.bytes(T, K) / (T * K), 1)


def test_the_schedule_moves_the_fewest_bytes():
    # silu(gate) * up: reads 4 bytes, its value takes 2
    assert bytes_of("silu_mul", ROTATED, "", False) == (False, 4 + 1)
    assert bytes_of("silu_mul", ROTATED, "", True) == (False, 4 + 1 + 2)
    assert bytes_of("silu_mul", "", H32, False) == (False, 4 + (4 + 1))
    assert bytes_of("silu_mul", "", H32, True) == (True, 4 + 2 + (2 + 1))
    assert bytes_of("silu_mul", ROTATED, H32, False) == (True, 4 + 2 + 2 * (2 + 1))
    # its backward: 6 bytes, two values of 2; grad_up needs 4 bytes only
    assert bytes_of("silu_mul_backward", ROTATED, "", False) == (False, (6 + 1) + (4 + 1))
    assert bytes_of("silu_mul_backward", "", H32, False) == (True, 6 + 4 + 2 * (2 + 1))
    for value in (False, True):
        stored = (True, 6 + 4 + 4 * (2 + 1))
        assert bytes_of("silu_mul_backward", ROTATED, H32, value) == stored
    assert bytes_of("rms_norm", ROTATED, H32, False) == (False, (2 + 1) + 2 + (2 + 1))


def chains_of_a_block(executor: str) -> set[str]:
    model, x = DecoderBlocks(1).bfloat16(), torch.randn(2, 64, 128, dtype=torch.bfloat16)
    options = {"recipe": "int8_rotated", "executor": executor}
    torch.compile(model, backend="hadagraph", options=options)(x).sum().backward()
    return {region.chain for region in hadagraph.report()[-1].regions if region.chain}


@pytest.mark.usefixtures("uncached")
def test_the_chains_of_a_llama_block_are_the_ones_tested_and_raced(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import chain_race

    names = ("SILU_MUL", "SILU_MUL_THREE", "SILU_MUL_THREE_BY_EXP", "RMS_NORM")
    for name in names:
        assert CHAINS[name.lower()] == getattr(chain_race, name)
    found = chains_of_a_block("inductor")
    by_exp = CHAINS["silu_mul_three_by_exp"] in found  # torch 2.11
    three = "silu_mul_three_by_exp" if by_exp else "silu_mul_three"
    assert found == {CHAINS[name] for name in ("silu_mul", three, "rms_norm")}
    assert by_exp or CHAINS["silu_mul_three_rounded"] in chains_of_a_block("eager")


def test_the_race_of_chains_has_the_tables_plan_first_and_others(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    import chain_race

    for case in chain_race.CASES:
        first, *others = chain_race.candidates(case, SM90, quick=False)
        wanted = wanted_of(*case.wanted)
        assert first == select_chain(chain_race.T, case.K, Chain.parse(case.chain), wanted, SM90)
        assert len(others) > 5 and first not in others


def test_what_an_output_needs_of_a_chain():
    chain = Chain.parse(CHAINS["silu_mul_backward"])
    up = "in bf16 matrix; in bf16 matrix; neg %0; exp %2; add %3 1.0; div %0 %4; cast_bf16 %5; "
    up += "mul %1 %6; cast_bf16 %7; out %8 bf16"
    assert restricted(chain, [0]) == (Chain.parse(up), (0, 2))
    assert restricted(chain, [0, 1]) == (chain, (0, 1, 2))
    # a matrix is read even if no output needs it: it has their shape
    broadcast = Chain.parse("in bf16 matrix; in fp32 rows; neg %1; out %2 bf16; out %0 bf16")
    assert restricted(broadcast, [0])[1] == (0, 1)


def test_an_output_is_finished_and_its_value_freed_before_the_next(monkeypatch):
    """The most bytes of values, codes and scales at once, without a launch."""
    held = {"now": 0, "most": 0}

    def counted(size, dtype, device):
        made = torch.empty(size, dtype=dtype, device=device)
        nbytes = made.nbytes
        held["now"] += nbytes
        held["most"] = max(held.values())
        weakref.finalize(made, lambda: held.update(now=held["now"] - nbytes))
        return made

    for module in (chains, calls):
        monkeypatch.setattr(module, "empty", counted)
    monkeypatch.setattr(launch, "_READY", {})
    monkeypatch.setattr(calls, "launch_of", lambda *_: lambda *tensors: None)
    inputs = chain_inputs(CHAINS["silu_mul_three"], 256, 256, exact=True)
    rows, columns, element = [ROTATED, "", ROTATED], [H32] * 3, inputs[0].numel()
    arguments = (inputs, CHAINS["silu_mul_three"], rows, columns)
    results = launch.quantize_chain(*arguments, [False] * 3, SM90)
    # All three values with the codes of the one layout; not those of all five.
    assert held["most"] == pytest.approx((3 * 2 + 1) * element, rel=0.02)
    assert held["now"] == sum(each.nbytes for each in results)
    kept = launch.quantize_chain(*arguments, [True] * 3, SM90)
    del results
    assert held["now"] == sum(each.nbytes for each in kept)


@interpreter
@pytest.mark.parametrize("layouts", CHAIN_LAYOUTS)
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name, layouts):
    check_chain(name, 40, 150, [CHAIN_LAYOUTS[layouts]], "cpu", SM90)


@interpreter
@pytest.mark.parametrize("T", [0, 1, 33])
@pytest.mark.parametrize("K", [1, 31])
def test_chains_of_odd_shapes(T, K):
    for pair in CHAIN_LAYOUTS.values():
        check_chain("relu_scaled", T, K, [pair], "cpu", SM90, strided=True)
        if T > 0:
            check_chain("offset", T, K, [pair], "cpu", SM90)


@interpreter
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_chain_schedules(stored, values):
    text = ROTATED if values else PLAIN
    schedule = ChainSchedule(stored)
    check_chain("add", 40, 140, [(text, H32)], "cpu", SM90, values=values, schedule=schedule)
    layouts = [(text, ROTATED), ("int8/per_tensor/h16", "int8/per_tensor")]
    check_chain("two_dtypes", 40, 140, layouts, "cpu", SM90, values=values, schedule=schedule)
    layouts = [(text, PLAIN), ("int8/per_kept_index/h16:fixed(3)", "int8/per_kept_index/h16")]
    check_chain("two_dtypes", 40, 140, layouts, "cpu", SM90, values=values, schedule=schedule)


@interpreter
def test_chain_outputs_in_unlike_layouts():
    check_chain("two_dtypes", 70, 130, [(ROTATED, ""), ("", "")], "cpu", SM90)
    check_chain("two_dtypes", 70, 130, [("", PLAIN), (H32, ROTATED)], "cpu", SM90, values=False)


@interpreter
@pytest.mark.parametrize("index", range(len(tune.columns_candidates(SM90))))
def test_chain_column_configurations(index, monkeypatch):
    monkeypatch.setattr("hadagraph.codegen.choose.LITERAL_ELEMENTS", 1)
    config = tune.columns_candidates(SM90)[index]
    check_chain("two_dtypes", 70, 136, [(ROTATED, H32)], "cpu", SM90, config=config)
    check_chain("add", 70, 136, [("", H32)], "cpu", SM90, config=config, strided=True)
    # not stored, so that the pass which writes codes computes the chain, too
    check_chain("add", 70, 136, [("", H32)], "cpu", SM90, config=config, values=False)


@interpreter
@pytest.mark.parametrize("index", range(len(tune.chain_rows_candidates(SM90))))
def test_chain_row_configurations(index):
    config = tune.chain_rows_candidates(SM90)[index]
    check_chain("add", 35, 300, [(ROTATED, "")], "cpu", SM90, config=config)


@interpreter
def test_chains_of_rows_read_twice():
    check_chain("add", 2, 17000, [(ROTATED, "")], "cpu", SM90)
    check_chain("relu_scaled", 2, 17000, [(PLAIN, "")], "cpu", SM90, values=False)


@interpreter
def test_chains_keep_what_is_not_finite():
    x, y = chain_inputs(CHAINS["add"], 40, 150, exact=True)
    x[3, 7], y[30, 100], y[5, 5] = float("nan"), float("inf"), -float("inf")
    for pair in CHAIN_LAYOUTS.values():
        check_chain("add", 40, 150, [pair], "cpu", SM90, inputs=[x, y], values=False)


@interpreter
@pytest.mark.parametrize("column", ["", H32])
def test_the_sources_that_run_are_listed(column):
    text = CHAINS["rms_norm"]
    inputs = chain_inputs(text, 40, 200, exact=False)
    row = f"int8/per_kept_index/{'h64' if column else 'h16'}"
    arguments = (inputs, text, [row], [column], [False])
    before = launch.emitted_sources()
    listed = launch.sources_for("quantize_chain", arguments, SM90)
    assert len(listed) == (3 if column else 1)
    assert not before.keys() & listed.keys()
    launch.quantize_chain(*arguments, SM90)
    assert launch.emitted_sources() == before | listed


@interpreter
def test_what_a_chain_refuses():
    x = torch.zeros(4, 4, dtype=torch.bfloat16)
    add = CHAINS["add"]
    with pytest.raises(ValueError, match="input 1 must be matrix of bf16 with 16 elements"):
        launch.quantize_chain([x, x.float()], add, [ROTATED], [""], [False], SM90)
    with pytest.raises(ValueError, match="every output must be wanted"):
        launch.quantize_chain([x, x], add, [""], [""], [True], SM90)


def test_tall_matrices_have_their_tokens_along_the_first_grid_dim():
    config = tune.VectorsConfig(128, 64, 2)
    few, many = (pass_fields(T, 64, (64,), config, (9, 0)) for T in (1 << 20, 10_000_000))
    assert not few["tokens_first"] and many["tokens_first"]
