"""When two encoded operands are multiplied by block-scaled matrix instructions, and with which
kernel: from encodings, sizes and the target alone. No tensors."""

from __future__ import annotations

from hadagraph.codegen.emit_block_scaled import NAMES
from hadagraph.codegen.spec import BlockScaledMmSpec, Capability
from hadagraph.codegen.tune import MmConfig, first_that_fills
from hadagraph.formats import BLOCK_SCALED_CAPABILITY, Encoding

BLOCKS = {"e8m0": 32, "ue4m3": 16}
"""Codes that share a scale, by the scales' format."""
# Tiles: the first that gives nearly every SM a program. Never raced: untested on such devices.
_MM_100 = (
    MmConfig(128, 256, 256, 8, 3, True),
    MmConfig(128, 128, 256, 4, 3, True),
)
_MM_120 = (
    MmConfig(128, 128, 128, 8, 3, False),
    MmConfig(64, 64, 128, 4, 3, False),
)
PROGRAMS = 100


def block_scaled_refusal(a: Encoding, b: Encoding, capability: Capability) -> str | None:
    """Why block-scaled matrix instructions cannot multiply the codes of two operands as they are;
    None if they can."""
    if capability < BLOCK_SCALED_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} has none, 10.0 is needed"
    for encoding in (a, b):
        if encoding.format not in NAMES:
            return f"they take {', '.join(NAMES)}, not {encoding.format}"
        if BLOCKS.get(encoding.scale, 0) != encoding.granularity.block:
            return (
                "they take blocks of 32 codes with e8m0 scales or of 16 with ue4m3 scales, not "
                f"{encoding.granularity} with {encoding.scale}"
            )
    if a.scale != b.scale:
        return f"both operands must have scales alike, not {a.scale} and {b.scale}"
    formats = {a.format, b.format}
    if a.scale == "ue4m3" and formats != {"fp4_e2m1"}:
        return f"with ue4m3 scales they take fp4_e2m1 only, not {', '.join(sorted(formats))}"
    if "fp4_e2m1" in formats and len(formats) > 1:
        return "fp8 times fp4 is multiplied in bf16 by Triton on some of them"
    return None


def block_scaled_mm(
    sizes: tuple[int, int, int],
    a: Encoding,
    b: Encoding,
    bias_dtype: str | None,
    out_dtype: str,
    capability: Capability,
    config: MmConfig | None = None,
    *,
    arranged: bool | None = None,
) -> BlockScaledMmSpec:
    """The kernel for codes [M, C] and [N, C], given (M, N, C); `block_scaled_refusal` has none.
    arranged: None leaves it to the target, whether it has tensor memory."""
    M, N, C = sizes
    if config is None:
        ladder = _MM_100 if capability[0] == 10 else _MM_120
        config = first_that_fills(ladder, M, N, PROGRAMS)
    return BlockScaledMmSpec(
        a.format,
        b.format,
        a.scale,
        BLOCKS[a.scale],
        a.granularity.kind == "block_2d",
        b.granularity.kind == "block_2d",
        out_dtype,
        bias_dtype,
        **config.fields(M, N),
        descriptors=config.descriptors,
        arranged=capability[0] == 10 if arranged is None else arranged,
        mask_c=C % config.block_c != 0,
        capability=capability,
    )
