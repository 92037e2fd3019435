"""What an emitted kernel owes its reference, as assertions shared by the GPU and interpreter tests.

Bitwise where arithmetic is exact in any order (integer-valued inputs up to 256); on random data at
most 1e-4 of the codes differ, by one step, and scales by what sums in fp32 leave open.
"""

from __future__ import annotations

import math

import torch

from hadagraph.codegen import launch
from hadagraph.formats import PER_TENSOR, Encoding, format_named
from hadagraph.reference import (
    CHAIN_DTYPES,
    chain_reference,
    quantize_reference,
    scale_reference,
)
from hadagraph.region import Chain
from hadagraph.rotation import rotate_reference

CODE_FRACTION = 1e-4
SCALE_ULPS = 2
"""Of a scale whose maximum is a sum with rounding: an ulp of that can be two of the scale."""
TRUNCATED_ULPS = 2
"""More, at most, where the tensor core drops addends' bits: see `_scale_in_fp64`."""


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
    expected_scale, allowed_ulps = _scale_in_fp64(x, encoding, contracted_dim)
    ulps = (scale.view(torch.int32) - expected_scale.view(torch.int32)).abs()
    too_far = (ulps > allowed_ulps) & ~expected_scale.isnan()
    assert not too_far.any(), f"{ulps[too_far].tolist()} ulp where {allowed_ulps[too_far].tolist()}"
    assert int(difference.amax()) <= steps
    allowed = math.ceil(fraction * difference.numel())
    assert int(difference.count_nonzero()) <= allowed


def _scale_in_fp64(
    x: torch.Tensor, encoding: Encoding, contracted_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales from maxima without accumulation error (on fp32 data the fp32 reference's own sums are
    up to 7 ulp off), and the ulps that a kernel may be off.

    None where no sum of the maximum's addends, in any order, passes the 24 bits of fp32. Else a
    Hopper tensor core, which aligns its addends to the largest and truncates, may drop an ulp of
    the maximum for each addend whose last bit lies below the maximum's: few of bf16 numbers (8
    bits) whose sizes are alike, many of fp16 and fp32 numbers.
    """
    y = x.double() if contracted_dim == 1 else x.double().t()
    groups = 1 if encoding.granularity == PER_TENSOR else y.shape[0]
    if encoding.rotation is None:
        amax = y.reshape(groups, -1).abs().amax(dim=1)
        return scale_reference(amax.float(), encoding)[0], torch.zeros(groups, dtype=torch.int64)
    block = encoding.rotation.block
    addends = torch.nn.functional.pad(y, (0, -y.shape[1] % block)).reshape(groups, -1, block)
    y = rotate_reference(addends.reshape(y.shape[0], -1), 1, encoding.rotation, normalize=False)
    amax, where = y.reshape(groups, -1).abs().max(dim=1)
    addends = addends[torch.arange(groups), where // block]
    last = addends.frexp().exponent - round(1 - math.log2(torch.finfo(x.dtype).eps))
    below = (last < amax.frexp().exponent[:, None] - 24) & (addends != 0)
    ulps = SCALE_ULPS + below.sum(dim=1).clamp(max=TRUNCATED_ULPS)
    largest_sum = addends.abs().sum(dim=1, keepdim=True).frexp().exponent
    exact = ((last >= largest_sum - 24) | (addends == 0)).all(dim=1)
    return scale_reference(amax.float(), encoding)[0], torch.where(exact, 0, ulps)


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


CHAINS = {
    # exact on small integers
    "add": "in bf16 matrix; in bf16 matrix; add %0 %1; out %2 bf16",
    "relu_scaled": "in fp16 matrix; in fp16 columns; in fp32 rows; in fp32 scalar; relu %0; "
    "mul %4 %1; mul %5 %2; add %6 %3; out %7 fp32",
    "two_dtypes": "in bf16 matrix; in bf16 matrix; sub %0 1.0; maximum %0 %1; out %2 fp16; "
    "out %3 bf16",
    # Of a Llama block under Inductor: gate, up -> silu(gate) * up; with grad_output -> grad_up,
    # silu(gate) * up again, grad_gate, by torch 2.13 and by 2.11; and a norm.
    "silu_mul": "in bf16 matrix; in bf16 matrix; neg %0; exp %2; add %3 1.0; div %0 %4; mul %5 %1; "
    "out %6 bf16",
    "silu_mul_three": "in bf16 matrix; in bf16 matrix; in bf16 matrix; neg %0; exp %3; "
    "add %4 1.0; div %0 %5; mul %6 %1; mul %2 %6; mul %2 %1; sigmoid %0; mul %9 %10; sub 1.0 %10; "
    "mul %0 %12; add %13 1.0; mul %11 %14; out %8 bf16; out %7 bf16; out %15 bf16",
    "silu_mul_three_by_exp": "in bf16 matrix; in bf16 matrix; in bf16 matrix; neg %0; exp %3; "
    "add %4 1.0; div %0 %5; mul %6 %1; mul %2 %6; mul %2 %1; reciprocal %5; mul %10 1.0; "
    "mul %9 %11; sub 1.0 %11; mul %0 %13; add %14 1.0; mul %12 %15; out %8 bf16; out %7 bf16; "
    "out %16 bf16",
    "rms_norm": "in bf16 matrix; in fp32 rows; in bf16 columns; mul %0 %1; mul %3 %2; out %4 bf16",
    # Of eager execution, every operation rounded: the three, and -> grad_up, grad_gate
    "silu_mul_three_rounded": "in bf16 matrix; in bf16 matrix; in bf16 matrix; neg %0; exp %3; "
    "add %4 1.0; div %0 %5; cast_bf16 %6; mul %7 %1; cast_bf16 %8; mul %2 %7; cast_bf16 %10; "
    "mul %2 %1; cast_bf16 %12; sigmoid %0; mul %13 %14; sub 1.0 %14; mul %0 %16; add %17 1.0; "
    "mul %15 %18; cast_bf16 %19; out %11 bf16; out %9 bf16; out %20 bf16",
    "silu_mul_backward": "in bf16 matrix; in bf16 matrix; in bf16 matrix; neg %0; exp %3; "
    "add %4 1.0; div %0 %5; cast_bf16 %6; mul %2 %7; cast_bf16 %8; mul %2 %1; cast_bf16 %10; "
    "sigmoid %0; mul %11 %12; sub 1.0 %12; mul %0 %14; add %15 1.0; mul %13 %16; cast_bf16 %17; "
    "out %9 bf16; out %18 bf16",
    "gelu_tanh": "in fp16 matrix; mul %0 %0; mul %0 %1; mul %2 0.044715; add %0 %3; "
    "mul %4 0.7978845608028654; tanh %5; add %6 1.0; mul %0 0.5; mul %7 %8; out %9 fp16",
    "gelu_erf": "in fp32 matrix; mul %0 0.7071067811865476; erf %1; add %2 1.0; mul %0 0.5; "
    "mul %3 %4; out %5 fp32",
    # not 0 where every input is
    "offset": "in bf16 matrix; in bf16 columns; exp %0; square %1; add %2 %3; div 3.0 %4; "
    "out %5 bf16",
    "every_operation": "in fp32 matrix; in fp32 scalar; abs %0; add %2 0.5; log %3; rsqrt %3; "
    "sqrt %3; pow %3 1.5; neg %4; reciprocal %3; square %5; minimum %8 %9; add %6 %7; mul %11 %10; "
    "add %12 %13; cast_fp16 %14; sub %15 %1; add 1.0 2.0; mul %17 %16; out %18 fp32",
}
EXACT_CHAINS = ("add", "relu_scaled", "two_dtypes")


def chain_inputs(text: str, T: int, K: int, *, exact: bool) -> list[torch.Tensor]:
    """Inputs of a chain: small integers, or random normal numbers."""
    shapes = {"matrix": (T, K), "rows": (T,), "columns": (K,), "scalar": ()}
    generator = torch.Generator().manual_seed(T + K)
    made = []
    for each in Chain.parse(text).inputs:
        x = torch.randn(shapes[each.shape], generator=generator)
        x = (2 * x).round().clamp(-4, 4) if exact else x
        made.append(x.to(CHAIN_DTYPES[each.dtype]))
    return made


def check_chain(
    name: str,
    T: int,
    K: int,
    layouts: list[tuple[str, str]],
    device: str,
    capability: tuple[int, int],
    *,
    values: bool = True,
    inputs: list[torch.Tensor] | None = None,
    strided: bool = False,
    config: object = None,
    schedule: object = None,
) -> None:
    """Quantizes the outputs of CHAINS[name] in `layouts` (rows, columns; "" not). Values agree with
    the reference within the rounding of the functions; codes are those of the values."""
    text, exact = CHAINS[name], name in EXACT_CHAINS
    chain = Chain.parse(text)
    inputs = chain_inputs(text, T, K, exact=exact) if inputs is None else inputs
    moved = [_moved(x, device, strided) for x in inputs]
    layouts = layouts * len(chain.outputs) if len(layouts) == 1 else layouts
    rows, columns = ([pair[i] for pair in layouts] for i in (0, 1))
    arguments = (moved, text, rows, columns)
    options = (capability, config, schedule)
    got = launch.quantize_chain(*arguments, [values] * len(layouts), *options)
    with_values = got
    if not values:
        with_values = launch.quantize_chain(*arguments, [True] * len(layouts), capability)
    results, others = iter(got), iter(with_values)
    for (row, column), expected in zip(layouts, chain_reference(chain, inputs), strict=True):
        sides = [(side, dim) for side, dim in ((row, 1), (column, 0)) if side]
        quantized = [(next(results), next(results)) for _ in sides]
        if values:
            value = next(results)
        else:
            value = [next(others) for _ in range(2 * len(sides) + 1)][-1]
        cast = CHAIN_DTYPES["fp16"] if "cast_fp16" in text else value.dtype
        _assert_values(value.cpu(), expected, cast, exact=exact)
        for outputs, (side, dim) in zip(quantized, sides, strict=True):
            assert_quantized(outputs, value.cpu(), Encoding.parse(side), dim, exact=exact)
    assert next(results, None) is None


def _moved(x: torch.Tensor, device: str, strided: bool) -> torch.Tensor:
    """x on the device; `strided`: matrices as columns 3 to 3 + K of wider ones."""
    if not strided or x.dim() != 2:
        return x.to(device)
    wide = torch.full((x.shape[0], x.shape[1] + 5), float("nan"), dtype=x.dtype, device=device)
    wide[:, 3 : 3 + x.shape[1]] = x.to(device)
    return wide[:, 3 : 3 + x.shape[1]]


def _assert_values(
    value: torch.Tensor, expected: torch.Tensor, cast: torch.dtype, *, exact: bool
) -> None:
    """exp, tanh and the like are good to a few fp32 ulp, and so are quotients and sums of their
    results, relative to the largest term (taken as 1 for inputs of order 1). A rounding to the
    dtype, or to that of a `cast`, that falls on the other side of a tie is one step off, and few
    are."""
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    if exact:
        torch.testing.assert_close(value, expected, rtol=0.0, atol=0.0, equal_nan=True)
        return
    eps = torch.finfo(cast).eps
    # what follows a cast inside the chain may cancel
    least = 2.0**-18 if cast == value.dtype else 4 * eps
    value, expected = value.double(), expected.double()
    error = (value - expected).abs()
    allowed = 2 * eps * expected.abs() + least * expected.abs().clamp(min=1)
    assert torch.equal(value.isnan(), expected.isnan())
    assert bool((error <= allowed)[~expected.isnan()].all()), f"off by {error.nan_to_num().max()}"
    if cast != torch.float32 and error.numel() > 100:
        differing = error > 2.0**-18 * expected.abs().clamp(min=2.0**-9)
        assert float(differing.double().mean()) < 0.01


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
    fp8_accumulation: float = 2.0**-12,
) -> None:
    """Within the output's rounding, the epilogue's three fp32 roundings, and for fp8 the tensor
    core's fp32 accumulator (at least 13 bits kept a step), of the fp64 product."""
    a, b, a_scale, b_scale = (t.double() for t in (a, b, a_scale, b_scale))
    bias_term = 0.0 if bias is None else bias.double()
    exact = (a @ b.t()) * a_scale[:, None] * b_scale[None, :] + bias_term
    magnitude = (a.abs() @ b.abs().t()) * a_scale[:, None] * b_scale[None, :]
    magnitude = magnitude + (0.0 if bias is None else bias.double().abs())
    eps = torch.finfo(out.dtype).eps
    accumulation = 2.0**-21 if bool((a == a.round()).all()) else fp8_accumulation
    error = (out.double() - exact).abs()
    assert bool((error <= eps * exact.abs() + accumulation * magnitude + 1e-30).all())
