"""Specs of the kernels that write and read general encodings (`hadagraph.encode`): everything that
their source depends on, with the FLOPs and bytes of a launch. Knows nothing of tensors.

Legend: R kept indices of an operand, C its contracted dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from hadagraph.codec import packed_size
from hadagraph.codegen.spec import INPUT_BYTES, Capability, KernelSpec
from hadagraph.formats import SCALE_FORMATS, Encoding, format_named

AMAX, CODES, MASK, VALUES = "amax", "codes", "mask", "values"
"""What a pass over the operand leaves: maximum magnitudes, codes and scales, the clip mask, or what
was rotated or projected."""
BLOCK_2D = "block_2d"


@dataclass(frozen=True)
class EncodeSpec:
    """One pass over an operand, `kept_first`: whose neighbors in memory differ in the kept index.

    A tile is `rows` kept indices of `parts` runs of `width` codes, made of `in_width` elements of
    the input (more than `width` under a projection). `encoding` has no fixed signs, which live in
    the matrix argument; the name of per-step signs is left out as well. `largest`: which maxima an
    earlier pass leaves or left, of the "tensor" or of each "kept" index; None: none. The mask or
    the values are written with the kept index last if `kept_last`; `inverse`: the rotation or
    projection is taken back.
    """

    input_dtype: str
    encoding: Encoding
    result: str
    largest: str | None
    kept_first: bool
    rows: int
    parts: int
    width: int
    in_width: int
    warps: int
    stages: int
    capability: Capability
    kept_last: bool = False
    inverse: bool = False

    def __post_init__(self) -> None:
        assert self.result in (AMAX, CODES, MASK, VALUES)
        assert self.result == VALUES or not self.inverse
        assert self.width % self.group == 0
        assert self.encoding.granularity.kind != BLOCK_2D or self.rows % self.group == 0
        assert self.parts == 1 or self.group == self.width

    @property
    def group(self) -> int:
        """Codes along the contracted dim that are treated together: of one scale, at most."""
        return self.encoding.granularity.block or self.width

    @property
    def span(self) -> int:
        """Codes of a tile along the contracted dim."""
        return self.parts * self.width

    @property
    def transformed(self) -> bool:
        """Whether a matrix multiplies."""
        return self.encoding.rotation is not None or self.encoding.tokens_kept is not None

    @property
    def draws_signs(self) -> bool:
        return self.encoding.rotation is not None and self.encoding.rotation.signs is not None

    @property
    def draws_rounding(self) -> bool:
        return self.result == CODES and self.encoding.rounding == "stochastic"

    @property
    def fragment_order(self) -> bool:
        """Whether the matrix's columns come in `hadagraph.codegen.matrices.fragment_order`: the
        codes that share a random counter then lie in one thread."""
        return self.draws_rounding and self.encoding.rotation is not None

    @property
    def name(self) -> str:
        encoding = self.encoding
        parts = [encoding.format, encoding.granularity.kind]
        parts += [str(encoding.granularity.block)] if encoding.granularity.block else []
        parts += [f"h{encoding.rotation.block}"] if encoding.rotation else []
        if encoding.tokens_kept is not None:
            parts += ["keep{}of{}".format(*encoding.tokens_kept)]
        parts += [] if encoding.scale == "fp32" else [encoding.scale]
        parts += [] if encoding.rounding == "nearest" else [encoding.rounding]
        parts += [] if encoding.fit == "amax" else [encoding.fit]
        parts += ["prescale"] if encoding.prescale else []
        if self.result == AMAX:
            parts = [str(self.largest), *parts[2:]]
        if self.result == VALUES:
            parts = [*parts[2:], *(["inverse"] if self.inverse else [])]
        prefix = {AMAX: "encode_amax", CODES: "encode", MASK: "clip_mask", VALUES: "transform"}
        return "_".join([prefix[self.result], *parts, self.input_dtype])

    def flops(self, R: int, C: int) -> int:
        """Multiply-adds of the rotation or projection, counted twice."""
        encoding = self.encoding
        if encoding.tokens_kept is not None:
            return 2 * R * C * encoding.tokens_kept[0]
        return 2 * R * C * encoding.rotation.block if encoding.rotation else 0

    def bytes(self, R: int, C: int) -> int:
        """One read of the input, one write of codes and scales, of maxima, or of the mask."""
        read = R * C * INPUT_BYTES[self.input_dtype]
        if self.result == AMAX:
            return read + 4 * (1 if self.largest == "tensor" else R)
        if self.result == VALUES:
            out = R * self.encoding.transformed_size(C)
            return read + out * INPUT_BYTES[self.input_dtype]
        codes = self.encoding.contracted_size(C)
        if self.result == MASK:
            return read + R * codes
        return read + stored_bytes(self.encoding, R, codes)


@dataclass(frozen=True)
class DecodeSpec:
    """Codes [R, stored C] times block scales to a matrix in `out_dtype`, [R, size] or `transposed`.

    `encoding`: only format, granularity and scale format count. `factor`: the scales of kept
    indices or of the tensor, and the tensor's scale, are multiplied as well.
    """

    encoding: Encoding
    out_dtype: str
    factor: bool
    transposed: bool
    rows: int
    warps: int
    stages: int
    capability: Capability

    @property
    def group(self) -> int:
        """Codes along the contracted dim that are treated together, of one scale."""
        return self.encoding.granularity.block or 128

    @property
    def groups(self) -> int:
        """Of a tile, along the contracted dim."""
        return max(1, 128 // self.group)

    @property
    def name(self) -> str:
        encoding = self.encoding
        parts = [encoding.format, encoding.granularity.kind]
        parts += [str(encoding.granularity.block)] if encoding.granularity.block else []
        parts += [] if encoding.scale == "fp32" else [encoding.scale]
        parts += ["scaled"] if self.factor else []
        parts += ["transposed"] if self.transposed else []
        return "_".join(["decode", *parts, self.out_dtype])

    def flops(self, R: int, C: int) -> int:
        """Products with scales."""
        return R * C

    def bytes(self, R: int, C: int) -> int:
        """One read of codes and scales, one write of the matrix."""
        written = {**INPUT_BYTES, "int8": 1}[self.out_dtype]
        return stored_bytes(self.encoding, R, C) + R * C * written


def stored_bytes(encoding: Encoding, R: int, C: int) -> int:
    """Of codes [R, C] (C padded) and their scales."""
    block = encoding.granularity.block
    groups = {"per_tensor": 1, "per_kept_index": R}.get(encoding.granularity.kind, 0)
    if block is not None:
        groups = -(-R // block) * (C // block) if _is_2d(encoding) else R * (C // block)
    size = 4 if SCALE_FORMATS[encoding.scale].name == "fp32" else 1
    return R * packed_size(C, format_named(encoding.format)) + groups * size


def _is_2d(encoding: Encoding) -> bool:
    return encoding.granularity.kind == BLOCK_2D


AnySpec = KernelSpec | EncodeSpec | DecodeSpec
