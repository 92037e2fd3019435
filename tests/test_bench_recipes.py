"""The benchmark of all recipes: what is run, kept, merged and concluded, without training."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_examples import LINE, save_tiny_llama

from finetuning.text import Corpus
from finetuning.training import train

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import recipes as bench  # noqa: E402
from from_scratch import SEPARATOR, Size, build, size_named, stream  # noqa: E402
from gpu_turns import Turns  # noqa: E402
from gpu_workers import Outcome, Task, Workers  # noqa: E402
from recipe_records import (  # noqa: E402
    BASELINE,
    CONTROL,
    DIVERGED,
    FAILED,
    FINE_TUNING,
    FINISHED,
    FROM_SCRATCH,
    SQNR,
    TIME,
    TRAINING,
    is_done,
    keep,
    load,
    rows,
)
from recipe_tables import BEGIN, END, insert, markdown, memory_markdown  # noqa: E402

SETTINGS = {
    "steps": 300,
    "batch": 8,
    "sequence": 512,
    "lr": 5e-5,
    "dtype": "bf16",
    "model": "a model",
    "text": "a text",
    "options": {},
}


def record(recipe: str, end: float | None = None, **changed: Any) -> dict[str, Any]:
    made = {
        "kind": TRAINING,
        "workload": FINE_TUNING,
        "recipe": recipe,
        "seed": 0,
        "status": FINISHED,
        "call": "first",
        "gpu": 0,
        "device": "a GPU",
        "versions": {"torch": "2"},
        "settings": SETTINGS,
        "start": 3.0,
        "end": end,
    }
    return made | changed


# ------------------------------------------------------------------ records


def test_what_is_kept_is_found_again_and_its_settings_decide_whether_it_is_done(
    tmp_path: Path,
) -> None:
    keep(record("int8_rotated", 2.5), tmp_path)
    keep(record("halo0_int8", float("nan"), status=DIVERGED, steps_done=7), tmp_path)
    keep(record("nvfp4", status=FAILED, error="no kernel"), tmp_path)
    records = load(tmp_path)
    assert len(records) == 3
    assert next(r for r in records if r["recipe"] == "halo0_int8")["end"] is None

    def done(recipe: str, seed: int = 0, **changed: Any) -> bool:
        return is_done(records, FINE_TUNING, TRAINING, recipe, seed, SETTINGS | changed)

    assert done("int8_rotated")
    assert done("halo0_int8")
    assert not done("nvfp4")  # failed: to be tried again
    assert not done("int8_rotated", seed=1)
    assert not done("int8_rotated", steps=200)


def test_a_merged_file_counts_like_the_files_of_its_runs(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    keep(record("nvfp4", status=FAILED, error="killed"), folder)
    merged = {"runs": [record("nvfp4", 2.5), record("hot", 2.6)]}
    (folder / "a_earlier.json").write_text(json.dumps(merged))
    found = {r["recipe"]: r["status"] for r in load(folder)}
    assert found == {"nvfp4": FINISHED, "hot": FINISHED}


def test_the_gap_is_a_share_of_the_improvement_seed_by_seed() -> None:
    records = [
        record(BASELINE, 2.0),
        record(BASELINE, 2.2, seed=1),
        record("ours", 2.01),
        record("ours", 2.208, seed=1),
        record("theirs", 2.5),
    ]
    baseline, ours, theirs = rows(records, FINE_TUNING)
    assert (baseline.recipe, ours.recipe, theirs.recipe) == (BASELINE, "ours", "theirs")
    assert ours.gaps == pytest.approx({0: 0.01, 1: 0.01})
    assert ours.difference == pytest.approx(0.009)
    assert ours.spread == pytest.approx(0.2)
    assert ours.parity is True
    assert theirs.gap == pytest.approx(0.5)
    assert theirs.parity is None  # one seed has no spread to be within


def test_parity_needs_the_gap_and_the_spread() -> None:
    def parity(first: float, second: float, spread: float) -> bool | None:
        records = [
            record(BASELINE, 2.0),
            record(BASELINE, 2.0 + spread, seed=1),
            record("ours", first),
            record("ours", second + spread, seed=1),
        ]
        return rows(records, FINE_TUNING)[1].parity

    assert parity(2.01, 2.01, spread=0.2) is True
    assert parity(2.01, 2.01, spread=0.005) is False  # outside the spread of the seeds
    assert parity(2.03, 2.03, spread=0.2) is False  # 3 % of the improvement


def test_the_baseline_of_the_same_call_is_taken_first() -> None:
    records = [
        record(BASELINE, 2.0),
        record(BASELINE, 2.4, call="second"),
        record("ours", 2.4, call="second"),
        record("late", 2.4, call="third"),
        record("elsewhere", 2.4, device="another GPU"),
    ]
    by_name = {row.recipe: row for row in rows(records, FINE_TUNING)}
    assert by_name["ours"].gap == pytest.approx(0)
    assert by_name["ours"].baseline_same_call
    assert by_name["late"].gap == pytest.approx(0)  # the latest one
    assert not by_name["late"].baseline_same_call
    assert by_name["elsewhere"].gap is None


def test_divergence_and_failure_stand_in_the_table() -> None:
    records = [
        record(BASELINE, 2.0),
        record("halo0_int8", None, status=DIVERGED, steps_done=7),
        record("nvfp4", status=FAILED, error="out of memory", device=None),
    ]
    del records[2]["start"], records[2]["end"]
    by_name = {row.recipe: row for row in rows(records, FINE_TUNING)}
    assert by_name["halo0_int8"].parity is False
    assert by_name["halo0_int8"].note == "diverged at step 7 (seed 0)"
    assert by_name["nvfp4"].note == "failed: out of memory"


def test_times_are_those_of_the_same_call_and_gpu() -> None:
    records = [
        record(BASELINE, kind=TIME, gpu=0, alone_ms=[50.0]),
        record(BASELINE, kind=TIME, gpu=1, alone_ms=[60.0]),
        record(BASELINE, kind=TIME, gpu=1, alone_ms=[90.0], call="second"),
        record("ours", 2.0, gpu=1, alone_ms=[70.0, 40.0, 30.0]),
        record("ours", kind=SQNR, sqnr_db={"output": {"a": 30.0, "b": 20.0, "c": None}}),
    ]
    ours = rows(records, FINE_TUNING)[1]
    assert (ours.ms, ours.ms_baseline) == (40.0, 60.0)
    assert ours.sqnr == {"output": (25.0, 20.0, "b")}
    assert (ours.device_ms, ours.device_ms_baseline) == (None, None)
    records[1]["device_ms"], records[3]["device_ms"] = 20.0, 10.0
    ours = rows(records, FINE_TUNING)[1]
    assert (ours.device_ms, ours.device_ms_baseline) == (10.0, 20.0)


def test_who_misses_parity_is_explained_by_its_weakest_matmuls() -> None:
    def levels(name: str, weakest: float) -> dict[str, Any]:
        sites = {f"layers.{n}.k_proj": weakest - n for n in range(4)}
        sites |= {f"layers.{n}.down_proj": 30.0 + n for n in range(16)}
        sqnr = {"output": {"a": 40.0}, "grad_input": sites, "grad_weight": {}}
        return record(name, kind=SQNR, sqnr_db=sqnr)

    records = [record(BASELINE, 2.0), record(BASELINE, 2.2, seed=1)]
    records += [record("kept", 2.0), record("kept", 2.2, seed=1), levels("kept", 33.0)]
    records += [record("missed", 2.5), levels("missed", 3.0), levels("int8_rotated", 39.0)]
    missed = next(row for row in rows(records, FINE_TUNING) if row.recipe == "missed")
    assert missed.missed and missed.parity is None and missed.weakest == "grad_input"
    assert missed.worst_linears["grad_input"] == ("k_proj", 2, 2)
    text = markdown(records)
    assert "| `missed` | 2.5000 | +50.00 | 1 | no, by one seed |" in text
    assert "grad_input, most of all k_proj (2 of the 2 worst)" in text
    assert "`kept` (35.5 dB, grad_input)" in text and "`missed` (35.5 dB, grad_input)" in text
    assert "`int8_rotated` | -" not in text and "Not run: `int8_rotated`, " in text


def test_markdown_has_a_row_a_recipe_and_is_put_between_the_marks() -> None:
    records = [
        record(BASELINE, 2.0, alone_ms=[50.0]),
        record("ours", 2.01, alone_ms=[25.0]),
        record(BASELINE, 2.0, workload=FROM_SCRATCH),
    ]
    text = markdown(records)
    assert "| `ours` | 2.0100 | +1.00 | 1 | 25.0 (2.00x) |" in text
    assert "### From scratch" in text
    once = insert("# Recipes\n", text)
    assert once.count(BEGIN) == once.count(END) == 1
    assert insert(once.replace("`ours`", "`old`") + "after\n", text) == once + "after\n"


# ------------------------------------------------------------------ what is run


def arguments(*words: str) -> argparse.Namespace:
    return bench.parse(["--model", "m", "--text", "t", "--device", "cpu", *words])


def test_every_recipe_has_its_runs_and_shards_share_them_out() -> None:
    args = arguments("--sqnr", "--gpus", "2", "--seeds", "fp8_tensorwise=2")
    jobs = bench.wanted_jobs(args)
    assert len(jobs) == len(set(jobs))
    tuned = {j.recipe: j.seeds for j in jobs if (j.workload, j.kind) == (FINE_TUNING, TRAINING)}
    assert set(tuned) == set(bench.known_recipes())
    assert tuned[BASELINE] == tuned["int8_rotated"] == (0, 1, 2)
    assert tuned["fp8_tensorwise"] == (0, 1)
    assert tuned["int8_rotated memory=min"] == tuned[CONTROL] == (0, 1, 2)
    measured = [j.recipe for j in jobs if j.kind == SQNR]
    assert sorted(measured) == sorted(set(bench.hadagraph.RECIPES) - {BASELINE})
    assert jobs[0].recipe == BASELINE
    scratch = {j.recipe for j in jobs if j.workload == FROM_SCRATCH}
    assert scratch == set(bench.FROM_SCRATCH_RECIPES)
    shards = [bench.open_jobs(jobs, [], bench_workloads(args), (i, 3)) for i in range(3)]
    assert sorted(map(str, jobs)) == sorted(str(job) for shard in shards for job in shard)


def bench_workloads(args: argparse.Namespace) -> dict[str, Any]:
    return {
        name: bench.Workload(name, None, SETTINGS, None, None, Size(1, 32))  # type: ignore[arg-type]
        for name in args.workloads
    }


def test_what_is_done_is_left_out_but_the_baseline_is_in_every_call() -> None:
    args = arguments("--recipes", "int8_rotated", "hot", "--workloads", FINE_TUNING)
    jobs, found = bench.wanted_jobs(args), bench_workloads(args)
    records = [record("hot", 2.0), record("int8_rotated", 2.0), record(BASELINE, 2.0)]
    left = bench.open_jobs(jobs, records, found, (0, 1))
    assert {j.recipe for j in left} == {BASELINE, "int8_rotated"}
    assert next(j for j in left if j.recipe == "int8_rotated").seeds == (1, 2)
    records += [record("int8_rotated", 2.0, seed=seed) for seed in (1, 2)]
    assert bench.open_jobs(jobs, records, found, (0, 1)) == []


def test_a_baseline_is_run_only_for_what_is_compared_with_it() -> None:
    scratch = ("--scratch-recipes", "int8_rotated")
    args = arguments("--recipes", "hot", "--sqnr", "--gpus", "2", *scratch)
    jobs, found = bench.wanted_jobs(args), bench_workloads(args)

    def left(*records: dict[str, Any]) -> list[tuple[str, str, str]]:
        opened = bench.open_jobs(jobs, list(records), found, (0, 1))
        return sorted({(j.workload, j.kind, j.recipe) for j in opened})

    done = record("int8_rotated", 2.0, workload=FROM_SCRATCH)
    kinds = {(FINE_TUNING, TRAINING, BASELINE), (FINE_TUNING, TIME, BASELINE)}
    assert {job for job in left(done) if job[2] == BASELINE} == kinds
    assert left(done, record("hot", 2.0)) == [(FINE_TUNING, SQNR, "hot")]


def test_time_only_has_a_baseline_on_each_gpu() -> None:
    jobs = bench.wanted_jobs(arguments("--time-only", "--gpus", "2", "--recipes", "hot"))
    assert [(j.kind, j.recipe, j.gpu) for j in jobs] == [
        (TIME, BASELINE, 0),
        (TIME, BASELINE, 1),
        (TIME, "hot", None),
    ]


@pytest.mark.parametrize("text", ["2/2", "a/3", "1"])
def test_a_bad_shard_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not I/N"):
        bench.shard_of(text)


# ------------------------------------------------------------------ processes


def python(code: str, name: str = "task", limit_s: float = 30.0, **more: Any) -> Task:
    return Task(name, lambda gpu: [sys.executable, "-c", code.format(gpu=gpu)], limit_s, **more)


def test_workers_wait_for_what_a_task_needs_and_tell_how_each_ended(tmp_path: Path) -> None:
    made = tmp_path / "made"
    tasks = [
        python("import sys; print('it broke'); sys.exit(3)", "bad"),
        python(f"assert open({str(made)!r})", "second", needs=(made,)),
        python(f"import time; time.sleep(0.3); open({str(made)!r}, 'w')", "first", device=False),
        python("", "never", needs=(tmp_path / "nobody makes this",)),
    ]
    ended: dict[str, Outcome] = {}
    never = Workers(2, 0, tmp_path).run(tasks, 60, lambda o: ended.update({o.task.name: o}))
    assert {name: outcome.code for name, outcome in ended.items()} == {
        "bad": 3,
        "first": 0,
        "second": 0,
    }
    assert ended["bad"].log.read_text() == "it broke\n"
    assert [task.name for task in never] == ["never"]


def test_workers_kill_at_a_tasks_limit_and_at_the_deadline(tmp_path: Path) -> None:
    ended: dict[str, Outcome] = {}
    sleep = "import time; time.sleep(60)"
    tasks = [python(sleep, "slow", limit_s=0.3), python(sleep, "late"), python(sleep, "waiting")]
    began = time.monotonic()
    never = Workers(2, 0, tmp_path).run(tasks, 1.0, lambda o: ended.update({o.task.name: o}))
    assert time.monotonic() - began < 10
    assert (ended["slow"].code, ended["slow"].at_deadline) == (None, False)
    assert (ended["late"].code, ended["late"].at_deadline) == (None, True)
    assert not never and ended["waiting"].at_deadline  # took the place of the slow one


def test_workers_spread_over_the_gpus(tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], {gpu}); time.sleep(0.5)"
    tasks = [python(code, f"task{i}") for i in range(4)] + [python(code, "pinned", gpu=1)]
    said: dict[str, str] = {}
    Workers(4, 2, tmp_path).run(tasks, 60, lambda o: said.update({o.task.name: o.log.read_text()}))
    assert sorted(said.values()) == ["0 0\n", "0 0\n", "1 1\n", "1 1\n", "1 1\n"]
    assert said["pinned"] == "1 1\n"


def beside(folder: Path, steps: Any) -> None:
    turns = Turns(folder, 0)
    while steps.value >= 0:
        turns.beside()
        steps.value += 1
        time.sleep(0.005)


def test_who_asks_for_the_gpu_has_it_alone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    counters = [context.Value("i", 0) for _ in range(2)]
    others = [context.Process(target=beside, args=(tmp_path, c)) for c in counters]
    for other in others:
        other.start()
    try:
        deadline = time.monotonic() + 10
        while min(c.value for c in counters) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        with Turns(tmp_path, 0).alone():
            before = [c.value for c in counters]
            time.sleep(0.1)
            assert [c.value for c in counters] == before
        time.sleep(0.2)
        assert all(c.value > b for c, b in zip(counters, before, strict=True))
    finally:
        for other in others:
            other.kill()


# ------------------------------------------------------------------ from scratch


def test_the_model_from_scratch_has_30_million_parameters_and_a_tied_head() -> None:
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model = build(Size(8, 512), 0, 512)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(30.5e6, rel=0.02)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_text_becomes_its_bytes() -> None:
    assert stream(["ab", "é"]).tolist() == [97, 98, SEPARATOR, 0xC3, 0xA9, SEPARATOR]
    assert dataclasses.astuple(size_named("2x64")) == (2, 64)
    with pytest.raises(ValueError, match="8by512 is not LAYERSxWIDTH"):
        size_named("8by512")


# ------------------------------------------------------------------ what is kept


@pytest.mark.parametrize(
    ("recipe", "least", "most"),
    [("int8_rotated", 0.5, 0.54), ("mxfp4", 0.25, 0.28), ("hot", 0.25, 0.26)],
)
def test_the_linears_keep_their_codes_alone(recipe: str, least: float, most: float) -> None:
    from saved_memory import LINEARS, Model, measure

    args = argparse.Namespace(batch=2, sequence=64, shape="tiny", executor="eager")
    model = Model(LINEARS, args)
    in_bf16 = 2 * args.batch * args.sequence * sum(model.module.widths)
    found = measure(model, recipe, args)
    assert found["lowered"] > 0
    assert least <= found["saved_bytes"] / in_bf16 <= most


# ------------------------------------------------------------------ from end to end


class Broken(torch.nn.Module):
    """Its loss is no number from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.weight * (float("nan") if self.calls > 1 else 1.0)


def test_training_ends_where_the_loss_is_no_number() -> None:
    args = arguments("--workloads", FROM_SCRATCH, "--sequence", "8", "--scratch-steps", "5")
    settings = bench.workloads(args)[FROM_SCRATCH].training
    tokens = torch.arange(64)
    broken = Broken()
    result = train("broken", broken, broken, Corpus("", tokens, tokens), settings, print, False)
    assert len(result.train_loss) == 2
    assert (result.held_out[-1].step, result.start) == (2, 1.0)
    assert result.end != result.end


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_call_trains_keeps_and_merges_and_another_has_nothing_to_do(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(LINE * 400, encoding="utf-8")
    tiny = ("--steps", "3", "--batch", "2", "--sequence", "32", "--windows", "2")
    places = [
        *("--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")),
        *("--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "merged.json")),
        *("--cache", str(tmp_path / "cache"), "--device", "cpu", "--gpus", "0"),
    ]
    chosen = ("--recipes", "int8_rotated", "--seeds", "bf16=2", "int8_rotated=2")
    less = ("--workloads", FINE_TUNING, "--option", "executor=eager", "--dtype", "fp32")

    def call() -> str:
        command = [sys.executable, str(BENCH / "recipes.py"), *places, *tiny, *chosen, *less]
        done = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "2 processes to run, 0 runs are there" in call()
    content = json.loads((tmp_path / "merged.json").read_text())
    assert content["device"] and content["versions"]["torch"] and content["settings"]
    ours = next(row for row in rows(content["runs"], FINE_TUNING) if row.recipe != BASELINE)
    assert set(ours.gaps) == {0, 1}
    assert 0 < ours.saved_bytes < ours.saved_bytes_baseline
    assert ours.ms > 0 and ours.ms_baseline > 0
    assert "0 processes to run" in call()


def test_the_devices_time_is_that_of_the_profiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    import recipe_training

    calls: list[str] = []

    class Profiler:
        def __init__(self, activities: Any) -> None:
            self.start, self.stop = lambda: calls.append("on"), lambda: calls.append("off")

        def export_chrome_trace(self, path: str) -> None:
            kernels = [{"cat": "kernel", "name": "gemm", "dur": 1500.0}] * 4
            Path(path).write_text(json.dumps({"traceEvents": [*kernels, {"cat": "cuda_runtime"}]}))

    monkeypatch.setattr(recipe_training, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    device = recipe_training.DeviceTime(first=5, count=2)
    for step in range(1, 8):
        calls.append(str(step))
        device.on_step(step, 1.0)
    assert calls[4:] == ["5", "on", "6", "7", "wait", "off"]
    assert device.found() == {"device_ms": 3.0, "launches": 2}


def test_options_of_hadagraph_stand_behind_the_recipes_name(tmp_path: Path) -> None:
    from recipe_training import Worker

    workload = bench_workloads(arguments())[FINE_TUNING]
    workload = dataclasses.replace(workload, settings=SETTINGS | {"lower": True, "options": {}})
    given = ("int8_rotated memory=min", "call", tmp_path, 0, lambda record: None, 1.0)
    options = Worker(workload, *given)._options(None)  # type: ignore[arg-type]
    assert options == {"recipe": "int8_rotated", "never_slower": False, "memory": "min"}


def test_parts_of_the_memory_file_are_united(tmp_path: Path) -> None:
    from saved_memory import merge

    shares = {"inductor bf16": {"saved_share": 1.0}, "mxfp4": {"saved_share": 0.27}}
    settings = {"shape": "tiny", "batch": 2, "sequence": 64, "executor": "eager"}
    files = []
    for number, more in enumerate(({"hlq": {"saved_share": 0.13}}, {"int8_rotated": {}}, {})):
        content = {"models": {"linears": shares | more}, "device": "a GPU" if number < 2 else ""}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(content | {"settings": settings}))
    place = argparse.Namespace(merge=files[:2], out=tmp_path / "merged.json")
    united = merge(place)["models"]["linears"]
    assert set(united) == {*shares, "hlq", "int8_rotated"}
    assert json.loads(place.out.read_text())["models"]["linears"] == united
    with pytest.raises(ValueError, match="another device"):
        merge(argparse.Namespace(merge=files, out=None))


# ------------------------------------------------------------------ pictures


def test_pictures_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from plot_recipes import draw_curves, draw_gaps, draw_memory

    records = [
        record(BASELINE, 2.0),
        record("int8_rotated", 2.001),
        record("halo0_int8", None, status=DIVERGED, steps_done=7),
        record(BASELINE, 1.0, workload=FROM_SCRATCH, held_out=[[0, 5.0], [50, 1.0]]),
        record("hot", None, workload=FROM_SCRATCH, held_out=[[0, 5.0], [9, None]]),
    ]
    draw_gaps(records, tmp_path / "loss.png")
    draw_curves(records, tmp_path / "curves.png")
    shares = {"inductor bf16": {"saved_share": 1.0}, "mxfp4": {"saved_share": 0.27}}
    models = {"linears": shares | {"hot": {"error": "no"}}, "block": shares}
    draw_memory({"models": models}, tmp_path / "memory.png")
    settings = {"shape": "tiny", "batch": 2, "sequence": 64}
    table = memory_markdown({"models": models, "settings": settings, "device": "a GPU"})
    assert "| `mxfp4` | 0.270 | 0.270 |" in table and "`hot`" not in table
    assert all((tmp_path / f"{n}.png").stat().st_size > 1000 for n in ("loss", "curves", "memory"))
