"""A region: the nodes of one rotate-quantize-GEMM chain, as `passes.fuse` groups them and
`codegen` will emit them. Data only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """A quantizing op with the pointwise chain that produces its input (`producers`, single-use,
    nearest last) and the GEMMs that read its codes, by node name."""

    quantizer: str
    producers: tuple[str, ...]
    gemms: tuple[str, ...]
