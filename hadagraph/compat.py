"""Every private or version-dependent torch API that hadagraph uses, in one place (torch 2.11 to
2.13). Knows nothing of hadagraph's own passes."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    CustomPartitionerFn,
    get_hash_for_files,
)
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    FakeTensor,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "CheckpointPolicy",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "aot_autograd",
    "boxed",
    "cache_dir",
    "compile_fx",
    "compute_capability",
    "cuda_driver_version",
    "detect_fake_mode",
    "empty_strided_cuda",
    "fake_empty",
    "get_hash_for_files",
    "guard_on",
    "inductor_config",
    "inductor_option_default",
    "inductor_option_names",
    "library_scaled_mm",
    "list_mode_options",
    "min_cut_partition",
    "reset_cudagraph_trees",
    "select_decomp_table",
    "settle_triton_cache",
    "size_bounds",
    "spin",
    "stable_topological_sort",
    "static_hint",
    "submit_to_compile_worker",
    "symbolic_size",
    "unset_fake_temporarily",
    "without_caches",
    "without_data",
]

log = logging.getLogger(__name__)
# Node metadata that the partitioner and the activation-checkpointing code read.
INHERITED_META = (
    "partitioner_tag",
    "recompute",
    "ac_graph_id",
    "seq_nr",
    "stack_trace",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "custom",
)


# (size, stride, dtype) on the current device: what Inductor's generated code allocates with.
empty_strided_cuda: Callable[..., torch.Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]

# The fp8 matmuls of cuBLASLt and CUTLASS.
library_scaled_mm: Callable[..., torch.Tensor] = torch._scaled_mm


def fake_empty(
    like: torch.Tensor, shape: Sequence[int | torch.SymInt], dtype: torch.dtype
) -> torch.Tensor:
    """`like.new_empty`, contiguous. Of a fake tensor in a tenth of that one's time, which goes
    through the dispatcher: a compilation makes tens of thousands."""
    if type(like) is not FakeTensor:
        return like.new_empty(shape, dtype=dtype)
    with in_kernel_invocation_manager(like.fake_mode):
        empty = torch.empty(shape, dtype=dtype, device="meta")
    return FakeTensor(like.fake_mode, empty, like.fake_device)


def inductor_option_names() -> frozenset[str]:
    """The names of Inductor's own options, as `torch.compile(options=...)` takes them."""
    return frozenset(inductor_config.get_config_copy())


def inductor_option_default(name: str) -> Any:
    """The present value of one of Inductor's options."""
    return inductor_config.get_config_copy()[name]


def min_cut_partition(
    gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Torch's default partitioner, min-cut rematerialization, as Inductor calls it."""
    return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)


def reset_cudagraph_trees() -> None:
    """Drop the CUDA-graph state, as Inductor's own backend does on `torch._dynamo.reset()`."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees as reset

        reset()


@contextmanager
def without_caches() -> Iterator[None]:
    """A context in which neither AOTAutograd's nor Inductor's caches are read or written."""
    with warnings.catch_warnings(), inductor_config.patch(force_disable_caches=True):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


def submit_to_compile_worker(task: Callable[..., Any], *arguments: Any) -> Future[Any] | None:
    """Runs a picklable task in one of Inductor's worker processes; None where there are none: the
    option compile_threads is 1, this process must have no children, or the workers are gone."""
    if get_compile_threads() <= 1:
        return None
    try:
        return AsyncCompile.process_pool().submit(task, *arguments)
    except (RuntimeError, OSError) as error:  # a daemonic process, or a pool closed or killed
        log.debug("no compile worker: %s", error)
        return None


def settle_triton_cache(device: int) -> None:
    """Gives Triton, where the user gave it no folder, the one that Inductor would choose with its
    first kernel: binaries must be looked for where workers leave them."""
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device))


def static_hint(size: int | torch.SymInt) -> int:
    """The size itself, or the size a symbol had when it was traced. Adds no guard."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return 1 if hint is None else int(hint)


def without_data() -> AbstractContextManager[Any]:
    """A context in which tensors have shapes and no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def symbolic_size(size: int | torch.SymInt) -> Any:
    """The size itself, or a symbol's sympy expression. Adds no guard."""
    return size if isinstance(size, int) else size.node.expr


def size_bounds(size: torch.SymInt) -> tuple[int, int | None]:
    """The least and the largest value that guards so far allow; None where nothing bounds it."""
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    most = int(bounds.upper) if bounds.upper.is_Integer else None
    return int(bounds.lower) if bounds.lower.is_Integer else 0, most


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device. RuntimeError where torch is built for ROCm, which numbers other chips so:
    kernels are chosen and written for NVIDIA's."""
    if torch.version.hip is not None:
        raise RuntimeError(
            f"hadagraph's kernels are for NVIDIA GPUs, and this torch ({torch.__version__}) is "
            "built for ROCm; on the CPU the operators run by their references"
        )
    return torch.cuda.get_device_capability(device)


def cuda_driver_version() -> int:
    """The newest CUDA that the driver speaks, as 1000 * major + 10 * minor; 0 without a driver.

    From the driver itself (cuDriverGetVersion): torch's own binding is not in every version.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def guard_on(module: str, *attributes: str) -> None:
    """While Dynamo compiles a frame: let its code be valid only as long as
    `module.attribute.attribute...` (a constant) is what it is now. Nothing outside of Dynamo."""
    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:
        return
    source: Any = translator.import_source(module)
    for attribute in attributes:
        source = AttrSource(source, attribute)
    install_guard(source.make_guard(GuardBuilder.CONSTANT_MATCH))


def spin(cycles: int) -> None:
    """Keep the current CUDA stream busy for that many clock cycles."""
    torch.cuda._sleep(cycles)


def boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes its arguments as one list, as AOTAutograd wants it."""
    result: Callable[..., Any] = make_boxed_func(function)
    return result
