"""Time on a device what predictions need, fit its profile to that, and keep it on disk beside the
emitted kernels. Decides nothing by it.

M, N kept dims and C contracted dim of a GEMM; T rows and K columns of a quantizer's input.
"""

from __future__ import annotations

import hashlib
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

import hadagraph.codegen
from hadagraph import compat, ops
from hadagraph.codegen.store import source_directory
from hadagraph.device import CHIPS, KINDS, LAYOUTS, DeviceProfile, HostTimes, chip_profile
from hadagraph.fitting import GemmPoint, QuantizerPoint, fit

log = logging.getLogger(__name__)
SECONDS = 20.0
POOL_ELEMENTS = 1 << 27
"""Of random data in bf16, and the same of int8 and fp8: half of the GiB of scratch at most."""
COPY_BYTES = 1 << 27
SPIN_CYCLES = 300_000
GEMMS = (
    (8192, 4096, 4096),
    (4096, 576, 576),
    (2048, 2048, 2048),
    (576, 1536, 4096),
    (4096, 4096, 1024),
    (512, 4096, 4096),
    (8192, 1536, 1536),
    (1024, 1024, 8192),
    (4096, 14336, 4096),
)
MATRICES = ((8192, 4096), (4096, 1024), (2048, 512))
ENCODINGS = {
    "rotated": ("int8/per_kept_index/h128", "int8/per_kept_index/h32"),
    "plain": ("fp8_e4m3/per_kept_index",) * 2,
    "per_tensor": ("fp8_e4m3/per_tensor",) * 2,
}
DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
LAUNCH_ERRORS = (RuntimeError, CompilationError, OutOfResources)
LARGE_GEMM = (8192, 4096, 8192)
SUSTAINED_SECONDS = 0.4


# -------------------------------------------------------------------------- timing


def measure(
    device: torch.device | int | None = None, seconds: float = SECONDS
) -> DeviceProfile | None:
    """The profile of a CUDA device, by timing on it what predictions need: at most 1 GiB of its
    memory, and no new point after `seconds`. What was not measured by then, or is refused, stays
    as the table has it. Out of memory: the table's row alone (None where it has none), logged.

    ValueError where the device is no CUDA device.
    """
    where = _cuda(device)
    name, capability = torch.cuda.get_device_name(where), torch.cuda.get_device_capability(where)
    properties = torch.cuda.get_device_properties(where)
    table = chip_profile(name, capability)
    prior = replace(
        table or CHIPS["H200"],
        name=name,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
        source="measured",
    )
    try:
        with torch.cuda.device(where):
            return _measured(prior, time.monotonic() + seconds)
    except torch.OutOfMemoryError as error:
        log.warning("%s is not measured, no memory: %s", name, str(error).partition("\n")[0])
        return table


def _cuda(device: torch.device | int | None) -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError("device must be a CUDA device, but torch finds none")
    where = torch.device("cuda", torch.cuda.current_device())
    if device is not None:
        where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if where.type != "cuda":
        raise ValueError(f"device must be a CUDA device, got {device!r}")
    return where


def _measured(prior: DeviceProfile, deadline: float) -> DeviceProfile:
    prior = replace(prior, copy_bytes_per_us=_copy_bytes_per_us())
    torch.cuda.empty_cache()
    pool = torch.randn(POOL_ELEMENTS, dtype=torch.bfloat16, device="cuda")
    pools = {"bf16": pool, "int8": (pool * 32).clamp_(-127, 127).to(torch.int8)}
    if prior.capability >= (8, 9):
        pools["fp8"] = pool.to(torch.float8_e4m3fn)
    gemms: list[GemmPoint] = []
    quantizers: list[QuantizerPoint] = []
    for index, shape in enumerate(GEMMS):
        for format in pools:
            if time.monotonic() < deadline:
                gemms += _gemm_point(pools[format], format, *shape)
        if index < len(MATRICES):
            for kind in KINDS:
                for layouts in LAYOUTS:
                    if time.monotonic() < deadline and (kind == "rotated" or "fp8" in pools):
                        quantizers += _quantizer_point(pool, layouts, kind, *MATRICES[index])
    rates = [
        replace(rate, sustained=_sustained_tflops(pools[rate.format], rate.format))
        if rate.format in pools and time.monotonic() < deadline
        else rate
        for rate in prior.gemms
    ]
    prior = replace(prior, gemms=tuple(rates))
    host = _host_times(pool, prior.host)
    log.info("%s: %d GEMMs, %d quantizers timed", prior.name, len(gemms), len(quantizers))
    return replace(fit(prior, gemms, quantizers), host=host)


def _copy_bytes_per_us() -> float:
    source, target = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * COPY_BYTES / median_us([lambda: target.copy_(source)] * 4, 5)


def median_us(calls: Sequence[Callable[[], object]], rounds: int) -> float:
    """Median over `rounds` of the mean time of these calls, by the device's clock, behind a spin
    that hides their launches."""
    for call in calls[:2]:
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        compat.spin(SPIN_CYCLES * len(calls))
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(calls) * 1e3)
    return statistics.median(times)


def _views(pool: torch.Tensor, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    """Matrices one after the other from a pool."""
    found, place = [], 0
    for rows, columns in shapes:
        found.append(pool[place : place + rows * columns].view(rows, columns))
        place += rows * columns
    return found


def _sustained_tflops(pool: torch.Tensor, format: str) -> float:
    """The rate of a large GEMM in the second half of SUSTAINED_SECONDS without a pause."""
    M, N, C = LARGE_GEMM
    (call,) = _gemm_calls(pool, format, M, N, C)
    count = max(2, round(SUSTAINED_SECONDS / 2 / (1e-6 * median_us([call] * 4, 3))))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for half in (0, 1):
        if half:
            start.record()
        for _ in range(count):
            call()
    end.record()
    torch.cuda.synchronize()
    return 2e-9 * M * N * C * count / start.elapsed_time(end)


def _gemm_calls(
    pool: torch.Tensor, format: str, M: int, N: int, C: int
) -> list[Callable[[], object]]:
    a, b = _views(pool, (M, C), (N, C))
    if format == "bf16":
        return [lambda: torch.mm(a, b.t())]
    scales = (torch.ones(M, device="cuda"), torch.ones(N, device="cuda"))
    return [lambda: ops.scaled_mm(a, b, *scales, None, torch.bfloat16)]


def _gemm_point(pool: torch.Tensor, format: str, M: int, N: int, C: int) -> Iterable[GemmPoint]:
    try:
        return (GemmPoint(format, M, N, C, median_us(_gemm_calls(pool, format, M, N, C) * 6, 3)),)
    except torch.OutOfMemoryError:
        raise
    except LAUNCH_ERRORS as error:
        log.warning("no %s GEMM of %d x %d x %d: %s", format, M, N, C, str(error)[:200])
        return ()


def _quantizer_point(
    pool: torch.Tensor, layouts: str, kind: str, T: int, K: int
) -> Iterable[QuantizerPoint]:
    inputs = _views(pool, *[(T, K)] * max(1, min(12, POOL_ELEMENTS // (T * K))))
    operator = getattr(ops, f"quantize_{layouts}")
    rows, columns = ENCODINGS[kind]
    texts = {"rows": (rows,), "columns": (columns,), "both": (rows, columns)}[layouts]
    calls: list[Callable[[], object]] = [partial(operator, x, *texts) for x in inputs]
    try:
        return (QuantizerPoint(layouts, kind, T, K, median_us(calls, 3)),)
    except torch.OutOfMemoryError:
        raise
    except LAUNCH_ERRORS as error:
        log.warning("no quantizer of %s %s, %d x %d: %s", layouts, kind, T, K, str(error)[:200])
        return ()


def _host_times(pool: torch.Tensor, prior: HostTimes) -> HostTimes:
    x, out = _views(pool, (256, 256), (256, 256))
    rows, columns = ENCODINGS["rotated"]
    codes, scale = ops.quantize_rows(x, rows)
    calls: dict[str, Callable[[], object]] = {
        "mm": lambda: torch.mm(x, x, out=out),
        "scaled_mm": lambda: ops.scaled_mm(codes, codes, scale, scale, None, torch.bfloat16),
        "quantize_rows": lambda: ops.quantize_rows(x, rows),
        "quantize_columns": lambda: ops.quantize_columns(x, columns),
        "quantize_both": lambda: ops.quantize_both(x, rows, columns),
    }
    return replace(prior, **{name: _host_us(call) for name, call in calls.items()})


def _host_us(call: Callable[[], object]) -> float:
    """Host time of one of many asynchronous calls: few enough that none waits for the device."""
    times = []
    for _ in range(5):
        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - began) * 1e4)
    torch.cuda.synchronize()
    return statistics.median(times)


# -------------------------------------------------------------------------- keeping


def profile_of(device: torch.device) -> DeviceProfile | None:
    """What is known of a device: its measurement on disk if there is one for this driver, torch,
    triton and these kernels, else the table's row. None for the CPU and unknown devices."""
    if device.type != "cuda":
        return None
    path = profile_path(device)
    if path.exists():
        try:
            return DeviceProfile.from_json(path.read_text())
        except ValueError as error:
            log.warning("%s is ignored: %s", path, error)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    profile = chip_profile(name, capability)
    if profile is None:
        log.info("%s: no profile, nothing is skipped for speed", name)
    return profile


def measure_device(
    device: torch.device | int | None = None, *, seconds: float = SECONDS
) -> DeviceProfile | None:
    """`measure`, kept on disk: every later compilation on a device of this name uses it."""
    where = _cuda(device)
    profile = measure(where, seconds)
    if profile is not None and profile.source == "measured":
        path = profile_path(where)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(profile.to_json())
        os.replace(temporary, path)
    return profile


def profile_path(device: torch.device) -> Path:
    """Where a CUDA device's measurement lies, if there is one."""
    versions = (torch.__version__, triton.__version__, compat.cuda_driver_version())
    key = repr((torch.cuda.get_device_name(device), versions, kernel_sources_hash()))
    return source_directory() / f"device_{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def kernel_sources_hash() -> str:
    """A hash of what emits and launches the kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(hadagraph.codegen.__file__)).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
