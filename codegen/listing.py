"""What kernels an operator call would run, as specs and as sources. Reads shapes, strides and
dtypes only, so fake and meta tensors will do; launches nothing."""

from __future__ import annotations

from typing import Any

import torch

from hadagraph.codegen.choose import (
    DESCRIPTOR_ALIGNMENT,
    DTYPE_NAMES,
    FORMAT_NAMES,
    in_one_kernel,
    select_quantize,
    tma_addressable,
)
from hadagraph.codegen.choose_chains import select_chain, wanted_of
from hadagraph.codegen.choose_mm import select_mm
from hadagraph.codegen.emit import emit
from hadagraph.codegen.spec import Capability, KernelSpec, MmSpec
from hadagraph.codegen.store import source_key
from hadagraph.codegen.tune import LibraryMm
from hadagraph.formats import Encoding
from hadagraph.region import MATRIX, Chain


def sources_for(op: str, arguments: tuple[Any, ...], capability: Capability) -> dict[str, str]:
    """Name and hash -> source of the kernels that the operator (`"quantize_rows"`, ...) would run
    on the target. Symbolic sizes count as their hints."""
    sources = [(spec.name, emit(spec)) for spec in specs_for(op, arguments, capability)]
    return {source_key(name, source): source for name, source in sources}


def specs_for(
    op: str, arguments: tuple[Any, ...], capability: Capability
) -> tuple[KernelSpec, ...]:
    """Specs of the kernels that the operator would run; see `sources_for`."""
    if op == "scaled_mm":
        route = _scaled_mm_route(arguments, capability)
        return () if isinstance(route, LibraryMm) else (route,)
    if op == "quantize_chain":
        return _chain_specs(arguments, capability)
    x, *texts = arguments
    encodings = [Encoding.parse(text) for text in texts]
    rows = None if op == "quantize_columns" else encodings[0]
    columns = None if op == "quantize_rows" else encodings[-1]
    sizes, strides = [_hint(s) for s in x.shape], [_hint(s) for s in x.stride()]
    start = _hint(x.storage_offset()) * x.element_size()
    dtype = x.dtype if x.dtype in DTYPE_NAMES else torch.float32
    if sizes[1] != 1 and strides[1] != 1 and strides[0] == 1:
        sizes, strides, rows, columns = sizes[::-1], strides[::-1], columns, rows
    stride = strides[0] if strides[1] == 1 else sizes[1]
    aligned = start % DESCRIPTOR_ALIGNMENT == 0
    addressable = tma_addressable(stride, sizes[1], dtype, aligned)
    pairs = [(rows, columns)]
    if rows and columns and not in_one_kernel(rows, columns, dtype, capability):
        pairs = [(rows, None), (None, columns)]
    T, K = sizes
    plans = [
        select_quantize(T, K, dtype, *pair, capability, addressable=addressable, stride=stride)
        for pair in pairs
    ]
    return tuple(spec for plan in plans for spec in plan.specs)


def _chain_specs(arguments: tuple[Any, ...], capability: Capability) -> tuple[KernelSpec, ...]:
    inputs, chain, *wanted = arguments
    parsed = Chain.parse(chain)
    pairs = zip(inputs, parsed.inputs, strict=True)
    matrices = [x for x, each in pairs if each.shape == MATRIX]
    T, K = (_hint(size) for size in matrices[0].shape)
    strides = [_hint(x.stride(0)) if K == 1 or _hint(x.stride(1)) == 1 else K for x in matrices]
    wants = wanted_of(*wanted)
    return select_chain(T, K, parsed, wants, capability, strides=strides).specs


def _scaled_mm_route(arguments: tuple[Any, ...], capability: Capability) -> MmSpec | LibraryMm:
    a, b, a_scale, b_scale, bias, out_dtype = arguments
    return select_mm(
        (_hint(a.shape[0]), _hint(b.shape[0]), _hint(a.shape[1])),
        (FORMAT_NAMES[a.dtype], FORMAT_NAMES[b.dtype]),
        (_hint(a_scale.numel()) == 1, _hint(b_scale.numel()) == 1),
        None if bias is None else bias.dtype,
        out_dtype,
        capability,
    )


def _hint(size: Any) -> int:
    """A symbolic size's hint; any other size itself."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
