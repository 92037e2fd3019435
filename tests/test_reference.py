"""The references against the numerics contract written out by hand, and at its edges: zeros, empty,
odd, huge, tiny, inf and NaN."""

from __future__ import annotations

import itertools

import by_hand
import numpy as np
import pytest
import torch
from asserts import assert_codes_bitwise, assert_sqnr
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, matrices

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, PLAIN_FORMATS, Encoding
from hadagraph.reference import (
    AMAX_FLOOR,
    INT32_CONTRACTION,
    dequantize_reference,
    quantize_reference,
    scaled_mm_reference,
)
from hadagraph.rotation import Fixed, Rotation, rotate_reference, sign_vector

ROTATIONS = (None, Rotation(16), Rotation(32, Fixed(7)), Rotation(128))
encodings = st.builds(
    Encoding,
    st.sampled_from(PLAIN_FORMATS),
    st.sampled_from((PER_TENSOR, PER_KEPT_INDEX)),
    st.sampled_from(ROTATIONS),
)
every_encoding = pytest.mark.parametrize(
    "encoding",
    [
        Encoding(name, granularity, rotation)
        for name, granularity, rotation in itertools.product(
            PLAIN_FORMATS, (PER_TENSOR, PER_KEPT_INDEX), (None, Rotation(16, Fixed(7)))
        )
    ],
    ids=str,
)
INT8 = Encoding("int8", PER_KEPT_INDEX)


def expected(x, encoding, contracted_dim):
    rotation = encoding.rotation
    signs = rotation and rotation.signs and sign_vector(rotation.signs, rotation.block).numpy()
    return by_hand.quantize(
        x if contracted_dim == 1 else x.t(),
        encoding.format,
        per_tensor=encoding.granularity == PER_TENSOR,
        block=rotation.block if rotation else None,
        signs=signs,
    )


@given(matrices(), encodings, st.integers(0, 1))
def test_codes_and_scales_are_those_of_the_contract(x, encoding, contracted_dim):
    codes, scale = quantize_reference(x, encoding, contracted_dim)
    expected_codes, expected_scale = expected(x, encoding, contracted_dim)
    assert_codes_bitwise(codes, expected_codes)
    assert codes.is_contiguous()
    assert torch.equal(scale, expected_scale)


@given(matrices(), encodings)
def test_columns_are_the_rows_of_the_transpose(x, encoding):
    codes, scale = quantize_reference(x, encoding, 0)
    transposed_codes, transposed_scale = quantize_reference(x.t(), encoding, 1)
    assert_codes_bitwise(codes, transposed_codes)
    assert torch.equal(scale, transposed_scale)


@given(st.sampled_from((1, 5, 16)), st.sampled_from((1, 20, 128, 300)), encodings, st.data())
def test_dequantized_is_the_rotated_input(rows, columns, encoding, data):
    x = torch.randn(rows, columns, dtype=torch.float64).to(data.draw(st.sampled_from(FLOATS)))
    codes, scale = quantize_reference(x, encoding, 1)
    rotated = x.double()
    if encoding.rotation:
        rotated = rotate_reference(rotated, 1, encoding.rotation)
    # Half a step of the largest code: 1/254 for int8, and half of 2^-3 or 2^-2 of each for fp8.
    back = dequantize_reference(codes, scale, torch.float64)[:, : rotated.shape[1]]
    step = {"int8": 1 / 254, "fp8_e4m3": 1 / 16, "fp8_e5m2": 1 / 8}[encoding.format]
    assert (back - rotated).abs().max() <= 1.001 * step * rotated.abs().max()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100], ids=["tiny", "huge"])
@every_encoding
def test_powers_of_two_change_scales_only(encoding, size):
    x = torch.randint(-256, 257, (7, 32)).float()
    codes, scale = quantize_reference(x, encoding, 1)
    scaled_codes, scaled_scale = quantize_reference(x * size, encoding, 1)
    assert_codes_bitwise(scaled_codes, codes)
    assert torch.equal(scaled_scale, scale * size)


@pytest.mark.parametrize("value", [1e-44, 1e-39, 2.0**-126, 2.0**-110])
def test_groups_below_the_floor_use_fewer_codes(value):
    codes, scale = quantize_reference(torch.full((1, 16), value), INT8, 1)
    assert scale.item() == np.float32(AMAX_FLOOR) / np.float32(127)
    assert set(codes.flatten().tolist()) == {round(value / AMAX_FLOOR * 127)}


def test_the_largest_magnitudes_stay_finite():
    x = torch.full((2, 16), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    codes, scale = quantize_reference(x, INT8, 1)
    assert bool((codes == 127).all()) and bool(scale.isfinite().all())


def test_a_rotation_that_overflows_fp32_is_visible():
    x = torch.full((2, 16), 3e38)
    x[1] = 1
    codes, scale = quantize_reference(x, Encoding("int8", PER_KEPT_INDEX, Rotation(16)), 1)
    assert scale.isnan().tolist() == [True, False]
    assert not bool(codes[0].any())


@every_encoding
def test_zero_groups_have_scale_one_and_codes_zero(encoding):
    x = torch.zeros(3, 20)
    codes, scale = quantize_reference(x, encoding, 1)
    assert not bool(codes.float().any())
    assert torch.equal(scale, torch.ones_like(scale))


def test_a_zero_row_beside_others():
    x = torch.zeros(3, 16)
    x[1] = 5
    codes, scale = quantize_reference(x, INT8, 1)
    assert scale.tolist() == [1.0, float(np.float32(5) / np.float32(127)), 1.0]
    assert codes.float().amax(1).tolist() == [0, 127, 0]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("contracted_dim", [0, 1])
@every_encoding
def test_inf_and_nan_stay_visible(encoding, contracted_dim, value):
    x = torch.randn(18, 33)
    x[2, 3] = value
    codes, scale = quantize_reference(x, encoding, contracted_dim)
    hit = torch.zeros_like(scale, dtype=torch.bool)
    hit[0 if encoding.granularity == PER_TENSOR else (3, 2)[contracted_dim]] = True
    assert torch.equal(scale.isnan(), hit)
    assert not bool(codes.float()[hit.expand(len(codes))].any())
    other_codes, other_scale = quantize_reference(torch.randn(4, codes.shape[1]), encoding, 1)
    out = scaled_mm_reference(codes, other_codes, scale, other_scale, None, torch.bfloat16)
    assert torch.equal(out.isnan(), hit.expand(len(codes))[:, None].expand_as(out))


@every_encoding
@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0), (1, 1), (1, 17), (17, 1)])
def test_empty_and_single_shapes(encoding, shape):
    for contracted_dim in (0, 1):
        codes, scale = quantize_reference(torch.ones(shape), encoding, contracted_dim)
        kept, contracted = shape[1 - contracted_dim], shape[contracted_dim]
        assert codes.shape == (kept, -(-contracted // 16) * 16)
        assert scale.shape == (1 if encoding.granularity == PER_TENSOR else kept,)
        assert bool(scale.isfinite().all())
        if encoding.rotation is None:
            assert not bool(codes.float()[:, contracted:].any())


def test_quantizing_leaves_the_input_alone():
    x = torch.randn(4, 16)
    before = x.clone()
    quantize_reference(x, INT8, 1)
    quantize_reference(x, INT8, 0)
    assert torch.equal(x, before)


def codes_of(values):
    return torch.as_tensor(values, dtype=torch.int8)


# Codes are padded to 16: a contraction of 1, which torch._int_mm gets wrong on a CPU, is no case.
@given(st.sampled_from((1, 3, 16)), st.sampled_from((0, 16, 48, 128)), st.booleans())
def test_scaled_mm_is_exact_integers_times_scales(rows, contracted, per_tensor):
    a = codes_of(torch.randint(-127, 128, (rows, contracted)))
    b = codes_of(torch.randint(-127, 128, (5, contracted)))
    a_scale, b_scale = torch.rand(1 if per_tensor else rows), torch.rand(5)
    out = scaled_mm_reference(a, b, a_scale, b_scale, None, torch.float32)
    assert torch.equal(out, by_hand.scaled_mm(a, b, a_scale, b_scale))


def test_int8_sums_are_exact_beyond_2_to_the_24():
    a = codes_of([[127] * 2000 + [1]])
    b = codes_of([[127] * 2000 + [1], [127] * 2000 + [3]])
    one = torch.ones(1)
    exact = 127 * 127 * 2000
    out = scaled_mm_reference(a, b, one, torch.ones(2), None, torch.float32)
    # An fp32 accumulator would lose the last product; exact sums are rounded once.
    assert out.tolist() == [[float(np.float32(exact + 1)), float(np.float32(exact + 3))]]
    assert out[0, 0] != out[0, 1]


@pytest.mark.parametrize("extra", [0, 16, INT32_CONTRACTION])
def test_contractions_past_int32_are_split(extra):
    contracted = INT32_CONTRACTION + extra
    a = codes_of([[127] * contracted, [-127] * contracted])
    one = torch.ones(2)
    out = scaled_mm_reference(a, a[:1], one, one[:1], None, torch.float32)
    exact = 127.0 * 127.0 * contracted
    # One fp32 rounding a part and one a sum.
    torch.testing.assert_close(out, torch.tensor([[exact], [-exact]]), rtol=3 * 2.0**-24, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_is_added_in_fp32_and_the_sum_rounded_once(dtype):
    a, b = codes_of([[100] * 16]), codes_of([[100] * 16, [1] * 16])
    scale, bias = torch.tensor([0.01]), torch.tensor([1.0 / 3, -100.0]).to(dtype)
    out = scaled_mm_reference(a, b, scale, scale, bias, dtype)
    products = torch.tensor([[160000.0, 1600.0]]) * scale * scale
    assert out.dtype == dtype
    assert torch.equal(out, (products + bias.float()).to(dtype))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_products_are_summed_in_fp32(name):
    x, w = torch.randn(8, 64), torch.randn(16, 64)
    a, a_scale = quantize_reference(x, Encoding(name, PER_KEPT_INDEX), 1)
    b, b_scale = quantize_reference(w, Encoding("fp8_e4m3", PER_TENSOR), 1)
    out = scaled_mm_reference(a, b, a_scale, b_scale, None, torch.float32)
    wide = dequantize_reference(a, a_scale, torch.float64) @ (
        dequantize_reference(b, b_scale, torch.float64).t()
    )
    assert_sqnr(out, wide, 120)  # fp32 sums of 64 terms


def test_rotation_makes_outliers_harmless():
    torch.manual_seed(0)
    x, w = torch.randn(64, 256), torch.randn(48, 256)
    x[:, 7] *= 100
    exact = x.double() @ w.double().t()

    def product(rotation):
        encoding = Encoding("int8", PER_KEPT_INDEX, rotation)
        (a, a_scale), (b, b_scale) = (quantize_reference(m, encoding, 1) for m in (x, w))
        return scaled_mm_reference(a, b, a_scale, b_scale, None, torch.float32)

    # int8 with a crest factor of about 3.5: 20 log10(127 sqrt(12) / 3.5), less 3 for two operands.
    assert_sqnr(product(Rotation(128)), exact, 35)
    with pytest.raises(AssertionError, match="SQNR"):
        assert_sqnr(product(None), exact, 35)
