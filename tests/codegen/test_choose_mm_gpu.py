"""torch._scaled_mm as a route of scaled_mm on a GPU, against the fp64 product."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_scaled_mm, random_codes

from hadagraph.codegen import launch
from hadagraph.codegen.autotune import tune_shapes
from hadagraph.codegen.choose_mm import select_mm
from hadagraph.codegen.tune import LibraryMm
from hadagraph.formats import FORMATS

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        FORMATS["fp8_e4m3"].min_capability > CAPABILITY, reason="needs fp8 matrix instructions"
    ),
]
E4M3, E5M2 = "fp8_e4m3", "fp8_e5m2"
BF16 = torch.bfloat16
FAST_ACCUMULATION = 2.0**-9  # 16 steps of the contraction, 13 bits kept in each


def operands(M, N, C, names, tensorwise):
    a, b = random_codes((M, C), names[0], 0), random_codes((N, C), names[1], 1)
    scales = [torch.rand(1 if tensorwise else rows) + 0.5 for rows in (M, N)]
    return [tensor.cuda() for tensor in (a, b, *scales)]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(256, 512, 1024), (301, 208, 80), (1, 16, 16), (8192, 16, 4096)])
@pytest.mark.parametrize("tensorwise", [True, False])
def test_against_the_fp64_product(tensorwise, shape, biased, fast):
    given = operands(*shape, (E4M3, E4M3), tensorwise or shape[0] == 1)
    if shape[0] == 1 and not tensorwise:
        pytest.skip("one row: its scale is the tensor's")
    bias = torch.randn(shape[1], device="cuda", dtype=BF16) if biased else None
    out = launch.scaled_mm(*given, bias, BF16, CAPABILITY, LibraryMm(fast))
    assert_scaled_mm(out, *given, bias)


@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("names", [(E5M2, E4M3), (E4M3, E5M2), (E4M3, E4M3)])
def test_tensor_scales_take_mixed_formats_and_every_output(names, out_dtype):
    given = operands(256, 128, 512, names, True)
    out = launch.scaled_mm(*given, None, out_dtype, CAPABILITY, LibraryMm(True))
    assert out.dtype == out_dtype
    assert_scaled_mm(out, *given, None, FAST_ACCUMULATION)


def test_a_bias_in_half_precision():
    given = operands(256, 128, 512, (E4M3, E4M3), True)
    bias = torch.randn(128, device="cuda", dtype=torch.float16)
    out = launch.scaled_mm(*given, bias, torch.float16, CAPABILITY, LibraryMm(True))
    assert_scaled_mm(out, *given, bias)


@pytest.mark.parametrize("tensorwise", [True, False])
def test_nan_scales_reach_their_outputs_only(tensorwise):
    a, b, a_scale, b_scale = operands(256, 512, 128, (E4M3, E4M3), tensorwise)
    a[:] = torch.zeros(256, 128).to(a.dtype)  # a group of NaN scale has codes 0
    a_scale[-1] = float("nan")
    out = launch.scaled_mm(a, b, a_scale, b_scale, None, BF16, CAPABILITY, LibraryMm(True))
    if tensorwise:
        assert out.isnan().all()
    else:
        assert out[-1].isnan().all() and not out[:-1].isnan().any()


def test_two_runs_and_a_graph_give_the_same_bits():
    given = operands(1024, 1536, 4096, (E4M3, E4M3), False)
    want = launch.scaled_mm(*given, None, BF16, CAPABILITY, LibraryMm(True))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch.scaled_mm(*given, None, BF16, CAPABILITY, LibraryMm(True))
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.skipif(CAPABILITY != (9, 0), reason="the table names the library on Hopper only")
def test_the_table_uses_it_and_operands_that_are_not_dense_do_not(monkeypatch):
    calls = []
    library = launch.library_call
    monkeypatch.setattr(launch, "library_call", lambda *a: calls.append(a) or library(*a))
    monkeypatch.setattr(launch, "_READY", {})
    monkeypatch.setattr("hadagraph.codegen.choose_mm.winner", lambda problem, capability: None)
    a, b, a_scale, b_scale = operands(4096, 4096, 512, (E4M3, E4M3), False)
    for operand in (a, a[:, :256], a[:, 256:]):
        columns = operand.shape[1]
        other = b[:, :columns].clone()
        out = launch.scaled_mm(operand, other, a_scale, b_scale, None, BF16, CAPABILITY)
        assert_scaled_mm(out[:64], operand[:64], other, a_scale[:64], b_scale, None)
    assert len(calls) == 1


def test_a_race_on_this_gpu(monkeypatch, tmp_path):
    from hadagraph.codegen import tuned

    monkeypatch.setattr(tuned, "source_directory", lambda: tmp_path)
    tuned.winners_on.cache_clear()
    shape = (512, 512, 512)
    (race,) = tune_shapes([shape], seconds=120, format=E4M3)
    found = select_mm(shape, (E4M3, E4M3), (False, False), None, BF16, CAPABILITY)
    tuned.winners_on.cache_clear()
    assert race.choice is not None and race.milliseconds > 0
    if isinstance(race.choice, LibraryMm):
        assert found == race.choice
    else:
        assert (found.block_m, found.stages) == (race.choice.block_m, race.choice.stages)
