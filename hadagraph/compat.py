"""Every private or version-dependent torch API that hadagraph uses, in one place (torch 2.11 to
2.13). Knows nothing of hadagraph's own passes."""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import detect_fake_mode
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    CustomPartitionerFn,
    get_hash_for_files,
)
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils.checkpoint import CheckpointPolicy

__all__ = [
    "CheckpointPolicy",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "aot_autograd",
    "boxed",
    "cache_dir",
    "compile_fx",
    "cuda_driver_version",
    "detect_fake_mode",
    "empty_strided_cuda",
    "get_hash_for_files",
    "inductor_config",
    "inductor_option_default",
    "inductor_option_names",
    "library_scaled_mm",
    "list_mode_options",
    "min_cut_partition",
    "reset_cudagraph_trees",
    "select_decomp_table",
    "spin",
    "stable_topological_sort",
    "static_hint",
    "without_caches",
]

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


def static_hint(size: int | torch.SymInt) -> int:
    """The size itself, or the size a symbol had when it was traced. Adds no guard."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return 1 if hint is None else int(hint)


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


def spin(cycles: int) -> None:
    """Keep the current CUDA stream busy for that many clock cycles."""
    torch.cuda._sleep(cycles)


def boxed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes its arguments as one list, as AOTAutograd wants it."""
    result: Callable[..., Any] = make_boxed_func(function)
    return result
