"""Kernel launches without Triton's work per call (binding, specializing, finding the binary): what
the first launch yields is kept. The one place that touches Triton's private launch interface, of
the releases in KNOWN_TRITON; others are launched the ordinary way. Chooses no kernels.

A binary is specialized on its integers (1, or multiples of 16), on dtypes and on whether each
pointer is a multiple of ALIGNMENT. A `Launch` fixes all but the pointers, and checks those.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import logging
import operator
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from hadagraph.compat import empty_strided_cuda

log = logging.getLogger(__name__)
KNOWN_TRITON = ("3.6.0", "3.7.0", "3.7.1")
ALIGNMENT = 16
MAPS_KEPT = 256
"""Addresses whose tensor maps one argument keeps."""

STUB_ERRORS = (AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError)
"""What building a launcher raises without a driver, a C compiler or a writable cache."""

Start = Callable[[int, list[Any]], None]
"""(stream, arguments as the binary takes them): starts one kernel."""


class Launch:
    """One kernel on one grid, for tensors that agree in dtype, shape, strides and device from call
    to call. `integers` follow the tensors in the kernel's `signature`. `prepare` is called once,
    before the first launch.

    The first launch of 16-byte aligned tensors keeps the binary; while a profiler's launch hooks
    are set, or where a tensor is not aligned, a launch goes through Triton.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        options: Mapping[str, Any],
        signature: Mapping[str, str],
        integers: tuple[int, ...],
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.kernel, self.grid, self.options = kernel, grid, dict(options)
        self.integers, self.prepare = integers, prepare
        kinds = list(signature.values())[: len(signature) - len(integers)]
        self.blocks = [Block.of(kind) for kind in kinds]
        self.compiled: Any = None
        self.start: Start | None = None
        self.maps: list[TensorMaps | None] = []
        self.device = 0

    def __call__(self, *tensors: Tensor) -> None:
        pointers = [tensor.data_ptr() for tensor in tensors]
        aligned = reduce(operator.or_, pointers) % ALIGNMENT == 0
        if not aligned or self.start is None or _hooked():
            compiled = self.ordinary(*tensors)
            if aligned and self.compiled is None and compiled is not None:
                self._keep(compiled, tensors[0].get_device())
            return
        arguments: list[Any] = []
        for index, maps in enumerate(self.maps):
            if maps is None:
                arguments.append(pointers[index])
            else:
                arguments += maps(pointers[index], tensors[index])
        arguments += self.integers
        self.start(_stream_of()(self.device), arguments)

    def ordinary(self, *tensors: Tensor) -> Any:
        """The launch through Triton; its compiled kernel, or None under the interpreter."""
        if self.prepare is not None:
            self.prepare()
            self.prepare = None
        arguments = [
            tensor if block is None else block.descriptor(tensor)
            for tensor, block in zip(tensors, self.blocks, strict=True)
        ]
        return self.kernel[self.grid](*arguments, *self.integers, **self.options)

    def _keep(self, compiled: Any, device: int) -> None:
        """Whatever later launches need of the kernel, compiled for aligned tensors."""
        self.compiled, self.device = compiled, device
        descriptors = any(self.blocks)
        reason = _refusal(compiled, descriptors)
        if reason is not None:
            _log_once(reason)
            return
        metas = iter(compiled.metadata.tensordesc_meta if descriptors else ())
        self.maps = [TensorMaps(block, next(metas)) if block else None for block in self.blocks]
        self.start = _start(compiled, self.grid, descriptors)


@dataclass(frozen=True)
class Block:
    """The tile that a descriptor of a kernel's signature moves; in Gluon with its layout in shared
    memory."""

    sizes: list[int]
    layout: Any | None

    @staticmethod
    def of(kind: str) -> Block | None:
        """That of `tensordesc<i8[128, 64]>`, or `tensordesc<i8[128, 64],LAYOUT>`; None for a
        pointer."""
        match = re.fullmatch(r"tensordesc<\w+\[([\d, ]+)\](?:,(.+))?>", kind)
        if match is None:
            return None
        layout = None if match[2] is None else _layout(match[2])
        return Block([int(size) for size in match[1].split(",")], layout)

    def descriptor(self, tensor: Tensor) -> Any:
        shape, strides = list(tensor.shape), list(tensor.stride())
        if self.layout is None:
            return TensorDescriptor(tensor, shape, strides, self.sizes)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(tensor, shape, strides, self.sizes, self.layout)


def _layout(text: str) -> Any:
    """The layout of which the text is the `repr`."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    numbers = dict(re.findall(r"(\w+)=(\d+)", text))
    layout = NVMMASharedLayout(
        int(numbers["swizzle_byte_width"]), int(numbers["element_bitwidth"]), rank=2
    )
    assert repr(layout) == text, f"{layout!r} is not {text}"
    return layout


class TensorMaps:
    """The arguments that stand for tensors of one layout: the hardware's map, shape and strides.

    A map holds the address and the layout, and nothing of the memory behind it, so that an equal
    address means an equal map for whichever tensor lies there.
    """

    def __init__(self, block: Block, meta: Any) -> None:
        self.block, self.meta = block, meta
        self.kept: dict[int, list[Any]] = {}

    def __call__(self, pointer: int, tensor: Tensor) -> list[Any]:
        found = self.kept.get(pointer)
        if found is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            if len(self.kept) >= MAPS_KEPT:
                self.kept.clear()
            found = make_tensordesc_arg(self.block.descriptor(tensor), self.meta)
            self.kept[pointer] = found
        return found


def _hooked() -> bool:
    """Whether a profiler wants to see every launch: hooks are None, a function or a chain."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _refusal(compiled: Any, descriptors: bool) -> str | None:
    """Why this kernel's launches go through Triton, if they do."""
    unknown = _unknown_triton()
    if unknown is not None:
        return unknown
    launcher = compiled.run
    if type(launcher).__module__ != "triton.backends.nvidia.driver":
        return f"its launcher is {type(launcher).__module__}.{type(launcher).__name__}"
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return "it needs scratch memory"
    if descriptors and not getattr(compiled.metadata, "tensordesc_meta", None):
        return "its tensor descriptors are not tensor maps"
    return None


def _unknown_triton() -> str | None:
    if triton.__version__.split("+")[0] in KNOWN_TRITON:
        return None
    return f"triton {triton.__version__} is not one of {', '.join(KNOWN_TRITON)}"


@cache
def gluon_refusal() -> str | None:
    """Why kernels in Gluon, an experimental part of Triton, are not used here, if they aren't;
    logged."""
    reason = _unknown_triton()
    if reason is None and knobs.runtime.interpret:
        reason = "Triton's interpreter does not run it"
    if reason is None and importlib.util.find_spec("triton.experimental.gluon") is None:
        reason = "triton.experimental.gluon is missing"
    if reason is not None:
        log.info("no kernel in Gluon is used, those in Triton stand in: %s", reason)
    return reason


@cache
def _log_once(reason: str) -> None:
    log.info("kernels are launched through Triton, with more host time a call: %s", reason)


def _start(compiled: Any, grid: tuple[int, ...], descriptors: bool) -> Start:
    """The C launcher with all but stream and arguments filled in; no hooks, no scratch."""
    launcher, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    launch = launcher.launch
    if descriptors:  # inside a wrapper that makes the maps anew at every launch
        launch = inspect.getclosurevars(launch).nonlocals["launcher"]
    x, y, z = (*grid, 1, 1)[:3]
    cooperative, dependent = launcher.launch_cooperative_grid, launcher.launch_pdl
    if hasattr(launcher, "kernel_signature"):  # 3.7
        annotations, signature = launcher.arg_annotations, launcher.kernel_signature

        def start(stream: int, arguments: list[Any]) -> None:
            launch(
                x, y, z, stream, function, cooperative, dependent, packed,
                None, None, None, None, None, annotations, signature, arguments,
            )  # fmt: skip
    else:

        def start(stream: int, arguments: list[Any]) -> None:
            launch(
                x, y, z, stream, function, cooperative, dependent,
                None, None, packed, None, None, None, *arguments,
            )  # fmt: skip

    return start


@cache
def _stream_of() -> Callable[[int], int]:
    """Device index -> handle of its current stream, as Triton finds it."""
    return triton.runtime.driver.active.get_current_stream


def build_stub(compiled: Any) -> None:
    """Puts the C function that launches a compiled kernel into Triton's cache, where this Triton
    builds one for every signature (3.6), so that the first launch need not wait for a C compiler.
    Uses no device; where it cannot be built, the first launch tries again."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return
    try:
        driver.CudaLauncher(compiled.src, compiled.metadata)
    except STUB_ERRORS as error:
        log.debug("%s: its launcher is built at the first launch: %r", compiled.name, error)


def empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, contiguous, on the current device if that is meant."""
    if device.type != "cuda":
        return torch.empty(size, dtype=dtype, device=device)
    strides = (max(size[1], 1), 1) if len(size) == 2 else (1,)
    return empty_strided_cuda(size, strides, dtype)


def zero_words(count: int, device: torch.device) -> Tensor:
    """int32 zeros [count] on the current device, by one memset on the current stream."""
    if device.type != "cuda" or torch.version.hip is not None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    words = empty_strided_cuda((count,), (1,), torch.int32)
    status = _memset()(words.data_ptr(), 0, count, _stream_of()(words.get_device()))
    if status != 0:  # a thread that has no CUDA context yet; torch makes it one
        log.debug("cuMemsetD32Async failed with CUDA error %s: zeroed by torch", status)
        words.zero_()
    return words


@cache
def _memset() -> Any:
    function = ctypes.CDLL("libcuda.so.1").cuMemsetD32Async
    function.argtypes = (ctypes.c_uint64, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function
