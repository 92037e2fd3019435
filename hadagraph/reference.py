"""Plain-PyTorch references of every kernel: rotate, quantize, scaled matmul. They define the
numerics, and are the CPU implementation. Import no Triton.

Order of operations (each step in fp32, correctly rounded):
    y      = x D H                       unnormalized, fp32 accumulation
    amax   = max |y| over the scale group, floored at AMAX_FLOOR; a group of zeros has amax 0
    codes  = round_half_even(y * (max / amax)), at most +-max
    scale  = (amax / max) * (1 / sqrt(block))
A group that holds inf or NaN gets scale NaN and codes 0; a group of zeros scale 1 and codes 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hadagraph.formats import PER_TENSOR, Encoding, format_named
from hadagraph.region import MATRIX, ROWS, Chain, Value
from hadagraph.rotation import padded_size, rotate_reference

# Below this the reciprocal scale would overflow fp32; such a group simply uses fewer codes.
AMAX_FLOOR = 2.0**-100
# int32 holds 127 * 127 * 133,000; longer contractions are summed in parts.
INT32_CONTRACTION = 1 << 17


def normalization(encoding: Encoding) -> float:
    """1/sqrt(block) rounded to fp32, the factor folded into the scale; 1 without a rotation."""
    block = encoding.rotation.block if encoding.rotation else 1
    return float(np.float32(1.0) / np.sqrt(np.float32(block)))


CHAIN_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STEPS: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "pow": torch.pow,
    "neg": torch.neg,
    "abs": torch.abs,
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "log": torch.log,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "relu": torch.relu,
    "cast_bf16": lambda x: x.to(torch.bfloat16).float(),
    "cast_fp16": lambda x: x.to(torch.float16).float(),
}


def chain_reference(chain: Chain, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The matrices [T, K] that a chain makes, contiguous, each in its output's dtype.

    inputs: in the order of `chain.inputs`, [T, K], [T], [K] or [] as their shapes say. Every step
    computes in fp32 and rounds to fp32; constants are fp32.
    """
    values = [
        given.float()[:, None] if each.shape == ROWS else given.float()
        for each, given in zip(chain.inputs, inputs, strict=True)
    ]

    def value(operand: Value | float) -> torch.Tensor:
        if isinstance(operand, Value):
            return values[operand.index]
        return torch.tensor(operand, dtype=torch.float32, device=inputs[0].device)

    for step in chain.steps:
        values.append(STEPS[step.op](*map(value, step.operands)))
    shape = inputs[[each.shape for each in chain.inputs].index(MATRIX)].shape
    return [
        inputs[0].new_empty(shape, dtype=CHAIN_DTYPES[output.dtype]).copy_(value(output.value))
        for output in chain.outputs
    ]


def quantize_reference(
    x: torch.Tensor, encoding: Encoding, contracted_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a matrix.

    x: [T, K] in bf16, fp16 or fp32, any strides. Returns codes [kept, padded contracted],
    contiguous, in the format's dtype, and fp32 scales [kept] (`per_kept_index`) or [1]
    (`per_tensor`). The contracted dim comes last whatever `contracted_dim` was.
    """
    fmt = format_named(encoding.format)
    y = x.float()
    if encoding.rotation is not None:
        y = rotate_reference(y, contracted_dim, encoding.rotation, normalize=False)
    amax = _group_maxima(y, encoding, contracted_dim)
    scale, inverse = scale_reference(amax, encoding)
    y = y * (inverse if contracted_dim == 0 else inverse[:, None])
    if not bool(inverse.isfinite().all()):
        y = torch.where((inverse if contracted_dim == 0 else inverse[:, None]).isnan(), 0.0, y)
    # |y| <= max (1 + 2^-22), which rounds to a code within +-max: clamping would change nothing.
    codes = y.round_().to(torch.int8) if fmt.is_integer else y.to(fmt.dtype)
    return _contracted_last(codes, contracted_dim, encoding.contracted_multiple), scale


def _group_maxima(y: torch.Tensor, encoding: Encoding, contracted_dim: int) -> torch.Tensor:
    """max |y| of each scale group, NaN where the group holds NaN: [kept] or [1]."""
    groups = 1 if encoding.granularity == PER_TENSOR else y.shape[1 - contracted_dim]
    if y.numel() == 0:
        return y.new_zeros(groups)
    if encoding.granularity == PER_TENSOR:
        low, high = torch.aminmax(y)
    else:
        low, high = torch.aminmax(y, dim=contracted_dim)
    return torch.maximum(-low, high).reshape(groups)


def _contracted_last(codes: torch.Tensor, contracted_dim: int, multiple: int) -> torch.Tensor:
    """Codes as [kept, contracted], contiguous, the contracted dim padded with zeros."""
    codes = codes.t() if contracted_dim == 0 else codes
    kept, size = codes.shape
    padded = padded_size(size, multiple)
    if padded == size:
        return codes.contiguous()
    out = codes.new_zeros((kept, padded))
    # Copied as bytes: not every op knows the one-byte floating-point types.
    out.view(torch.uint8)[:, :size] = codes.view(torch.uint8)
    return out


def scale_reference(amax: torch.Tensor, encoding: Encoding) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that decodes, and the factor that encodes (NaN where codes must be 0), both fp32
    [groups], from each group's maximum magnitude."""
    largest = torch.tensor(format_named(encoding.format).max, dtype=torch.float32)
    floored = amax.clamp(min=AMAX_FLOOR)
    scale = floored / largest * torch.tensor(normalization(encoding), dtype=torch.float32)
    inverse = largest / floored
    finite = amax.isfinite()
    scale = torch.where(amax == 0, 1.0, torch.where(finite, scale, torch.nan))
    return scale, torch.where(finite, inverse, torch.nan)


def dequantize_reference(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values that codes [kept, contracted] stand for, in the rotated basis."""
    return codes.to(dtype) * scale.to(dtype)[:, None]


def scaled_mm_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`(sum_c a[m, c] b[n, c]) * a_scale[m] * b_scale[n] + bias[n]`, rounded once to `out_dtype`.

    a: [M, C] and b: [N, C] codes (both int8, or both fp8 of either kind), contracted dim last;
    scales fp32 [M] or [1], [N] or [1]. int8 products are summed exactly, fp8 ones in fp32.
    """
    if a.dtype == torch.int8:
        accumulated = exact_int8_mm(a, b)
    else:
        with torch.autocast(a.device.type, enabled=False):
            accumulated = a.float() @ b.float().t()
    out = accumulated * a_scale[:, None] * b_scale[None, :]
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)


def exact_int8_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """fp32 [M, N]: exact int32 sums over parts of the contraction, added in fp32."""
    if a.shape[0] == 0 or b.shape[0] == 0 or a.shape[1] == 0:
        return a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.float32)
    parts = [
        torch._int_mm(part_a, part_b.t()).float()
        for part_a, part_b in zip(
            a.split(INT32_CONTRACTION, dim=1), b.split(INT32_CONTRACTION, dim=1), strict=True
        )
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
