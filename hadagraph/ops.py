"""The operators that hadagraph puts into a graph: schemas, and the implementation by reference.
What they return of fake tensors is in `hadagraph.fakes`; CUDA implementations are registered by
`hadagraph.codegen`.

T tokens or rows, K columns, M and N kept dims, C contracted dim (padded), all possibly symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hadagraph.encode import (
    Encoded,
    clip_mask_reference,
    decode_reference,
    encode_reference,
    encoded_mm_reference,
    rotate_with_seed,
    unrotate_with_seed,
)
from hadagraph.fakes import FAKES, checked_chain
from hadagraph.formats import Encoding
from hadagraph.observation import observer_numbered
from hadagraph.reference import chain_reference, quantize_reference, scaled_mm_reference
from hadagraph.rotation import Rotation, project_reference, unproject_reference
from hadagraph.seeds import next_seed as _next_seed

NAMESPACE = "hadagraph"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

SCHEMAS = {
    # exact: the vocabulary of the passes before lower_precision
    "gemm": "(Tensor lhs, Tensor rhs, Tensor? bias) -> Tensor",
    # gemm whose operands an observer sees (hadagraph.observation), by the number it gave the GEMM
    "gemm_observed": "(Tensor lhs, Tensor rhs, Tensor? bias, int observer, int gemm) -> Tensor",
    "rotate": "(Tensor x, int dim, str rotation, Tensor? seed=None) -> Tensor",
    "unrotate": "(Tensor x, int dim, str rotation, SymInt size, Tensor? seed=None) -> Tensor",
    # r of each block of b along a dim: the lowest-sequency Walsh rows, and back
    "project": "(Tensor x, int dim, int kept, int block) -> Tensor",
    "unproject": "(Tensor x, int dim, int kept, int block, SymInt size) -> Tensor",
    # int64 [1], another one at each call: what the random draws of one step start from
    "next_seed": "(Device device) -> Tensor",
    # what lower_precision leaves behind
    "quantize_rows": "(Tensor x, str rows) -> (Tensor codes, Tensor scale)",
    "quantize_columns": "(Tensor x, str columns) -> (Tensor codes, Tensor scale)",
    "quantize_both": "(Tensor x, str rows, str columns) -> (Tensor row_codes, Tensor row_scale, "
    "Tensor column_codes, Tensor column_scale)",
    # what fuse leaves behind: pointwise arithmetic (region.Chain as text) and quantizers of what it
    # makes. Per output of the chain the encodings of its two layouts ("": not wanted) and whether
    # the rounded matrix is wanted; of those wanted, in order: row codes, row scale, column codes,
    # column scale, value
    "quantize_chain": "(Tensor[] inputs, str chain, str[] rows, str[] columns, bool[] values) "
    "-> Tensor[]",
    "scaled_mm": "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    # every encoding that the 8-bit kernels don't take (`Encoding.is_plain`); what `stream` and
    # `seed` are is said in hadagraph.encode
    "encode": "(Tensor x, Tensor? seed, str encoding, int contracted_dim, int stream) "
    "-> (Tensor codes, Tensor scale, Tensor tensor_scale)",
    "decode": "(Tensor codes, Tensor scale, Tensor tensor_scale, str encoding, int contracted_dim, "
    "SymInt size, ScalarType dtype) -> Tensor",
    "encoded_mm": "(Tensor a, Tensor a_scale, Tensor a_tensor_scale, Tensor b, Tensor b_scale, "
    "Tensor b_tensor_scale, Tensor? bias, str a_encoding, str b_encoding, ScalarType out_dtype) "
    "-> Tensor",
    "clip_mask": "(Tensor x, Tensor? seed, str encoding, int contracted_dim) -> Tensor",
    # a copy of a result that is compared with the fp64 product of lhs [M, C] and rhs [N, C], which
    # is rotated along its dims as the result is ("": not)
    "measured": "(Tensor result, Tensor lhs, Tensor rhs, Tensor? seed, str left, str right, "
    "str site) -> Tensor",
    # scaled_mm that also compares itself with the fp64 product of the unquantized operands
    "scaled_mm_measured": "(Tensor lhs, Tensor rhs, Tensor a, Tensor b, Tensor a_scale, "
    "Tensor b_scale, Tensor? bias, ScalarType out_dtype, str site) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    _tags = [torch.Tag.pt2_compliant_tag]
    if _name == "next_seed":  # neither merged nor recomputed
        _tags.append(torch.Tag.nondeterministic_seeded)
    LIBRARY.define(_name + _schema, tags=tuple(_tags))

gemm = torch.ops.hadagraph.gemm.default
gemm_observed = torch.ops.hadagraph.gemm_observed.default
rotate = torch.ops.hadagraph.rotate.default
unrotate = torch.ops.hadagraph.unrotate.default
project = torch.ops.hadagraph.project.default
unproject = torch.ops.hadagraph.unproject.default
next_seed = torch.ops.hadagraph.next_seed.default
encode = torch.ops.hadagraph.encode.default
decode = torch.ops.hadagraph.decode.default
encoded_mm = torch.ops.hadagraph.encoded_mm.default
clip_mask = torch.ops.hadagraph.clip_mask.default
quantize_rows = torch.ops.hadagraph.quantize_rows.default
quantize_columns = torch.ops.hadagraph.quantize_columns.default
quantize_both = torch.ops.hadagraph.quantize_both.default
quantize_chain = torch.ops.hadagraph.quantize_chain.default
scaled_mm = torch.ops.hadagraph.scaled_mm.default
measured = torch.ops.hadagraph.measured.default
scaled_mm_measured = torch.ops.hadagraph.scaled_mm_measured.default
QUANTIZERS = (quantize_rows, quantize_columns, quantize_both)


def _gemm(lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
    """lhs [M, C] @ rhs [N, C]^T + bias [N]: the one form every GEMM is normalized to."""
    if bias is None:
        return torch.mm(lhs, rhs.t())
    return torch.addmm(bias, lhs, rhs.t())


def _gemm_observed(
    lhs: Tensor, rhs: Tensor, bias: Tensor | None, observer: int, gemm: int
) -> Tensor:
    out = _gemm(lhs, rhs, bias)
    observer_numbered(observer).record(gemm, lhs, rhs, out if bias is None else out - bias)
    return out


def _rotate(x: Tensor, dim: int, rotation: str, seed: Tensor | None = None) -> Tensor:
    return rotate_with_seed(x, dim, Rotation.parse(rotation), seed).contiguous()


def _unrotate(x: Tensor, dim: int, rotation: str, size: int, seed: Tensor | None = None) -> Tensor:
    return unrotate_with_seed(x, dim, Rotation.parse(rotation), size, seed).contiguous()


def _project(x: Tensor, dim: int, kept: int, block: int) -> Tensor:
    return project_reference(x, dim, (kept, block)).contiguous()


def _unproject(x: Tensor, dim: int, kept: int, block: int, size: int) -> Tensor:
    return unproject_reference(x, dim, (kept, block), size).contiguous()


def _encode(
    x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    return encode_reference(x, Encoding.parse(encoding), contracted_dim, seed, stream).tensors


def _decode(
    codes: Tensor, scale: Tensor, tensor_scale: Tensor, encoding: str, *orientation: Any
) -> Tensor:
    encoded = Encoded(codes, scale, tensor_scale)
    return decode_reference(encoded, Encoding.parse(encoding), *orientation)


def _encoded_mm(*arguments: Any) -> Tensor:
    tensors, (bias, a_encoding, b_encoding, out_dtype) = arguments[:6], arguments[6:]
    a, b = Encoded(*tensors[:3]), Encoded(*tensors[3:])
    encodings = Encoding.parse(a_encoding), Encoding.parse(b_encoding)
    return encoded_mm_reference(a, b, bias, *encodings, out_dtype)


def _clip_mask(x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int) -> Tensor:
    return clip_mask_reference(x, Encoding.parse(encoding), contracted_dim, seed)


def _quantize_rows(x: Tensor, rows: str) -> tuple[Tensor, Tensor]:
    return quantize_reference(x, Encoding.parse(rows), contracted_dim=1)


def _quantize_columns(x: Tensor, columns: str) -> tuple[Tensor, Tensor]:
    return quantize_reference(x, Encoding.parse(columns), contracted_dim=0)


def _quantize_both(x: Tensor, rows: str, columns: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (*_quantize_rows(x, rows), *_quantize_columns(x, columns))


def _quantize_chain(
    inputs: list[Tensor], chain: str, rows: list[str], columns: list[str], values: list[bool]
) -> list[Tensor]:
    parsed = checked_chain(inputs, chain, rows, columns, values)
    results: list[Tensor] = []
    for value, by_rows, by_columns, kept in zip(
        chain_reference(parsed, inputs), rows, columns, values, strict=True
    ):
        results += _quantize_rows(value, by_rows) if by_rows else ()
        results += _quantize_columns(value, by_columns) if by_columns else ()
        results += [value] if kept else []
    return results


MEASURED: dict[str, float] = {}


def _scaled_mm_measured(lhs: Tensor, rhs: Tensor, *rest: Any) -> Tensor:
    """`scaled_mm`, and its SQNR in dB against lhs [M, C] rhs [N, C]^T in fp64 into MEASURED[site]:
    the error of the quantized operands, before the rounding to `out_dtype`."""
    *operands, bias, out_dtype, site = rest
    quantized = scaled_mm(*operands, None, torch.float32)
    _measure(quantized, lhs.double() @ rhs.double().t(), site)
    return scaled_mm(*operands, bias, out_dtype)


def _measured(
    result: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    seed: Tensor | None,
    left: str,
    right: str,
    site: str,
) -> Tensor:
    """A copy of a result fp32 [M, N], whose SQNR in dB goes into MEASURED[site]."""
    exact = lhs.double() @ rhs.double().t()
    for dim, rotation in enumerate((left, right)):
        exact = _rotate(exact, dim, rotation, seed) if rotation else exact
    _measure(result, exact, site)
    return result.clone()


def _measure(result: Tensor, exact: Tensor, site: str) -> None:
    noise = (result.double() - exact).square().sum()
    MEASURED[site] = float(10 * torch.log10(exact.square().sum() / noise))


# References on the CPU only, and on every device: hadagraph.codegen has CUDA kernels for the first,
# and for some of the others.
_ON_CPU: dict[str, Callable[..., Any]] = {
    "quantize_rows": _quantize_rows,
    "quantize_columns": _quantize_columns,
    "quantize_both": _quantize_both,
    "quantize_chain": _quantize_chain,
    "scaled_mm": scaled_mm_reference,
}
_ANYWHERE: dict[str, Callable[..., Any]] = {
    "gemm": _gemm,
    "gemm_observed": _gemm_observed,
    "rotate": _rotate,
    "unrotate": _unrotate,
    "project": _project,
    "unproject": _unproject,
    "next_seed": _next_seed,
    "encode": _encode,
    "decode": _decode,
    "encoded_mm": _encoded_mm,
    "clip_mask": _clip_mask,
    "measured": _measured,
    "scaled_mm_measured": _scaled_mm_measured,
}
for _name, _implementation in _ON_CPU.items():
    LIBRARY.impl(_name, _implementation, "CPU")
for _name, _implementation in _ANYWHERE.items():
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
FAKE_OF: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.hadagraph, name).default: fake for name, fake in FAKES.items()
}
"""What each operator does with fake tensors, without the dispatcher's share of the time."""
