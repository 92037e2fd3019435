"""Launches made ready, without a GPU: what becomes of operands that kernels cannot read, and of
launches that are dropped while they are in use."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hadagraph import backend
from hadagraph.codegen import calls, choose, launch, matrices, tune
from hadagraph.codegen.choose_chains import select_chain, wanted_of
from hadagraph.formats import Encoding
from hadagraph.reference import scaled_mm_reference
from hadagraph.region import Chain
from hadagraph.rotation import Rotation

SM90 = (9, 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("C", [1, 8, 16, 40])
def test_codes_of_any_length_become_addressable(C, dtype):
    codes = torch.randint(0, 64, (5, C), dtype=torch.int8).view(dtype)
    for given in (codes, codes.t().contiguous().t()):
        ready = launch._addressable(given)
        assert torch.equal(ready.view(torch.int8), codes.view(torch.int8))
        assert ready.stride(1) == 1 and ready.stride(0) % 16 == 0
        assert launch._addressable(ready) is ready


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("T", [1 << 20, 65535 * 128 + 1, 100_000_000])
def test_grids_of_tall_matrices_stay_within_their_limit(monkeypatch, T, both):
    """65535 programs along the second dim, which cover every token."""
    made = []
    monkeypatch.setattr(calls, "launch_of", lambda spec, grid, _: made.append((spec, grid)))
    monkeypatch.setattr(calls, "matrix_on", lambda *_: None)
    x = torch.empty(T, 256, dtype=torch.bfloat16, device="meta")
    encoding = Encoding.parse("int8/per_kept_index/h64")
    ones = tune.TilesConfig(tune.PassConfig(1, 8, 1), tune.PassConfig(1, 8, 1))
    launch.quantizer(x, encoding if both else None, encoding, SM90, ones)
    assert len(made) == 2
    for spec, (stripes, programs) in made:
        assert stripes == 2 and programs <= 65535
        assert programs * spec.tiles * 128 >= T > (programs - 1) * spec.tiles * 128
        assert spec.mask_rows or T % (spec.tiles * 128) == 0


def test_a_contraction_of_any_length_is_multiplied(monkeypatch):
    """Once copied, the operands are what the kernel reads."""
    made = []

    def reference_call(route, a, b, out_dtype):
        made.append((a.stride(), b.stride()))
        return lambda *operands: scaled_mm_reference(*operands, out_dtype=out_dtype)

    monkeypatch.setattr(launch, "scaled_mm_call", reference_call)
    monkeypatch.setattr(launch, "_READY", {})
    a, b = (torch.randint(-9, 9, (rows, 40), dtype=torch.int8) for rows in (6, 7))
    operands = (a, b, torch.rand(6), torch.rand(7), None)
    got = launch.scaled_mm(*operands, torch.float32, SM90)
    assert torch.equal(got, scaled_mm_reference(*operands, out_dtype=torch.float32))
    assert made == [((48, 1), (48, 1))]


def test_a_launch_may_be_dropped_under_way(monkeypatch):
    """One that makes another ready in the middle, which takes its place."""
    monkeypatch.setattr(launch, "LAYOUTS_KEPT", 1)
    monkeypatch.setattr(launch, "_READY", {})

    def outer(x):
        inner = launch.ready(("inner",), lambda: lambda x: x + 1)
        return inner(x) * 2

    for _ in range(2):
        assert launch.ready(("outer",), lambda: outer)(3) == 8
        assert list(launch._READY) == [("inner",)]


@pytest.mark.parametrize(
    ("K", "dtype", "descriptors"), [(256, "bf16", True), (100, "bf16", False), (256, "fp32", False)]
)
def test_a_chain_s_value_is_moved_by_tma_only_where_it_can_be(monkeypatch, K, dtype, descriptors):
    moved = next(c for c in tune.tiles_candidates(SM90) if c.write.descriptors)
    monkeypatch.setattr(choose, "tiles_configuration", lambda *_: moved)
    chain = Chain.parse(f"in {dtype} matrix; neg %0; out %1 {dtype}")
    plan = select_chain(512, K, chain, wanted_of([""], ["int8/per_tensor"], [False]), SM90)
    (step,) = plan.tiles
    assert step.plan.write.descriptors is descriptors


def test_matrices_of_kernels_that_are_compiled_ahead_are_not_kept(monkeypatch):
    monkeypatch.setattr(matrices, "_MATRICES", {})
    meta, cpu = torch.device("meta"), torch.device("cpu")
    makes = (
        lambda where: matrices.matrix_on(where, torch.float16, Rotation(32), True),
        lambda where: matrices.inverse_on(where, torch.bfloat16, Rotation(32), 64),
        lambda where: matrices.projection_on(where, torch.bfloat16, (8, 16), 64),
        lambda where: matrices.projection_on(where, torch.bfloat16, (8, 16), 64, inverse=True),
    )
    for make in makes:
        assert (made := make(meta)).is_meta
        assert (made.shape, made.dtype) == ((kept := make(cpu)).shape, kept.dtype)
    assert {key[0] for key in matrices._MATRICES} == {cpu}


def test_rocm_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(RuntimeError, match="built for ROCm"):
        launch.capability_of(torch.device("cuda", 40))
    with FakeTensorMode(), pytest.raises(RuntimeError, match="ROCm"):
        backend._capability([torch.empty(1, device="cuda:0")])
    assert backend._capability([torch.empty(1)]) is None
