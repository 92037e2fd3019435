"""Numbers on the grid of a format, their bit patterns, and how these are packed into bytes. Plain
PyTorch, any device; knows nothing of scale groups, rotations or graphs."""

from __future__ import annotations

from functools import lru_cache

import torch

from hadagraph.formats import Format, ScaleFormat

E8M0_BIAS = 127


def to_grid(x: torch.Tensor, format: Format, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 numbers on the format's grid, at most +-max: rounded to nearest even, or, given uniform
    numbers in [0, 1) of x's shape, away from zero with the probability that leaves the mean as it
    was. Clamped before rounding; x must be finite."""
    x = x.clamp(-format.max, format.max)
    step = grid_step(x, format)
    quotient = x / step  # a power of two: exact
    if uniform is None:
        return quotient.round() * step
    # Compared rather than added: a sum would be rounded, and could carry even a number that lies on
    # the grid to the next one, past the maximum too.
    below = quotient.abs().floor()
    up = uniform < quotient.abs() - below
    return ((below + up) * step).copysign(x)


def grid_step(x: torch.Tensor, format: Format) -> torch.Tensor:
    """The distance between neighbors of the grid at |x|; that above, at powers of two."""
    if format.is_integer:
        return torch.ones_like(x)
    exponent = torch.frexp(x).exponent - 1
    exponent = exponent.clamp(min=format.least_exponent)
    return power_of_two(exponent - format.mantissa_bits)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """fp32 2^exponent of int32 exponents from -149 to 127, exactly: made of bits, where
    `torch.ldexp` calls pow, which promises no such thing on every device."""
    half = exponent >> 1  # two factors, both normal numbers, also of a subnormal one
    first, second = (((part + 127) << 23).view(torch.float32) for part in (half, exponent - half))
    return first * second


def to_codes(values: torch.Tensor, format: Format) -> torch.Tensor:
    """Bit patterns uint8, or the format's own dtype, of fp32 numbers on its grid. Integers are
    stored as two's complement in their low bits; floating-point ones as sign, exponent,
    mantissa."""
    if not format.is_packed:
        return values.to(format.dtype)
    if format.is_integer:
        return values.to(torch.int8).view(torch.uint8) & ((1 << format.bits) - 1)
    exponent = (torch.frexp(values).exponent - 1).clamp(min=format.least_exponent)
    exponent = torch.where(values == 0, format.least_exponent, exponent)
    magnitude = values.abs() * power_of_two(format.mantissa_bits - exponent)
    above = (exponent - format.least_exponent) * (1 << format.mantissa_bits)
    sign = torch.signbit(values).to(torch.uint8) << (format.bits - 1)
    return (magnitude.to(torch.int32) + above).to(torch.uint8) | sign


@lru_cache(maxsize=32)
def code_values(format: Format) -> torch.Tensor:
    """fp32 [2^bits]: what each bit pattern of a packed format stands for."""
    codes = torch.arange(1 << format.bits, dtype=torch.int32)
    half = 1 << (format.bits - 1)
    if format.is_integer:
        return torch.where(codes < half, codes, codes - 2 * half).float()
    magnitude = codes & (half - 1)
    exponent = magnitude >> format.mantissa_bits
    mantissa = (magnitude & ((1 << format.mantissa_bits) - 1)).float()
    implied = (exponent > 0).float() * (1 << format.mantissa_bits)
    scale = exponent.clamp(min=1) - 1 + format.least_exponent - format.mantissa_bits
    value = (mantissa + implied) * power_of_two(scale)
    return torch.where(codes >= half, -value, value)


def from_codes(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """fp32 values of unpacked codes."""
    if not format.is_packed:
        return codes.float()
    return code_values(format).to(codes.device)[codes.int()]


def pack(codes: torch.Tensor, format: Format) -> torch.Tensor:
    """Codes [..., C] -> bytes [..., C * bits / 8]; C a multiple of 4. Code 0 lies in the lowest
    bits of the first byte."""
    if format.bits == 8:
        return codes
    if format.bits == 4:
        low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
        return low | (high << 4)
    a, b, c, d = codes.unflatten(-1, (-1, 4)).unbind(-1)
    parts = (a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2))
    return torch.stack(parts, -1).flatten(-2)


def unpack(packed: torch.Tensor, format: Format) -> torch.Tensor:
    """The inverse of `pack`."""
    if format.bits == 8:
        return packed
    if format.bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    x, y, z = packed.unflatten(-1, (-1, 3)).unbind(-1)
    parts = (x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2)
    return torch.stack(parts, -1).flatten(-2)


def packed_size(count: int, format: Format) -> int:
    """Bytes that `count` codes take (SymInts welcome)."""
    return count if format.bits == 8 else count * format.bits // 8


def scale_to_codes(scale: torch.Tensor, format: ScaleFormat) -> torch.Tensor:
    """fp32 scales that `round_scale` rounded -> fp32 as they are, or bytes; NaN -> `nan_code`."""
    if format.name == "fp32":
        return scale
    exponent = torch.frexp(scale).exponent - 1
    if format.mantissa_bits == 0:
        codes = exponent + E8M0_BIAS
    else:
        exponent = exponent.clamp(min=_least_exponent(format))
        exponent = torch.where(scale == 0, _least_exponent(format), exponent)
        above = (exponent - _least_exponent(format)) * (1 << format.mantissa_bits)
        significant = scale * power_of_two(format.mantissa_bits - exponent)
        codes = significant.nan_to_num().int() + above
    return torch.where(scale.isnan(), nan_code(format), codes).to(torch.uint8)


def scale_from_codes(codes: torch.Tensor, format: ScaleFormat) -> torch.Tensor:
    """fp32 scales from what `scale_to_codes` made."""
    if format.name == "fp32":
        return codes
    bits = codes.int()
    if format.mantissa_bits == 0:
        scale = power_of_two(bits - E8M0_BIAS)
    else:
        exponent = bits >> format.mantissa_bits
        implied = (exponent > 0).float() * (1 << format.mantissa_bits)
        mantissa = (bits & ((1 << format.mantissa_bits) - 1)).float() + implied
        shift = exponent.clamp(min=1) - 1 + _least_exponent(format) - format.mantissa_bits
        scale = mantissa * power_of_two(shift)
    return torch.where(bits == nan_code(format), torch.nan, scale)


def round_scale(scale: torch.Tensor, format: ScaleFormat, *, up: bool = False) -> torch.Tensor:
    """Positive fp32 scales on the scale format's grid, at least its smallest positive number:
    to nearest even, e8m0 down; or `up`. NaN stays."""
    if format.name == "fp32":
        return scale
    least = 2.0**-127 if format.mantissa_bits == 0 else smallest_scale(format)
    scale = scale.clamp(least, format.max)
    exponent = torch.frexp(scale).exponent - 1
    if format.mantissa_bits:
        exponent = exponent.clamp(min=_least_exponent(format))
    step = power_of_two(exponent - format.mantissa_bits)
    quotient = scale / step
    if up:
        rounded = quotient.ceil()
    else:
        rounded = quotient.floor() if format.mantissa_bits == 0 else quotient.round()
    return (rounded * step).clamp(max=format.max)


def smallest_scale(format: ScaleFormat) -> float:
    """The smallest positive number of a scale format that has subnormals."""
    return 2.0 ** (_least_exponent(format) - format.mantissa_bits)


def nan_code(format: ScaleFormat) -> int:
    """The bit pattern of NaN: the largest code."""
    return (1 << (format.exponent_bits + format.mantissa_bits)) - 1


def _least_exponent(format: ScaleFormat) -> int:
    return 2 - (1 << (format.exponent_bits - 1))
