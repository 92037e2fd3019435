"""Emitted kernels of general encodings on a GPU against their references: bitwise on integers, on
fresh random data within the bounds; poisoned memory, odd shapes, CUDA graphs, no host syncs."""

from __future__ import annotations

import pytest
import torch
from encode_checks import (
    ENCODINGS,
    PRODUCTS,
    PROJECTIONS,
    REFUSED,
    ROTATIONS,
    STREAM,
    check_encode,
    check_mm,
    check_projection,
    check_rotation,
    seed_on,
)
from kernel_checks import integers

from hadagraph import ops
from hadagraph.codegen import launch
from hadagraph.formats import Encoding

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_allocations")]
CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Few, and mostly of multiples of 16: whether a size is one makes another binary.
SHAPES = ((144, 272), (37, 150), (129, 1))


def check(x: torch.Tensor, text: str, contracted_dim: int, *, exact: bool = True) -> None:
    check_encode(x, Encoding.parse(text), contracted_dim, "cuda", CAPABILITY, exact=exact)


def fresh(T: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    """Other numbers in every run."""
    generator = torch.Generator()
    print("seed", generator.seed())
    return torch.randn((T, K), generator=generator).to(dtype)


@pytest.mark.parametrize("contracted_dim", [0, 1])
@pytest.mark.parametrize("text", ENCODINGS)
def test_every_encoding(text, contracted_dim):
    for shape in SHAPES:
        check(integers(*shape, BF16), text, contracted_dim)
    check(fresh(528, 784, BF16), text, contracted_dim, exact=False)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("text", [*ENCODINGS[:14:2], ENCODINGS[15], ENCODINGS[17]])
def test_dtypes(text, dtype):
    for contracted_dim in (0, 1):
        check(integers(144, 272, dtype), text, contracted_dim)
        check(fresh(272, 400, dtype), text, contracted_dim, exact=False)


@pytest.mark.parametrize("text", ENCODINGS[::6])
def test_strides(text):
    base = integers(300, 400, BF16)
    for x in (base.t(), base[::2], base[:, 3:200], base[:, ::3], base[:1].expand(40, 400)):
        for contracted_dim in (0, 1):
            check(x, text, contracted_dim)


@pytest.mark.parametrize("text", ENCODINGS)
def test_special_values(text):
    x = integers(144, 272, BF16)
    x[5], x[7, 64:128] = 0, 0
    check(x, text, 1)
    x[3, 7], x[50, 100], x[143, 271] = float("nan"), float("inf"), -float("inf")
    check(x, text, 1)
    y = torch.zeros(64, 64, dtype=BF16)
    check(y, text, 0)
    y[1], y[2], y[3, 5] = 2.0**-120, 2.0**110, 2.0**-130
    check(y, text, 1)


@pytest.mark.parametrize("text", REFUSED)
def test_what_kernels_refuse(text):
    x = integers(24, 300, BF16).cuda()
    made = ops.encode(x, seed_on("cuda"), text, 1, STREAM)
    assert all(each.device == x.device for each in made)
    values = ops.decode(*made, text, 1, 300 if "keep" not in text else 114, FP32)
    assert values.isfinite().all()


@pytest.mark.parametrize("texts", PRODUCTS)
def test_encoded_mm(texts):
    if CAPABILITY < (8, 9) and "fp8_e4m3/per" in texts[0]:
        pytest.skip("the fp64 bound is of fp8 products")
    for bias, out in ((BF16, FP32), (None, BF16), (FP32, FP16)):
        check_mm(texts, (300, 203, 520), bias, out, "cuda", CAPABILITY)
    check_mm(texts, (1, 5, 16), None, FP32, "cuda", CAPABILITY)
    check_mm(texts, (512, 1024, 1024), None, BF16, "cuda", CAPABILITY)


@pytest.mark.parametrize("text", ROTATIONS)
def test_rotations(text):
    for dtype in (BF16, FP16, FP32):
        x = fresh(528, 208, dtype)
        for dim in (0, 1):
            for lying in (x, x.t(), x[::2, ::3]) if dtype == BF16 else (x,):
                check_rotation(lying, dim, text, "cuda", CAPABILITY)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_projections(projection):
    x = fresh(528, 208, BF16)
    for dim in (0, 1):
        for lying in (x, x.t()):
            check_projection(lying, dim, projection, "cuda", CAPABILITY)


def test_long_contractions():
    check_mm(PRODUCTS[5], (64, 128, 20000), None, BF16, "cuda", CAPABILITY)


def every_operator(x: torch.Tensor, seed: torch.Tensor) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []
    for index, text in enumerate((ENCODINGS[1], ENCODINGS[2], ENCODINGS[7], ENCODINGS[14])):
        made = ops.encode(x, seed, text, 1, index)
        columns = ops.encode(x, seed, text, 0, index)
        out = ops.encoded_mm(*made, *made, None, text, text, BF16)
        size = Encoding.parse(text).transformed_size(x.shape[1])
        results += [*made, *columns, out, ops.decode(*made, text, 1, size, BF16)]
    results.append(ops.clip_mask(x, None, ENCODINGS[9], 1))
    for rotation in ROTATIONS:
        rotated = ops.rotate(x, 0, rotation, seed)
        results += [rotated, ops.unrotate(rotated, 0, rotation, x.shape[0], seed)]
    projected = ops.project(x, 1, 8, 16)
    results += [projected, ops.unproject(projected, 1, 8, 16, x.shape[1])]
    return results


def test_no_host_sync():
    launch.prepare("cuda")
    x, seed = integers(256, 384, BF16).cuda(), seed_on("cuda")
    every_operator(x, seed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_operator(x, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_draw_anew():
    """The seed is read on the device: a replay after it has changed rounds otherwise, and as a
    direct call with that seed does."""
    launch.prepare("cuda")
    x, seed = fresh(256, 384, BF16).cuda(), seed_on("cuda")
    every_operator(x, seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every_operator(x, seed)
    seen = []
    for number in (1, 2):
        seed.fill_(number)
        graph.replay()
        seen.append(captured[0].clone())
        for got, expected in zip(captured, every_operator(x, seed.clone()), strict=True):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert not torch.equal(*seen)


def test_next_seed_advances_in_a_graph():
    text = ENCODINGS[1]
    x = fresh(64, 128, BF16).cuda()
    ops.encode(x, ops.next_seed(x.device), text, 1, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = ops.encode(x, ops.next_seed(x.device), text, 1, 0)[0]
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(codes.clone())
    assert not torch.equal(*seen)


def test_stochastic_rounding_is_unbiased():
    """The mean over many streams comes within five standard deviations of the value."""
    x = torch.linspace(-7, 7, 4096, device="cuda").reshape(16, 256)
    x[:, 0] = 7.0
    text = "int4/per_tensor/stochastic"
    draws, total = 256, torch.zeros(16, 256, device="cuda")
    for stream in range(draws):
        made = ops.encode(x, seed_on("cuda"), text, 1, stream)
        total += ops.decode(*made, text, 1, 256, FP32)
    error = (total / draws - x).abs()
    assert float(error.max()) < 5 * 0.5 / draws**0.5
    assert abs(float((total / draws - x).mean())) < 5 * 0.5 / (draws * 4096) ** 0.5


def test_many_rows_and_long_columns():
    """Grids and offsets of 32 bits: more programs than a grid's second axis allows."""
    x = torch.randint(-8, 9, (1 << 21, 16), device="cuda").to(BF16)
    text = "fp4_e2m1/block_contracted(16)/h16/ue4m3"
    codes, scale, _ = ops.encode(x, None, text, 1, 0)
    tail = ops.encode(x[-64:].clone(), None, text, 1, 0)
    assert torch.equal(codes[-64:], tail[0])
    assert torch.equal(scale[-64:], tail[1])
    columns, scale, _ = ops.encode(x, None, text, 0, 0)
    tail = ops.encode(x[-64:].clone(), None, text, 0, 0)
    assert torch.equal(columns[:, -32:], tail[0][:, :32])
