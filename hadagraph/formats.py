"""Number formats, scale granularities and encodings: the tables that say how one operand of a GEMM
is written in few bits. Knows nothing of graphs or kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from hadagraph.rotation import MIN_BLOCK, PerStep, Rotation, padded_size


@dataclass(frozen=True)
class Format:
    """A number format. `dtype` is what its codes are stored in (packed bytes where `bits` < 8);
    `max` the largest finite magnitude that codes are scaled to; `accumulate` the dtype in which
    products of two such codes are summed; `min_capability` the first CUDA compute capability with
    matrix instructions for it.

    A floating-point format has `exponent_bits` and `mantissa_bits`, the exponent biased by
    2^(exponent_bits - 1) - 1 and subnormals below 2^(1 - bias); integers have 0 exponent bits.
    """

    name: str
    dtype: torch.dtype
    bits: int
    max: float
    accumulate: torch.dtype
    min_capability: tuple[int, int]
    exponent_bits: int = 0
    mantissa_bits: int = 0

    @property
    def is_integer(self) -> bool:
        return self.exponent_bits == 0

    @property
    def is_packed(self) -> bool:
        """Whether several codes share a byte: two of 4 bits, four of 6 bits in three bytes."""
        return self.bits < 8

    @property
    def least_exponent(self) -> int:
        """Of a floating-point format: the exponent of its smallest normal, and of subnormals."""
        return 2 - (1 << (self.exponent_bits - 1))


# int8 and int4 are used symmetrically (-127..127, -7..7), so that negation is exact.
# e4m3 and e5m2: OCP 8-bit floating point specification, revision 1.0, table 1.
# e3m2, e2m3, e2m1: OCP microscaling formats (MX) specification, version 1.0, section 5.3; they
# have neither inf nor NaN.
_I32, _F32 = torch.int32, torch.float32
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("bf16", torch.bfloat16, 16, 3.3895313892515355e38, _F32, (8, 0), 8, 7),
        Format("int8", torch.int8, 8, 127.0, _I32, (8, 0)),
        Format("int4", torch.uint8, 4, 7.0, _I32, (8, 0)),
        Format("fp8_e4m3", torch.float8_e4m3fn, 8, 448.0, _F32, (8, 9), 4, 3),
        Format("fp8_e5m2", torch.float8_e5m2, 8, 57344.0, _F32, (8, 9), 5, 2),
        Format("fp6_e3m2", torch.uint8, 6, 28.0, _F32, (10, 0), 3, 2),
        Format("fp6_e2m3", torch.uint8, 6, 7.5, _F32, (10, 0), 2, 3),
        Format("fp4_e2m1", torch.uint8, 4, 6.0, _F32, (10, 0), 2, 1),
    )
}
QUANTIZED_FORMATS = tuple(name for name, row in FORMATS.items() if row.bits <= 8)
# What the 8-bit kernels and GEMMs of every supported device take as it is.
PLAIN_FORMATS = ("int8", "fp8_e4m3", "fp8_e5m2")
# The first CUDA compute capability whose matrix instructions take block scales.
BLOCK_SCALED_CAPABILITY = (10, 0)


@dataclass(frozen=True)
class ScaleFormat:
    """How the scales of blocks are stored, one byte each but for `fp32`. Unsigned; the largest code
    is NaN. e8m0 has no mantissa: powers of two, 2^-127 to 2^127."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float


# E8M0: OCP MX specification 1.0, section 5.4.1. UE4M3: the positive half of OCP e4m3 (NVFP4's).
# UE5M3: eight bits without a sign, bias 15, the largest code NaN (arXiv 2509.17791).
SCALE_FORMATS: dict[str, ScaleFormat] = {
    row.name: row
    for row in (
        ScaleFormat("fp32", 8, 23, 3.4028234663852886e38),
        ScaleFormat("e8m0", 8, 0, 2.0**127),
        ScaleFormat("ue4m3", 4, 3, 448.0),
        ScaleFormat("ue5m3", 5, 3, 114688.0),
    )
}
ROUNDINGS = ("nearest", "stochastic")
# How a scale is fitted to its group's maximum magnitude:
#   amax            max |x| / format max; e8m0 rounds the exponent of max |x| down (OCP MX), so that
#                   values above the format's max are clamped, other formats round to nearest
#   ceil            the same rounded up, so that nothing is clamped (TetraJet)
#   three_quarters  as amax, of values taken times 3/4, so that nothing is clamped; what is decoded
#                   is taken times 4/3 (arXiv 2502.20586)
#   mse             the scale of least squared error for normal data of the group's rms; larger
#                   values are clipped (Quartet, arXiv 2505.14669; e8m0 to the nearest power of two
#                   by its logarithm). Not for fp8, whose error hardly depends on the scale
#   four_six        max |x| / 6 or max |x| / 4, whichever errs less in the group (arXiv 2512.02010);
#                   for fp4_e2m1 with ue4m3 or ue5m3
# ceil and three_quarters are about how few scales there are, and refused with scale format fp32.
FITS = ("amax", "ceil", "three_quarters", "mse", "four_six")
_LOGARITHMIC = ("fp8_e4m3", "fp8_e5m2")


def format_named(name: str) -> Format:
    """The format of that name. ValueError lists the allowed ones."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


@dataclass(frozen=True)
class Granularity:
    """Which elements share a scale, named by the GEMM's axes: `per_tensor`, `per_kept_index` (one
    scale for each index of the dim that the GEMM keeps), `block_contracted` (per kept index and run
    of `block` along the contracted dim), `block_2d` (`block` x `block` tiles)."""

    kind: str
    block: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in GRANULARITIES:
            raise ValueError(
                f"granularity must be one of {', '.join(GRANULARITIES)}, got {self.kind!r}"
            )
        if (self.block is not None) != self.kind.startswith("block_"):
            raise ValueError(f"granularity {self.kind!r} got block {self.block!r}")
        if self.block is not None and (self.block < 2 or self.block & (self.block - 1)):
            raise ValueError(f"block of {self.kind} must be a power of two, got {self.block!r}")

    def __str__(self) -> str:
        return self.kind if self.block is None else f"{self.kind}({self.block})"

    @staticmethod
    def parse(text: str) -> Granularity:
        """The granularity that `str` wrote. ValueError on any other text."""
        match = re.fullmatch(r"(\w+?)(?:\((\d+)\))?", text)
        if match is None:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {text!r}")
        return Granularity(match[1], None if match[2] is None else int(match[2]))


GRANULARITIES = ("per_tensor", "per_kept_index", "block_contracted", "block_2d")
PER_TENSOR = Granularity("per_tensor")
PER_KEPT_INDEX = Granularity("per_kept_index")


@dataclass(frozen=True)
class Encoding:
    """How an operand is turned into codes and scales along the contracted dim: rotated (or
    projected to `tokens_kept` = (r, b), the r lowest-sequency Walsh rows of each block of b),
    scaled and rounded. `str` and `parse` carry it through operator arguments, for instance
    `int8/per_kept_index/h128` or `fp4_e2m1/block_contracted(32)/h32/e8m0/stochastic`.

    scale: the format of the scales. prescale: an fp32 scale of the whole tensor besides, so that
    block scales of few exponents reach. fit: see FITS.
    """

    format: str
    granularity: Granularity
    rotation: Rotation | None = None
    scale: str = "fp32"
    rounding: str = "nearest"
    fit: str = "amax"
    prescale: bool = False
    tokens_kept: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _one_of("format of an encoding", self.format, QUANTIZED_FORMATS)
        _one_of("scale format of an encoding", self.scale, tuple(SCALE_FORMATS))
        _one_of("rounding of an encoding", self.rounding, ROUNDINGS)
        _one_of("fit of an encoding", self.fit, FITS)
        blocks = self.granularity.block is not None
        if self.scale != "fp32" and not blocks:
            raise ValueError(
                f"scale format {self.scale} is for block granularities, got {self.granularity}"
            )
        if self.prescale and self.scale == "fp32":
            raise ValueError("prescale is for scales of few exponents, got scale format fp32")
        self._check_fit()
        if self.tokens_kept is not None:
            kept, block = self.tokens_kept
            if block < 2 or block & (block - 1) or not 0 < kept <= block:
                raise ValueError(
                    f"tokens_kept must be (r, b) with 0 < r <= b and b a power of two, "
                    f"got {self.tokens_kept!r}"
                )
            if self.rotation is not None:
                raise ValueError("tokens_kept projects, and allows no rotation besides")

    def _check_fit(self) -> None:
        if self.fit in ("ceil", "three_quarters") and self.scale == "fp32":
            raise ValueError(
                f"fit {self.fit} is for scales of few exponents or digits, got scale format fp32"
            )
        if self.fit == "mse" and self.format in _LOGARITHMIC:
            raise ValueError(
                f"fit mse is for formats whose error depends on the scale, got {self.format}"
            )
        if self.fit == "four_six" and self.format != "fp4_e2m1":
            raise ValueError(f"fit four_six is for fp4_e2m1, got {self.format}")
        if self.fit == "four_six" and self.scale not in ("ue4m3", "ue5m3"):
            raise ValueError(
                f"fit four_six is for the scale formats ue4m3 and ue5m3, got {self.scale}"
            )

    def __str__(self) -> str:
        parts = [self.format, str(self.granularity)]
        parts += [str(self.rotation)] if self.rotation else []
        parts += [] if self.scale == "fp32" else [self.scale]
        parts += [] if self.rounding == "nearest" else [self.rounding]
        parts += [] if self.fit == "amax" else [self.fit]
        parts += ["prescale"] if self.prescale else []
        if self.tokens_kept is not None:
            parts.append("keep{}of{}".format(*self.tokens_kept))
        return "/".join(parts)

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Encoding:
        """The encoding that `str` wrote. ValueError on any other text."""
        parts = text.split("/")
        if len(parts) < 2:
            raise ValueError(
                f"encoding must read <format>/<granularity>[/<rotation>][/<scale>][/<rounding>]"
                f"[/<fit>][/prescale][/keep<r>of<b>], got {text!r}"
            )
        fields: dict[str, Any] = {}
        for part in parts[2:]:
            name, value = _field(part)
            if name in fields:
                raise ValueError(f"encoding {text!r} says its {name} twice")
            fields[name] = value
        return Encoding(parts[0], Granularity.parse(parts[1]), **fields)

    @property
    def is_plain(self) -> bool:
        """Whether the 8-bit kernels and `scaled_mm` take it: everything else goes through
        `encode` and `encoded_mm`."""
        plain = Encoding(self.format, self.granularity, self.rotation)
        return (
            self == plain
            and self.format in PLAIN_FORMATS
            and self.granularity in (PER_TENSOR, PER_KEPT_INDEX)
            and not (self.rotation and isinstance(self.rotation.signs, PerStep))
        )

    @property
    def needs_seed(self) -> bool:
        """Whether it draws random numbers anew in each step."""
        signs = self.rotation.signs if self.rotation else None
        return self.rounding == "stochastic" or isinstance(signs, PerStep)

    @property
    def contracted_multiple(self) -> int:
        """The contracted dim of the codes is padded with zeros to a multiple of this: the rotation
        block, the scale's block, and 16 bytes, which tensor descriptors and matrix instructions ask
        for. All are powers of two, but 64 codes of 6 bits take 48 bytes."""
        least = MIN_BLOCK if not format_named(self.format).is_packed else 64
        return max(least, self.rotation.block if self.rotation else 1, self.granularity.block or 1)

    def transformed_size(self, size: int) -> int:
        """What rotation or projection make of `size` elements along the contracted dim (SymInts
        welcome)."""
        if self.tokens_kept is not None:
            kept, block = self.tokens_kept
            return padded_size(size, block) // block * kept
        return padded_size(size, self.rotation.block) if self.rotation else size

    def contracted_size(self, size: int) -> int:
        """Codes along the contracted dim of an operand with `size` elements there (SymInts
        welcome), padding included."""
        return padded_size(self.transformed_size(size), self.contracted_multiple)


def _field(part: str) -> tuple[str, Any]:
    """Which field of an encoding a part of its text gives, and the value."""
    kept = re.fullmatch(r"keep(\d+)of(\d+)", part)
    if kept is not None:
        return "tokens_kept", (int(kept[1]), int(kept[2]))
    for name, allowed in (("scale", tuple(SCALE_FORMATS)), ("rounding", ROUNDINGS), ("fit", FITS)):
        if part in allowed:
            return name, part
    if part == "prescale":
        return part, True
    return "rotation", Rotation.parse(part)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}, got {value!r}")
