"""Tuning without a GPU: an injected timer says how fast each candidate is."""

from __future__ import annotations

import ast
import json
import logging
import time

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from hadagraph.backend import Session
from hadagraph.codegen import autotune, choose_mm, tuned
from hadagraph.codegen.autotune import candidates, tune_shapes
from hadagraph.codegen.choose_mm import problem_of, select_mm
from hadagraph.codegen.spec import ScaledMmSpec
from hadagraph.codegen.tune import LibraryMm, MmConfig, scaled_mm_candidates
from hadagraph.codegen.tuned import MmProblem
from hadagraph.config import Config
from hadagraph.reports import Collector

HOPPER = (9, 0)
ODD = MmConfig(64, 64, 128, 4, 3, True)
ROWS = (False, False)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A Hopper GPU called "Test GPU", and a cache folder of the test's own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test GPU")
    monkeypatch.setattr("hadagraph.codegen.choose_mm.l2_bytes", lambda capability: 60 << 20)
    monkeypatch.setattr(tuned, "source_directory", lambda: tmp_path)
    tuned.winners_on.cache_clear()
    yield tmp_path
    tuned.winners_on.cache_clear()


def favour(choice):
    return lambda problem, candidate: 1.0 if candidate == choice else 2.0


def selected(shape, formats=("int8", "int8"), **kwargs):
    return select_mm(shape, formats, ROWS, None, torch.bfloat16, HOPPER, **kwargs)


def test_a_winner_is_used_by_its_bucket_in_this_and_later_processes(machine):
    shape, alike, other = (8192, 4096, 4096), (7000, 4096, 3500), (4096, 4096, 4096)
    before = selected(shape)
    (race,) = tune_shapes([shape], timer=favour(ODD))
    assert race.choice == ODD and race.raced == len(scaled_mm_candidates(HOPPER))
    for _ in range(2):
        for found in (selected(shape), selected(alike)):
            assert (found.block_m, found.block_n, found.stages) == (64, 64, 3)
        assert selected(other).block_m == before.block_m
        tuned.winners_on.cache_clear()  # as a new process
    assert len(list(machine.glob("tuned_*.json"))) == 1


def test_the_fingerprint_tells_winners_apart():
    empty = tuned.fingerprint()
    tune_shapes([(512, 512, 512)], timer=favour(ODD))
    first = tuned.fingerprint()
    tune_shapes([(512, 512, 512)], timer=favour(scaled_mm_candidates(HOPPER)[0]))
    assert empty == ""
    assert len({empty, first, tuned.fingerprint()}) == 3


def test_graphs_compiled_before_a_race_are_not_taken_from_caches_after_it():
    session = Session(Config(), HOPPER, Collector())
    before = session.uuid()
    assert session.uuid() == before
    tune_shapes([(512, 512, 512)], timer=favour(ODD))
    assert session.uuid() != before


def test_later_winners_join_earlier_ones():
    tune_shapes([(512, 512, 512)], timer=favour(ODD))
    tune_shapes([(1024, 512, 512)], timer=favour(LibraryMm(False)), format="fp8_e4m3")
    kept = tuned.winners_on("Test GPU")
    assert list(kept.values()) == [ODD, LibraryMm(False)]
    assert tuned.winners_on("Other GPU") == {}


def test_another_capability_ignores_the_winners(monkeypatch):
    tune_shapes([(512, 512, 512)], timer=favour(ODD))
    problem = problem_of((512, 512, 512), ("int8", "int8"), ROWS, torch.bfloat16)
    assert tuned.winner(problem, HOPPER) == ODD
    assert tuned.winner(problem, (8, 0)) is None


@pytest.mark.parametrize(
    ("size", "bucket"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (3500, 4096), (6144, 6144)]
)
def test_buckets(size, bucket):
    problem = MmProblem(size, size, size, "int8", "int8", "rowwise", "bf16")
    assert problem.bucket() == MmProblem(bucket, bucket, bucket, *tuple_of(problem)[3:])
    assert problem.bucket().bucket() == problem.bucket()


def tuple_of(problem):
    return tuple(vars(problem).values())


def test_the_library_is_raced_where_it_can_be_used():
    fp8 = problem_of((512, 512, 512), ("fp8_e4m3",) * 2, ROWS, torch.bfloat16)
    assert [c for c in candidates(fp8, HOPPER) if isinstance(c, LibraryMm)] == [
        LibraryMm(True),
        LibraryMm(False),
    ]
    for shape, out in (((512, 512, 16384), torch.bfloat16), ((512, 512, 512), torch.float32)):
        problem = problem_of(shape, ("fp8_e4m3",) * 2, ROWS, out)
        assert LibraryMm(True) not in candidates(problem, HOPPER)
    assert selected((512, 512, 512), ("fp8_e4m3",) * 2).block_m == 64
    tune_shapes([(512, 512, 512)], timer=favour(LibraryMm(False)), format="fp8_e4m3")
    assert selected((512, 512, 512), ("fp8_e4m3",) * 2) == LibraryMm(False)


def test_candidates_that_fail_lose():
    def timer(problem, candidate):
        if candidate == ODD:
            raise OutOfResources(300000, 232448, "shared memory")
        return 1.0 if candidate.block_m == 256 else 2.0

    (race,) = tune_shapes([(512, 512, 512)], timer=timer)
    assert race.choice.block_m == 256
    assert race.raced == len(scaled_mm_candidates(HOPPER)) - 1


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300000, 232448, "shared memory"),
        PTXASError("ptxas exited with code 255"),
        CompilationError("x = 1", ast.parse("x").body[0], "no such layout"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_race_survives_candidates_that_do_not_compile(error):
    def timer(problem, candidate):
        if candidate != ODD:
            raise error
        return 1.0

    (race,) = tune_shapes([(512, 512, 512)], timer=timer)
    assert (race.choice, race.raced) == (ODD, 1)


def test_an_error_of_ours_is_not_a_lost_race():
    def timer(problem, candidate):
        raise AssertionError("wrong result")

    with pytest.raises(AssertionError, match="wrong result"):
        tune_shapes([(512, 512, 512)], timer=timer)


def test_an_interrupted_run_keeps_the_races_that_are_finished():
    def timer(problem, candidate):
        if problem.M == 512:
            raise KeyboardInterrupt
        return 1.0 if candidate == ODD else 2.0

    with pytest.raises(KeyboardInterrupt):
        tune_shapes([(256, 512, 512), (512, 512, 512)], timer=timer)
    tuned.winners_on.cache_clear()  # as a new process
    (problem,) = tuned.winners_on("Test GPU")
    assert problem.M == 256


def winning(M):
    return MmProblem(M, 512, 512, "int8", "int8", "rowwise", "bf16")


def test_kept_winners_join_those_of_another_process(machine):
    first, second = ODD, LibraryMm(False)
    path = tuned.keep_winners("Test GPU", {winning(256): first})
    assert tuned.winners_on("Test GPU") == {winning(256): first}
    content = json.loads(path.read_text())
    theirs = {"problem": vars(winning(1024)), "choice": vars(second)}
    path.write_text(json.dumps(content | {"winners": [*content["winners"], theirs]}))
    assert winning(1024) not in tuned.winners_on("Test GPU")  # which read the file before
    assert tuned.keep_winners("Test GPU", {winning(256): second}) == path
    everything = {winning(256): second, winning(1024): second}
    assert tuned.winners_on("Test GPU") == everything
    content = json.loads(path.read_text())
    assert (content["device"], len(content["winners"])) == ("Test GPU", 2)
    assert content["torch"] == torch.__version__
    assert list(machine.iterdir()) == [path]  # nothing half written


def test_kept_winners_replace_a_damaged_file(caplog):
    path = tuned.winners_path("Test GPU")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
    tuned.keep_winners("Test GPU", {winning(256): ODD})
    assert "cannot be read" in caplog.text
    assert tuned.winners_on("Test GPU") == {winning(256): ODD}


def test_out_of_memory_keeps_the_table(caplog, machine):
    def timer(problem, candidate):
        if problem.M == 512:
            raise torch.OutOfMemoryError("full")
        return 1.0

    with caplog.at_level(logging.INFO, logger=autotune.__name__):
        full, fine = tune_shapes([(512, 512, 512), (256, 512, 512)], timer=timer)
    assert full.choice is None and "memory is full" in full.reason
    assert "keeps the table's configuration: the GPU's memory is full" in caplog.text
    assert fine.choice is not None


def test_a_problem_beyond_the_scratch_limit_is_not_raced():
    def timer(problem, candidate):
        raise AssertionError("timed")

    (race,) = tune_shapes([(65536, 65536, 4096)], timer=timer)
    assert race.choice is None and "MiB" in race.reason


def test_the_time_cap_keeps_what_is_finished(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    each = len(scaled_mm_candidates(HOPPER))
    shapes = [(256, 512, 512), (512, 512, 512), (1024, 512, 512)]
    races = tune_shapes(shapes, seconds=each + 2, timer=favour(ODD))
    assert [race.choice for race in races] == [ODD, None, None]
    assert races[1].reason == races[2].reason == "time is up"
    assert races[1].raced == 2 and races[2].raced == 0
    assert len(tuned.winners_on("Test GPU")) == 1


def test_nothing_is_written_where_nothing_won(machine):
    tune_shapes([(512, 512, 512)], seconds=-1, timer=favour(ODD))
    assert not list(machine.iterdir())


def test_a_damaged_file_is_ignored_and_said(caplog):
    path = tuned.winners_path("Test GPU")
    path.write_text('{"winners": [{"problem": {}}]}')
    assert tuned.winners_on("Test GPU") == {}
    assert str(path) in caplog.text
    assert isinstance(selected((512, 512, 512)), ScaledMmSpec)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shapes": [(0, 5, 5)]}, "shapes must be positive"),
        ({"scales": "mixed"}, "scales must be"),
        ({"format": "int7"}, "int7"),
        ({"out_dtype": torch.float64}, "out_dtype must be"),
    ],
)
def test_what_cannot_be_raced(changed, message):
    with pytest.raises(ValueError, match=message):
        tune_shapes(**({"shapes": [(512, 512, 512)], "timer": favour(ODD)} | changed))


def test_the_command_prints_each_race(monkeypatch, capsys):
    monkeypatch.setattr(autotune, "GpuTimer", lambda device, capability: favour(ODD))
    autotune.main(["512,512,512", "65536,65536,4096", "--seconds", "5"])
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("512 x 512 x 512 int8: 0 TFLOP/s, MmConfig(block_m=64, block_n=64")
    assert "not raced: it needs" in second
    with pytest.raises(SystemExit):
        autotune.main(["512x512"])
    assert choose_mm.winner is tuned.winner
