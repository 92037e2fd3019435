"""Every code of every format and scale format against its definition in bits, rounding to the grid,
and packing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hadagraph import codec
from hadagraph.formats import FORMATS, QUANTIZED_FORMATS, SCALE_FORMATS

PACKED = tuple(name for name in QUANTIZED_FORMATS if FORMATS[name].is_packed)
FP8 = ("fp8_e4m3", "fp8_e5m2")
# Exponent bits, mantissa bits, bias, and the first magnitude that is no number: the OCP 8-bit and
# MX specifications; written out here, not read from the table.
BITS = {
    "fp8_e4m3": (4, 3, 7, 0x7F),
    "fp8_e5m2": (5, 2, 15, 0x7C),
    "fp6_e3m2": (3, 2, 3, None),
    "fp6_e2m3": (2, 3, 1, None),
    "fp4_e2m1": (2, 1, 1, None),
    "e8m0": (8, 0, 127, 0xFF),
    "ue4m3": (4, 3, 7, 0x7F),
    "ue5m3": (5, 3, 15, 0xFF),
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def magnitude_by_bits(code: int, name: str) -> float:
    """Of an unsigned code; NaN where the format has no finite number."""
    exponent_bits, mantissa_bits, bias, first_special = BITS[name]
    if first_special is not None and code >= first_special:
        return math.nan
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    assert exponent < 1 << exponent_bits
    if name == "e8m0":
        return 2.0 ** (exponent - bias)
    if exponent == 0:
        return mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def value_by_bits(code: int, name: str) -> float:
    if name.startswith("int"):
        bits = int(name.removeprefix("int"))
        return float(code - (1 << bits) if code >> (bits - 1) else code)
    sign_bit = sum(BITS[name][:2])
    magnitude = magnitude_by_bits(code & ((1 << sign_bit) - 1), name)
    return math.copysign(magnitude, -1 if code >> sign_bit else 1)


def all_codes(name: str) -> torch.Tensor:
    """Every bit pattern, in the dtype that unpacked codes have."""
    return torch.arange(1 << FORMATS[name].bits).to(torch.uint8).view(FORMATS[name].dtype)


def numbers(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of the finite numbers within +-max, and what they stand for by their bits."""
    codes = all_codes(name)
    values = torch.tensor([value_by_bits(c, name) for c in range(codes.numel())])
    finite = values.isfinite() & (values.abs() <= FORMATS[name].max)
    return codes[finite], values[finite]


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
def test_every_code_stands_for_what_its_bits_say(name):
    codes = all_codes(name)
    got = codec.from_codes(codes, FORMATS[name])
    for code, value in enumerate(got.tolist()):
        expected = value_by_bits(code, name)
        if math.isnan(expected):
            assert not math.isfinite(value)
        else:
            assert (value, math.copysign(1, value)) == (expected, math.copysign(1, expected))


def test_known_numbers():
    assert codec.code_values(FORMATS["fp4_e2m1"])[:8].tolist() == list(E2M1)
    assert codec.code_values(FORMATS["int4"]).tolist() == [*range(8), *range(-8, 0)]
    # OCP MX specification 1.0, section 5.3: largest number, smallest normal and subnormal.
    e3m2, e2m3 = (codec.code_values(FORMATS[n]) for n in ("fp6_e3m2", "fp6_e2m3"))
    assert (e3m2[31], e3m2[4], e3m2[1]) == (28.0, 0.25, 0.0625)
    assert (e2m3[31], e2m3[8], e2m3[1]) == (7.5, 1.0, 0.125)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("int8", 255),
        ("int4", 15),
        ("fp8_e4m3", 254),
        ("fp8_e5m2", 248),
        ("fp6_e3m2", 64),
        ("fp6_e2m3", 64),
        ("fp4_e2m1", 16),
    ],
)
def test_every_number_round_trips(name, count):
    codes, values = numbers(name)
    assert codes.numel() == count
    assert values.max() == FORMATS[name].max == -values.min()
    back = codec.to_codes(codec.to_grid(values, FORMATS[name]), FORMATS[name])
    assert back.dtype == codes.dtype
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
def test_ties_go_to_the_even_code_and_others_to_the_nearest(name):
    values = numbers(name)[1].unique()
    middle = (values[1:] + values[:-1]) / 2
    codes = codec.to_codes(codec.to_grid(middle, FORMATS[name]), FORMATS[name])
    assert bool((codes.view(torch.uint8) % 2 == 0).all())
    infinity = torch.tensor(math.inf)
    for towards, expected in ((infinity, values[1:]), (-infinity, values[:-1])):
        beside = torch.nextafter(middle, towards)
        assert torch.equal(codec.to_grid(beside, FORMATS[name]), expected)


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_beyond_the_largest_number_is_clamped(name, stochastic):
    most = FORMATS[name].max
    x = torch.tensor([most * (1 + 2**-20), most * 1.5, 3e38])
    draws = torch.full((6,), 1 - 2.0**-24) if stochastic else None
    got = codec.to_grid(torch.cat([x, -x]), FORMATS[name], draws)
    assert got.tolist() == [most] * 3 + [-most] * 3
    assert bool(codec.from_codes(codec.to_codes(got, FORMATS[name]), FORMATS[name]).eq(got).all())


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_rounded_as_torch_casts(name):
    generator = torch.Generator().manual_seed(1)
    scale = torch.exp2(torch.rand(20000, generator=generator) * 36 - 20)
    x = torch.randn(20000, generator=generator) * scale
    x = x[x.abs() <= FORMATS[name].max]
    got = codec.to_codes(codec.to_grid(x, FORMATS[name]), FORMATS[name])
    assert torch.equal(got.view(torch.uint8), x.to(FORMATS[name].dtype).view(torch.uint8))


@pytest.mark.parametrize("name", PACKED)
def test_packed_formats_are_rounded_to_the_nearest_number(name):
    values = numbers(name)[1].unique().double()
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * FORMATS[name].max / 2
    got = codec.to_grid(x, FORMATS[name]).double()
    nearest = (x.double()[:, None] - values).abs().amin(1)
    assert torch.equal((got - x.double()).abs(), nearest)


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
def test_numbers_on_the_grid_stay_whatever_is_drawn(name):
    values = numbers(name)[1]
    for draw in (0.0, 0.5, 1 - 2.0**-24):
        got = codec.to_grid(values, FORMATS[name], torch.full_like(values, draw))
        assert torch.equal(got, values)


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.875])
def test_stochastic_rounding_goes_up_with_the_share_of_the_way(name, share):
    values = numbers(name)[1].unique()
    values = values[values >= 0]
    x = (values[:-1] + share * (values[1:] - values[:-1]))[:, None]
    draws = (torch.arange(64) / 64.0).expand(x.shape[0], -1)  # each equally likely
    for sign in (1, -1):
        got = codec.to_grid(sign * x.expand_as(draws), FORMATS[name], draws)
        assert torch.equal(got.double().mean(1, keepdim=True), sign * x.double())


def test_powers_of_two():
    exponents = torch.arange(-149, 128, dtype=torch.int32)
    assert codec.power_of_two(exponents).tolist() == [2.0**e for e in range(-149, 128)]


def test_signs_of_zero():
    zeros = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    for name in (n for n in QUANTIZED_FORMATS if not FORMATS[n].is_integer):
        codes = codec.to_codes(codec.to_grid(zeros, FORMATS[name]), FORMATS[name])
        sign_bit = 1 << (FORMATS[name].bits - 1)
        assert codes.view(torch.uint8).tolist() == [0, sign_bit] * 2


# -------------------------------------------------------------------------- scales

BYTES = ("e8m0", "ue4m3", "ue5m3")


@pytest.mark.parametrize("name", BYTES)
def test_every_scale_code_stands_for_what_its_bits_say(name):
    count = (codec.nan_code(SCALE_FORMATS[name])) + 1
    codes = torch.arange(count).to(torch.uint8)
    got = codec.scale_from_codes(codes, SCALE_FORMATS[name])
    expected = torch.tensor([magnitude_by_bits(c, name) for c in range(count)])
    assert torch.equal(got[:-1], expected[:-1])
    assert got[-1].isnan()
    assert expected[-1].isnan()
    assert expected[:-1].max() == SCALE_FORMATS[name].max
    assert torch.equal(codec.scale_to_codes(got, SCALE_FORMATS[name]), codes)


def test_scale_codes_are_torchs():
    codes = torch.arange(256).to(torch.uint8)
    expected = codes.view(torch.float8_e8m0fnu).float()
    got = codec.scale_from_codes(codes, SCALE_FORMATS["e8m0"])
    assert torch.equal(got[:-1], expected[:-1])
    half = codes[:127]
    expected = half.view(torch.float8_e4m3fn).float()
    assert torch.equal(codec.scale_from_codes(half, SCALE_FORMATS["ue4m3"]), expected)


def positive_scales(name: str) -> torch.Tensor:
    codes = torch.arange(codec.nan_code(SCALE_FORMATS[name])).to(torch.uint8)
    values = codec.scale_from_codes(codes, SCALE_FORMATS[name])
    return values[values > 0]


@pytest.mark.parametrize("name", BYTES)
def test_scales_on_the_grid_stay(name):
    values = positive_scales(name)
    for up in (False, True):
        assert torch.equal(codec.round_scale(values, SCALE_FORMATS[name], up=up), values)


@pytest.mark.parametrize("name", ["ue4m3", "ue5m3"])
def test_scales_are_rounded_to_nearest_even_or_up(name):
    values = positive_scales(name)
    middle = (values[1:] + values[:-1]) / 2
    nearest = codec.round_scale(middle, SCALE_FORMATS[name])
    codes = codec.scale_to_codes(nearest, SCALE_FORMATS[name])
    assert bool((codes % 2 == 0).all())
    assert bool(((nearest == values[1:]) | (nearest == values[:-1])).all())
    assert torch.equal(codec.round_scale(middle, SCALE_FORMATS[name], up=True), values[1:])
    above = torch.nextafter(values[:-1], torch.tensor(math.inf))
    assert torch.equal(codec.round_scale(above, SCALE_FORMATS[name]), values[:-1])
    assert torch.equal(codec.round_scale(above, SCALE_FORMATS[name], up=True), values[1:])


def test_e8m0_is_rounded_down_or_up():
    values = positive_scales("e8m0")[1:]  # beside 2^-127, a subnormal, is nothing to round
    for factor in (1 + 2.0**-23, 1.5, 2 - 2.0**-23):
        between = values[:-1] * factor
        down = codec.round_scale(between, SCALE_FORMATS["e8m0"])
        assert torch.equal(down, values[:-1])
        up = codec.round_scale(between, SCALE_FORMATS["e8m0"], up=True)
        assert torch.equal(up, values[1:])


@pytest.mark.parametrize("name", BYTES)
def test_scales_beyond_the_ends_and_nan(name):
    values = positive_scales(name)
    x = torch.tensor([1e-45, 3.4e38, math.nan])
    got = codec.round_scale(x, SCALE_FORMATS[name])
    assert got[:2].tolist() == [values.min(), values.max()]
    assert got[2].isnan()
    assert codec.scale_to_codes(got, SCALE_FORMATS[name])[2] == codec.nan_code(SCALE_FORMATS[name])


def test_fp32_scales_pass():
    x = torch.tensor([1e-45, 0.1, 3.4e38, math.nan])
    fp32 = SCALE_FORMATS["fp32"]
    for result in (
        codec.round_scale(x, fp32),
        codec.scale_to_codes(x, fp32),
        codec.scale_from_codes(x, fp32),
    ):
        assert result is x


# -------------------------------------------------------------------------- packing


@given(
    st.sampled_from(QUANTIZED_FORMATS),
    st.sampled_from(((), (0,), (1,), (3,), (2, 3))),
    st.sampled_from((0, 4, 8, 64, 68)),
    st.integers(0, 2**16),
)
def test_packing_is_a_string_of_bits(name, lead, count, seed):
    generator = torch.Generator().manual_seed(seed)
    bits = FORMATS[name].bits
    codes = torch.randint(0, 1 << bits, (*lead, count), generator=generator).to(torch.uint8)
    given_codes = codes.view(FORMATS[name].dtype)
    packed = codec.pack(given_codes, FORMATS[name])
    assert packed.shape == (*lead, count * bits // 8)
    assert packed.dtype == FORMATS[name].dtype
    assert packed.shape[-1] == codec.packed_size(count, FORMATS[name])
    back = codec.unpack(packed, FORMATS[name])
    assert torch.equal(back.view(torch.uint8), codes)
    rows = zip(
        packed.view(torch.uint8).reshape(math.prod(lead), count * bits // 8).tolist(),
        codes.reshape(math.prod(lead), count).tolist(),
        strict=True,
    )
    for row, expected in rows:
        string = int.from_bytes(bytes(row), "little")
        assert string == sum(code << (bits * place) for place, code in enumerate(expected))


@pytest.mark.parametrize(
    ("name", "codes", "packed"),
    [
        ("fp4_e2m1", [0x1, 0xF, 0x8, 0x0], [0xF1, 0x08]),
        ("fp6_e3m2", [0x01, 0x3F, 0x20, 0x00], [0xC1, 0x0F, 0x02]),
    ],
)
def test_the_first_code_lies_in_the_lowest_bits(name, codes, packed):
    got = codec.pack(torch.tensor(codes, dtype=torch.uint8), FORMATS[name])
    assert got.tolist() == packed
