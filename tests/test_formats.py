"""Formats, granularities and encodings: the tables, every code of the plain formats through the
8-bit quantizer, text round trips, refusals. Codes of every format: tests/test_codec.py."""

from __future__ import annotations

import pytest
import torch
from asserts import assert_codes_bitwise
from hypothesis import given, settings
from hypothesis import strategies as st

from hadagraph.formats import (
    FITS,
    FORMATS,
    PER_KEPT_INDEX,
    PER_TENSOR,
    PLAIN_FORMATS,
    QUANTIZED_FORMATS,
    ROUNDINGS,
    SCALE_FORMATS,
    Encoding,
    Granularity,
    format_named,
)
from hadagraph.reference import dequantize_reference, quantize_reference
from hadagraph.rotation import Fixed, PerStep, Rotation


def every_code(name: str) -> torch.Tensor:
    """All finite codes of a plain format within +-max, as [1, n]."""
    fmt = FORMATS[name]
    codes = torch.arange(256).to(torch.uint8).view(fmt.dtype)
    values = codes.float()
    return codes[values.isfinite() & (values.abs() <= fmt.max)][None]


@pytest.mark.parametrize("name", PLAIN_FORMATS)
def test_every_code_round_trips(name):
    codes = every_code(name)
    # Scaled by its own maximum, each value is exactly a code again.
    got, scale = quantize_reference(codes.float(), Encoding(name, PER_KEPT_INDEX), 1)
    assert torch.equal(scale, torch.ones(1))
    assert_codes_bitwise(got[:, : codes.shape[1]], codes)
    assert torch.equal(dequantize_reference(got, scale)[:, : codes.shape[1]], codes.float())


@pytest.mark.parametrize(("name", "count"), [("int8", 255), ("fp8_e4m3", 254), ("fp8_e5m2", 248)])
def test_max_is_the_largest_finite_code(name, count):
    codes = every_code(name)
    assert codes.numel() == count
    assert codes.float().max() == FORMATS[name].max == -codes.float().min()


@pytest.mark.parametrize("name", PLAIN_FORMATS)
def test_halfway_between_two_codes_rounds_to_even(name):
    values = every_code(name).double().unique()
    middle = (values[1:] + values[:-1]) / 2
    # The group's maximum makes the scale 1, so that fp32 holds every midpoint exactly.
    x = torch.cat([middle, values[-1:]]).float()[None]
    got, _ = quantize_reference(x, Encoding(name, PER_KEPT_INDEX), 1)
    even = got[0, : middle.numel()].view(torch.uint8) % 2 == 0
    assert bool(even.all())


def test_the_table_matches_torch():
    for name in ("fp8_e4m3", "fp8_e5m2"):
        assert FORMATS[name].max == torch.finfo(FORMATS[name].dtype).max
        info = torch.finfo(FORMATS[name].dtype)
        assert 2.0 ** FORMATS[name].least_exponent == info.smallest_normal
        assert 2.0 ** -FORMATS[name].mantissa_bits == info.eps
    assert FORMATS["bf16"].max == torch.finfo(torch.bfloat16).max
    for name, row in FORMATS.items():
        assert row.name == name
        stored = torch.uint8 if row.is_packed else row.dtype
        assert row.dtype == stored
        assert row.is_packed or row.bits == 8 * row.dtype.itemsize
        assert row.is_integer == (row.accumulate == torch.int32)
        if not row.is_integer:
            assert row.bits == 1 + row.exponent_bits + row.mantissa_bits
    for name, scale in SCALE_FORMATS.items():
        assert scale.name == name
    assert SCALE_FORMATS["fp32"].max == torch.finfo(torch.float32).max
    assert SCALE_FORMATS["ue4m3"].max == torch.finfo(torch.float8_e4m3fn).max
    assert SCALE_FORMATS["e8m0"].max == torch.finfo(torch.float8_e8m0fnu).max


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"format must be one of bf16, int8, .* got 'int3'"):
        format_named("int3")


@pytest.mark.parametrize(
    "granularity",
    [PER_TENSOR, PER_KEPT_INDEX, Granularity("block_contracted", 128), Granularity("block_2d", 32)],
)
def test_granularity_text_round_trip(granularity):
    assert Granularity.parse(str(granularity)) == granularity


@pytest.mark.parametrize(
    "text", ["", "row", "per_tensor(16)", "block_2d", "block_2d()", "per-tensor"]
)
def test_other_granularities_are_refused(text):
    with pytest.raises(ValueError, match="granularity"):
        Granularity.parse(text)


def allowed(**fields) -> Encoding | None:
    try:
        return Encoding(**fields)
    except ValueError:
        return None


ENCODINGS = st.builds(
    allowed,
    format=st.sampled_from(QUANTIZED_FORMATS),
    granularity=st.sampled_from(
        (
            PER_TENSOR,
            PER_KEPT_INDEX,
            Granularity("block_contracted", 32),
            Granularity("block_2d", 2),
        )
    ),
    rotation=st.sampled_from(
        (None, Rotation(128), Rotation(16, Fixed(3)), Rotation(64, PerStep("a.b")))
    ),
    scale=st.sampled_from(tuple(SCALE_FORMATS)),
    rounding=st.sampled_from(ROUNDINGS),
    fit=st.sampled_from(FITS),
    prescale=st.booleans(),
    tokens_kept=st.sampled_from((None, (1, 2), (8, 16), (16, 16))),
).filter(lambda encoding: encoding is not None)


@settings(max_examples=200)
@given(ENCODINGS)
def test_encoding_text_round_trip(encoding):
    assert Encoding.parse(str(encoding)) == encoding


@pytest.mark.parametrize(
    "text",
    [
        "int8/per_tensor",
        "int8/per_kept_index/h16:fixed(3)",
        "fp4_e2m1/block_contracted(32)/h32/e8m0/stochastic/three_quarters",
        "fp4_e2m1/block_2d(16)/ue4m3/prescale",
        "fp4_e2m1/block_contracted(16)/ue4m3/four_six/prescale",
        "int4/per_tensor/keep8of16",
    ],
)
def test_encoding_texts_stay_as_they_are(text):
    assert str(Encoding.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8", "encoding must read"),
        ("int8/per_tensor/h16/x", "rotation must read"),
        ("bf16/per_tensor", "format of an encoding must be one of int8"),
        ("int3/per_tensor", "format of an encoding must be one of int8"),
        ("int8/block_2d(15)", "must be a power of two, got 15"),
        ("int8/block_2d(1)", "must be a power of two, got 1"),
        ("int8/per_tensor/16", "rotation must read"),
        ("int8/per_tensor/e8m0", "scale format e8m0 is for block granularities, got per_tensor"),
        ("int8/per_kept_index/ue4m3", "scale format ue4m3 is for block granularities"),
        ("int8/block_2d(16)/prescale", "prescale is for scales of few exponents, got .* fp32"),
        ("fp4_e2m1/block_2d(16)/ceil", "fit ceil is for scales of few exponents"),
        ("fp4_e2m1/per_tensor/three_quarters", "fit three_quarters is for scales of few"),
        ("fp8_e4m3/block_2d(16)/mse", "fit mse is for formats whose error .* got fp8_e4m3"),
        ("fp8_e5m2/per_tensor/mse", "fit mse is for formats whose error .* got fp8_e5m2"),
        ("int4/block_2d(16)/ue4m3/four_six", "fit four_six is for fp4_e2m1, got int4"),
        ("fp4_e2m1/block_2d(16)/four_six", "four_six is for the scale formats .* got fp32"),
        ("fp4_e2m1/block_2d(16)/e8m0/four_six", "four_six is for the scale formats .* got e8m0"),
        ("int8/per_tensor/keep0of16", "tokens_kept must be .* got \\(0, 16\\)"),
        ("int8/per_tensor/keep17of16", "tokens_kept must be .* got \\(17, 16\\)"),
        ("int8/per_tensor/keep1of12", "tokens_kept must be .* got \\(1, 12\\)"),
        ("int8/per_tensor/h16/keep8of16", "tokens_kept projects, and allows no rotation"),
        ("int8/per_tensor/nearest/stochastic", "says its rounding twice"),
        ("int8/block_2d(16)/e8m0/fp32", "says its scale twice"),
        ("int8/per_tensor/h16/h32", "says its rotation twice"),
    ],
)
def test_other_encodings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Encoding.parse(text)


@pytest.mark.parametrize(
    ("text", "plain", "seeded"),
    [
        ("int8/per_tensor/h16", True, False),
        ("fp8_e5m2/per_kept_index", True, False),
        ("int8/per_tensor/h16:fixed(1)", True, False),
        ("int8/per_tensor/h16:per_step(a)", False, True),
        ("int8/per_tensor/stochastic", False, True),
        ("int8/block_contracted(128)", False, False),
        ("int8/per_tensor/keep8of16", False, False),
        ("int8/per_tensor/mse", False, False),
        ("int4/per_tensor", False, False),
        ("fp6_e2m3/per_tensor", False, False),
    ],
)
def test_what_the_8_bit_kernels_take_and_what_draws(text, plain, seeded):
    encoding = Encoding.parse(text)
    assert (encoding.is_plain, encoding.needs_seed) == (plain, seeded)


@pytest.mark.parametrize(("rotation", "multiple"), [(None, 16), (2, 16), (16, 16), (128, 128)])
def test_the_contracted_dim_is_padded_to_block_and_16_bytes(rotation, multiple):
    made = Rotation(rotation) if rotation else None
    assert Encoding("int8", PER_TENSOR, made).contracted_multiple == multiple


@pytest.mark.parametrize(
    ("text", "size", "transformed", "codes"),
    [
        ("int4/per_tensor", 1, 1, 64),
        ("int4/per_tensor/h128", 129, 256, 256),
        ("fp8_e4m3/block_contracted(32)/e8m0", 33, 33, 64),
        ("fp8_e4m3/block_2d(128)", 0, 0, 0),
        ("int8/per_tensor/keep8of16", 17, 16, 16),
        ("int8/per_tensor/keep3of16", 33, 9, 16),
        ("int4/per_tensor/keep8of16", 160, 80, 128),
    ],
)
def test_sizes_of_the_contracted_dim(text, size, transformed, codes):
    encoding = Encoding.parse(text)
    assert encoding.transformed_size(size) == transformed
    assert encoding.contracted_size(size) == codes
