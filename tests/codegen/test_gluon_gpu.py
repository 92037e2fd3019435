"""The kernels in Gluon on a GPU: bit for bit exact integer sums, scaled and rounded in order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hadagraph.codegen import direct, launch
from hadagraph.codegen.choose import select_scaled_mm
from hadagraph.codegen.direct import gluon_refusal
from hadagraph.codegen.spec import GluonMmSpec
from hadagraph.codegen.tune import COOPERATIVE_BELOW_L2, MmConfig, scaled_mm_candidates

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CAPABILITY != (9, 0), reason="needs compute capability 9.0"),
    pytest.mark.skipif(gluon_refusal() is not None, reason=f"no Gluon: {gluon_refusal()}"),
]
HOPPER = (9, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
CONFIGS = [config for config in scaled_mm_candidates(HOPPER) if config.schedule]
# One row, edges in each dim, one step, tiles of 132 SMs once and again, an odd number of tiles.
SHAPES = [
    (1, 8, 16),
    (8, 1032, 16),
    (200, 328, 400),
    (127, 136, 128),
    (129, 120, 144),
    (1544, 2056, 4112),
    (4168, 4232, 528),
    (128 * 133, 128, 256),
]
Operands = list[torch.Tensor]


@pytest.fixture(params=["pingpong", "cooperative"])
def config(request):
    """The first configuration of each schedule."""
    return next(config for config in CONFIGS if config.schedule == request.param)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """No launch is ready; freed memory holds 0x7F bytes: an element not written is seen."""
    monkeypatch.setattr(launch, "_READY", {})
    block = torch.full((1 << 26,), 0x7F, dtype=torch.uint8, device="cuda")
    small = [torch.full((1 << 12,), 0x7F, dtype=torch.uint8, device="cuda") for _ in range(64)]
    del block, small
    yield
    torch.cuda.synchronize()


def operands(M: int, N: int, C: int, per_tensor=(), seed: int = 0) -> Operands:
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "generator": generator}
    codes = [torch.randint(-127, 128, (r, C), dtype=torch.int8, **options) for r in (M, N)]
    counts = [1 if i in per_tensor else rows for i, rows in enumerate((M, N))]
    return [*codes, *(torch.rand(count, **options) * 1e-2 + 1e-4 for count in counts)]


def multiplied(given: Operands, config: MmConfig, bias=None, out=BF16) -> torch.Tensor:
    (M, C), N = given[0].shape, given[1].shape[0]
    dtype = None if bias is None else bias.dtype
    one = tuple(scale.numel() == 1 for scale in given[2:])
    spec = select_scaled_mm(M, N, C, "int8", "int8", one, dtype, out, HOPPER, config)
    assert isinstance(spec, GluonMmSpec)
    return launch.scaled_mm(*given, bias, out, HOPPER, config)


def reference(given: Operands, bias=None, out=BF16) -> torch.Tensor:
    """Integer sums, exact in fp64 (below 2^53) as in int64, then fp32 in the order of the
    reference."""
    a, b, a_scale, b_scale = given
    sums = (a.double() @ b.double().t()).float()
    product = sums * a_scale[:, None] * b_scale[None, :]
    return (product if bias is None else product + bias.float()).to(out)


def assert_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got, want), f"{int((got != want).sum())} of {got.numel()} elements differ"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shapes(config, shape):
    for _ in range(3):
        given = operands(*shape)
        assert_bits(multiplied(given, config), reference(given))


def test_the_reference_is_exact():
    a, b, a_scale, b_scale = operands(8, 16, 4096)
    sums = a.cpu().long() @ b.cpu().long().t()
    want = (sums.float() * a_scale.cpu()[:, None] * b_scale.cpu()[None, :]).to(BF16)
    assert_bits(reference([a, b, a_scale, b_scale]).cpu(), want)


@pytest.mark.parametrize("out", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
@pytest.mark.parametrize("per_tensor", [(), (0,), (1,), (0, 1)])
def test_scales_bias_and_outputs(per_tensor, bias_dtype, out, config):
    for shape in ((256, 512, 384), (301, 264, 208)):
        given = operands(*shape, per_tensor)
        bias = None if bias_dtype is None else torch.randn(shape[1], device="cuda").to(bias_dtype)
        assert_bits(multiplied(given, config, bias, out), reference(given, bias, out))


def test_the_largest_sums_of_one_run(config):
    """127 * 127 * 131072 < 2^31."""
    C = 1 << 17
    a, b = (torch.full((rows, C), 127, dtype=torch.int8, device="cuda") for rows in (130, 136))
    b[::2] = -127
    one = torch.ones(1, device="cuda")
    given = [a, b, one, one]
    assert_bits(multiplied(given, config, out=FP32), reference(given, out=FP32))


@pytest.mark.parametrize("side", [2, 3])
def test_nan_scales_reach_their_outputs_only(side, config):
    given = operands(200, 328, 400)
    given[side][5] = float("nan")
    out = multiplied(given, config)
    line, rest = (out[5], out[6:]) if side == 2 else (out[:, 5], out[:, 6:])
    assert line.isnan().all() and not rest.isnan().any()
    assert int(out.isnan().sum()) == line.numel()


def test_rows_of_wider_matrices(config):
    """Codes whose rows are apart, and a contraction of any length: TMA reads zeros beyond it."""
    wide = operands(300, 264, 512)
    for start, end in ((0, 400), (16, 400), (112, 493)):
        given = [wide[0][:, start:end], wide[1][:, start:end], *wide[2:]]
        assert_bits(multiplied(given, config), reference(given))


def test_misaligned_operands(config):
    """Codes are copied; for scales and bias another binary, in any order."""
    shape = (M, N, C) = (256, 384, 256)
    a, b, a_scale, b_scale = operands(*shape)
    bytes_ = torch.zeros(M * C + 16, dtype=torch.int8, device="cuda")
    floats = torch.zeros(3, 1024, device="cuda")
    bias = torch.randn(N, device="cuda")
    want = reference([a, b, a_scale, b_scale], bias)
    for offset in (0, 1, 0, 3, 4, 1):
        moved = bytes_[offset : offset + M * C].view(M, C).copy_(a)
        vectors = [
            row[offset : offset + len(vector)].copy_(vector)
            for row, vector in zip(floats, (a_scale, b_scale, bias), strict=True)
        ]
        assert_bits(multiplied([moved, b, *vectors[:2]], config, vectors[2]), want)


def test_two_runs_give_the_same_bits(config):
    given = operands(4096, 4096, 4096)
    first = multiplied(given, config)
    assert_bits(first, reference(given))
    for _ in range(20):
        assert_bits(multiplied(given, config), first)


def test_in_a_cuda_graph(monkeypatch, config):
    given = operands(1544, 2056, 1040)
    bias = torch.randn(2056, device="cuda", dtype=BF16)
    multiplied(given, config, bias)
    torch.cuda.synchronize()
    ordinary = direct.Launch.ordinary
    seen = []
    monkeypatch.setattr(
        direct.Launch, "ordinary", lambda self, *t: seen.append(1) or ordinary(self, *t)
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = multiplied(given, config, bias)
    assert not seen  # launched directly
    for seed in (1, 2, 3):
        for kept, new in zip(given, operands(1544, 2056, 1040, seed=seed), strict=True):
            kept.copy_(new)
        graph.replay()
        assert_bits(out, reference(given, bias))


def test_launches_find_their_descriptors_by_address(config):
    """Operands of one layout in turn, and on a side stream: every launch reads its own."""
    sets = [operands(640, 520, 272, seed=seed) for seed in range(4)]
    wanted = [reference(given) for given in sets]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        for given, want in zip(sets, wanted, strict=True):
            assert_bits(multiplied(given, config), want)
            with torch.cuda.stream(stream):
                assert_bits(multiplied(given, config), want)


def test_through_triton_as_directly(monkeypatch, config):
    given = operands(640, 520, 272)
    multiplied(given, config)
    want = multiplied(given, config)
    monkeypatch.setattr(direct, "_hooked", lambda: True)
    assert_bits(multiplied(given, config), want)


def test_the_operator_takes_it_where_every_sm_has_a_tile(monkeypatch):
    monkeypatch.setattr("hadagraph.codegen.choose_mm.winner", lambda problem, capability: None)
    given = operands(2048, 1536, 1024)
    called, make = [], launch.scaled_mm_call
    monkeypatch.setattr(
        launch, "scaled_mm_call", lambda spec, *rest: called.append(spec) or make(spec, *rest)
    )
    out = torch.ops.hadagraph.scaled_mm(*given, None, BF16)
    small_l2 = torch.cuda.get_device_properties().L2_cache_size < COOPERATIVE_BELOW_L2
    wanted = "cooperative" if small_l2 else "pingpong"
    assert [spec.schedule for spec in called] == [wanted]
    assert_bits(out, reference(given))
    odd = operands(2048, 1540, 1024)
    assert_bits(torch.ops.hadagraph.scaled_mm(*odd, None, BF16), reference(odd))
    assert not isinstance(called[-1], GluonMmSpec)


@pytest.mark.parametrize("stages_and_group", [(2, 1), (3, 4), (5, 32)])
def test_other_stages_and_groups(stages_and_group, config):
    stages, group = stages_and_group
    if config.schedule == "cooperative":
        stages = min(stages, 4)  # more do not fit
    given = operands(1000, 1000, 1008)
    config = replace(config, stages=stages, group=group)
    assert_bits(multiplied(given, config), reference(given))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("tiles", [1, 131, 133, 300])
def test_few_steps_and_tiles(config, tiles, steps):
    """Programs with one tile and with several, so that a warpgroup may have none of its own; tiles
    of fewer steps than stages."""
    given = operands(128 * tiles, 256, 128 * steps - 16)
    for _ in range(3):
        assert_bits(multiplied(given, config), reference(given))
