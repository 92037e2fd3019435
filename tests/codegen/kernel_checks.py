"""What an emitted kernel owes its reference, as assertions shared by the GPU and interpreter tests.

Bitwise where arithmetic is exact in any order (integer-valued inputs up to 256); on random data at
most 1e-4 of the codes differ, by one step, and scales by SCALE_ULPS (fp32 accumulation).
"""

from __future__ import annotations

import math

import torch

from hadagraph.codegen import launch
from hadagraph.formats import PER_TENSOR, Encoding, format_named
from hadagraph.reference import quantize_reference, scale_reference
from hadagraph.rotation import rotate_reference

CODE_FRACTION = 1e-4
# Of a scale, 1.5 ulp are its division and its product by the normalization. The rest is the sum: a
# Hopper tensor core aligns its addends to the largest and truncates. The 8-bit significands of bf16
# lose little; those of fp16 (11 bits) and fp32 (24, in three products) reach below the last bit
# that is kept, and each of the block's eight steps of 16 products may drop up to an ulp, always
# towards zero.
SCALE_ULPS = {torch.bfloat16: 2, torch.float16: 4, torch.float32: 4}


def integers(T: int, K: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-256, 257, (T, K), generator=generator).to(dtype)


def normals(T: int, K: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((T, K), generator=generator).to(dtype)


def ordinals(codes: torch.Tensor) -> torch.Tensor:
    """Codes as int16 that count representable values from zero; -0 counts as 0."""
    raw = codes.view(torch.int8).short()
    if codes.dtype == torch.int8:
        return raw
    magnitude = raw & 0x7F
    return torch.where(raw < 0, -magnitude, magnitude)


def assert_quantized(
    got: tuple[torch.Tensor, torch.Tensor],
    x: torch.Tensor,
    encoding: Encoding,
    contracted_dim: int,
    *,
    exact: bool,
    steps: int = 1,
    fraction: float = CODE_FRACTION,
) -> None:
    """`got` is what the reference makes of x (on the CPU): bitwise or within the bounds."""
    codes, scale = (tensor.cpu() for tensor in got)
    expected_codes, expected_scale = quantize_reference(x, encoding, contracted_dim)
    assert codes.shape == expected_codes.shape
    assert codes.dtype == expected_codes.dtype
    assert scale.shape == expected_scale.shape
    assert torch.equal(scale.isnan(), expected_scale.isnan())
    difference = (ordinals(codes) - ordinals(expected_codes)).abs()
    if exact:
        finite = ~expected_scale.isnan()
        assert torch.equal(scale[finite], expected_scale[finite])
        assert not difference.any(), f"{int(difference.count_nonzero())} codes differ"
        return
    expected_scale = _scale_in_fp64(x, encoding, contracted_dim)
    ulps = (scale.view(torch.int32) - expected_scale.view(torch.int32)).abs()
    worst = int(ulps[~expected_scale.isnan()].amax())
    assert worst <= SCALE_ULPS[x.dtype], f"a scale is {worst} ulp off"
    assert int(difference.amax()) <= steps
    allowed = math.ceil(fraction * difference.numel())
    assert int(difference.count_nonzero()) <= allowed


def _scale_in_fp64(x: torch.Tensor, encoding: Encoding, contracted_dim: int) -> torch.Tensor:
    """Scales from maxima without accumulation error: on fp32 data the fp32 reference's own sums
    are up to 7 ulp off."""
    y = x.double() if contracted_dim == 1 else x.double().t()
    if encoding.rotation is not None:
        y = rotate_reference(y, 1, encoding.rotation, normalize=False)
    amax = y.abs().amax().reshape(1) if encoding.granularity == PER_TENSOR else y.abs().amax(dim=1)
    return scale_reference(amax.float(), encoding)[0]


def check_quantizers(
    x: torch.Tensor,
    encoding: Encoding,
    layouts: str,
    device: str,
    capability: tuple[int, int],
    config: object = None,
    **bounds: object,
) -> None:
    """Runs `layouts` ("rows", "columns" or "both") on x as it lies, strides included."""
    rows = encoding if layouts != "columns" else None
    columns = encoding if layouts != "rows" else None
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    moved.copy_(x)
    row_outputs, column_outputs = launch.quantize(moved, rows, columns, capability, config)
    if rows is not None:
        assert_quantized(row_outputs, x, rows, 1, **bounds)
    if columns is not None:
        assert_quantized(column_outputs, x, columns, 0, **bounds)


def random_codes(shape: tuple[int, int], name: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = format_named(name).dtype
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return torch.randn(shape, generator=generator).to(dtype)


def assert_scaled_mm(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Within the output's rounding, the epilogue's three fp32 roundings, and for fp8 the tensor
    core's fp32 accumulator (at least 13 bits kept), of the fp64 product."""
    a, b, a_scale, b_scale = (t.double() for t in (a, b, a_scale, b_scale))
    bias_term = 0.0 if bias is None else bias.double()
    exact = (a @ b.t()) * a_scale[:, None] * b_scale[None, :] + bias_term
    magnitude = (a.abs() @ b.abs().t()) * a_scale[:, None] * b_scale[None, :]
    magnitude = magnitude + (0.0 if bias is None else bias.double().abs())
    eps = torch.finfo(out.dtype).eps
    accumulation = 2.0**-21 if bool((a == a.round()).all()) else 2.0**-12
    error = (out.double() - exact).abs()
    assert bool((error <= eps * exact.abs() + accumulation * magnitude + 1e-30).all())
