"""Plain-PyTorch references of the general encodings: any format, granularity, scale format, fit and
rounding of `hadagraph.formats.Encoding`. They define the numerics, and are the CPU implementation;
what `reference` quantizes is the plain case that the 8-bit kernels take.

Order of operations for x [T, K] (each step in fp32, correctly rounded):
    y      = x D H / sqrt(block)     along the contracted dim, padded with zeros; or projected
    t      = max |y| / (format max * reach) of the tensor with `prescale`, else 1;  y = y * (1 / t)
    amax   = max |y| over the scale group; a group of zeros has codes 0 and scale 1
    scale  = by the fit, on the scale format's grid, clamped to it
    codes  = y * (1 / scale) on the format's grid, at most +-max; with fp32 scales the factor is
             max / amax; with three_quarters y is taken times 3/4
    tensor_scale = t, with three_quarters times 4/3
A group that holds inf or NaN gets scale NaN and codes 0; with `prescale` the tensor is one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hadagraph.codec import (
    from_codes,
    pack,
    packed_size,
    round_scale,
    scale_from_codes,
    scale_to_codes,
    to_codes,
    to_grid,
    unpack,
)
from hadagraph.formats import (
    FORMATS,
    SCALE_FORMATS,
    Encoding,
    Format,
    ScaleFormat,
    format_named,
)
from hadagraph.philox import random_signs, stream_number, uniform
from hadagraph.reference import AMAX_FLOOR, exact_int8_mm
from hadagraph.rotation import (
    PerStep,
    Rotation,
    project_reference,
    rotate_reference,
    unrotate_reference,
)

THREE_QUARTERS = 0.75
LONGEST_REACH = 448.0
"""Of a block scale under `prescale`: what UE4M3 reaches; wider scale formats are used as far."""
FOUR_SIX_REACH = 256.0
"""With fit four_six: so that 3/2 of it, the scale that puts the maximum on 4, fits UE4M3 (arXiv
2512.02010)."""
# max |code| over the standard deviation of normal data at which the format's squared error is
# least (found numerically: tests/test_encode.py; for fp4_e2m1 as in Quartet's code). fp8 has none:
# its error is the same to 0.1 % for any reach from 5 to 2000.
NORMAL_REACH = {
    "int4": 2.474,
    "int8": 3.921,
    "fp4_e2m1": 2.922,
    "fp6_e2m3": 3.748,
    "fp6_e3m2": 4.542,
}


@dataclass(frozen=True)
class Encoded:
    """Codes (packed bytes for less than 8 bits) [kept, stored], scales, and the tensor's scale fp32
    [1]. Scales: fp32 [1] per tensor, fp32 [kept] per kept index, [kept, contracted / B] or
    [kept / B, contracted / B] rounded up for blocks, bytes unless the scale format is fp32."""

    codes: torch.Tensor
    scale: torch.Tensor
    tensor_scale: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the order in which operators take and return them."""
        return self.codes, self.scale, self.tensor_scale


def encode_reference(
    x: torch.Tensor,
    encoding: Encoding,
    contracted_dim: int,
    seed: torch.Tensor | None = None,
    stream: int = 0,
) -> Encoded:
    """Codes and scales of a matrix.

    x: [T, K], any float dtype and strides; the contracted dim comes last in the codes. seed: int64
    [1], wanted where `encoding.needs_seed`; `stream`: number of the rounding's stream. ValueError
    without the seed.
    """
    format = format_named(encoding.format)
    y = transformed(x, encoding, contracted_dim, seed)
    y, tensor_scale = _prescaled(y, encoding, format)
    scale, inverse = group_scales(y, encoding, x.shape[contracted_dim])
    if encoding.fit == "three_quarters":
        y = y * THREE_QUARTERS
        tensor_scale = tensor_scale * torch.tensor(1 / THREE_QUARTERS, dtype=torch.float32)
    factor = spread(inverse, encoding, y.shape)
    values = torch.where(factor.isnan(), 0.0, y * factor)
    draws = None
    if encoding.rounding == "stochastic":
        draws = uniform(_given(seed, encoding), (y.shape[0], y.shape[1]), stream)
    codes = pack(to_codes(to_grid(values, format, draws), format), format)
    return Encoded(codes, scale_to_codes(scale, SCALE_FORMATS[encoding.scale]), tensor_scale)


def transformed(
    x: torch.Tensor, encoding: Encoding, contracted_dim: int, seed: torch.Tensor | None
) -> torch.Tensor:
    """x rotated or projected along the contracted dim, which comes last and is padded to
    `encoding.contracted_size`: fp32, contiguous."""
    y = x.float().t() if contracted_dim == 0 else x.float()
    if encoding.rotation is not None:
        y = rotate_with_seed(y, 1, encoding.rotation, seed)
    elif encoding.tokens_kept is not None:
        y = project_reference(y, 1, encoding.tokens_kept)
    padded = encoding.contracted_size(x.shape[contracted_dim])
    return torch.nn.functional.pad(y, (0, padded - y.shape[1])).contiguous()


def rotate_with_seed(
    x: torch.Tensor, dim: int, rotation: Rotation, seed: torch.Tensor | None
) -> torch.Tensor:
    """`rotate_reference`, per-step signs drawn from the seed."""
    if not isinstance(rotation.signs, PerStep):
        return rotate_reference(x, dim, rotation)
    signs = signs_of(rotation, seed).to(x)
    padded = torch.nn.functional.pad(
        x.movedim(dim, -1), (0, -x.shape[dim] % rotation.block)
    ).unflatten(-1, (-1, rotation.block))
    signed = (padded * signs).flatten(-2)
    return rotate_reference(signed, -1, Rotation(rotation.block)).movedim(-1, dim)


def unrotate_with_seed(
    x: torch.Tensor, dim: int, rotation: Rotation, size: int, seed: torch.Tensor | None
) -> torch.Tensor:
    """The inverse of `rotate_with_seed`: H is its own inverse, then the signs, then cut back."""
    if not isinstance(rotation.signs, PerStep):
        return unrotate_reference(x, dim, rotation, size)
    plain = rotate_reference(x, dim, Rotation(rotation.block)).movedim(dim, -1)
    signed = plain.unflatten(-1, (-1, rotation.block)) * signs_of(rotation, seed).to(x)
    return signed.flatten(-2).movedim(-1, dim).narrow(dim, 0, size)


def signs_of(rotation: Rotation, seed: torch.Tensor | None) -> torch.Tensor:
    """fp32 [block]: the +-1 diagonal of per-step signs. ValueError without a seed."""
    assert isinstance(rotation.signs, PerStep)
    if seed is None:
        raise ValueError(f"rotation {rotation} draws its signs in each step and needs a seed")
    return random_signs(seed, rotation.block, stream_number(rotation.signs.stream))


def _prescaled(
    y: torch.Tensor, encoding: Encoding, format: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    if not encoding.prescale:
        return y, torch.ones(1, device=y.device)
    amax = _largest(y.abs().reshape(1, -1))
    longest = FOUR_SIX_REACH if encoding.fit == "four_six" else LONGEST_REACH
    reach = format.max * min(SCALE_FORMATS[encoding.scale].max, longest)
    floored = amax.clamp(min=AMAX_FLOOR)
    most = floored.new_full((), reach)
    scale = torch.where(amax == 0, 1.0, torch.where(amax.isfinite(), floored / most, torch.nan))
    return y * torch.where(amax == 0, 1.0, most / floored), scale


def _largest(magnitudes: torch.Tensor) -> torch.Tensor:
    """The maximum along the last dim, NaN where there is one; 0 of nothing."""
    if magnitudes.numel() == 0:
        return magnitudes.new_zeros(magnitudes.shape[:-1])
    return magnitudes.amax(-1)


def group_scales(
    y: torch.Tensor, encoding: Encoding, contracted: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of each group of y [kept, padded contracted], on the scale format's grid, and the
    factor that encodes, both fp32 in the shape that `Encoded.scale` has. contracted: the dim's size
    before rotation and padding."""
    groups = _groups(y, encoding)
    amax = _largest(groups.abs())
    floored = amax.clamp(min=AMAX_FLOOR)
    if encoding.fit == "mse":
        floored = _normal_reach(groups, floored, _counts(y, encoding, contracted), encoding)
    scale, inverse = _fitted(groups, floored, encoding)
    finite = amax.isfinite()
    scale = torch.where(amax == 0, 1.0, torch.where(finite, scale, torch.nan))
    inverse = torch.where(amax == 0, 1.0, torch.where(finite, inverse, torch.nan))
    return scale, inverse


def _counts(y: torch.Tensor, encoding: Encoding, contracted: int) -> torch.Tensor:
    """How many elements of each group are no padding, at least 1."""
    size = encoding.transformed_size(contracted)
    real = torch.zeros_like(y)
    real[:, :size] = 1.0
    return _groups(real, encoding).sum(-1).clamp(min=1.0)


def _normal_reach(
    groups: torch.Tensor, floored: torch.Tensor, counts: torch.Tensor, encoding: Encoding
) -> torch.Tensor:
    """What the largest code shall stand for by the rms of each group. Relative to the maximum,
    whose square could overflow or vanish."""
    relative = (groups / floored[..., None]).square().sum(-1)
    return floored * (relative / counts).sqrt() * NORMAL_REACH[encoding.format]


def _fitted(
    groups: torch.Tensor, floored: torch.Tensor, encoding: Encoding
) -> tuple[torch.Tensor, torch.Tensor]:
    format, scale_format = format_named(encoding.format), SCALE_FORMATS[encoding.scale]
    up = encoding.fit == "ceil"
    # A tensor, as torch divides by numbers, and numbers by tensors, through a rounded reciprocal.
    most = floored.new_full((), format.max)
    if encoding.scale == "fp32":
        return floored / most, most / floored
    if encoding.fit == "four_six":
        return _four_or_six(groups, floored, format, scale_format)
    if encoding.scale == "e8m0" and encoding.fit in ("amax", "three_quarters"):
        # The exponent of the largest number that the format has (OCP MX, section 6.3).
        scale = round_scale(floored / _power_below(format.max), scale_format)
    elif encoding.scale == "e8m0" and encoding.fit == "mse":
        # The nearest power of two, by its logarithm.
        scale = round_scale(floored / most * 2**0.5, scale_format)
    else:
        scale = round_scale(floored / most, scale_format, up=up)
    return scale, 1 / scale


def _four_or_six(
    groups: torch.Tensor, amax: torch.Tensor, format: Format, scale_format: ScaleFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale that puts the largest number on 6, or on 4 where that errs less."""
    candidates = []
    for most in (6.0, 4.0):
        scale = round_scale(amax / amax.new_full((), most), scale_format)
        inverse = 1 / scale
        decoded = to_grid((groups * inverse[..., None]).nan_to_num(), format) * scale[..., None]
        candidates.append((scale, inverse, (decoded - groups).square().sum(-1)))
    (six, by_six, error_six), (four, by_four, error_four) = candidates
    better = error_four < error_six
    return torch.where(better, four, six), torch.where(better, by_four, by_six)


def _power_below(value: float) -> float:
    return float(2 ** (int(value).bit_length() - 1))


def _groups(y: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    """y [kept, contracted] as [..., group's elements]."""
    kind, block = encoding.granularity.kind, encoding.granularity.block
    if kind == "per_tensor":
        return y.reshape(1, -1)
    if kind == "per_kept_index":
        return y
    assert block is not None
    if kind == "block_contracted":
        return y.unflatten(1, (-1, block))
    padded = torch.nn.functional.pad(y, (0, 0, 0, -y.shape[0] % block))
    tiles = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    return tiles.transpose(1, 2).flatten(2)


def spread(scale: torch.Tensor, encoding: Encoding, shape: torch.Size) -> torch.Tensor:
    """A scale for each code, to be broadcast with [kept, contracted]."""
    kind, block = encoding.granularity.kind, encoding.granularity.block
    if kind == "per_tensor":
        return scale
    if kind == "per_kept_index":
        return scale[:, None]
    assert block is not None
    if kind == "block_2d":
        scale = scale.repeat_interleave(block, 0)[: shape[0]]
    return scale.repeat_interleave(block, 1)


def clip_mask_reference(
    x: torch.Tensor, encoding: Encoding, contracted_dim: int, seed: torch.Tensor | None
) -> torch.Tensor:
    """bool, in x's orientation, as long along the contracted dim as the rotated matrix: where the
    rotated value is within what the format reaches at its group's scale."""
    format = format_named(encoding.format)
    y, _ = _prescaled(transformed(x, encoding, contracted_dim, seed), encoding, format)
    _, inverse = group_scales(y, encoding, x.shape[contracted_dim])
    within = (y * spread(inverse, encoding, y.shape)).abs() <= format.max
    within = within[:, : encoding.transformed_size(x.shape[contracted_dim])]
    return within.t().contiguous() if contracted_dim == 0 else within.contiguous()


def decode_dtype(encoding: Encoding) -> torch.dtype:
    """The dtype that `block_values` come in: bf16 where its 8 significant bits hold code times
    block scale exactly, else fp32 (exact, but for fp32 scales, whose product is rounded)."""
    format, scale = format_named(encoding.format), SCALE_FORMATS[encoding.scale]
    if encoding.granularity.block is None:
        return torch.bfloat16
    if encoding.scale == "fp32":
        return torch.float32
    bits = format.bits - 1 if format.is_integer else format.mantissa_bits + 1
    scale_bits = scale.mantissa_bits + 1 if scale.mantissa_bits else 0
    return torch.bfloat16 if bits + scale_bits <= 8 else torch.float32


def block_values(encoded: Encoded, encoding: Encoding) -> torch.Tensor:
    """Code times block scale, [kept, contracted] in `decode_dtype`; codes alone where the scale is
    one of the GEMM's epilogue."""
    format = FORMATS[encoding.format]
    values = from_codes(unpack(encoded.codes, format), format)
    if encoding.granularity.block is not None:
        scale = scale_from_codes(encoded.scale, SCALE_FORMATS[encoding.scale])
        values = values * spread(scale, encoding, values.shape)
    return values.to(decode_dtype(encoding))


def epilogue_scale(encoded: Encoded, encoding: Encoding) -> torch.Tensor:
    """fp32 [kept] or [1]: what `block_values` leave out."""
    if encoding.granularity.block is not None:
        return encoded.tensor_scale
    return encoded.scale * encoded.tensor_scale


def decode_reference(
    encoded: Encoded, encoding: Encoding, contracted_dim: int, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """The matrix that codes stand for, in the rotated basis and x's orientation, cut to `size`
    along the contracted dim."""
    factor = epilogue_scale(encoded, encoding)
    values = block_values(encoded, encoding).float() * factor[:, None]
    values = values[:, :size].to(dtype)
    return values.t().contiguous() if contracted_dim == 0 else values.contiguous()


def encoded_mm_reference(
    a: Encoded,
    b: Encoded,
    bias: torch.Tensor | None,
    a_encoding: Encoding,
    b_encoding: Encoding,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """out [M, N] = decoded a [M, C] times decoded b [N, C]^T + bias [N], rounded once: products of
    code times block scale summed in fp32 (integers without block scales exactly), then the scales
    of kept indices and tensors. Two encodings may pad C differently: what goes beyond the shorter
    is padding, and left out."""
    left, right = block_values(a, a_encoding), block_values(b, b_encoding)
    size = min(left.shape[1], right.shape[1])
    left, right = left[:, :size], right[:, :size]
    integers = all(
        format_named(e.format).is_integer and e.granularity.block is None
        for e in (a_encoding, b_encoding)
    )
    if integers:
        total = exact_int8_mm(left.to(torch.int8), right.to(torch.int8))
    else:
        with torch.autocast(left.device.type, enabled=False):
            total = left.float() @ right.float().t()
    out = total * epilogue_scale(a, a_encoding)[:, None] * epilogue_scale(b, b_encoding)[None, :]
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)


def encoded_shapes(
    kept: int, contracted: int, encoding: Encoding
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Shapes of codes and scales of an operand (SymInts welcome); `contracted` before padding."""
    size = encoding.contracted_size(contracted)
    block = encoding.granularity.block or 1
    scales: dict[str, tuple[int, ...]] = {
        "per_tensor": (1,),
        "per_kept_index": (kept,),
        "block_contracted": (kept, size // block),
        "block_2d": ((kept + block - 1) // block, size // block),
    }
    codes = kept, packed_size(size, format_named(encoding.format))
    return codes, scales[encoding.granularity.kind]


def _given(seed: torch.Tensor | None, encoding: Encoding) -> torch.Tensor:
    if seed is None:
        raise ValueError(f"encoding {encoding} draws random numbers and needs a seed")
    return seed
