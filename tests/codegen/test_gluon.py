"""Which kernel in Gluon multiplies int8 codes when, and that one in Triton does where none can."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from hadagraph.codegen import choose_mm, direct
from hadagraph.codegen.autotune import candidates
from hadagraph.codegen.choose import gluon_mm_refusal, select_scaled_mm
from hadagraph.codegen.choose_mm import problem_of
from hadagraph.codegen.listing import sources_for
from hadagraph.codegen.spec import SCHEDULES, GluonMmSpec, ScaledMmSpec
from hadagraph.codegen.tune import MmConfig, scaled_mm_candidates
from hadagraph.reference import INT32_CONTRACTION

HOPPER = (9, 0)
BF16, FP32 = torch.bfloat16, torch.float32
INT8, E4M3 = ("int8", "int8"), ("fp8_e4m3", "fp8_e4m3")
LARGE, SMALL = (8192, 4096, 4096), (512, 512, 512)
H100_L2, H200_L2 = 50 << 20, 60 << 20
PINGPONG = MmConfig(128, 128, 128, 4, 6, True, group=16, schedule="pingpong")


@pytest.fixture(autouse=True)
def fresh():
    direct.gluon_refusal.cache_clear()
    yield
    direct.gluon_refusal.cache_clear()


def selected(sizes=LARGE, formats=INT8, out=BF16, capability=HOPPER, config=None, l2_bytes=None):
    of_call = (*sizes, *formats, (False, True), FP32, out, capability)
    return select_scaled_mm(*of_call, config, l2_bytes)


@pytest.mark.parametrize("sizes", [LARGE, (8191, 4088, 4096 + 16), (128 * 132, 8, 16)])
@pytest.mark.parametrize("out", [BF16, torch.float16, FP32])
def test_hopper_takes_it_where_every_sm_has_a_tile(sizes, out):
    spec = selected(sizes, out=out)
    assert isinstance(spec, GluonMmSpec)
    assert (spec.a_per_tensor, spec.b_per_tensor, spec.bias_dtype) == (False, True, "fp32")
    assert (spec.mask_m, spec.mask_n) == (sizes[0] % 128 != 0, sizes[1] % 128 != 0)


@pytest.mark.parametrize("l2_bytes", [None, H200_L2, H100_L2])
@pytest.mark.parametrize(
    ("sizes", "widest"),
    [
        ((16384, 14336, 4096), "cooperative"),
        ((16384, 4096, 1024), "cooperative"),
        ((1024, 4096, 16384), "cooperative"),  # as long on 128 SMs as two small tiles on 124
        ((16384, 3200, 4096), "cooperative"),  # the last half tile is outside
        ((128 * 132, 1408, 4096), "cooperative"),  # 12 waves in place of 11
        ((128 * 132, 1152, 4096), "pingpong"),  # 10 in place of 9
        ((8192, 4088, 4096), "cooperative"),
        ((1536, 4096, 4096), "pingpong"),  # two waves of the time of two, in place of three of one
        ((128 * 132, 128, 4096), "pingpong"),  # half of each tile of twice the width is outside
    ],
)
def test_a_small_l2_wants_tiles_that_read_less(sizes, widest, l2_bytes):
    spec = selected(sizes, l2_bytes=l2_bytes)
    assert spec.schedule == (widest if l2_bytes == H100_L2 else "pingpong")
    assert spec.block_n == (256 if spec.cooperative else 128)
    assert spec.mask_n == (sizes[1] % spec.block_n != 0)


@pytest.mark.parametrize(
    ("sizes", "formats", "capability"),
    [(SMALL, INT8, HOPPER), (LARGE, E4M3, HOPPER), (LARGE, INT8, (10, 0)), (LARGE, INT8, (8, 0))],
)
def test_a_small_l2_changes_nothing_else(sizes, formats, capability):
    given = {"sizes": sizes, "formats": formats, "capability": capability}
    assert selected(**given, l2_bytes=H100_L2) == selected(**given)


def test_the_table_takes_what_won_on_each_device():
    """Of groups of 8 tiles, at every shape of the race."""
    path = Path(__file__).parents[2] / "bench" / "results" / "gemm_schedules.json"
    races = json.loads(path.read_text())["races"]
    assert [race["l2_bytes"] for race in races] == [H200_L2, H100_L2]
    for race, count in zip(races, (6, 9), strict=True):
        rates = {}
        for row in race["rows"]:
            schedule, _, rest = row["name"].partition(", ")
            if schedule in SCHEDULES and rest == "groups of 8":
                sizes = row["M"], row["N"], row["C"]
                rates.setdefault(sizes, {})[schedule] = row["tflops"]
        assert len(rates) == count
        for sizes, found in rates.items():
            assert set(found) == set(SCHEDULES)
            spec = selected(sizes, l2_bytes=race["l2_bytes"])
            assert spec.schedule == max(found, key=found.__getitem__), sizes


def test_the_l2_is_that_of_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: HOPPER)
    monkeypatch.setattr(choose_mm, "winner", lambda problem, capability: None)
    for size, schedule in ((H100_L2, "cooperative"), (H200_L2, "pingpong")):
        properties = SimpleNamespace(L2_cache_size=size)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda given=properties: given)
        spec = choose_mm.select_mm(LARGE, INT8, (False, True), None, BF16, HOPPER)
        assert spec.schedule == schedule
    assert choose_mm.l2_bytes((8, 0)) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_mm.l2_bytes(HOPPER) is None


def test_small_outputs_keep_smaller_tiles():
    spec = selected(SMALL)
    assert isinstance(spec, ScaledMmSpec) and spec.block_m == 64
    assert isinstance(selected(SMALL, config=PINGPONG), GluonMmSpec)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"sizes": (8192, 4100, 4096)}, "16 bytes"),
        ({"sizes": (8192, 4098, 4096), "out": FP32}, "16 bytes"),
        ({"sizes": (8192, 4096, INT32_CONTRACTION + 16)}, "int32"),
        ({"formats": E4M3}, "int8"),
        ({"capability": (10, 0)}, "9.0"),
        ({"capability": (8, 0)}, "9.0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", [None, PINGPONG])
def test_triton_multiplies_what_it_cannot(changed, why, config):
    spec = selected(**changed, config=config)
    assert isinstance(spec, ScaledMmSpec)
    assert spec == selected(**changed)
    sizes, out = changed.get("sizes", LARGE), changed.get("out", BF16)
    names = changed.get("formats", INT8)[0], "fp32" if out == FP32 else "bf16"
    assert why in str(gluon_mm_refusal(*sizes[1:], *names, changed.get("capability", HOPPER)))


def test_fp32_rows_of_four_are_whole_16_bytes():
    assert isinstance(selected((8192, 4100, 4096), out=FP32), GluonMmSpec)


@pytest.mark.parametrize("why", ["version", "interpreter", "missing"])
def test_where_gluon_is_not_known_triton_stands_in_and_it_is_said_once(monkeypatch, caplog, why):
    if why == "version":
        monkeypatch.setattr(triton, "__version__", "9.0.0")
    elif why == "interpreter":
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, logger=direct.__name__):
        for config in (None, PINGPONG):
            spec = selected(config=config)
            assert isinstance(spec, ScaledMmSpec)
            assert (spec.block_m, spec.block_n, spec.stages) == (128, 128, 3)
    said = {"version": "9.0.0 is not", "interpreter": "interpreter", "missing": "is missing"}[why]
    assert [said in record.getMessage() for record in caplog.records] == [True]


def test_other_targets_do_not_ask_for_gluon(monkeypatch, caplog):
    monkeypatch.setattr(triton, "__version__", "9.0.0")
    with caplog.at_level(logging.INFO, logger=direct.__name__):
        selected(capability=(8, 0))
        selected(formats=E4M3)
    assert not caplog.records


def test_it_is_raced_where_it_can_be_used():
    listed = [config for config in scaled_mm_candidates(HOPPER) if config.schedule]
    raced = {(config.schedule, config.group) for config in listed}
    assert raced == {(schedule, group) for schedule in SCHEDULES for group in (8, 16)}
    assert not any(config.schedule for config in scaled_mm_candidates((10, 0)))

    def raced(sizes, formats):
        problem = problem_of(sizes, formats, (False, False), BF16)
        return [c for c in candidates(problem, HOPPER) if getattr(c, "schedule", None)]

    assert raced(LARGE, INT8) == listed
    assert raced((8192, 4100, 4096), INT8) == raced(LARGE, E4M3) == []


@pytest.mark.parametrize("schedule", ["pingpong", "cooperative"])
def test_a_dump_shows_its_source(monkeypatch, schedule):
    size = H100_L2 if schedule == "cooperative" else H200_L2
    monkeypatch.setattr(choose_mm, "l2_bytes", lambda capability: size)
    a = torch.empty(8192, 4096, dtype=torch.int8, device="meta")
    scale = torch.empty(8192, device="meta")
    ((name, source),) = sources_for("scaled_mm", (a, a, scale, scale, None, BF16), HOPPER).items()
    assert name.startswith(f"scaled_mm_{schedule}_int8_bf16_")
    assert "gl.warp_specialize" in source
