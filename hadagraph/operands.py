"""From the rules of a recipe to the plans of one GEMM's operands: rotations and streams made
concrete, what the backward gets, what the device emulates. Knows nothing of graphs."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from hadagraph.formats import BLOCK_SCALED_CAPABILITY, PLAIN_FORMATS, Encoding, format_named
from hadagraph.plan import Decision, GemmSite, OperandPlan
from hadagraph.recipes import PER_GEMM, OperandRule
from hadagraph.rotation import PerStep, Rotation, block_for

Size = int | torch.SymInt
Capability = tuple[int, int] | None

# What the block-scaled matrix instructions take: bits of the codes, block, format of the scales.
_BLOCK_SCALED = ((8, 32, "e8m0"), (4, 32, "e8m0"), (4, 16, "ue4m3"))


def operand_plans(
    pair: tuple[OperandRule, OperandRule],
    site: GemmSite,
    kept: tuple[Size, Size],
    contracted: Size,
    capability: Capability,
    forward: Decision | None = None,
    clip_masked: bool = False,
) -> tuple[OperandPlan, OperandPlan]:
    """The plans of the GEMM's left and right operand from their rules, in that order.

    kept, contracted: sizes of the operands' dims. forward: for a gradient the decision on the GEMM
    that it belongs to. clip_masked: of a forward GEMM, whether its operands' gradients are masked.
    """
    stream = stream_name(site)
    left, right = (
        _plan(rule, named, size, contracted, stream, forward)
        for rule, named, size in zip(pair, (site.lhs, site.rhs), kept, strict=True)
    )
    masked = clip_masked and site.role == "output"
    emulated = not has_native_gemm(left, right, capability)
    left, right = (
        replace(
            plan,
            saved=_saved(site.role, named),
            clip_masked=masked and plan.is_quantized,
            emulated=emulated,
        )
        for plan, named in ((left, site.lhs), (right, site.rhs))
    )
    return left, right


def stream_name(site: GemmSite) -> str:
    """What the random draws of a site are named by: letters, digits, `_` and `.` only."""
    return re.sub(r"[^\w.]", "_", f"{site.name}.{site.role}")


def has_native_gemm(left: OperandPlan, right: OperandPlan, capability: Capability) -> bool:
    """Whether a device multiplies the two operands' codes as they are. 8-bit codes without block
    scales, however they were rounded, count as native on the CPU, too, whose kernels are references
    throughout."""
    if not (left.is_quantized and right.is_quantized):
        return True
    encodings = (left.encoding, right.encoding)
    if all(e.format in PLAIN_FORMATS and e.granularity.block is None for e in encodings):
        least = max(format_named(e.format).min_capability for e in encodings)
        return capability is None or capability >= least or all(e.is_plain for e in encodings)
    if capability is None or capability < BLOCK_SCALED_CAPABILITY:
        return False
    blocks = [_block_scaled(encoding) for encoding in encodings]
    return None not in blocks and blocks[0] == blocks[1]


def _block_scaled(encoding: Encoding) -> tuple[int, int, str] | None:
    """Bits, block and scale format, where a matrix instruction reads them."""
    bits = 8 if encoding.format.startswith("fp8") else 4 if encoding.format == "fp4_e2m1" else 0
    block = encoding.granularity.block
    if block is None or (bits, block, encoding.scale) not in _BLOCK_SCALED:
        return None
    return bits, block, encoding.scale


def _plan(
    rule: OperandRule,
    named: str,
    kept: Size,
    contracted: Size,
    stream: str,
    forward: Decision | None,
) -> OperandPlan:
    signs = PerStep(stream) if rule.signs == PER_GEMM else rule.signs
    assert not isinstance(signs, str)
    inner = outer = None
    if rule.max_block is not None:
        inner = Rotation(_block(contracted, rule.max_block), signs)
    if rule.outer_block is not None:
        outer = Rotation(_block(kept, rule.outer_block))
    reads = rule.reads
    if reads == "forward":
        made = forward_plan(forward, named)
        if made is not None and _is_readable(made):
            outer = made.rotation
        else:
            reads = "value"
    return OperandPlan(
        rule.format,
        rule.granularity,
        inner,
        scale=rule.scale,
        rounding=rule.rounding,
        fit=rule.fit,
        prescale=rule.prescale,
        tokens_kept=rule.tokens_kept,
        outer=outer,
        outer_tokens_kept=rule.outer_tokens_kept,
        outliers=rule.outliers,
        outlier_axis=rule.outlier_axis,
        reads=reads,
    )


def forward_plan(forward: Decision | None, named: str) -> OperandPlan | None:
    """What the forward GEMM does to its `input` or `weight`; None in high precision."""
    if forward is None:
        return None
    return forward.lhs if forward.site.lhs == named else forward.rhs


def _is_readable(made: OperandPlan) -> bool:
    """Whether codes alone, un-rotated along the contracted dim, are all of what they were made of.
    Within a recipe they are; an override may have changed the forward."""
    aside = made.outer or made.outer_tokens_kept or made.outliers
    return made.is_quantized and not aside


def _block(size: Size, most: int) -> int:
    """Of a symbolic dim any block is right, by padding."""
    return block_for(size, most) if isinstance(size, int) else most


def _saved(role: str, named: str) -> str | None:
    """Codes of activations are saved for grad_weight; weights are quantized again."""
    if role == "grad_weight" and named == "input":
        return "codes"
    return "recompute" if role == "grad_input" and named == "weight" else None
