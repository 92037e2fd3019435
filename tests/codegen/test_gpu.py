"""Emitted kernels on a GPU against their references, for every configuration of the tables."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import (
    CHAINS,
    assert_quantized,
    assert_scaled_mm,
    chain_inputs,
    check_chain,
    check_quantizers,
    integers,
    normals,
    random_codes,
)

from hadagraph import ops
from hadagraph.codegen import launch, tune
from hadagraph.codegen.choose_chains import ChainSchedule
from hadagraph.formats import FORMATS, Encoding
from hadagraph.rotation import Fixed, Rotation

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_allocations")]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
FP8 = FORMATS["fp8_e4m3"].min_capability <= CAPABILITY
NAMES = ["int8", "fp8_e4m3", "fp8_e5m2"] if FP8 else ["int8"]
MAIN = ["int8/per_kept_index/h128", "int8/per_kept_index"]
MAIN += ["fp8_e4m3/per_kept_index", "fp8_e4m3/per_kept_index/h64"] if FP8 else []
# Columns of these are rotated by butterflies.
BY_BUTTERFLIES = ["int8/per_kept_index/h32", "int8/per_kept_index/h16", "int8/per_kept_index"]
BY_BUTTERFLIES += ["fp8_e4m3/per_kept_index/h32", "fp8_e5m2/per_kept_index"] if FP8 else []
LAYOUTS = ("rows", "columns", "both")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(x: torch.Tensor, text: str, layouts: str, config: object = None, **bounds: object):
    check_quantizers(x, Encoding.parse(text), layouts, "cuda", CAPABILITY, config, **bounds)


@pytest.mark.parametrize("text", MAIN)
@pytest.mark.parametrize("index", range(len(tune.rows_candidates(CAPABILITY))))
def test_rows_bitwise_for_every_configuration(index, text):
    config = tune.rows_candidates(CAPABILITY)[index]
    check(integers(1000, 576, torch.bfloat16), text, "rows", config, exact=True)
    check(integers(256, 4096, torch.bfloat16, 1), text, "rows", config, exact=True)


@pytest.mark.parametrize("index", range(len(tune.rows_candidates(CAPABILITY))))
def test_long_rows_for_every_configuration(index):
    config = tune.rows_candidates(CAPABILITY)[index]
    check(integers(300, 14336, torch.bfloat16), MAIN[0], "rows", config, exact=True)


@pytest.mark.parametrize("index", range(len(tune.rows_candidates(CAPABILITY))))
def test_rows_of_every_block_and_width(index):
    config = tune.rows_candidates(CAPABILITY)[index]
    for block in (16, 32, 64, 128):
        text = f"int8/per_kept_index/h{block}"
        for shape in ((37, 2048), (129, 200), (65, 203), (8, 8192)):
            check(integers(*shape, torch.bfloat16), text, "rows", config, exact=True)
    for dtype in DTYPES:
        check(integers(64, 4096, dtype), MAIN[0], "rows", config, exact=True)
        check(normals(256, 4096, dtype), MAIN[0], "rows", config, exact=False)


@pytest.mark.parametrize("text", BY_BUTTERFLIES)
@pytest.mark.parametrize("index", range(len(tune.columns_candidates(CAPABILITY))))
def test_columns_bitwise_for_every_configuration(index, text, monkeypatch):
    config = tune.columns_candidates(CAPABILITY)[index]
    for least in (1, 1 << 40):  # strides in the source, and not
        monkeypatch.setattr("hadagraph.codegen.choose.LITERAL_ELEMENTS", least)
        launch._READY.clear()
        for T, K in ((1024, 512), (515, 200), (260, 203), (48, 1000)):
            check(integers(T, K, torch.bfloat16), text, "columns", config, exact=True)
    launch._READY.clear()


@pytest.mark.parametrize("text", BY_BUTTERFLIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_by_butterflies(dtype, text):
    check(integers(4100, 2056, dtype), text, "columns", exact=True)
    check(normals(2048, 4096, dtype), text, "columns", exact=False)
    x = integers(4100, 2056, dtype)
    x[3, 7], x[50, 100], x[4099, 2055] = float("nan"), float("inf"), -float("inf")
    x[:, 5] = 0
    check(x, text, "columns", exact=True)


@pytest.mark.parametrize("text", MAIN)
@pytest.mark.parametrize("index", range(len(tune.tiles_candidates(CAPABILITY))))
def test_tiles_bitwise_for_every_configuration(index, text):
    config = tune.tiles_candidates(CAPABILITY)[index]
    check(integers(1024, 512, torch.bfloat16), text, "both", config, exact=True)
    check(integers(515, 200, torch.bfloat16, 1), text, "columns", config, exact=True)
    check(integers(515, 200, torch.bfloat16, 2), text, "both", config, exact=True)
    check(integers(260, 203, torch.bfloat16, 3), text, "both", config, exact=True)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["int8/per_kept_index/h128", "int8/per_tensor/h32"])
def test_input_dtypes_and_random_data(dtype, text, layouts):
    check(integers(130, 300, dtype), text, layouts, exact=True)
    check(normals(512, 1024, dtype), text, layouts, exact=False)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("granularity", ["per_kept_index", "per_tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_formats(name, granularity, layouts):
    check(integers(65, 144, torch.bfloat16), f"{name}/{granularity}", layouts, exact=True)
    check(normals(256, 512, torch.bfloat16), f"{name}/{granularity}/h16", layouts, exact=False)


@pytest.mark.parametrize("T", [0, 1, 3, 17, 129])
@pytest.mark.parametrize("K", [1, 31, 256])
def test_odd_shapes(T, K):
    for layouts in LAYOUTS:
        check(integers(T, K, torch.bfloat16), MAIN[0], layouts, exact=True)


def test_rows_too_long_for_one_tile():
    check(integers(5, 20000, torch.bfloat16), MAIN[0], "rows", exact=True)
    check(integers(4, 32768, torch.bfloat16), MAIN[1], "rows", exact=True)


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_strides(layouts):
    base = integers(300, 400, torch.bfloat16)
    for x in (
        base.t(),
        base[::2],
        base[:, 3:200],
        base[:, ::3],
        base[:1].expand(40, 400),
        base[:, 8:200],
    ):
        moved = base.cuda().as_strided(x.size(), x.stride(), x.storage_offset())
        assert moved.stride() == x.stride()
        encoding = Encoding.parse(MAIN[0])
        rows = encoding if layouts != "columns" else None
        columns = encoding if layouts != "rows" else None
        got = launch.quantize(moved, rows, columns, CAPABILITY)
        for outputs, dim in zip(got, (1, 0), strict=True):
            if outputs is not None:
                assert_quantized(outputs, x, encoding, dim, exact=True)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("text", MAIN)
def test_non_finite_groups_are_nan_and_others_untouched(text, layouts):
    x = integers(150, 272, torch.bfloat16)
    x[3, 7], x[50, 100], x[149, 271] = float("nan"), float("inf"), -float("inf")
    check(x, text, layouts, exact=True)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("text", MAIN)
def test_zero_tiny_and_huge_groups(text, layouts):
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    check(x, text, layouts, exact=True)
    x[1], x[2], x[3, 5] = 2.0**-120, 2.0**110, 2.0**-130
    check(x, text, layouts, exact=True)


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_signed_rotation(layouts):
    encoding = Encoding.parse("int8/per_kept_index/h64:fixed(5)")
    assert encoding.rotation == Rotation(64, Fixed(5))
    check(integers(70, 130, torch.bfloat16), str(encoding), layouts, exact=True)


def run_mm(
    M, N, C, names, bias_dtype=None, out_dtype=torch.bfloat16, config=None, per_tensor=(), size=1.0
):
    a, b = random_codes((M, C), names[0], 0), random_codes((N, C), names[1], 1)
    a_scale = (torch.rand(1 if 0 in per_tensor else M) + 0.5) * size
    b_scale = torch.rand(1 if 1 in per_tensor else N) + 0.5
    bias = None if bias_dtype is None else torch.randn(N).to(bias_dtype)
    on_device = [t.cuda() for t in (a, b, a_scale, b_scale)]
    device_bias = None if bias is None else bias.cuda()
    out = launch.scaled_mm(*on_device, device_bias, out_dtype, CAPABILITY, config)
    assert_scaled_mm(out, *on_device, device_bias)


@pytest.mark.parametrize("names", [("int8", "int8"), *([("fp8_e4m3", "fp8_e4m3")] if FP8 else [])])
@pytest.mark.parametrize("index", range(len(tune.scaled_mm_candidates(CAPABILITY))))
def test_scaled_mm_every_configuration(index, names):
    config = tune.scaled_mm_candidates(CAPABILITY)[index]
    run_mm(512, 768, 1024, names, config=config)
    run_mm(301, 203, 208, names, torch.bfloat16, config=config)


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 17, 48), (129, 300, 592), (0, 5, 16), (5, 7, 0)])
def test_scaled_mm_shapes(shape):
    run_mm(*shape, ("int8", "int8"), torch.float32, torch.float32)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_scaled_mm_dtypes(out_dtype, bias_dtype):
    # sums of 256 products reach 10^6: scaled to stay below fp16's 65504
    names, size = ("int8", "int8"), 2.0**-8
    run_mm(128, 64, 256, names, bias_dtype, out_dtype, per_tensor=(1,), size=size)


@pytest.mark.skipif(not FP8, reason="needs fp8 matrix instructions")
@pytest.mark.parametrize("names", [("fp8_e5m2", "fp8_e4m3"), ("fp8_e4m3", "fp8_e5m2")])
def test_scaled_mm_mixed_fp8(names):
    config = next(c for c in tune.scaled_mm_candidates(CAPABILITY) if c.schedule is None)
    run_mm(256, 128, 512, names, per_tensor=(0, 1), config=config)


def test_scaled_mm_long_contractions():
    """All-maximal int8 codes overflow an int32 accumulator without the split."""
    C = (1 << 17) + 8192
    a = torch.full((16, C), 127, dtype=torch.int8, device="cuda")
    one = torch.ones(16, device="cuda")
    out = launch.scaled_mm(a, a, one, one, None, torch.float32, CAPABILITY)
    assert torch.allclose(out, torch.full_like(out, 127.0 * 127.0 * C), rtol=2**-22)
    if FP8:
        run_mm(64, 64, 20000 // 16 * 16, ("fp8_e4m3", "fp8_e4m3"), out_dtype=torch.float32)


def test_nan_scale_makes_its_outputs_nan():
    a = torch.ones(32, 64, dtype=torch.int8, device="cuda")
    scale = torch.ones(32, device="cuda")
    poisoned = scale.clone()
    poisoned[5] = float("nan")
    out = ops.scaled_mm(a, a, poisoned, scale, None, torch.bfloat16)
    assert out[5].isnan().all()
    assert int(out.isnan().sum()) == 32


def every_operator(x: torch.Tensor) -> list[torch.Tensor]:
    text = MAIN[0]
    rows, row_scale = ops.quantize_rows(x, text)
    columns, column_scale = ops.quantize_columns(x, text)
    both = ops.quantize_both(x, text, "int8/per_tensor")
    y = ops.scaled_mm(rows, rows, row_scale, row_scale, None, torch.bfloat16)
    z = ops.scaled_mm(columns, columns, column_scale, column_scale, None, torch.bfloat16)
    return [rows, row_scale, columns, column_scale, *both, y, z]


def test_no_host_sync():
    launch.prepare("cuda")
    x = integers(256, 384, torch.bfloat16).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_operator(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_on_new_input():
    launch.prepare("cuda")
    x = integers(256, 384, torch.bfloat16).cuda()
    every_operator(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every_operator(x)
    for seed in (1, 2):
        x.copy_(integers(256, 384, torch.bfloat16, seed))
        graph.replay()
        for got, expected in zip(captured, every_operator(x.clone()), strict=True):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_concurrent_streams():
    inputs = [integers(512, 512, torch.bfloat16, seed).cuda() for seed in range(4)]
    expected = [every_operator(x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(3):
        got = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(every_operator(x))
        torch.cuda.synchronize()
        for one, other in zip(got, expected, strict=True):
            for tensor, wanted in zip(one, other, strict=True):
                assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8))


H128, H32 = "int8/per_kept_index/h128", "int8/per_kept_index/h32"
RECIPES = {
    "int8_rotated": (H128, H32),
    "int8_one_rotation": (H128, H128),
    "int8_plain": ("int8/per_kept_index", "int8/per_tensor"),
    "signed": ("int8/per_kept_index/h64:fixed(5)", "int8/per_tensor/h16:fixed(7)"),
}
if FP8:
    RECIPES["fp8_rowwise"] = ("fp8_e4m3/per_kept_index",) * 2
    RECIPES["fp8_tensorwise"] = ("fp8_e5m2/per_tensor", "fp8_e4m3/per_tensor")
    RECIPES["fp8_rotated"] = ("fp8_e4m3/per_kept_index/h64", "fp8_e5m2/per_kept_index/h32")


def of_layouts(recipe: str, layouts: str) -> list[tuple[str, str]]:
    row, column = RECIPES[recipe]
    return [("" if layouts == "columns" else row, "" if layouts == "rows" else column)]


def run_chain(name: str, T: int, K: int, layouts: list[tuple[str, str]], **options: object):
    check_chain(name, T, K, layouts, "cuda", CAPABILITY, **options)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name, layouts):
    run_chain(name, 300, 520, of_layouts("int8_rotated", layouts))
    run_chain(name, 131, 203, of_layouts("int8_rotated", layouts), strided=True, values=False)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["two_dtypes", "silu_mul_backward"])
def test_chain_recipes(name, recipe, layouts):
    run_chain(name, 131, 203, of_layouts(recipe, layouts), values=False)


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("T", [0, 1, 17, 129])
@pytest.mark.parametrize("K", [1, 31, 256])
def test_chains_of_odd_shapes(T, K, layouts):
    run_chain("relu_scaled", T, K, of_layouts("int8_rotated", layouts))
    if T == 17:
        run_chain("offset", T, K, of_layouts("int8_rotated", layouts))


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    ["add", "silu_mul", "silu_mul_backward", "silu_mul_three", "silu_mul_three_by_exp", "rms_norm"],
)
def test_large_chains(name, layouts):
    run_chain(name, 2048, 4096, of_layouts("int8_rotated", layouts), values=False)
    run_chain(name, 2085, 4104, of_layouts("int8_rotated", layouts), values=False)


@pytest.mark.parametrize("name", ["add", "silu_mul"])
def test_chains_of_long_rows(name):
    for K in (14336, 20000):
        for values in (True, False):
            run_chain(name, 70, K, [(H128, "")], values=values)
    run_chain(name, 5, 20000, [(MAIN[1], "")], values=False)


@pytest.mark.parametrize("index", range(len(tune.columns_candidates(CAPABILITY))))
def test_chain_columns_for_every_configuration(index, monkeypatch):
    config = tune.columns_candidates(CAPABILITY)[index]
    for least in (1, 1 << 40):
        monkeypatch.setattr("hadagraph.codegen.choose.LITERAL_ELEMENTS", least)
        launch._READY.clear()
        for pair in [(H128, H32), ("", H32), (MAIN[1], MAIN[1])]:
            run_chain("two_dtypes", 515, 200, [pair], config=config)
        run_chain("silu_mul_backward", 512, 512, [(H128, H32)], config=config)
        run_chain("rms_norm", 300, 520, [("", H32)], config=config, strided=True, values=False)
    launch._READY.clear()


@pytest.mark.parametrize("index", range(len(tune.chain_rows_candidates(CAPABILITY))))
def test_chain_rows_for_every_configuration(index):
    config = tune.chain_rows_candidates(CAPABILITY)[index]
    for T, K in ((1000, 576), (256, 4096), (70, 14336)):
        run_chain("add", T, K, [(H128, "")], config=config)
    run_chain("rms_norm", 256, 4096, [(MAIN[1], "")], config=config)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_chain_schedules(stored, values):
    schedule = ChainSchedule(stored)
    for name in ("add", "silu_mul", "silu_mul_backward"):
        run_chain(name, 300, 520, [(H128, H32)], values=values, schedule=schedule)
        run_chain(name, 300, 520, [(H128, "")], values=values, schedule=schedule)
    layouts = [(H128, H128), ("int8/per_tensor/h16", "int8/per_tensor")]
    run_chain("two_dtypes", 300, 520, layouts, values=values, schedule=schedule)
    layouts = [(H128, ""), ("", H32)]
    run_chain("two_dtypes", 300, 520, layouts, values=values, schedule=schedule)


def test_chains_keep_what_is_not_finite():
    x, y = chain_inputs(CHAINS["add"], 150, 272, exact=True)
    x[3, 7], y[50, 100], y[149, 271] = float("nan"), float("inf"), -float("inf")
    for layouts in LAYOUTS:
        for recipe in RECIPES:
            run_chain("add", 150, 272, of_layouts(recipe, layouts), inputs=[x, y])


@triton.jit
def _sigmoid(x_ptr, out_ptr):
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(out_ptr + i, tl.sigmoid(tl.load(x_ptr + i).to(tl.float32)))


@pytest.mark.parametrize("layouts", [(H128, ""), ("", H32)])
def test_the_sigmoid_of_chains_has_the_bits_of_tritons(layouts):
    """Of every bf16 down to -87.3; below that it is nothing, where Triton's is under 1.2e-38."""
    x = torch.arange(1 << 16, device="cuda").to(torch.int16).view(torch.bfloat16)
    expected = torch.empty(1 << 16, device="cuda")
    _sigmoid[(256,)](x, expected)
    text = "in bf16 matrix; sigmoid %0; out %1 fp32"
    rows, columns = ([layout] for layout in layouts)
    arguments = ([x.view(256, 256)], text, rows, columns, [True], CAPABILITY)
    got = launch.quantize_chain(*arguments)[-1].flatten()
    exact = ~(x.float() < -87.3)  # a bf16 is compared with the nearest bf16, -87.5
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num()[exact], expected.nan_to_num()[exact])
    assert bool(((got - expected).abs()[~exact] < 1.2e-38).all())


@pytest.mark.parametrize("layouts", [(H128, ""), ("", H32)])
def test_silu_of_chains_is_as_precise_as_fp32_allows(layouts):
    """Decomposed as x / (exp(-x) + 1), for every bf16; below -87.3 it is 0 or under 1.2e-36."""
    x = torch.arange(1 << 16, device="cuda").to(torch.int16).view(torch.bfloat16)
    text = "in bf16 matrix; neg %0; exp %1; add %2 1.0; div %0 %3; out %4 fp32"
    rows, columns = ([layout] for layout in layouts)
    got = launch.quantize_chain([x.view(256, 256)], text, rows, columns, [True], CAPABILITY)[-1]
    got, x = got.flatten().double(), x.double()
    expected = x / (1 + torch.exp(-x))
    minus_infinity = x == -torch.inf  # inf / inf
    assert torch.equal(got.isnan(), x.isnan() | minus_infinity)
    plus_infinity = x == torch.inf
    assert bool((got[plus_infinity] == torch.inf).all())
    error = (got - expected).abs()
    exact = x.isfinite() & (x > -87.3) & (expected.abs() > 1.2e-38)
    assert bool((error <= expected.abs() * 1e-7 * (4 + x.abs()))[exact].all())
    assert bool((error < 1.2e-36)[x.isfinite() & ~exact].all())


def test_chain_operator_in_a_cuda_graph():
    launch.prepare("cuda")
    text = CHAINS["silu_mul_backward"]
    inputs = [x.cuda() for x in chain_inputs(text, 256, 384, exact=False)]
    arguments = (text, [H128, H128], [H32, ""], [False, True])
    ops.quantize_chain(inputs, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.quantize_chain(inputs, *arguments)
    for x in inputs:
        x.copy_(torch.randn_like(x))
    graph.replay()
    expected = ops.quantize_chain([x.clone() for x in inputs], *arguments)
    assert len(captured) == len(expected) == 7
    for got, other in zip(captured, expected, strict=True):
        assert torch.equal(got.view(torch.uint8), other.view(torch.uint8))
