"""The route of a scaled matmul: when torch._scaled_mm is chosen, when it is refused, and that a
caller's configuration and a race's winner go before the tables."""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch

from hadagraph.codegen import choose_mm, launch
from hadagraph.codegen.choose_mm import accumulations, library_refusal, problem_of, select_mm
from hadagraph.codegen.listing import specs_for
from hadagraph.codegen.spec import MmSpec, ScaledMmSpec
from hadagraph.codegen.tune import LibraryMm, MmConfig
from hadagraph.compat import library_scaled_mm
from hadagraph.reference import scaled_mm_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = "fp8_e4m3", "fp8_e5m2"
ROWS, TENSORS = (False, False), (True, True)
LARGE, SMALL = (8192, 4096, 4096), (576, 1536, 4096)


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch):
    monkeypatch.setattr(choose_mm, "winner", lambda problem, capability: None)


def route(
    sizes=LARGE,
    formats=(E4M3, E4M3),
    scales=ROWS,
    bias=None,
    out=BF16,
    capability=(9, 0),
    config=None,
    dense=True,
):
    return select_mm(sizes, formats, scales, bias, out, capability, config, dense=dense)


def test_the_table_gives_hopper_fp8_to_the_library_where_it_was_faster():
    assert route() == LibraryMm(fast_accumulation=True)
    assert route(scales=TENSORS) == LibraryMm(fast_accumulation=True)
    assert isinstance(route(SMALL), ScaledMmSpec)  # SMs would idle on 128-row tiles
    assert route(SMALL, scales=TENSORS) == LibraryMm(fast_accumulation=True)


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
def test_other_devices_keep_emitted_kernels(capability):
    assert isinstance(route(capability=capability), ScaledMmSpec)


def test_int8_and_long_contractions_keep_emitted_kernels():
    assert isinstance(route(formats=("int8", "int8")), MmSpec)
    assert isinstance(route((8192, 4096, 14336)), ScaledMmSpec)
    assert accumulations(problem_of((8, 8, 8192), (E4M3, E4M3), ROWS, BF16)) == (True, False)
    assert accumulations(problem_of((8, 8, 8193), (E4M3, E4M3), ROWS, BF16)) == (False,)


@pytest.mark.parametrize(
    "changed",
    [
        {"formats": (E5M2, E5M2), "scales": TENSORS},
        {"formats": (E5M2, E4M3)},
        {"formats": ("int8", "int8")},
        {"scales": (False, True)},
        {"out": FP32},
        {"out": FP16},
        {"sizes": (8192, 4088, 4096)},
        {"sizes": (8192, 4096, 4088)},
        {"bias": FP32},
        {"bias": FP16},
        {"bias": FP32, "out": FP32, "scales": TENSORS},
        {"dense": False},
        {"capability": (8, 0), "formats": ("int8", "int8")},
    ],
    ids=str,
)
def test_refused(changed):
    assert isinstance(route(**changed), MmSpec)
    with pytest.raises(ValueError, match=r"torch\._scaled_mm refuses"):
        route(**changed, config=LibraryMm(True))


@pytest.mark.parametrize(
    "changed",
    [
        {"bias": BF16},
        {"formats": (E5M2, E4M3), "scales": TENSORS},
        {"formats": (E4M3, E5M2), "scales": TENSORS},
        {"out": FP16, "scales": TENSORS, "bias": FP16},
        {"out": FP32, "scales": TENSORS},
        {"sizes": (8191, 4096, 4096)},
        {"capability": (8, 9)},
    ],
    ids=str,
)
def test_allowed(changed):
    assert route(**changed, config=LibraryMm(False)) == LibraryMm(False)


def test_a_callers_configuration_goes_before_the_winner_and_that_before_the_table(monkeypatch):
    own, winning = MmConfig(64, 64, 128, 4, 3, True), MmConfig(128, 64, 128, 4, 5, True)
    monkeypatch.setattr(choose_mm, "winner", lambda problem, capability: winning)
    assert route().block_m == 128 and route().block_n == 64
    assert route(config=own).block_m == 64
    assert route(config=LibraryMm(True)) == LibraryMm(True)
    monkeypatch.setattr(choose_mm, "winner", lambda problem, capability: LibraryMm(False))
    assert route(SMALL) == LibraryMm(False)
    table = route(bias=FP32)  # a winner that this call cannot use
    assert isinstance(table, ScaledMmSpec) and table.bias_dtype == "fp32"


def test_the_route_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger=choose_mm.__name__):
        route()
    assert "torch._scaled_mm, fast_accumulation=True" in caplog.text


def test_a_dump_lists_no_kernel_for_the_library():
    a = torch.empty(8192, 4096, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(8192, device="meta")
    assert specs_for("scaled_mm", (a, a, scale, scale, None, BF16), (9, 0)) == ()
    (spec,) = specs_for("scaled_mm", (a, a, scale, scale, None, FP32), (9, 0))
    assert isinstance(spec, ScaledMmSpec)


def library_takes_row_scales():
    a, scale = torch.ones(32, 64).to(torch.float8_e4m3fn), torch.ones(32)
    scales = {"scale_a": scale.unsqueeze(1), "scale_b": scale.unsqueeze(0)}
    try:
        library_scaled_mm(a, a.t(), **scales, out_dtype=BF16)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize(("tensorwise", "bias"), list(product((False, True), repeat=2)))
def test_the_library_call_computes_the_reference(tensorwise, bias):
    """torch._scaled_mm has a CPU implementation, of tensor scales at least."""
    if not tensorwise and not library_takes_row_scales():
        pytest.skip("torch._scaled_mm takes no row scales on this CPU")
    torch.manual_seed(0)
    a, b = (torch.randn(rows, 64).to(torch.float8_e4m3fn) for rows in (32, 48))
    scales = [torch.rand(1 if tensorwise else rows) + 0.5 for rows in (32, 48)]
    vector = torch.randn(48).bfloat16() if bias else None
    operands = (a, b, *scales, vector)
    got = launch.scaled_mm(*operands, BF16, (9, 0), LibraryMm(True))
    want = scaled_mm_reference(*operands, BF16).float()
    assert got.dtype == BF16
    assert torch.allclose(got.float(), want, rtol=2**-6, atol=2**-6 * float(want.abs().amax()))


@pytest.mark.parametrize("which", [2, 3])
def test_scales_must_be_fp32_beside_the_codes(which):
    a = torch.ones(32, 64, dtype=torch.int8)
    operands = [a, a, torch.ones(32), torch.ones(32), None]
    operands[which] = operands[which].double()
    name = ("a_scale", "b_scale")[which - 2]
    with pytest.raises(ValueError, match=f"{name} must be torch.float32 on cpu, got torch.float64"):
        launch.scaled_mm(*operands, BF16, (9, 0))


def test_refusals_are_sentences():
    problem = problem_of((32, 48, 64), (E4M3, E4M3), TENSORS, BF16)
    assert library_refusal(problem, None, (9, 0)) is None
    assert "8.9" in str(library_refusal(problem, None, (8, 0)))
