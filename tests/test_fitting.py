"""Fitting a profile: rates are found again from the times that they predict, few points change
nothing, a disturbed one does not pull."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hadagraph.cost import gemm_us, quantizer_us
from hadagraph.device import CHIPS
from hadagraph.fitting import GemmPoint, QuantizerPoint, fit

H200 = CHIPS["H200"]
SHAPES = (
    (8192, 4096, 4096),
    (4096, 576, 576),
    (2048, 2048, 2048),
    (576, 1536, 4096),
    (512, 4096, 4096),
    (1024, 1024, 8192),
    (8192, 1536, 1536),
)
MATRICES = ((16384, 4096), (4096, 576), (2048, 512), (8192, 1536), (2048, 128))


def test_gemm_rates_are_found_again():
    rate = replace(H200.gemm("int8"), tflops=1000.0, ramp=200.0, fixed_us=8.0, sustained=math.inf)
    truth = replace(H200, gemms=(rate,))
    points = [GemmPoint("int8", *s, us=gemm_us(truth, *s, "int8")) for s in SHAPES]
    fitted = fit(H200, points, [])
    for M, N, C in SHAPES:
        burst = replace(fitted, gemms=(replace(fitted.gemm("int8"), sustained=math.inf),))
        want = gemm_us(truth, M, N, C, "int8")
        assert gemm_us(burst, M, N, C, "int8") == pytest.approx(want, rel=0.1)
    assert fitted.gemm("bf16") == H200.gemm("bf16")
    assert fitted.gemm("int8").sustained == H200.gemm("int8").sustained


@pytest.mark.parametrize("steady", [True, False])
def test_the_power_limit_is_found_where_it_is_in_the_points(steady):
    prior = H200.gemm("bf16").sustained
    rate = replace(H200.gemm("bf16"), sustained=500.0)
    truth = replace(H200, gemms=(rate,))
    points = [GemmPoint("bf16", *s, us=gemm_us(truth, *s, "bf16")) for s in SHAPES]
    fitted = fit(H200, points, [], steady=steady).gemm("bf16")
    assert fitted.sustained == pytest.approx(500.0 if steady else prior, rel=0.03)


def quantizer_points(share, fixed_us):
    rates = (replace(H200.quantizer("rows", "rotated"), share=share, fixed_us=fixed_us),)
    truth = replace(H200, quantizers=rates)
    return [
        QuantizerPoint("rows", "rotated", T, K, quantizer_us(truth, T, K, "rows", "rotated"))
        for T, K in MATRICES
    ]


def test_a_quantizers_line_is_found_again_whatever_disturbs_one_point():
    points = quantizer_points(0.5, 6.0)
    points[1] = replace(points[1], us=10 * points[1].us)
    rate = fit(H200, [], points).quantizer("rows", "rotated")
    assert rate.share == pytest.approx(0.5, rel=0.02)
    assert rate.fixed_us == pytest.approx(6.0, rel=0.05)


def test_no_quantizer_is_faster_than_a_copy():
    points = [replace(point, us=0.5 * point.us) for point in quantizer_points(1.0, 2.0)]
    assert fit(H200, [], points).quantizer("rows", "rotated").share == 1.0


def test_few_points_change_nothing():
    points = [GemmPoint("int8", *s, us=1.0) for s in SHAPES[:2]]
    assert fit(H200, points, quantizer_points(0.5, 6.0)[:2]) == H200
