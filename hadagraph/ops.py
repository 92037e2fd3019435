"""The operators that hadagraph puts into a graph: schemas, shapes (fakes) and the CPU
implementation by reference. CUDA implementations are registered by `hadagraph.codegen.launch`.

T tokens or rows, K columns, M and N kept dims, C contracted dim (padded), all possibly symbolic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hadagraph.encode import (
    Encoded,
    clip_mask_reference,
    decode_reference,
    encode_reference,
    encoded_mm_reference,
    encoded_shapes,
    rotate_with_seed,
    unrotate_with_seed,
)
from hadagraph.formats import PER_TENSOR, SCALE_FORMATS, Encoding, format_named
from hadagraph.observation import observer_numbered
from hadagraph.reference import (
    CHAIN_DTYPES,
    chain_reference,
    quantize_reference,
    scaled_mm_reference,
)
from hadagraph.region import COLUMNS, MATRIX, ROWS, SCALAR, Chain
from hadagraph.rotation import (
    PerStep,
    Rotation,
    padded_size,
    project_reference,
    rotate_reference,
    unproject_reference,
    unrotate_reference,
)
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
    parsed = Rotation.parse(rotation)
    if isinstance(parsed.signs, PerStep):
        return rotate_with_seed(x, dim, parsed, seed).contiguous()
    return rotate_reference(x, dim, parsed).contiguous()


def _unrotate(x: Tensor, dim: int, rotation: str, size: int, seed: Tensor | None = None) -> Tensor:
    parsed = Rotation.parse(rotation)
    if isinstance(parsed.signs, PerStep):
        return unrotate_with_seed(x, dim, parsed, size, seed).contiguous()
    return unrotate_reference(x, dim, parsed, size).contiguous()


def _project(x: Tensor, dim: int, kept: int, block: int) -> Tensor:
    return project_reference(x, dim, (kept, block)).contiguous()


def _unproject(x: Tensor, dim: int, kept: int, block: int, size: int) -> Tensor:
    return unproject_reference(x, dim, (kept, block), size).contiguous()


def _encode(
    x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    made = encode_reference(x, Encoding.parse(encoding), contracted_dim, seed, stream)
    return made.codes, made.scale, made.tensor_scale


def _decode(
    codes: Tensor,
    scale: Tensor,
    tensor_scale: Tensor,
    encoding: str,
    contracted_dim: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    encoded = Encoded(codes, scale, tensor_scale)
    return decode_reference(encoded, Encoding.parse(encoding), contracted_dim, size, dtype)


def _encoded_mm(
    a: Tensor,
    a_scale: Tensor,
    a_tensor_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_tensor_scale: Tensor,
    bias: Tensor | None,
    a_encoding: str,
    b_encoding: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return encoded_mm_reference(
        Encoded(a, a_scale, a_tensor_scale),
        Encoded(b, b_scale, b_tensor_scale),
        bias,
        Encoding.parse(a_encoding),
        Encoding.parse(b_encoding),
        out_dtype,
    )


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
    quantized = scaled_mm(a, b, a_scale, b_scale, None, torch.float32)
    _measure(quantized, lhs.double() @ rhs.double().t(), site)
    return scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)


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


LIBRARY.impl("gemm", _gemm, "CompositeExplicitAutograd")
LIBRARY.impl("gemm_observed", _gemm_observed, "CompositeExplicitAutograd")
LIBRARY.impl("rotate", _rotate, "CompositeExplicitAutograd")
LIBRARY.impl("unrotate", _unrotate, "CompositeExplicitAutograd")
LIBRARY.impl("project", _project, "CompositeExplicitAutograd")
LIBRARY.impl("unproject", _unproject, "CompositeExplicitAutograd")
LIBRARY.impl("next_seed", _next_seed, "CompositeExplicitAutograd")
LIBRARY.impl("encode", _encode, "CompositeExplicitAutograd")
LIBRARY.impl("decode", _decode, "CompositeExplicitAutograd")
LIBRARY.impl("encoded_mm", _encoded_mm, "CompositeExplicitAutograd")
LIBRARY.impl("clip_mask", _clip_mask, "CompositeExplicitAutograd")
LIBRARY.impl("measured", _measured, "CompositeExplicitAutograd")
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


@torch.library.register_fake("hadagraph::gemm_observed", lib=LIBRARY)
def _gemm_observed_fake(
    lhs: Tensor, rhs: Tensor, bias: Tensor | None, observer: int, gemm: int
) -> Tensor:
    return _gemm_fake(lhs, rhs, bias)


@torch.library.register_fake("hadagraph::rotate", lib=LIBRARY)
def _rotate_fake(x: Tensor, dim: int, rotation: str, seed: Tensor | None = None) -> Tensor:
    shape = list(x.shape)
    shape[dim] = padded_size(shape[dim], Rotation.parse(rotation).block)
    return x.new_empty(shape)


@torch.library.register_fake("hadagraph::unrotate", lib=LIBRARY)
def _unrotate_fake(
    x: Tensor, dim: int, rotation: str, size: int, seed: Tensor | None = None
) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


@torch.library.register_fake("hadagraph::project", lib=LIBRARY)
def _project_fake(x: Tensor, dim: int, kept: int, block: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = padded_size(shape[dim], block) // block * kept
    return x.new_empty(shape)


@torch.library.register_fake("hadagraph::unproject", lib=LIBRARY)
def _unproject_fake(x: Tensor, dim: int, kept: int, block: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.new_empty(shape)


@torch.library.register_fake("hadagraph::next_seed", lib=LIBRARY)
def _next_seed_fake(device: torch.device) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device=device)


@torch.library.register_fake("hadagraph::encode", lib=LIBRARY)
def _encode_fake(
    x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = Encoding.parse(encoding)
    kept, contracted = x.shape[1 - contracted_dim], x.shape[contracted_dim]
    codes, scales = encoded_shapes(kept, contracted, parsed)
    plain = SCALE_FORMATS[parsed.scale].name == "fp32"
    return (
        x.new_empty(codes, dtype=format_named(parsed.format).dtype),
        x.new_empty(scales, dtype=torch.float32 if plain else torch.uint8),
        x.new_empty((1,), dtype=torch.float32),
    )


@torch.library.register_fake("hadagraph::decode", lib=LIBRARY)
def _decode_fake(
    codes: Tensor,
    scale: Tensor,
    tensor_scale: Tensor,
    encoding: str,
    contracted_dim: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    shape = (codes.shape[0], size)
    return codes.new_empty(shape if contracted_dim else shape[::-1], dtype=dtype)


@torch.library.register_fake("hadagraph::encoded_mm", lib=LIBRARY)
def _encoded_mm_fake(
    a: Tensor,
    a_scale: Tensor,
    a_tensor_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_tensor_scale: Tensor,
    bias: Tensor | None,
    a_encoding: str,
    b_encoding: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@torch.library.register_fake("hadagraph::clip_mask", lib=LIBRARY)
def _clip_mask_fake(x: Tensor, seed: Tensor | None, encoding: str, contracted_dim: int) -> Tensor:
    shape = list(x.shape)
    shape[contracted_dim] = Encoding.parse(encoding).transformed_size(shape[contracted_dim])
    return x.new_empty(shape, dtype=torch.bool)


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


@torch.library.register_fake("hadagraph::measured", lib=LIBRARY)
def _measured_fake(
    result: Tensor,
    lhs: Tensor,
    rhs: Tensor,
    seed: Tensor | None,
    left: str,
    right: str,
    site: str,
) -> Tensor:
    return torch.empty_like(result)


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
