"""Formats, granularities and encodings: every code of every format, text round trips, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from asserts import assert_codes_bitwise

from hadagraph.formats import (
    FORMATS,
    PER_KEPT_INDEX,
    PER_TENSOR,
    QUANTIZED_FORMATS,
    Encoding,
    Granularity,
    format_named,
)
from hadagraph.reference import dequantize_reference, quantize_reference
from hadagraph.rotation import Fixed, PerStep, Rotation


def every_code(name: str) -> torch.Tensor:
    """All finite codes of a format within +-max, as [1, n]."""
    fmt = FORMATS[name]
    codes = torch.arange(256).to(torch.uint8).view(fmt.dtype)
    values = codes.float()
    return codes[values.isfinite() & (values.abs() <= fmt.max)][None]


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
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


@pytest.mark.parametrize("name", QUANTIZED_FORMATS)
def test_halfway_between_two_codes_rounds_to_even(name):
    values = every_code(name).double().unique()
    middle = (values[1:] + values[:-1]) / 2
    # The group's maximum makes the scale 1, so that fp32 holds every midpoint exactly.
    x = torch.cat([middle, values[-1:]]).float()[None]
    got, _ = quantize_reference(x, Encoding(name, PER_KEPT_INDEX), 1)
    even = got[0, : middle.numel()].view(torch.uint8) % 2 == 0
    assert bool(even.all())


def test_the_table_matches_torch():
    assert FORMATS["bf16"].max == torch.finfo(torch.bfloat16).max
    for name in ("fp8_e4m3", "fp8_e5m2"):
        assert FORMATS[name].max == torch.finfo(FORMATS[name].dtype).max
    for name, row in FORMATS.items():
        assert row.name == name
        assert row.bits == 8 * row.dtype.itemsize
        assert row.is_integer == (row.accumulate == torch.int32)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"format must be one of bf16, int8, .* got 'int4'"):
        format_named("int4")


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


def test_encoding_text_round_trip():
    rotations = (None, Rotation(128), Rotation(16, Fixed(3)), Rotation(64, PerStep("a.b")))
    for name, granularity, rotation in itertools.product(
        QUANTIZED_FORMATS, (PER_TENSOR, PER_KEPT_INDEX), rotations
    ):
        encoding = Encoding(name, granularity, rotation)
        assert Encoding.parse(str(encoding)) == encoding


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8", "encoding must read"),
        ("int8/per_tensor/h16/x", "encoding must read"),
        ("bf16/per_tensor", "format of an encoding must be one of int8"),
        ("int4/per_tensor", "format of an encoding must be one of int8"),
        ("int8/block_2d(16)", "must be per_tensor or per_kept_index, got block_2d"),
        ("int8/per_tensor/16", "rotation must read"),
    ],
)
def test_other_encodings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Encoding.parse(text)


@pytest.mark.parametrize(("rotation", "multiple"), [(None, 16), (2, 16), (16, 16), (128, 128)])
def test_the_contracted_dim_is_padded_to_block_and_16_bytes(rotation, multiple):
    made = Rotation(rotation) if rotation else None
    assert Encoding("int8", PER_TENSOR, made).contracted_multiple == multiple
