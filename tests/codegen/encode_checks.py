"""What the kernels of general encodings owe their references, as assertions shared by the GPU and
interpreter tests.

Bitwise on integer-valued inputs up to 256, for any seed; on random data at most 1e-4 of the codes
differ, by one step, besides groups whose scale fell on the other side of a rounding or of a choice.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hadagraph.codec import unpack
from hadagraph.codegen import encoded, encoded_mm, transforms
from hadagraph.codegen.spec import Capability
from hadagraph.encode import (
    Encoded,
    clip_mask_reference,
    decode_reference,
    encode_reference,
    encoded_mm_reference,
    rotate_with_seed,
    spread,
    unrotate_with_seed,
)
from hadagraph.formats import Encoding, format_named
from hadagraph.rotation import (
    Rotation,
    project_reference,
    unproject_reference,
)

SEED = -0x123456789ABCDEF
STREAM = 0x7FFFFFFF
# What recipes ask of a GPU, and what is left.
ENCODINGS = (
    "int4/per_tensor/h16",
    "int4/per_kept_index/h16/stochastic",
    "int8/per_tensor/keep8of16",
    "int8/per_kept_index/keep8of16/stochastic",
    "fp6_e3m2/per_tensor/h64",
    "fp6_e2m3/per_kept_index",
    "fp4_e2m1/block_contracted(32)/h32/e8m0",
    "fp4_e2m1/block_contracted(32)/h64:per_step(layer.0)/e8m0/stochastic/three_quarters",
    "fp4_e2m1/block_contracted(32)/e8m0/stochastic/ceil",
    "fp4_e2m1/block_contracted(32)/h32/e8m0/mse",
    "fp6_e2m3/block_contracted(32)/h128:fixed(3)/e8m0",
    "fp8_e4m3/block_contracted(32)/e8m0",
    "fp8_e5m2/block_contracted(32)/e8m0/stochastic",
    "fp4_e2m1/block_contracted(16)/ue4m3/prescale",
    "fp4_e2m1/block_contracted(16)/h16:fixed(7)/ue4m3/stochastic/prescale",
    "fp4_e2m1/block_2d(16)/ue4m3/prescale",
    "fp4_e2m1/block_2d(16)/h32/ue4m3/ceil",
    "fp4_e2m1/block_contracted(16)/ue4m3/four_six/prescale",
    "fp4_e2m1/block_2d(16)/ue5m3/four_six",
    "fp4_e2m1/block_contracted(16)/h128:per_step(x)/ue5m3/stochastic",
    "int8/block_2d(32)/e8m0/mse",
    "fp8_e4m3/block_2d(128)",
    "int8/per_tensor/h64:per_step(y)/stochastic",
    "fp8_e4m3/per_tensor/stochastic",
)
# Left to the references.
REFUSED = (
    "int8/per_kept_index/h256",
    "int4/per_tensor/mse",
    "fp8_e4m3/block_contracted(8)",
    "int8/per_tensor/keep6of16",
)
# (a, b) of encoded_mm: exact int4, int8; fp8 codes; decoded, of formats that are padded unlike.
PRODUCTS = (
    ("int4/per_tensor/h16", "int4/per_kept_index/h16/stochastic"),
    ("int8/per_tensor/keep8of16/stochastic", "int8/per_kept_index"),
    ("int4/per_kept_index", "int8/per_tensor"),
    ("fp8_e4m3/per_kept_index/stochastic", "fp8_e5m2/per_tensor"),
    ("fp4_e2m1/block_contracted(16)/ue4m3/prescale", "fp4_e2m1/block_2d(16)/ue4m3/prescale"),
    ("fp4_e2m1/block_contracted(32)/e8m0/three_quarters", "fp6_e3m2/per_kept_index"),
    ("fp8_e4m3/block_contracted(32)/e8m0", "fp4_e2m1/block_contracted(32)/e8m0/mse"),
    ("fp8_e4m3/block_contracted(128)", "fp8_e4m3/block_2d(128)"),
)


def seed_on(device: str) -> torch.Tensor:
    return torch.tensor([SEED], dtype=torch.int64, device=device)


def on(device: str, made: Encoded) -> Encoded:
    return Encoded(made.codes.to(device), made.scale.to(device), made.tensor_scale.to(device))


def steps_of(made: Encoded, encoding: Encoding) -> torch.Tensor:
    """Codes as int32 that count representable values from zero; -0 counts as 0."""
    format = format_named(encoding.format)
    raw = made.codes.view(torch.uint8)
    codes = unpack(raw, format).int()
    half = 1 << (format.bits - 1)
    if format.is_integer:
        return torch.where(codes < half, codes, codes - 2 * half)
    return torch.where(codes < half, codes, half - codes)


def assert_encoded(got: Encoded, expected: Encoded, encoding: Encoding, *, exact: bool) -> None:
    """`got` (anywhere) is `expected` (on the CPU), bitwise or within the bounds."""
    got = on("cpu", got)
    for name in ("codes", "scale", "tensor_scale"):
        one, other = getattr(got, name), getattr(expected, name)
        assert one.shape == other.shape, name
        assert one.dtype == other.dtype, name
    steps = (steps_of(got, encoding) - steps_of(expected, encoding)).abs()
    if exact:
        assert torch.equal(_bits(got.scale), _bits(expected.scale))
        assert torch.equal(_bits(got.tensor_scale), _bits(expected.tensor_scale))
        assert not steps.any(), f"{int(steps.count_nonzero())} codes differ"
        return
    torch.testing.assert_close(
        got.tensor_scale, expected.tensor_scale, rtol=2e-6, atol=0.0, equal_nan=True
    )
    if encoding.scale == "fp32":
        torch.testing.assert_close(got.scale, expected.scale, rtol=2e-6, atol=0.0, equal_nan=True)
    else:
        # a sum that is an ulp off can fall on the other side of a rounding, and change the group
        other_scale = got.scale != expected.scale
        assert int(other_scale.count_nonzero()) <= math.ceil(2e-3 * other_scale.numel())
        steps[spread(other_scale, encoding, steps.shape).expand_as(steps)] = 0
    assert int(steps.amax()) <= 1
    assert int(steps.count_nonzero()) <= math.ceil(1e-4 * steps.numel())


def _bits(scale: torch.Tensor) -> torch.Tensor:
    """Scales with one NaN."""
    if scale.dtype == torch.uint8:
        return scale
    return torch.where(scale.isnan(), float("nan"), scale).view(torch.int32)


def encoded_on(
    capability: Capability, x: torch.Tensor, seed: torch.Tensor | None, *values: Any
) -> Encoded:
    """What the operator `encode` makes; values: its other arguments."""
    return Encoded(*encoded.ready_encode(capability, x, seed, *values)(x, seed))


def decoded_on(capability: Capability, codes: Encoded, *values: Any) -> torch.Tensor:
    """What the operator `decode` makes; values: its other arguments."""
    return encoded.ready_decode(capability, *codes.tensors, *values)(*codes.tensors)


def multiplied_on(
    capability: Capability, a: Encoded, b: Encoded, bias: torch.Tensor | None, *values: Any
) -> torch.Tensor:
    """What the operator `encoded_mm` makes; values: its other arguments."""
    tensors = (*a.tensors, *b.tensors, bias)
    return encoded_mm.ready_encoded_mm(capability, *tensors, *values)(*tensors)


def check_encode(
    x: torch.Tensor,
    encoding: Encoding,
    contracted_dim: int,
    device: str,
    capability: Capability,
    *,
    exact: bool,
) -> None:
    """Encodes x as it lies, strides included; decodes what came out both ways; the clip mask."""
    # a mean of squares is no exact sum: an ulp can move a scale to the next power of two
    exact = exact and encoding.fit != "mse"
    moved = _moved(x, device)
    seed, on_device = seed_on("cpu"), seed_on(device)
    given = on_device if encoding.needs_seed else None
    got = encoded_on(capability, moved, given, str(encoding), contracted_dim, STREAM)
    expected = encode_reference(x, encoding, contracted_dim, seed, STREAM)
    assert_encoded(got, expected, encoding, exact=exact)
    size = encoding.transformed_size(x.shape[contracted_dim])
    for dtype in (torch.float32,) if exact else (torch.float32, torch.bfloat16):
        codes = on(device, expected)
        values = decoded_on(capability, codes, str(encoding), contracted_dim, size, dtype).cpu()
        wanted = decode_reference(expected, encoding, contracted_dim, size, dtype)
        assert values.is_contiguous()
        torch.testing.assert_close(values, wanted, rtol=0.0, atol=0.0, equal_nan=True)
    if encoding.fit == "mse":
        arguments = (moved, given, str(encoding), contracted_dim)
        mask = encoded.ready_clip_mask(capability, *arguments)(moved, given).cpu()
        wanted = clip_mask_reference(x, encoding, contracted_dim, seed)
        assert mask.shape == wanted.shape
        assert mask.dtype == torch.bool
        allowed = 0 if exact else math.ceil(3e-3 * mask.numel())
        assert int((mask != wanted).count_nonzero()) <= allowed


def _moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """x on the device, as it lies."""
    if 0 in x.stride():
        return x[:1].to(device).expand(x.shape)
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return moved.copy_(x)


ROTATIONS = ("h16", "h128", "h64:fixed(3)", "h32:per_step(layer.1)")
PROJECTIONS = ((8, 16), (4, 32), (16, 16))


def assert_rounded_once(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    """`got` is `expected` (fp32, for x of order 1) within half a step of x's dtype, and sums."""
    assert got.dtype == x.dtype
    assert got.shape == expected.shape
    assert got.is_contiguous()
    eps = torch.finfo(x.dtype).eps
    error = (got.cpu().float() - expected).abs()
    assert bool((error <= 0.51 * eps * expected.abs() + 6e-6).all())


def check_rotation(
    x: torch.Tensor, dim: int, text: str, device: str, capability: Capability
) -> None:
    """Rotated and taken back, each against the reference in fp32."""
    rotation, seed, moved = Rotation.parse(text), seed_on("cpu"), _moved(x, device)
    on_device = seed_on(device)
    rotate = transforms.ready_rotate(capability, moved, dim, text, on_device)
    got = rotate(moved, on_device)
    assert_rounded_once(got, rotate_with_seed(x.float(), dim, rotation, seed), x)
    size = x.shape[dim]
    back = transforms.ready_unrotate(capability, got, dim, text, size, on_device)(got, on_device)
    expected = unrotate_with_seed(got.cpu().float(), dim, rotation, size, seed)
    assert_rounded_once(back, expected, x)


def check_projection(
    x: torch.Tensor, dim: int, projection: tuple[int, int], device: str, capability: Capability
) -> None:
    """Projected and taken back, each against the reference in fp32."""
    moved = _moved(x, device)
    got = transforms.ready_project(capability, moved, dim, *projection)(moved)
    assert_rounded_once(got, project_reference(x.float(), dim, projection), x)
    size = x.shape[dim]
    back = transforms.ready_unproject(capability, got, dim, *projection, size)(got)
    expected = unproject_reference(got.cpu().float(), dim, projection, size)
    assert_rounded_once(back, expected, x)


def operand(text: str, kept: int, contracted: int, seed: int) -> tuple[Encoded, Encoding]:
    """On the CPU, of random data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((kept, contracted), generator=generator)
    encoding = Encoding.parse(text)
    return encode_reference(x, encoding, 1, seed_on("cpu"), STREAM), encoding


def check_mm(
    texts: tuple[str, str],
    sizes: tuple[int, int, int],
    bias_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    device: str,
    capability: Capability,
) -> None:
    """encoded_mm against the fp64 product of what the codes stand for: within the output's
    rounding, the epilogue's, and the tensor core's fp32 sum, which truncates in each step (to at
    least 13 bits for fp8, 22 otherwise; integers are exact)."""
    M, N, C = sizes
    (a, a_encoding), (b, b_encoding) = operand(texts[0], M, C, 1), operand(texts[1], N, C, 2)
    bias = None if bias_dtype is None else torch.randn(N).to(bias_dtype)
    given = None if bias is None else bias.to(device)
    out = multiplied_on(capability, on(device, a), on(device, b), given, *texts, out_dtype)
    assert out.dtype == out_dtype
    assert out.shape == (M, N)
    if 0 in (M, N):
        return
    whole = min(
        x.codes.shape[1] * 8 // format_named(e.format).bits
        for x, e in ((a, a_encoding), (b, b_encoding))
    )
    left, right = (
        decode_reference(x, e, 1, whole, torch.float32).double()
        for x, e in ((a, a_encoding), (b, b_encoding))
    )
    offset = 0.0 if bias is None else bias.double()
    exact = left @ right.t() + offset
    magnitude = left.abs() @ right.abs().t() + (0.0 if bias is None else bias.double().abs())
    kept = 2.0**-12 if all("fp8" in t and "block" not in t for t in texts) else 2.0**-17
    kept = 2.0**-20 if all("int" in t for t in texts) else kept
    allowed = torch.finfo(out_dtype).eps * exact.abs() + kept * magnitude + 1e-30
    assert bool(((out.cpu().double() - exact).abs() <= allowed).all())
    reference = encoded_mm_reference(a, b, bias, a_encoding, b_encoding, torch.float32)
    assert bool(((out.cpu() - reference).abs() <= 2 * allowed).all())
