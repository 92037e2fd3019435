"""Races the candidates for scaled matmuls on this machine's GPU and keeps the winners on disk, for
every later process. Runs only when asked to; compiling a model never waits for it.

    python -m hadagraph.codegen.autotune 8192,4096,4096 4096,14336,8192 --format fp8_e4m3
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from rich.progress import Progress
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from hadagraph.codegen import launch
from hadagraph.codegen.choose import DTYPE_NAMES, gluon_mm_refusal
from hadagraph.codegen.choose_mm import accumulations, library_refusal, problem_of
from hadagraph.codegen.spec import INPUT_BYTES, Capability
from hadagraph.codegen.tune import LibraryMm, scaled_mm_candidates
from hadagraph.codegen.tuned import (
    ROWWISE,
    TENSORWISE,
    MmChoice,
    MmProblem,
    keep_winners,
)
from hadagraph.compat import spin
from hadagraph.formats import FORMATS, format_named

log = logging.getLogger(__name__)
SCRATCH_BYTES = 1 << 30
REPEATS = 7
WARMUP = 2
LAUNCHES = 4
"""Between two events, behind a spin that hides what they cost the host."""
SPIN_CYCLES = 300_000
# A candidate that does not compile or fit loses; anything else is an error of ours.
LOST = (CompilationError, OutOfResources, PTXASError)

Timer = Callable[[MmProblem, MmChoice], float]
"""(problem, candidate) -> milliseconds. May raise one of LOST, or torch.OutOfMemoryError."""


@dataclass(frozen=True)
class Race:
    """What became of one problem: `choice` is None where nothing was raced, `reason` says why."""

    problem: MmProblem
    choice: MmChoice | None
    milliseconds: float
    raced: int
    reason: str = ""


def tune_shapes(
    shapes: Iterable[tuple[int, int, int]],
    device: torch.device | str = "cuda",
    seconds: float = 60.0,
    *,
    format: str = "int8",
    scales: str = "rowwise",
    out_dtype: torch.dtype = torch.bfloat16,
    timer: Timer | None = None,
) -> list[Race]:
    """Races every candidate for out [M, N] over C of each (M, N, C), codes of `format`, `scales`
    one a tensor ("tensorwise") or one a row ("rowwise"), and keeps the winners for the shapes'
    buckets, each as soon as it is raced. Stops after `seconds`. Launches made ready before keep
    their configuration. ValueError on what cannot be raced.
    """
    if scales not in (TENSORWISE, ROWWISE):
        raise ValueError(f"scales must be {TENSORWISE!r} or {ROWWISE!r}, got {scales!r}")
    if out_dtype not in DTYPE_NAMES:
        raise ValueError(f"out_dtype must be one of {list(DTYPE_NAMES)}, got {out_dtype}")
    if format_named(format).bits != 8:
        raise ValueError(f"format must be of 8 bits, got {format!r}")
    where = torch.device(device)
    capability = torch.cuda.get_device_capability(where)
    per_tensor = (scales == TENSORWISE,) * 2
    given = list(shapes)
    for shape in given:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shapes must be positive (M, N, C), got {shape}")
    problems = [problem_of(shape, (format, format), per_tensor, out_dtype) for shape in given]
    deadline = time.monotonic() + seconds
    timer = timer or GpuTimer(where, capability)
    races = []
    with Progress(transient=True) as progress:
        task = progress.add_task("racing matmuls", total=len(problems))
        for problem in problems:
            races.append(race(problem, capability, timer, deadline))
            choice = races[-1].choice
            if choice is not None:  # kept at once: whatever ends the later ones
                keep_winners(torch.cuda.get_device_name(where), {problem.bucket(): choice})
            progress.advance(task)
    return races


def race(problem: MmProblem, capability: Capability, timer: Timer, deadline: float) -> Race:
    """The fastest candidate, or none if the problem is too large or time ran out before all."""
    needed = _scratch_bytes(problem)
    if needed > SCRATCH_BYTES:
        return _unraced(problem, 0, f"it needs {needed >> 20} MiB, {SCRATCH_BYTES >> 20} allowed")
    times: dict[MmChoice, float] = {}
    for count, candidate in enumerate(candidates(problem, capability)):
        if time.monotonic() > deadline:
            return _unraced(problem, count, "time is up")
        try:
            times[candidate] = timer(problem, candidate)
        except torch.OutOfMemoryError:
            return _unraced(problem, count, "the GPU's memory is full")
        except LOST as error:
            log.debug("%s: %s lost: %s", problem, candidate, error)
    if not times:
        return _unraced(problem, 0, "no candidate runs")
    best = min(times, key=times.__getitem__)
    log.info("%s: %s in %.4f ms", problem, best, times[best])
    return Race(problem, best, times[best], len(times))


def _unraced(problem: MmProblem, raced: int, reason: str) -> Race:
    log.info("%s keeps the table's configuration: %s", problem, reason)
    return Race(problem, None, 0.0, raced, reason)


def candidates(problem: MmProblem, capability: Capability) -> list[MmChoice]:
    """The tables' configurations, those in Gluon and torch._scaled_mm where they can."""
    refusal = gluon_mm_refusal(
        problem.N, problem.C, problem.a_format, problem.out_dtype, capability
    )
    found: list[MmChoice] = [
        config
        for config in scaled_mm_candidates(capability)
        if refusal is None or config.schedule is None
    ]
    if library_refusal(problem, None, capability) is None:
        found += [LibraryMm(fast) for fast in accumulations(problem)]
    return found


def _scratch_bytes(problem: MmProblem) -> int:
    M, N, C = problem.M, problem.N, problem.C
    return (M + N) * (C + 4) + M * N * INPUT_BYTES[problem.out_dtype]


class GpuTimer:
    """Median milliseconds of a launch by CUDA events, on random operands of its own."""

    def __init__(self, device: torch.device, capability: Capability) -> None:
        self.device, self.capability = device, capability
        self.problem: MmProblem | None = None
        self.operands: list[torch.Tensor] = []

    def __call__(self, problem: MmProblem, choice: MmChoice) -> float:
        with torch.cuda.device(self.device):
            if problem != self.problem:
                self.operands = []  # freed before the next ones are made
                self.operands, self.problem = self._random_operands(problem), problem
            return self._median(problem, choice)

    def _random_operands(self, problem: MmProblem) -> list[torch.Tensor]:
        tensorwise = problem.scales == TENSORWISE
        codes = [
            self._random_codes(rows, problem.C, format)
            for rows, format in ((problem.M, problem.a_format), (problem.N, problem.b_format))
        ]
        scales = [
            torch.rand(1 if tensorwise else rows, device=self.device)
            for rows in (problem.M, problem.N)
        ]
        return [*codes, *scales]

    def _random_codes(self, rows: int, columns: int, format: str) -> torch.Tensor:
        """Bytes of small magnitude, which are finite codes of every format."""
        low, high = (-127, 128) if FORMATS[format].is_integer else (0, 0x40)
        raw = torch.randint(low, high, (rows, columns), dtype=torch.int8, device=self.device)
        return raw.view(format_named(format).dtype)

    def _median(self, problem: MmProblem, choice: MmChoice) -> float:
        (a, b, a_scale, b_scale), dtype = self.operands, _dtype_named(problem.out_dtype)

        def run() -> None:
            launch.scaled_mm(a, b, a_scale, b_scale, None, dtype, self.capability, choice)

        for _ in range(WARMUP):
            run()
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            spin(SPIN_CYCLES)
            start.record()
            for _ in range(LAUNCHES):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / LAUNCHES)
        return statistics.median(times)


def _shape(text: str) -> tuple[int, int, int]:
    try:
        M, N, C = (int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape must be M,N,C, got {text!r}") from None
    return M, N, C


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", type=_shape, metavar="M,N,C")
    parser.add_argument("--format", default="int8", help="int8 or fp8_e4m3 (default: int8)")
    parser.add_argument("--scales", default=ROWWISE, choices=(ROWWISE, TENSORWISE))
    parser.add_argument("--out", default="bf16", choices=DTYPE_NAMES.values(), help="output dtype")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop after this long")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    races = tune_shapes(
        options.shapes,
        seconds=options.seconds,
        format=options.format,
        scales=options.scales,
        out_dtype=_dtype_named(options.out),
    )
    for each in races:
        problem = each.problem
        rate = 2e-9 * problem.M * problem.N * problem.C / each.milliseconds if each.choice else 0.0
        what = f"{rate:.0f} TFLOP/s, {each.choice}" if each.choice else f"not raced: {each.reason}"
        print(f"{problem.M} x {problem.N} x {problem.C} {problem.a_format}: {what}")


def _dtype_named(name: str) -> torch.dtype:
    return next(dtype for dtype, known in DTYPE_NAMES.items() if known == name)


if __name__ == "__main__":
    main()
