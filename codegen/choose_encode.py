"""Which kernels write and read a general encoding, and how two encoded operands are multiplied,
from shapes, dtypes and the target alone: no tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hadagraph.codegen.choose_block_scaled import block_scaled_refusal
from hadagraph.codegen.encode_spec import (
    AMAX,
    BLOCK_2D,
    CODES,
    MASK,
    VALUES,
    DecodeSpec,
    EncodeSpec,
)
from hadagraph.codegen.spec import WIDTH, Capability, ScaledMmSpec
from hadagraph.codegen.tune import MmConfig, first_that_fills
from hadagraph.encode import decode_dtype
from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Encoding, format_named
from hadagraph.rotation import PerStep, Rotation

LEAST_WIDTH = 16
"""Of a matrix that tensor cores multiply by."""
KEPT_FIRST_WIDTH = 32
"""Codes of a run where neighbors in memory differ in the kept index, if nothing asks for more."""
TILE, WIDE_TILE = 4096, 8192
"""Codes of a tile: the second where 64 kept indices of WIDTH codes each are read together."""
DRAWN = PerStep("step")
"""Stands in specs for per-step signs of any stream."""


@dataclass(frozen=True)
class EncodePlan:
    """Kernels of one call: the maxima of the tensor or of kept indices if they are needed before,
    then the codes (or the clip mask)."""

    amax: EncodeSpec | None
    write: EncodeSpec

    @property
    def specs(self) -> tuple[EncodeSpec, ...]:
        return (self.write,) if self.amax is None else (self.amax, self.write)


def encode_refusal(encoding: Encoding) -> str | None:
    """Why the kernels cannot write this encoding; None if they can."""
    block = encoding.granularity.block
    if encoding.rotation is not None and encoding.rotation.block > WIDTH:
        return f"rotation block {encoding.rotation.block} is larger than {WIDTH}"
    if block is not None and not LEAST_WIDTH <= block <= WIDTH:
        return f"scale blocks of {block} are not among {LEAST_WIDTH} to {WIDTH}"
    if encoding.fit == "mse" and block is None:
        return "the squares of a whole row or tensor would need a pass of their own"
    if encoding.tokens_kept is not None and _projected_width(encoding) is None:
        kept, whole = encoding.tokens_kept
        return f"no run of at most {WIDTH} elements projects {kept} of {whole} to a power of two"
    return None


def select_encode(
    input_dtype: str,
    encoding: Encoding,
    capability: Capability,
    *,
    kept_first: bool,
    mask: bool = False,
    kept_last: bool = False,
) -> EncodePlan:
    """The kernels for an operand whose neighbors in memory differ in the kept index or, without
    `kept_first`, along the contracted dim; for its clip mask, if that is wanted, with the kept
    index last if `kept_last`."""
    assert encode_refusal(encoding) is None
    encoding = _without_names(encoding)
    if mask:
        encoding = replace(encoding, rounding="nearest")
    kind = encoding.granularity.kind
    largest = {"per_tensor": "tensor", "per_kept_index": "kept"}.get(kind)
    if encoding.prescale:
        largest = "tensor"
    result = MASK if mask else CODES
    write = _spec(input_dtype, encoding, result, largest, capability, kept_first)
    write = replace(write, kept_last=mask and kept_last)
    if largest is None:
        return EncodePlan(None, write)
    # Formats that differ only in codes share the pass before.
    shared = Encoding(
        "int8",
        PER_TENSOR if largest == "tensor" else PER_KEPT_INDEX,
        encoding.rotation,
        tokens_kept=encoding.tokens_kept,
    )
    amax = _spec(input_dtype, shared, AMAX, largest, capability, kept_first)
    return EncodePlan(amax, write)


def transform_refusal(encoding: Encoding) -> str | None:
    """Why no kernel only rotates or projects, as the encoding does first; None if one does."""
    return encode_refusal(
        Encoding("int8", PER_TENSOR, encoding.rotation, tokens_kept=encoding.tokens_kept)
    )


def select_transform(
    input_dtype: str,
    encoding: Encoding,
    capability: Capability,
    *,
    kept_first: bool,
    kept_last: bool,
    inverse: bool,
) -> EncodeSpec:
    """The kernel that rotates or projects as the encoding does first, or takes that back."""
    assert transform_refusal(encoding) is None
    alone = Encoding("int8", PER_TENSOR, encoding.rotation, tokens_kept=encoding.tokens_kept)
    spec = _spec(input_dtype, _without_names(alone), VALUES, None, capability, kept_first)
    if inverse:
        spec = replace(spec, width=spec.in_width, in_width=spec.width)
    return replace(spec, kept_last=kept_last, inverse=inverse)


def _without_names(encoding: Encoding) -> Encoding:
    """The encoding without what the kernels are given as arguments."""
    rotation = encoding.rotation
    if rotation is None:
        return encoding
    drawn = isinstance(rotation.signs, PerStep)
    return replace(encoding, rotation=Rotation(rotation.block, DRAWN if drawn else None))


def _spec(
    input_dtype: str,
    encoding: Encoding,
    result: str,
    largest: str | None,
    capability: Capability,
    kept_first: bool,
) -> EncodeSpec:
    width, in_width = _widths(encoding, kept_first)
    group, square = encoding.granularity.block, encoding.granularity.kind == BLOCK_2D
    parts = 1
    if not kept_first and not square and group in (None, width):
        parts = max(1, WIDTH // in_width)
    tile = WIDE_TILE if kept_first and width == WIDTH else TILE
    rows = max(tile // (parts * width), group if square and group else 1)
    warps = 8 if rows * parts * in_width > TILE else 4
    return EncodeSpec(
        input_dtype,
        encoding,
        result,
        largest,
        kept_first,
        rows,
        parts,
        width,
        in_width,
        warps=warps,
        stages=1,
        capability=capability,
    )


def _widths(encoding: Encoding, kept_first: bool) -> tuple[int, int]:
    """Codes of a run, and the elements that they are made of."""
    if encoding.tokens_kept is not None:
        found = _projected_width(encoding)
        assert found is not None
        return found
    group = encoding.granularity.block or LEAST_WIDTH
    if encoding.rotation is not None:
        width = max(LEAST_WIDTH, encoding.rotation.block, group)
    else:
        width = max(KEPT_FIRST_WIDTH, group) if kept_first else WIDTH
    return width, width


def _projected_width(encoding: Encoding) -> tuple[int, int] | None:
    """The shortest run of codes that a projection makes, and of how many elements: powers of two,
    whole blocks, and whole scale groups."""
    assert encoding.tokens_kept is not None
    kept, block = encoding.tokens_kept
    least = max(LEAST_WIDTH, encoding.granularity.block or 1)
    in_width = max(KEPT_FIRST_WIDTH, block)
    while in_width <= WIDTH:
        width = in_width // block * kept
        if width >= least and width & (width - 1) == 0:
            return width, in_width
        in_width *= 2
    return None


def decode_refusal(encoding: Encoding) -> str | None:
    """Why the kernels cannot read this encoding; None if they can."""
    block = encoding.granularity.block
    if block is not None and not LEAST_WIDTH <= block <= TILE:
        return f"scale blocks of {block} are not among {LEAST_WIDTH} to {TILE}"
    return None


def select_decode(
    encoding: Encoding,
    out_dtype: str,
    capability: Capability,
    *,
    factor: bool = False,
    transposed: bool = False,
) -> DecodeSpec:
    """The kernel that reads codes of the encoding; see `DecodeSpec`."""
    stored = Encoding(encoding.format, encoding.granularity, scale=encoding.scale)
    group = encoding.granularity.block or WIDTH
    rows = max(1, TILE // max(WIDTH, group))
    return DecodeSpec(
        stored, out_dtype, factor, transposed, rows, warps=4, stages=1, capability=capability
    )


# How two operands are multiplied.
NATIVE_CODES = "codes"
"""The codes as they are, or int4 widened to int8, by the 8-bit kernels; scales on the way out."""
NATIVE_BLOCKS = "blocks"
"""Codes and block scales as they are, by block-scaled matrix instructions."""
DECODED_BF16 = "bf16"
DECODED_FP32 = "fp32"
"""Codes times block scales in that dtype, then a product of it."""


def mm_route(a: Encoding, b: Encoding, capability: Capability) -> str:
    """NATIVE_CODES, NATIVE_BLOCKS, DECODED_BF16 or DECODED_FP32 for two encoded operands."""
    formats = format_named(a.format), format_named(b.format)
    if a.granularity.block is None and b.granularity.block is None:
        integers = all(each.is_integer for each in formats)
        fp8 = all(each.bits == 8 and not each.is_integer for each in formats)
        if integers or (fp8 and capability >= max(each.min_capability for each in formats)):
            return NATIVE_CODES
    if block_scaled_refusal(a, b, capability) is None:
        return NATIVE_BLOCKS
    exact = all(decode_dtype(each).itemsize == 2 for each in (a, b))
    return DECODED_BF16 if exact else DECODED_FP32


# Tiles of bf16 products: the first that gives nearly every SM a program.
_MM_80 = (MmConfig(128, 128, 32, 8, 3, False), MmConfig(64, 64, 32, 4, 3, False))
_MM_90 = (
    MmConfig(128, 256, 64, 8, 3, True),
    MmConfig(128, 128, 64, 8, 4, True),
    MmConfig(64, 64, 64, 4, 4, True),
)
MM_PROGRAMS = 100


def bf16_mm(
    sizes: tuple[int, int, int],
    per_tensor: tuple[bool, bool],
    bias_dtype: str | None,
    out_dtype: str,
    capability: Capability,
) -> ScaledMmSpec:
    """The scaled matmul of decoded operands, bf16 [M, C] and [N, C], given (M, N, C)."""
    M, N, C = sizes
    ladder = _MM_90 if capability[0] in (9, 10) else _MM_80
    config = first_that_fills(ladder, M, N, MM_PROGRAMS)
    return ScaledMmSpec(
        "bf16",
        "bf16",
        out_dtype,
        bias_dtype,
        *per_tensor,
        **config.fields(M, N),
        part=None,
        descriptors=config.descriptors,
        mask_c=not config.descriptors and C % config.block_c != 0,
        capability=capability,
    )
