"""Kernels compiled in Inductor's worker processes, so that their first launch finds the binary in
Triton's cache on disk. Knows no operators: `precompile` says which kernels."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hadagraph.codegen.direct import Block, build_stub
from hadagraph.codegen.encode_spec import AnySpec
from hadagraph.codegen.store import kernel_module, load_module
from hadagraph.compat import submit_to_compile_worker

log = logging.getLogger(__name__)
LONGEST_WAIT = 120.0
"""Seconds that a first launch waits for a worker before it compiles by itself. Where that was in
vain, workers are taken to hang: no later launch of this process waits."""
POINTERS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
"""Element types of a kernel's SIGNATURE, as tensors have them."""


@dataclass(frozen=True)
class Request:
    """A kernel and the integers that follow the tensors: what its binary depends on, where the
    tensors are aligned as `direct.Launch` needs it."""

    spec: AnySpec
    integers: tuple[int, ...]


@dataclass
class Totals:
    """Of this process: kernels given to workers, the seconds those took there (all added up), the
    seconds that first launches waited for them, and how many waits ended without a result."""

    kernels: int = 0
    worker_seconds: float = 0.0
    waited_seconds: float = 0.0
    waits_in_vain: int = 0


TOTALS = Totals()
_SUBMITTED: dict[Request, Future[float]] = {}


def submit(request: Request, target: GPUTarget) -> bool:
    """Starts compiling the kernel unless that was done before; whether a worker took it."""
    if request in _SUBMITTED or TOTALS.waits_in_vain:
        return False
    module = kernel_module(request.spec)
    future = submit_to_compile_worker(
        compile_kernel,
        str(module.__file__),
        request.spec.name,
        request.integers,
        (target.backend, target.arch, target.warp_size),
        triton_environment(),
    )
    if future is None:
        return False
    _SUBMITTED[request] = future
    future.add_done_callback(partial(_finished, request))
    TOTALS.kernels += 1
    return True


def _finished(request: Request, future: Future[float]) -> None:
    if future.cancelled():
        return
    error = future.exception()
    if error is None:
        TOTALS.worker_seconds += future.result()
    else:
        log.debug("%s: a worker could not compile it: %r", request.spec.name, error)


def wait_for(request: Request) -> None:
    """Returns when no worker compiles this kernel any more: it may be in the cache now."""
    future = _SUBMITTED.get(request)
    if future is None or future.done() or TOTALS.waits_in_vain:
        return
    began = time.perf_counter()
    if not wait([future], LONGEST_WAIT).done:
        TOTALS.waits_in_vain += 1
        log.warning(
            "%s: no worker had compiled it after %g s; kernels compile without workers from now on",
            request.spec.name,
            LONGEST_WAIT,
        )
    TOTALS.waited_seconds += time.perf_counter() - began


def triton_environment() -> dict[str, str]:
    """The variables that say where and how Triton compiles."""
    return {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}


def compile_kernel(
    path: str,
    name: str,
    integers: tuple[int, ...],
    target: tuple[str, Any, int],
    environment: dict[str, str],
) -> float:
    """Compiles the kernel of an emitted file for aligned tensors and these integers, and what
    launches it, into Triton's cache; returns the seconds. Runs in a worker, and uses no device."""
    began = time.perf_counter()
    with _environment(environment), _target(GPUTarget(*target)):
        module = load_module(Path(path))
        kinds = list(module.SIGNATURE.values())
        tensors = [stand_in(kind) for kind in kinds[: len(kinds) - len(integers)]]
        kernel = getattr(module, name)
        compiled = kernel.warmup(*tensors, *integers, grid=(1,), **module.OPTIONS)
        if target[0] == "cuda":
            build_stub(compiled)
    return time.perf_counter() - began


def stand_in(kind: str) -> Any:
    """An aligned tensor without memory, or a descriptor of one, for an argument's type."""
    block = Block.of(kind)
    if block is None:
        return torch.empty(0, dtype=POINTERS[kind.removeprefix("*")], device="meta")
    element = re.match(r"tensordesc<(\w+)\[", kind)
    assert element is not None
    return block.descriptor(torch.empty(block.sizes, dtype=POINTERS[element[1]], device="meta"))


class _Device:
    """Stands for the driver of a device of the target, of which compiling asks no more."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _target(target: GPUTarget) -> Iterator[None]:
    before = driver._active
    driver.set_active(_Device(target))
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Triton's variables as they are where the kernel will be launched."""
    before = triton_environment()
    _replace(before, variables)
    try:
        yield
    finally:
        _replace(variables, before)


def _replace(old: dict[str, str], new: dict[str, str]) -> None:
    for name in old.keys() - new.keys():
        del os.environ[name]
    os.environ.update(new)
