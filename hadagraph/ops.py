"""The operators that hadagraph puts into a graph: schemas, shapes (fakes) and the CPU
implementation by reference. CUDA implementations are registered by `hadagraph.codegen.launch`.

T tokens or rows, K columns, M and N kept dims, C contracted dim (padded), all possibly symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hadagraph.formats import PER_TENSOR, Encoding, format_named
from hadagraph.reference import (
    CHAIN_DTYPES,
    chain_reference,
    quantize_reference,
    scaled_mm_reference,
)
from hadagraph.region import COLUMNS, MATRIX, ROWS, SCALAR, Chain
from hadagraph.rotation import Rotation, padded_size, rotate_reference, unrotate_reference

NAMESPACE = "hadagraph"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

SCHEMAS = {
    # exact: the vocabulary of the passes before lower_precision
    "gemm": "(Tensor lhs, Tensor rhs, Tensor? bias) -> Tensor",
    "rotate": "(Tensor x, int dim, str rotation) -> Tensor",
    "unrotate": "(Tensor x, int dim, str rotation, SymInt size) -> Tensor",
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
    # scaled_mm that also compares itself with an fp64 product of the unquantized operands
    "scaled_mm_measured": "(Tensor lhs, Tensor rhs, Tensor a, Tensor b, Tensor a_scale, "
    "Tensor b_scale, Tensor? bias, ScalarType out_dtype, str site) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))

gemm = torch.ops.hadagraph.gemm.default
rotate = torch.ops.hadagraph.rotate.default
unrotate = torch.ops.hadagraph.unrotate.default
quantize_rows = torch.ops.hadagraph.quantize_rows.default
quantize_columns = torch.ops.hadagraph.quantize_columns.default
quantize_both = torch.ops.hadagraph.quantize_both.default
quantize_chain = torch.ops.hadagraph.quantize_chain.default
scaled_mm = torch.ops.hadagraph.scaled_mm.default
scaled_mm_measured = torch.ops.hadagraph.scaled_mm_measured.default
QUANTIZERS = (quantize_rows, quantize_columns, quantize_both)


def _gemm(lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
    """lhs [M, C] @ rhs [N, C]^T + bias [N]: the one form every GEMM is normalized to."""
    if bias is None:
        return torch.mm(lhs, rhs.t())
    return torch.addmm(bias, lhs, rhs.t())


def _rotate(x: Tensor, dim: int, rotation: str) -> Tensor:
    return rotate_reference(x, dim, Rotation.parse(rotation)).contiguous()


def _unrotate(x: Tensor, dim: int, rotation: str, size: int) -> Tensor:
    return unrotate_reference(x, dim, Rotation.parse(rotation), size).contiguous()


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


def checked_chain(
    inputs: Sequence[Tensor],
    chain: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[bool],
) -> Chain:
    """The chain of a `quantize_chain`. ValueError unless there are as many inputs, and encodings of
    outputs, as it says."""
    parsed = Chain.parse(chain)
    if len(inputs) != len(parsed.inputs):
        raise ValueError(
            f"quantize_chain: inputs must be {len(parsed.inputs)} tensors, got {len(inputs)}"
        )
    for name, given in (("rows", rows), ("columns", columns), ("values", values)):
        if len(given) != len(parsed.outputs):
            raise ValueError(
                f"quantize_chain: {name} must be {len(parsed.outputs)} long, got {len(given)}"
            )
    return parsed


MEASURED: dict[str, float] = {}


def _scaled_mm_measured(
    lhs: Tensor,
    rhs: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    site: str,
) -> Tensor:
    """`scaled_mm`, and its SQNR in dB against lhs [M, C] rhs [N, C]^T in fp64 into MEASURED[site]:
    the error of the quantized operands, before the rounding to `out_dtype`."""
    quantized = scaled_mm(a, b, a_scale, b_scale, None, torch.float32).double()
    exact = lhs.double() @ rhs.double().t()
    noise = (quantized - exact).square().sum()
    MEASURED[site] = float(10 * torch.log10(exact.square().sum() / noise))
    return scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)


LIBRARY.impl("gemm", _gemm, "CompositeExplicitAutograd")
LIBRARY.impl("rotate", _rotate, "CompositeExplicitAutograd")
LIBRARY.impl("unrotate", _unrotate, "CompositeExplicitAutograd")
LIBRARY.impl("scaled_mm_measured", _scaled_mm_measured, "CompositeExplicitAutograd")
LIBRARY.impl("quantize_rows", _quantize_rows, "CPU")
LIBRARY.impl("quantize_columns", _quantize_columns, "CPU")
LIBRARY.impl("quantize_both", _quantize_both, "CPU")
LIBRARY.impl("quantize_chain", _quantize_chain, "CPU")
LIBRARY.impl("scaled_mm", scaled_mm_reference, "CPU")


@torch.library.register_fake("hadagraph::gemm", lib=LIBRARY)
def _gemm_fake(lhs: Tensor, rhs: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(lhs.shape[1] == rhs.shape[1], lambda: "gemm: contracted dims differ")
    return lhs.new_empty((lhs.shape[0], rhs.shape[0]))


@torch.library.register_fake("hadagraph::rotate", lib=LIBRARY)
def _rotate_fake(x: Tensor, dim: int, rotation: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] = padded_size(shape[dim], Rotation.parse(rotation).block)
    return x.new_empty(shape)


@torch.library.register_fake("hadagraph::unrotate", lib=LIBRARY)
def _unrotate_fake(x: Tensor, dim: int, rotation: str, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


def _quantized_fake(x: Tensor, encoding: Encoding, contracted_dim: int) -> tuple[Tensor, Tensor]:
    kept = x.shape[1 - contracted_dim]
    contracted = padded_size(x.shape[contracted_dim], encoding.contracted_multiple)
    codes = x.new_empty((kept, contracted), dtype=format_named(encoding.format).dtype)
    groups = 1 if encoding.granularity == PER_TENSOR else kept
    return codes, x.new_empty((groups,), dtype=torch.float32)


@torch.library.register_fake("hadagraph::quantize_rows", lib=LIBRARY)
def _quantize_rows_fake(x: Tensor, rows: str) -> tuple[Tensor, Tensor]:
    return _quantized_fake(x, Encoding.parse(rows), 1)


@torch.library.register_fake("hadagraph::quantize_columns", lib=LIBRARY)
def _quantize_columns_fake(x: Tensor, columns: str) -> tuple[Tensor, Tensor]:
    return _quantized_fake(x, Encoding.parse(columns), 0)


@torch.library.register_fake("hadagraph::quantize_both", lib=LIBRARY)
def _quantize_both_fake(
    x: Tensor, rows: str, columns: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        *_quantized_fake(x, Encoding.parse(rows), 1),
        *_quantized_fake(x, Encoding.parse(columns), 0),
    )


@torch.library.register_fake("hadagraph::quantize_chain", lib=LIBRARY)
def _quantize_chain_fake(
    inputs: list[Tensor], chain: str, rows: list[str], columns: list[str], values: list[bool]
) -> list[Tensor]:
    parsed = checked_chain(inputs, chain, rows, columns, values)
    shapes = [each.shape for each in parsed.inputs]
    x = inputs[shapes.index(MATRIX)]
    expected = {MATRIX: x.shape, ROWS: x.shape[:1], COLUMNS: x.shape[1:], SCALAR: ()}
    for given, shape in zip(inputs, shapes, strict=True):
        torch._check(
            tuple(given.shape) == tuple(expected[shape]),
            lambda shape=shape: f"quantize_chain: the shape of a {shape} input differs",
        )
    results: list[Tensor] = []
    for output, by_rows, by_columns, kept in zip(
        parsed.outputs, rows, columns, values, strict=True
    ):
        results += _quantized_fake(x, Encoding.parse(by_rows), 1) if by_rows else ()
        results += _quantized_fake(x, Encoding.parse(by_columns), 0) if by_columns else ()
        results += [x.new_empty(x.shape, dtype=CHAIN_DTYPES[output.dtype])] if kept else []
    return results


@torch.library.register_fake("hadagraph::scaled_mm", lib=LIBRARY)
def _scaled_mm_fake(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    torch._check(a.shape[1] == b.shape[1], lambda: "scaled_mm: contracted dims differ")
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@torch.library.register_fake("hadagraph::scaled_mm_measured", lib=LIBRARY)
def _scaled_mm_measured_fake(
    lhs: Tensor,
    rhs: Tensor,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    site: str,
) -> Tensor:
    return _scaled_mm_fake(a, b, a_scale, b_scale, bias, out_dtype)
