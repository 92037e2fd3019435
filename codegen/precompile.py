"""Which kernels a graph's operator calls will launch, given to compile workers while the rest of
the graph is still being compiled. Reads shapes, strides and dtypes only; launches nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from triton import knobs
from triton.backends.compiler import GPUTarget

from hadagraph.codegen import encoded, encoded_mm, launch, transforms, workers
from hadagraph.codegen.calls import noted
from hadagraph.codegen.chains import chain_call
from hadagraph.codegen.choose_chains import wanted_of
from hadagraph.codegen.emit import emit
from hadagraph.codegen.spec import Capability
from hadagraph.codegen.store import source_key
from hadagraph.compat import static_hint, unset_fake_temporarily
from hadagraph.region import Chain

log = logging.getLogger(__name__)
OperatorCall = tuple[str, tuple[Any, ...]]
"""An operator's name, such as "quantize_rows", and its arguments: tensors may be fake."""


def compile_ahead(
    operator_calls: Iterable[OperatorCall],
    capability: Capability,
    target: GPUTarget | None = None,
) -> int:
    """Starts compiling every kernel of these calls that is not yet compiled; returns how many
    workers took. `target`: the current device's unless given."""
    if knobs.runtime.interpret:
        return 0
    target = target or triton.runtime.driver.active.get_current_target()
    distinct = {_key(op, arguments): (op, arguments) for op, arguments in operator_calls}
    started = 0
    for op, arguments in distinct.values():
        for request in requests_for(op, arguments, capability):
            started += workers.submit(request, target)
    if started:
        log.debug("%d kernels are compiled ahead", started)
    return started


def _key(op: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Equal for calls that launch the same kernels."""
    leaves = tree_leaves(tree_map_only(torch.SymInt, static_hint, arguments))
    return op, *(_layout(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    sizes, strides = (tuple(map(static_hint, n)) for n in (tensor.shape, tensor.stride()))
    return sizes, strides, tensor.dtype


def requests_for(
    op: str, arguments: tuple[Any, ...], capability: Capability
) -> list[workers.Request]:
    """The kernels that the call launches, for tensors that are aligned; symbolic sizes count as
    their hints. None for operators that `READY` does not name."""
    make = READY.get(op)
    if make is None:
        return []
    with unset_fake_temporarily(), noted() as requests:
        arguments = tree_map_only(torch.SymInt, static_hint, arguments)
        make(capability, *tree_map_only(Tensor, _without_memory, arguments))
    return requests


def sources_for(op: str, arguments: tuple[Any, ...], capability: Capability) -> dict[str, str]:
    """Name and hash -> source of the kernels that the call launches; see `requests_for`."""
    requests = requests_for(op, arguments, capability)
    sources = [(request.spec.name, emit(request.spec)) for request in requests]
    return {source_key(name, source): source for name, source in sources}


def _without_memory(tensor: Tensor) -> Tensor:
    """A tensor laid out alike, whose address counts as aligned."""
    sizes, strides, dtype = _layout(tensor)
    return torch.empty_strided(sizes, strides, dtype=dtype, device="meta")


def _chain(capability: Capability, inputs: list[Tensor], chain: str, *wanted: Any) -> None:
    chain_call(inputs, Chain.parse(chain), wanted_of(*wanted), capability)


def _scaled_mm(capability: Capability, *arguments: Any) -> None:
    *operands, out_dtype = arguments
    launch.multiplier(tuple(operands), out_dtype, capability)


READY: dict[str, Callable[..., object]] = {
    "quantize_rows": lambda target, x, text: launch.ready_quantize(target, x, text, None),
    "quantize_columns": lambda target, x, text: launch.ready_quantize(target, x, None, text),
    "quantize_both": launch.ready_quantize,
    "quantize_chain": _chain,
    "scaled_mm": _scaled_mm,
    "rotate": transforms.ready_rotate,
    "unrotate": transforms.ready_unrotate,
    "project": transforms.ready_project,
    "unproject": transforms.ready_unproject,
    "encode": encoded.ready_encode,
    "clip_mask": encoded.ready_clip_mask,
    "decode": encoded.ready_decode,
    "encoded_mm": encoded_mm.ready_encoded_mm,
}
"""By operator: makes a call ready, as its first run would. It takes the capability and the
operator's arguments."""
