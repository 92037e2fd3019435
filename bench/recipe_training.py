"""One recipe in a process of its own: trains, times or measures the errors of a model that was
prepared on disk, and leaves one record a run. Knows nothing of other recipes or processes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fine_tuning import add_noise, named_option
from from_scratch import Size, build, stream
from gpu_turns import Turns
from kernel_trace import recorded
from recipe_records import (
    BASELINE,
    CONTROL,
    DIVERGED,
    FINISHED,
    FROM_SCRATCH,
    SQNR,
    TIME,
    TRAINING,
    Record,
)
from record import device_name, versions
from torch.profiler import ProfilerActivity, profile

import hadagraph

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from finetuning.backends import HADAGRAPH, INDUCTOR
from finetuning.model import CausalLoss, find_model, load_model
from finetuning.text import Corpus, batches, read_works, split_works, tokenize
from finetuning.training import WARM_UP_STEPS, RunResult, Settings, train

TIMED_STEPS, FEWEST_TIMED = 20, 5
TIMED_S = 5.0  # others wait meanwhile
PROFILED_STEPS = 2
TRIED_STEPS = 12  # before a run that would take too long is given up
CALIBRATION_BATCHES = 4
CALIBRATED = ("auto",)  # besides the recipes that select rules by a profile
DIGITS = 5


# -------------------------------------------------------------------------- what is trained


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its text and how it is trained. `settings` is what has to be equal for two runs to
    be comparable, `training` the same for the training loop."""

    name: str
    training: Settings
    settings: dict[str, Any]
    model: str | None
    text: str | None
    size: Size

    def path(self, cache: Path) -> Path:
        """Where `prepare` leaves model and tokens."""
        return cache / f"{self.name}.pt"


@dataclasses.dataclass
class Prepared:
    """Model on its device and the tokens; `initial` are the weights that the prepared seed drew."""

    module: torch.nn.Module
    corpus: Corpus
    initial: dict[str, torch.Tensor]


def prepare(workload: Workload, cache: Path) -> Path:
    """Load or build the model and tokenize the text, on the CPU; workers read the file."""
    name, works = read_works(workload.text)
    split = split_works(works)
    sequence = workload.training.sequence
    if workload.name == FROM_SCRATCH:
        module = build(workload.size, 0, sequence)
        halves = (stream([work.text for work in half]) for half in (split.train, split.held_out))
        corpus = Corpus(name, *halves)
    else:
        language = load_model(find_model(workload.model))
        module = language.module
        corpus = tokenize(name, split, language.tokenizer, sequence)
    path = workload.path(cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save({"module": module, "corpus": corpus}, temporary)
    os.replace(temporary, path)
    return path


def load_prepared(workload: Workload, cache: Path) -> Prepared:
    """What `prepare` left, with the module on the device."""
    content = torch.load(workload.path(cache), weights_only=False)
    module = content["module"].to(workload.training.device)
    initial = {key: value.clone() for key, value in module.state_dict().items()}
    return Prepared(module, content["corpus"], initial)


# -------------------------------------------------------------------------- one process


class Worker:
    """Runs of one recipe of one workload, whose records go to `save` as each run ends. Words behind
    the recipe's name, `NAME=VALUE` each, are options of hadagraph. A run whose steps would take
    more than `limit_s` together ends the process."""

    def __init__(
        self,
        workload: Workload,
        recipe: str,
        call: str,
        cache: Path,
        gpu: int,
        save: Callable[[Record], object],
        limit_s: float,
    ) -> None:
        self.workload, self.recipe, self.call, self.gpu = workload, recipe, call, gpu
        self.save, self.limit_s = save, limit_s
        self.turns = Turns(cache / "turns", gpu)
        self.cache = cache
        self.calibration_s: float | None = None

    def run(self, kind: str, seeds: list[int]) -> None:
        """Every run asked for."""
        prepared = load_prepared(self.workload, self.cache)
        if kind == SQNR:
            self.save(self._record(kind, 0, FINISHED) | self._errors(prepared))
            return
        plain = CausalLoss(prepared.module).train()
        compiled = self._compile(plain, prepared)
        if kind == TIME:
            timed = self._alone(compiled, plain, prepared.corpus)
            self.save(self._record(kind, 0, FINISHED) | timed)
            return
        for seed in seeds:
            self.save(self._train(seed, compiled, plain, prepared, first=seed == seeds[0]))

    def _record(self, kind: str, seed: int, status: str) -> Record:
        return {
            "kind": kind,
            "workload": self.workload.name,
            "recipe": self.recipe,
            "seed": seed,
            "status": status,
            "call": self.call,
            "gpu": self.gpu,
            "device": device_name(),
            "versions": versions(),
            "settings": self.workload.settings,
        }

    # ------------------------------------------------------------------ compiling

    def _options(self, prepared: Prepared) -> dict[str, Any]:
        name, *given = self.recipe.split()
        options = {
            "recipe": name,
            "never_slower": not self.workload.settings["lower"],
            **self.workload.settings["options"],
            **dict(map(named_option, given)),
        }
        selects = getattr(hadagraph.RECIPES.get(name), "select", "")
        if (selects or name in CALIBRATED) and "profile" not in options:
            options["profile"] = self._calibrate(prepared)
        return options

    def _calibrate(self, prepared: Prepared) -> hadagraph.Profile:
        """A profile of the model at its start; the seconds that it took are kept."""
        loss = CausalLoss(prepared.module).train()
        started = time.perf_counter()
        with self._beside(), self.workload.training.precision():
            profile = hadagraph.calibrate(loss, self._calibration_batches(prepared.corpus))
        self.calibration_s = time.perf_counter() - started
        return profile

    def _calibration_batches(self, corpus: Corpus) -> Iterator[torch.Tensor]:
        training = self.workload.training
        size = (training.batch, training.sequence)
        for ids in batches(corpus.train, CALIBRATION_BATCHES, *size, training.seed):
            yield ids.to(training.device)
            self.turns.beside()

    def _compile(self, plain: torch.nn.Module, prepared: Prepared) -> torch.nn.Module:
        torch.compiler.reset()
        hadagraph.reset_report()
        if self.recipe == CONTROL:
            add_noise(prepared.module)
            return plain
        if self.recipe == BASELINE:
            compiled: torch.nn.Module = torch.compile(plain, backend=INDUCTOR)
            return compiled
        options = self._options(prepared)
        self._explain = lambda ids: hadagraph.explain(plain, ids, options=options).reports
        lowered: torch.nn.Module = torch.compile(plain, backend=HADAGRAPH, options=options)
        return lowered

    # ------------------------------------------------------------------ training

    def _train(
        self,
        seed: int,
        compiled: torch.nn.Module,
        plain: torch.nn.Module,
        prepared: Prepared,
        first: bool,
    ) -> Record:
        settings = dataclasses.replace(self.workload.training, seed=seed)
        self._reset_weights(prepared, seed)
        print(f"{self.workload.name} {self.recipe} seed {seed}: starts", flush=True)

        began = time.time()
        marks: list[float] = []

        def on_step(step: int, loss: float) -> None:
            marks.append(time.monotonic())
            if step == TRIED_STEPS:
                pace = statistics.median(b - a for a, b in itertools.pairwise(marks[1:]))
                if pace * settings.steps > self.limit_s:
                    sys.exit(f"too slow: {pace:.2f} s a step, {settings.steps} steps")
            if step >= WARM_UP_STEPS:
                self.turns.beside()
            if step % 50 == 0:
                print(f"  step {step}: loss {loss:.4f}", flush=True)

        measure_saved = first and self.recipe == BASELINE
        try:
            result = train(
                self.recipe, compiled, plain, prepared.corpus, settings, on_step, measure_saved
            )
        finally:
            self.turns.leave()
        status = FINISHED if math.isfinite(result.end) else DIVERGED
        record = self._record(TRAINING, seed, status) | _figures(result, first)
        record |= {"wall_s": time.time() - began, "calibration_s": self.calibration_s}
        if self.recipe not in (BASELINE, CONTROL):
            record |= self._lowering(prepared.corpus)
        if first and status == FINISHED and self.recipe != CONTROL:
            # Kept before it is timed: what follows may be cut short.
            self.save(record)
            record |= self._alone(compiled, plain, prepared.corpus)
        return record

    def _reset_weights(self, prepared: Prepared, seed: int) -> None:
        """Pretrained weights are the same for every seed; those from scratch are drawn by it."""
        initial = prepared.initial
        if self.workload.name == FROM_SCRATCH and seed != 0:
            sequence = self.workload.training.sequence
            initial = build(self.workload.size, seed, sequence).state_dict()
        prepared.module.load_state_dict(initial)

    def _lowering(self, corpus: Corpus) -> Record:
        """What was lowered in the training graphs, why the rest was not, and what is saved."""
        reports = [report for report in hadagraph.report() if report.kind == "training"]
        if not reports:  # the graph came out of a cache
            training = self.workload.training
            ids = next(batches(corpus.train, 1, training.batch, training.sequence, 0))
            with training.precision():
                reports = list(self._explain(ids.to(training.device)))
        sites = [site for report in reports for site in report.sites]
        reasons = Counter(site.reason for site in sites if site.reason)
        return {
            "gemms": len(sites),
            "lowered": sum(site.lowered for site in sites),
            "emulated": sum(
                (site.emulated or report.emulated) and site.lowered
                for report in reports
                for site in report.sites
            ),
            "reasons": dict(reasons.most_common(5)),
            "saved_bytes": sum(report.saved_bytes or 0 for report in reports),
        }

    def _alone(self, compiled: torch.nn.Module, plain: torch.nn.Module, corpus: Corpus) -> Record:
        """Milliseconds of each of a few steps with the GPU to this process, and of the kernels of
        one step by the profiler."""

        def steps(count: int, on_step: Callable[[int, float], None]) -> tuple[float, ...]:
            short = {"steps": count, "held_out_windows": 1, "evaluate_every": 0}
            settings = dataclasses.replace(self.workload.training, **short)
            return train(self.recipe, compiled, plain, corpus, settings, on_step, False).step_s

        pace = steps(WARM_UP_STEPS + 1, lambda *_: None)[-1]  # compiled, if it was not yet
        timed = min(TIMED_STEPS, max(FEWEST_TIMED, round(TIMED_S / pace)))
        first = WARM_UP_STEPS + timed
        profiler = DeviceTime(first, PROFILED_STEPS)
        with self.turns.alone():
            taken = steps(first + PROFILED_STEPS, profiler.on_step)[WARM_UP_STEPS:first]
        return {"alone_ms": [round(1e3 * seconds, 3) for seconds in taken]} | profiler.found()

    # ------------------------------------------------------------------ errors

    def _errors(self, prepared: Prepared) -> Record:
        """SQNR of every lowered GEMM of the first step."""
        training = self.workload.training
        loss = CausalLoss(prepared.module).train()
        ids = next(batches(prepared.corpus.train, 1, training.batch, training.sequence, 0))
        options = self._options(prepared) | {"never_slower": False}
        torch.compiler.reset()
        with self._beside(), training.precision():
            levels = hadagraph.measure_sqnr(loss, ids.to(training.device), options=options)
        rounded = {
            role: {site: round(level, 2) for site, level in sites.items()}
            for role, sites in levels.items()
        }
        return {"sqnr_db": rounded, "calibration_s": self.calibration_s}

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        self.turns.beside()
        try:
            yield
        finally:
            self.turns.leave()


class DeviceTime:
    """The device's milliseconds a step, over `count` steps of a training loop after its first
    `first`: the kernels' own durations, whatever the host does meanwhile."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count
        self._profiler: Any = None

    def on_step(self, step: int, loss: float) -> None:
        """Called after each step, counted from 1, before anything else runs on the device."""
        if not torch.cuda.is_available():
            return
        if step == self.first:
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.start()
        elif step == self.first + self.count:
            torch.cuda.synchronize()
            self._profiler.stop()

    def found(self) -> Record:
        """The time and the launches of a step; nothing without a GPU."""
        if self._profiler is None:
            return {}
        kernels = recorded(self._profiler, self.count)
        return {
            "device_ms": round(sum(row.us for row in kernels) / 1e3, 3),
            "launches": round(sum(row.count for row in kernels)),
        }


def _figures(result: RunResult, first: bool) -> Record:
    """Losses in nats a token, times in seconds, sizes in bytes. The first run of a process pays for
    compiling."""
    median = result.median_step_s
    slow = sum(result.step_s[:WARM_UP_STEPS])
    return {
        "start": result.start,
        "end": result.end,
        "held_out": [[point.step, round(point.loss, DIGITS)] for point in result.held_out],
        "train_loss": [round(loss, DIGITS) for loss in result.train_loss],
        "steps_done": len(result.train_loss),
        "shared_ms": 1e3 * median if median is not None else None,
        "compile_s": slow - WARM_UP_STEPS * median if first and median is not None else None,
        "saved_bytes": result.saved_bytes,
        "peak_bytes": result.peak_memory_bytes,
    }
