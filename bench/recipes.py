"""What each recipe costs in loss, time and memory: SmolLM2-135M fine-tuned on Shakespeare with all
of them, and a Llama of 30 M parameters trained from scratch on the same text with a few, beside
Inductor in bf16 in every call.

    python bench/recipes.py --gpus 4 --parallel 12 --seconds 500 --out bench/results/recipes.json
    python bench/recipes.py --folder runs --time-only --gpus 4 --parallel 8
    python bench/recipes.py --merge runs --out bench/results/recipes.json

Each run leaves a file in `--folder` as it ends; a call does what is not there yet, files that were
merged by earlier calls included, the most important first. Errors and divergence of one recipe are
results. Held-out losses are those of the plain model in bf16 with the weights that were trained.
Times are taken with the other processes of the same GPU at rest; device times are those of the
kernels alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from fine_tuning import named_option
from from_scratch import LLAMA_30M, size_named
from gpu_turns import Turns
from gpu_workers import Outcome, Task, Workers
from recipe_records import (
    BASELINE,
    CONTROL,
    FAILED,
    FINE_TUNING,
    FINISHED,
    FROM_SCRATCH,
    SQNR,
    TIME,
    TRAINING,
    WORKLOADS,
    Record,
    is_done,
    keep,
    load,
    merged,
)
from recipe_tables import print_tables
from recipe_training import CALIBRATED, Worker, Workload, prepare
from record import save, shard_of

import hadagraph

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from finetuning import UsageError
from finetuning.model import find_model
from finetuning.training import Settings

CLAIM_PARITY = (BASELINE, "int8_rotated", "auto", "fp8_rowwise", "mxfp8")
WITH_OPTIONS = ("int8_rotated memory=balanced", "int8_rotated memory=min")
THRICE = (*CLAIM_PARITY, *WITH_OPTIONS, CONTROL)  # seeds: these claim parity, or must miss it
FROM_SCRATCH_RECIPES = (BASELINE, "int8_rotated", "auto", "fp8_rowwise", "nvfp4", "halo0_int8")
LIMIT_S = 420.0
PREPARE, DEVICE = "prepare", "device"


@dataclasses.dataclass(frozen=True)
class Job:
    """Runs of one recipe that share a process; one record a seed."""

    workload: str
    kind: str
    recipe: str
    seeds: tuple[int, ...] = (0,)
    gpu: int | None = None

    @property
    def name(self) -> str:
        """What the driver prints and its log is called."""
        where = "" if self.gpu is None else f" gpu{self.gpu}"
        return f"{self.workload} {self.kind} {self.recipe}{where}"


# -------------------------------------------------------------------------- what to run


def known_recipes() -> list[str]:
    """Every recipe of hadagraph's table, the least asked for last, those with options of their own,
    and the control."""
    return [*sorted(hadagraph.RECIPES, key=lambda name: "fp6" in name), *WITH_OPTIONS, CONTROL]


def workloads(args: argparse.Namespace) -> dict[str, Workload]:
    """The two of them as the command line sizes them."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text = "Shakespeare" if args.text is None else Path(args.text).name
    found = {}
    for name in args.workloads:
        scratch = name == FROM_SCRATCH
        training = Settings(
            steps=args.scratch_steps if scratch else args.steps,
            batch=args.scratch_batch if scratch else args.batch,
            sequence=args.sequence,
            lr=args.scratch_lr if scratch else args.lr,
            clip=1.0,
            seed=0,
            device=device,
            dtype=args.dtype,
            recipe="",
            held_out_windows=args.windows,
            evaluate_every=args.evaluate_every,
            evaluate="plain",
        )
        settings = dataclasses.asdict(training)
        for key in ("seed", "recipe"):
            del settings[key]
        if scratch:
            model = f"Llama {args.scratch_size.layers}x{args.scratch_size.width}, bytes"
        else:
            model = find_model(args.model).name
        settings |= {"model": model, "text": text, "lower": args.lower}
        settings["options"] = dict(args.option)
        found[name] = Workload(name, training, settings, args.model, args.text, args.scratch_size)
    return found


def wanted_jobs(args: argparse.Namespace) -> list[Job]:
    """Everything that the command line asks for, the most important first."""
    known = known_recipes()
    names = [name for name in args.recipes or known if name in known]
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    seeds = dict.fromkeys(THRICE, 3) | dict(args.seeds)
    first = [name for name in CLAIM_PARITY if name in names]
    order = first + [name for name in names if name not in first]
    if args.time_only:
        return [
            *(Job(FINE_TUNING, TIME, BASELINE, gpu=gpu) for gpu in range(max(1, args.gpus))),
            *(Job(FINE_TUNING, TIME, n) for n in order if n not in (BASELINE, CONTROL)),
        ]
    jobs: list[Job] = []
    if FINE_TUNING in args.workloads:
        tuned = [Job(FINE_TUNING, TRAINING, n, tuple(range(seeds.get(n, 1)))) for n in order]
        jobs += tuned[: len(first)]
    if FROM_SCRATCH in args.workloads:
        scratch = [n for n in args.scratch_recipes if n in known]
        jobs += [Job(FROM_SCRATCH, TRAINING, n) for n in dict.fromkeys((BASELINE, *scratch))]
    if FINE_TUNING in args.workloads:
        jobs += tuned[len(first) :]
        if args.gpus > 1:  # on one GPU the baseline was timed as it trained
            jobs += [Job(FINE_TUNING, TIME, BASELINE, gpu=gpu) for gpu in range(args.gpus)]
        if args.sqnr:
            plain = [n for n in order if n in hadagraph.RECIPES and n != BASELINE]
            jobs += [Job(FINE_TUNING, SQNR, n) for n in plain]
    return jobs


def open_jobs(
    jobs: list[Job], records: list[Record], found: dict[str, Workload], shard: tuple[int, int]
) -> list[Job]:
    """What of a shard's jobs is not done. Each call has baselines of its own: those that something
    else that is left to do is compared with."""
    left = []
    for job in jobs[shard[0] :: shard[1]]:
        settings = found[job.workload].settings
        seeds = tuple(
            seed
            for seed in job.seeds
            if job.recipe == BASELINE
            or not is_done(records, job.workload, job.kind, job.recipe, seed, settings)
        )
        if seeds:
            left.append(dataclasses.replace(job, seeds=seeds))
    compared = {(job.workload, job.kind) for job in left if job.recipe != BASELINE}
    compared |= {(workload, TIME) for workload, kind in compared if kind == TRAINING}
    return [job for job in left if (job.workload, job.kind) in compared]


# -------------------------------------------------------------------------- the processes


class Driver:
    """Starts a process a job, keeps what they leave, and merges it whenever one ends."""

    def __init__(self, args: argparse.Namespace, found: dict[str, Workload]) -> None:
        self.args, self.found = args, found
        self.folder, self.cache = args.folder, args.cache
        self.call = args.call or datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.started = time.monotonic()
        self.jobs: dict[str, Job] = {}

    def run(self, jobs: list[Job]) -> None:
        """All of them, or as many as the time allows."""
        (self.cache / "device").unlink(missing_ok=True)
        needed = {job.workload for job in jobs}
        for name in needed:
            self.found[name].path(self.cache).unlink(missing_ok=True)
        tasks = [self._helper(PREPARE, name, device=False) for name in sorted(needed)]
        if self.args.measure_device and self.args.gpus:
            tasks.append(self._helper(DEVICE, DEVICE, device=True))
        tasks += [self._task(job) for job in jobs]
        self.jobs = {job.name: job for job in jobs}
        least = self.args.gpus if self.args.time_only else 1
        workers = Workers(max(least, self.args.parallel), self.args.gpus, self.cache)
        never = workers.run(tasks, self.args.seconds, self._ended)
        if never:
            print(f"not started: {', '.join(task.name for task in never)}")

    def _command(self, *words: str) -> list[str]:
        given = [*self.args.given, "--folder", str(self.folder), "--cache", str(self.cache)]
        return [sys.executable, str(Path(__file__).resolve()), *given, "--call", self.call, *words]

    def _helper(self, what: str, name: str, device: bool) -> Task:
        return Task(
            f"{what} {name}",
            lambda gpu: self._command("--gpu", str(gpu), "--worker", json.dumps({what: name})),
            LIMIT_S,
            device=device,
        )

    def _task(self, job: Job) -> Task:
        text = json.dumps(dataclasses.asdict(job))
        needs = [self.found[job.workload].path(self.cache)]
        if job.recipe.split()[0] in CALIBRATED and self.args.measure_device and self.args.gpus:
            needs.append(self.cache / "device")
        return Task(
            job.name,
            lambda gpu: self._command("--gpu", str(gpu), "--worker", text),
            self.args.limit,
            tuple(needs),
            job.gpu,
        )

    def _ended(self, outcome: Outcome) -> None:
        passed = time.monotonic() - self.started
        how = f"exit status {outcome.code}" if outcome.code is not None else "killed"
        print(f"[{passed:4.0f} s] {outcome.task.name}: {how} after {outcome.seconds:.0f} s")
        job = self.jobs.get(outcome.task.name)
        if outcome.code != 0:
            lines = [line for line in outcome.log.read_text(errors="replace").splitlines() if line]
            print("\n".join(f"    {line}" for line in lines[-12:]))
            if job is not None and not outcome.at_deadline:
                said = lines[-1][:300] if lines and outcome.code is not None else how
                self._lost(job, f"{said} ({outcome.seconds:.0f} s)")
        if job is not None:
            self._print(job)
        save_merged(self.args, load(self.folder))
        sys.stdout.flush()

    def _print(self, job: Job) -> None:
        for record in load(self.folder):
            ours = (record["workload"], record["kind"], record["recipe"], record["call"])
            if ours == (job.workload, job.kind, job.recipe, self.call):
                shown = ("status", "error", "start", "end", "compile_s", "shared_ms", "steps_done")
                print(f"    seed {record['seed']}", {k: record[k] for k in shown if k in record})

    def _lost(self, job: Job, error: str) -> None:
        """A record for every run that its process did not finish."""
        settings = self.found[job.workload].settings
        there = [r for r in load(self.folder) if r["call"] == self.call]
        for seed in job.seeds:
            if is_done(there, job.workload, job.kind, job.recipe, seed, settings):
                continue
            keep(
                {
                    "kind": job.kind,
                    "workload": job.workload,
                    "recipe": job.recipe,
                    "seed": seed,
                    "status": FAILED,
                    "call": self.call,
                    "gpu": job.gpu,
                    "device": None,
                    "settings": settings,
                    "error": error,
                },
                self.folder,
            )


def work(args: argparse.Namespace, found: dict[str, Workload]) -> None:
    """What a process does that the driver started."""
    given = json.loads(args.worker)
    if PREPARE in given:
        prepare(found[given[PREPARE]], args.cache)
        return
    if DEVICE in given:
        with Turns(args.cache / "turns", args.gpu).alone():
            try:
                hadagraph.measure_device()
            finally:
                (args.cache / "device").touch()  # without it auto uses the table of chips
        return
    job = Job(**given)
    worker = Worker(
        found[job.workload],
        job.recipe,
        args.call,
        args.cache,
        args.gpu,
        lambda record: keep(record, args.folder),
        args.run_limit,
    )
    worker.run(job.kind, list(job.seeds))


def save_merged(args: argparse.Namespace, records: list[Record]) -> None:
    """All runs in one file, with what states where they come from."""
    done = [r for r in records if r["status"] == FINISHED and r.get("versions")]
    latest = max(done, key=lambda r: r["call"], default=None)
    content: dict[str, Any] = {
        "benchmark": "recipes",
        "device": latest and latest["device"],
        "versions": latest and latest["versions"],
        "settings": {r["workload"]: r["settings"] for r in records},
        "runs": merged(records),
    }
    save(content, args.out)


# -------------------------------------------------------------------------- command line


def seeds_of(text: str) -> tuple[str, int]:
    """`NAME=N`."""
    name, equals, count = text.rpartition("=")
    if not equals or not count.isdigit() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=N, such as int8_rotated=3")
    return name, int(count)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options; `given` keeps those words that workers get too."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--folder", type=Path, default=Path("recipe_runs"), help="one file a run (%(default)s)")
    add("--out", type=Path, help="all runs in one file, written whenever one ends")
    add("--merge", type=Path, metavar="FOLDER", help="only merge FOLDER into --out, and print")
    add("--recipes", nargs="+", help="only these, with the baseline (default: all)")
    add("--scratch-recipes", nargs="*", default=FROM_SCRATCH_RECIPES, help="%(default)s")
    add("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    add("--seeds", nargs="+", type=seeds_of, default=[], metavar="NAME=N")
    add("--sqnr", action="store_true", help="measure every matmul's error at the start, too")
    add("--time-only", action="store_true", help="only time each recipe")
    add("--lower", action=argparse.BooleanOptionalAction, default=True, help="lower every matmul")
    add("--option", nargs="+", type=named_option, default=[], metavar="NAME=VALUE")
    add("--shard", type=shard_of, default=(0, 1), metavar="I/N", help="every N-th job")
    add("--parallel", type=int, default=1, help="processes at a time (%(default)s)")
    add("--gpus", type=int, default=int(torch.cuda.is_available()), help="(%(default)s)")
    add("--seconds", type=float, default=1e9, help="stop everything after so many")
    add("--limit", type=float, default=LIMIT_S, help="seconds a process (%(default)s)")
    add("--run-limit", type=float, default=240, help="seconds of steps a run (%(default)s)")
    add("--measure-device", action="store_true", help="measure the device's profile for auto")
    add("--cache", type=Path, default=Path(tempfile.gettempdir()) / "hadagraph_recipes")
    add("--call", help=argparse.SUPPRESS)
    add("--gpu", type=int, default=0, help=argparse.SUPPRESS)
    add("--worker", help=argparse.SUPPRESS)
    add("--model", help="as in examples/finetune.py")
    add("--text", help="as in examples/finetune.py")
    add("--device", help="cpu or cuda (default: a GPU where there is one)")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="of the matmuls (%(default)s)")
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=8)
    add("--sequence", type=int, default=512)
    add("--lr", type=float, default=5e-5)
    add("--windows", type=int, default=64, help="held-out windows (%(default)s)")
    add("--evaluate-every", type=int, default=50)
    add("--scratch-steps", type=int, default=1000)
    add("--scratch-batch", type=int, default=16)
    add("--scratch-lr", type=float, default=1e-3)
    add("--scratch-size", type=size_named, default=LLAMA_30M, metavar="LAYERSxWIDTH")
    args = parser.parse_args(arguments)
    args.given = list(arguments)
    unknown = set(args.recipes or ()) - set(known_recipes())
    if unknown:
        parser.error(f"--recipes {', '.join(sorted(unknown))}: allowed are {known_recipes()}")
    if args.time_only and FINE_TUNING not in args.workloads:
        parser.error("--time-only times fine_tuning, which --workloads leaves out")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 after one line that says what the user can change."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    if args.merge is not None:
        records = load(args.merge)
        save_merged(args, records)
        print_tables(records)
        return 0
    try:
        found = workloads(args)
    except UsageError as error:
        print(f"recipes: {error}", file=sys.stderr)
        return 2
    if args.worker is not None:
        work(args, found)
        sys.stdout.flush()
        os._exit(0)  # compile workers are of no use any more, and slow to end
    records = load(args.folder)
    jobs = open_jobs(wanted_jobs(args), records, found, args.shard)
    print(f"{len(jobs)} processes to run, {len(records)} runs are there", flush=True)
    Driver(args, found).run(jobs)
    records = load(args.folder)
    save_merged(args, records)
    print_tables(records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
