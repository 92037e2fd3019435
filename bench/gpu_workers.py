"""Runs commands as processes of their own on the GPUs of this machine, several on each, until a
deadline. Knows nothing of what they do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

POLL_S = 0.1
COMPILE_THREADS = 8  # more of them help no graph of these


@dataclass(frozen=True)
class Task:
    """A command. `arguments(gpu)` are its words; `needs` are files that must exist before it
    starts; `gpu` pins it to one; it is killed after `limit_s`. `device` is False for a task that
    needs no GPU: it takes no slot and sees none."""

    name: str
    arguments: Callable[[int], list[str]]
    limit_s: float
    needs: tuple[Path, ...] = ()
    gpu: int | None = None
    device: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a task ended: `code` is its exit status, or None where it was killed."""

    task: Task
    code: int | None
    seconds: float
    at_deadline: bool
    log: Path


@dataclass
class _Running:
    task: Task
    gpu: int
    process: subprocess.Popen[bytes]
    started: float
    log: Path


@dataclass
class Workers:
    """`parallel` processes at a time over `gpus` GPUs (0: none, the CPU), each with its share of
    the cores. `cache` holds the logs and the compilers' caches, which all share."""

    parallel: int
    gpus: int
    cache: Path
    _running: list[_Running] = field(default_factory=list)

    def run(
        self, tasks: list[Task], seconds: float, on_end: Callable[[Outcome], object]
    ) -> list[Task]:
        """Start the tasks in their order as places and what they need come free; `on_end` gets each
        as it ends. What still runs after `seconds` is killed. Returns what never started."""
        deadline = time.monotonic() + seconds
        waiting = list(tasks)
        previous = signal.signal(signal.SIGTERM, self._terminated)
        try:
            while waiting or self._running:
                if time.monotonic() >= deadline:
                    break
                self._reap(on_end)
                self._start_what_can(waiting)
                if waiting and not self._running:
                    break  # nothing is left that could make what they need
                time.sleep(POLL_S)
            self._reap(on_end)
        finally:
            signal.signal(signal.SIGTERM, previous)
            ended = [self._kill(entry, at_deadline=True) for entry in self._running]
            self._running.clear()
        for outcome in ended:
            on_end(outcome)
        return waiting

    def _terminated(self, number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    def _start_what_can(self, waiting: list[Task]) -> None:
        for task in list(waiting):
            if not all(path.exists() for path in task.needs):
                continue
            gpu = self._place(task)
            if gpu is not None:
                waiting.remove(task)
                self._running.append(self._start(task, gpu))

    def _place(self, task: Task) -> int | None:
        """The least used GPU with a free place; -1 for a task without a device."""
        if not task.device:
            return -1
        count = max(1, self.gpus)
        used = dict.fromkeys(range(count), 0)
        for entry in self._running:
            if entry.task.device:
                used[entry.gpu] += 1
        each = -(-self.parallel // count)
        if sum(used.values()) >= self.parallel:
            return None
        candidates = [task.gpu] if task.gpu is not None else sorted(used, key=used.__getitem__)
        return next((gpu for gpu in candidates if used[gpu] < each), None)

    def _start(self, task: Task, gpu: int) -> _Running:
        log = self.cache / "logs" / (task.name.replace(" ", "_").replace("/", "_") + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                task.arguments(gpu),
                env=self._environment(gpu),
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        return _Running(task, gpu, process, time.monotonic(), log)

    def _environment(self, gpu: int) -> dict[str, str]:
        cores = max(1, (os.cpu_count() or 1) // self.parallel)
        own = {
            "OMP_NUM_THREADS": str(min(4, cores)),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_COMPILE_THREADS": str(min(COMPILE_THREADS, cores)),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "PYTHONUNBUFFERED": "1",
        }
        if self.gpus:
            own["CUDA_VISIBLE_DEVICES"] = str(gpu) if gpu >= 0 else ""
        return os.environ | own

    def _reap(self, on_end: Callable[[Outcome], object]) -> None:
        for entry in list(self._running):
            code = entry.process.poll()
            seconds = time.monotonic() - entry.started
            if code is not None:
                self._running.remove(entry)
                on_end(Outcome(entry.task, code, seconds, False, entry.log))
            elif seconds > entry.task.limit_s:
                self._running.remove(entry)
                on_end(self._kill(entry, at_deadline=False))

    def _kill(self, entry: _Running, at_deadline: bool) -> Outcome:
        """The process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(entry.process.pid, signal.SIGKILL)
        entry.process.wait()
        seconds = time.monotonic() - entry.started
        return Outcome(entry.task, None, seconds, at_deadline, entry.log)
