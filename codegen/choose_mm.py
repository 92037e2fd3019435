"""Which route a scaled matmul takes, an emitted kernel or torch._scaled_mm: by the caller's
configuration, else what won a race on this machine, else the tables. No tensors."""

from __future__ import annotations

import logging

import torch

from hadagraph.codegen.choose import DTYPE_NAMES, FP8_CONTRACTION, select_scaled_mm
from hadagraph.codegen.spec import Capability, MmSpec
from hadagraph.codegen.tune import LibraryMm, MmConfig, library_is_faster
from hadagraph.codegen.tuned import (
    MIXED,
    ROWWISE,
    TENSORWISE,
    MmChoice,
    MmProblem,
    is_current,
    winner,
)
from hadagraph.formats import FORMATS

log = logging.getLogger(__name__)
LIBRARY_MULTIPLE = 16
E4M3, E5M2 = "fp8_e4m3", "fp8_e5m2"


def problem_of(
    sizes: tuple[int, int, int],
    formats: tuple[str, str],
    per_tensor: tuple[bool, bool],
    out_dtype: torch.dtype,
) -> MmProblem:
    """The problem of codes [M, C] and [N, C], given (M, N, C)."""
    scales = TENSORWISE if all(per_tensor) else MIXED if any(per_tensor) else ROWWISE
    return MmProblem(*sizes, *formats, scales, DTYPE_NAMES[out_dtype])


def select_mm(
    sizes: tuple[int, int, int],
    formats: tuple[str, str],
    per_tensor: tuple[bool, bool],
    bias_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    capability: Capability,
    config: MmChoice | None = None,
    *,
    dense: bool = True,
) -> MmSpec | LibraryMm:
    """The route for codes [M, C] and [N, C] and `sizes` (M, N, C); `dense`: their rows follow one
    another. ValueError if `config` is the library's and the library cannot."""
    problem = problem_of(sizes, formats, per_tensor, out_dtype)
    refusal = library_refusal(problem, bias_dtype, capability)
    if not dense:
        refusal = refusal or "its operands must be dense"
    if isinstance(config, LibraryMm) and refusal is not None:
        raise ValueError(f"config {config} cannot be used: torch._scaled_mm refuses, {refusal}")
    choice = config or winner(problem, capability)
    if choice is None and _library_by_table(problem, capability):
        choice = LibraryMm(fast_accumulation=True)
    if isinstance(choice, LibraryMm):
        if refusal is None:
            log.info(
                "%s: torch._scaled_mm, fast_accumulation=%s", problem, choice.fast_accumulation
            )
            return choice
        log.info("%s: an emitted kernel, torch._scaled_mm refuses: %s", problem, refusal)
    own = choice if isinstance(choice, MmConfig) else None
    of_call = (*sizes, *formats, per_tensor, bias_dtype, out_dtype, capability)
    return select_scaled_mm(*of_call, own, l2_bytes(capability))


def l2_bytes(capability: Capability) -> int | None:
    """Of the current device's L2; None if it is not of this capability."""
    if not is_current(capability):
        return None
    size: int = torch.cuda.get_device_properties().L2_cache_size
    return size


def accumulations(problem: MmProblem) -> tuple[bool, ...]:
    """The library's settings of `fast_accumulation` that keep the digits an emitted kernel keeps,
    whose sums leave the tensor core after FP8_CONTRACTION products."""
    return (True, False) if problem.C <= FP8_CONTRACTION else (False,)


def _library_by_table(problem: MmProblem, capability: Capability) -> bool:
    """Measured with fast accumulation only: longer contractions stay with the emitted kernel."""
    if FORMATS[problem.a_format].is_integer or True not in accumulations(problem):
        return False
    tensorwise = problem.scales == TENSORWISE
    return library_is_faster(problem.M, problem.N, tensorwise, capability)


def library_refusal(
    problem: MmProblem, bias_dtype: torch.dtype | None, capability: Capability
) -> str | None:
    """Why torch._scaled_mm cannot multiply such codes where they are dense; None if it can."""
    formats = {problem.a_format, problem.b_format}
    if capability < FORMATS[E4M3].min_capability or not formats <= {E4M3, E5M2}:
        return "it multiplies fp8 only, from compute capability 8.9 on"
    if formats == {E5M2}:
        return "it does not multiply e5m2 by e5m2"
    if problem.scales == MIXED:
        return "it takes one scale a tensor, or one a row, on both sides"
    if problem.scales == ROWWISE and (formats != {E4M3} or problem.out_dtype != "bf16"):
        return "with row scales it multiplies e4m3 by e4m3 to bf16 only"
    if problem.N % LIBRARY_MULTIPLE or problem.C % LIBRARY_MULTIPLE:
        return f"N and C must be multiples of {LIBRARY_MULTIPLE}"
    if bias_dtype is not None:
        bias = DTYPE_NAMES.get(bias_dtype)
        if bias != problem.out_dtype or bias == "fp32":
            return "a bias must be of the output's 16-bit dtype"
    return None
