"""Emitted kernels in Triton's interpreter against their references: no GPU needed.

The interpreter must be chosen before triton is imported, so one ordinary test runs this file again
in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from again import assert_passes_interpreted, interpreter, starts_interpreter
from kernel_checks import (
    assert_quantized,
    assert_scaled_mm,
    check_quantizers,
    integers,
    normals,
    random_codes,
)

from hadagraph.codegen import launch, tune
from hadagraph.codegen.choose import select_quantize, tma_addressable
from hadagraph.formats import Encoding

SM90 = (9, 0)
LAYOUTS = ("rows", "columns", "both")
TMA_CONFIG = next(c for c in tune.tiles_candidates(SM90) if c.write.descriptors)
COLUMNS_CONFIG = tune.columns_configuration(1 << 14, 1 << 12, SM90)
ROTATED, PLAIN = "int8/per_kept_index/h128", "int8/per_kept_index"
H32, H16 = "int8/per_kept_index/h32", "int8/per_kept_index/h16"


@pytest.mark.slow
@starts_interpreter
def test_interpreter_process():
    assert_passes_interpreted(__file__)


def check(x: torch.Tensor, text: str, layouts: str, config: object = None, **bounds: object):
    check_quantizers(x, Encoding.parse(text), layouts, "cpu", SM90, config, **bounds)


@interpreter
@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", [ROTATED, PLAIN, H32, "int8/per_tensor/h32"])
def test_dtypes(text, dtype, layouts):
    check(integers(130, 150, dtype), text, layouts, exact=True)
    if text in (ROTATED, H32):
        check(normals(40, 150, dtype), text, layouts, exact=False)


@interpreter
@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8(name, layouts):
    """The interpreter's conversion to fp8 loses the carry into the exponent when it rounds up to a
    power of two (a whole binade: 8 or 4 steps), as a few codes in a hundred do."""
    x = normals(33, 70, torch.bfloat16)
    check(x, f"{name}/per_kept_index/h16", layouts, exact=False, steps=8, fraction=0.1)


@interpreter
@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("T", [0, 1, 3, 17, 129])
@pytest.mark.parametrize("K", [1, 31])
def test_odd_shapes(T, K, layouts):
    for text in (ROTATED, H16):
        check(integers(T, K, torch.bfloat16), text, layouts, exact=True)


@interpreter
@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("text", [ROTATED, PLAIN, H32])
def test_special_values(text, layouts):
    x = integers(40, 144, torch.bfloat16)
    x[3, 7], x[30, 100], x[5] = float("nan"), float("inf"), 0
    check(x, text, layouts, exact=True)
    y = torch.zeros(32, 32, dtype=torch.bfloat16)
    # no subnormals: the interpreter's bf16 loads flush them
    y[1], y[2], y[3, 5] = 2.0**-120, 2.0**110, 2.0**-125
    check(y, text, layouts, exact=True)


@interpreter
@pytest.mark.parametrize("layouts", LAYOUTS)
def test_strides_and_signs(layouts):
    base = integers(60, 80, torch.bfloat16)
    for x in (base.t(), base.t().contiguous().t()):
        check(x, "int8/per_kept_index/h16:fixed(3)", layouts, exact=True)
        check(x, H16, layouts, exact=True)


@interpreter
@pytest.mark.parametrize("stride", [136, 0, 100, 132])
def test_where_descriptors_can_and_cannot_read(stride):
    """Whole 16 bytes apart; one row repeated; rows that overlap; rows that start anywhere."""
    base = integers(1, 6000, torch.bfloat16)[0]
    x = base.as_strided((40, 130), (stride, 1))
    moved = launch.quantize(x, *[Encoding.parse(ROTATED)] * 2, SM90, TMA_CONFIG)
    for outputs, dim in zip(moved, (1, 0), strict=True):
        assert_quantized(outputs, x, Encoding.parse(ROTATED), dim, exact=True)
    plan = select_quantize(
        40,
        130,
        x.dtype,
        *[Encoding.parse(ROTATED)] * 2,
        SM90,
        TMA_CONFIG,
        addressable=tma_addressable(stride, 130, x.dtype, True),
    )
    assert plan.write.descriptors == (stride == 136)


@interpreter
@pytest.mark.parametrize("text", [ROTATED, PLAIN])
def test_rows_read_twice(text):
    check(integers(2, 20000, torch.bfloat16), text, "rows", exact=True)


@interpreter
@pytest.mark.parametrize("index", range(len(tune.rows_candidates(SM90))))
def test_rows_configurations(index):
    config = tune.rows_candidates(SM90)[index]
    for text in (ROTATED, "int8/per_kept_index/h64", H16):
        check(integers(35, 300, torch.bfloat16), text, "rows", config, exact=True)


@interpreter
@pytest.mark.parametrize("index", range(len(tune.tiles_candidates(SM90))))
def test_tiles_configurations(index):
    config = tune.tiles_candidates(SM90)[index]
    # whole 16 bytes a row: tensor descriptors can address it, and pass its edges
    check(integers(150, 136, torch.bfloat16), ROTATED, "both", config, exact=True)


@interpreter
def test_tiles_of_tall_matrices(monkeypatch):
    """Programs walk as many tiles as keeps the grid within its limit: three here, of five."""
    monkeypatch.setattr("hadagraph.codegen.choose.SECOND_GRID_DIM", 2)
    monkeypatch.setattr(launch, "_READY", {})
    config = min(tune.tiles_candidates(SM90), key=lambda c: c.amax.tiles + c.write.tiles)
    check(integers(515, 136, torch.bfloat16), ROTATED, "both", config, exact=True)


@interpreter
@pytest.mark.parametrize("index", range(len(tune.columns_candidates(SM90))))
def test_columns_configurations(index, monkeypatch):
    """Programs that are cut off at both edges, strides that are written into the source."""
    monkeypatch.setattr("hadagraph.codegen.choose.LITERAL_ELEMENTS", 1)
    config = tune.columns_candidates(SM90)[index]
    check(integers(140, 280, torch.bfloat16)[:, 3:], H32, "columns", config, exact=True)


@interpreter
@pytest.mark.parametrize("text", [H32, H16, PLAIN])
def test_columns_without_masks(text):
    check(integers(256, 256, torch.bfloat16), text, "columns", COLUMNS_CONFIG, exact=True)


@interpreter
@pytest.mark.parametrize("capability", [SM90, (8, 9)])
@pytest.mark.parametrize("names", [("int8", "int8"), ("fp8_e4m3", "fp8_e5m2")])
@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 33, 144), (1, 1, 16), (9, 7, 40), (0, 4, 16), (5, 6, 0)])
def test_scaled_mm(shape, bias_dtype, names, capability):
    M, N, C = shape
    a, b = random_codes((M, C), names[0], 0), random_codes((N, C), names[1], 1)
    a_scale, b_scale = torch.rand(M) + 0.5, torch.rand(1) + 0.5
    bias = None if bias_dtype is None else torch.randn(N).to(bias_dtype)
    out = launch.scaled_mm(a, b, a_scale, b_scale, bias, torch.float32, capability)
    assert_scaled_mm(out, a, b, a_scale, b_scale, bias)
