"""Number formats, scale granularities and encodings: the tables that say how one operand of a GEMM
is written in few bits. Knows nothing of graphs or kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from hadagraph.rotation import MIN_BLOCK, Rotation


@dataclass(frozen=True)
class Format:
    """A number format. `max` is the largest finite magnitude that codes are scaled to; `accumulate`
    the dtype in which products of two such codes are summed; `min_capability` the first CUDA
    compute capability with matrix instructions for it."""

    name: str
    dtype: torch.dtype
    bits: int
    max: float
    accumulate: torch.dtype
    min_capability: tuple[int, int]

    @property
    def is_integer(self) -> bool:
        return not self.dtype.is_floating_point


# int8 is used symmetrically (-127..127), so that negation is exact.
# e4m3 and e5m2: OCP 8-bit floating point specification, revision 1.0, table 1.
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("bf16", torch.bfloat16, 16, 3.3895313892515355e38, torch.float32, (8, 0)),
        Format("int8", torch.int8, 8, 127.0, torch.int32, (8, 0)),
        Format("fp8_e4m3", torch.float8_e4m3fn, 8, 448.0, torch.float32, (8, 9)),
        Format("fp8_e5m2", torch.float8_e5m2, 8, 57344.0, torch.float32, (8, 9)),
    )
}
QUANTIZED_FORMATS = tuple(name for name, row in FORMATS.items() if row.bits <= 8)


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
    """How an operand is turned into codes and scales: rotated along the contracted dim, scaled and
    rounded to nearest even. `str` and `parse` carry it through operator arguments, for instance
    `int8/per_kept_index/h128`."""

    format: str
    granularity: Granularity
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if self.format not in QUANTIZED_FORMATS:
            raise ValueError(
                f"format of an encoding must be one of {', '.join(QUANTIZED_FORMATS)}, "
                f"got {self.format!r}"
            )
        if self.granularity not in (PER_TENSOR, PER_KEPT_INDEX):
            raise ValueError(
                f"granularity of an encoding must be per_tensor or per_kept_index, "
                f"got {self.granularity}"
            )

    def __str__(self) -> str:
        parts = [self.format, str(self.granularity)]
        return "/".join(parts + ([str(self.rotation)] if self.rotation else []))

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Encoding:
        """The encoding that `str` wrote. ValueError on any other text."""
        parts = text.split("/")
        if len(parts) not in (2, 3):
            raise ValueError(
                f"encoding must read <format>/<granularity>[/<rotation>], got {text!r}"
            )
        rotation = Rotation.parse(parts[2]) if len(parts) == 3 else None
        return Encoding(parts[0], Granularity.parse(parts[1]), rotation)

    @property
    def contracted_multiple(self) -> int:
        """The contracted dim of the codes is padded with zeros to a multiple of this: the rotation
        block, and 16 bytes, which tensor descriptors and 8-bit matrix instructions ask for."""
        return max(MIN_BLOCK, self.rotation.block if self.rotation else 1)
