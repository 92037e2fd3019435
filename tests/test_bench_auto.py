"""The benchmarks of the time model and of recipe auto: how points become shares, what counts as a
rival of auto, and a tiny run."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hadagraph.codegen import precompile
from hadagraph.cost import gemm_us, quantizer_us
from hadagraph.device import CHIPS

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import auto as auto_bench  # noqa: E402
import time_model  # noqa: E402
from cost_grid import FORMATS, TARGET_GEMMS  # noqa: E402

H200 = CHIPS["H200"]
RECORD = json.loads((BENCH / "results" / "time_model.json").read_text())["points"]


def perfect_points(profile=H200):
    """What a device would measure whose times are as predicted."""
    gemms, quantizers = [], []
    for _, each in time_model.linears():
        T, K, N = each.T, each.K, each.N
        roles = (("output", T, N, K), ("grad_input", T, K, N), ("grad_weight", N, K, T))
        for role, M, n, C in roles:
            gemms += [
                {
                    "kernel": f,
                    "role": role,
                    "M": M,
                    "N": n,
                    "C": C,
                    "us": gemm_us(profile, M, n, C, f),
                }
                for f in ("bf16", "int8", "fp8")
            ]
        for t, k in ((T, K), (T, N), (N, K)):
            for rate in profile.quantizers:
                us = quantizer_us(profile, t, k, rate.layouts, rate.kind)
                name = f"{rate.layouts} {rate.kind}"
                quantizers.append({"kernel": name, "T": t, "K": k, "us": us})
                quantizers.append({"kernel": f"{name} weight", "T": t, "K": k, "us": us})
    return {"gemms": gemms, "quantizers": quantizers, "steady": True}


def test_a_perfect_model_is_within_everywhere_and_one_off_by_a_fifth_nowhere():
    points = perfect_points()
    found = list(time_model.entries(points, H200))
    linears = len(time_model.linears())
    of_linears = [each for each in found if each.group != "targets"]
    assert len(of_linears) == linears * 4 * len(time_model.WAYS)
    assert all(each.ratio == pytest.approx(1.0) for each in found)
    assert time_model.share(found) == 1.0
    for row in points["gemms"] + points["quantizers"]:
        row["us"] *= 1.2
    assert time_model.share(list(time_model.entries(points, H200))) == 0.0


def test_measured_shape_by_shape_every_shape_is_whole():
    """What a run that is cut short has measured makes entries, the large GEMMs' first."""
    every = list(time_model.work())
    assert len(every) == len(TARGET_GEMMS) + len(time_model.linears())
    gemms, quantizers = [], []
    ways = len(time_model.WAYS)
    for count, (problems, matrices) in enumerate(every, 1):
        for role, M, N, C in problems:
            row = {"role": role, "M": M, "N": N, "C": C}
            gemms += [{"kernel": f, "us": gemm_us(H200, M, N, C, f)} | row for f in FORMATS]
        for (T, K), names in matrices.items():
            for name in names:
                us = quantizer_us(H200, T, K, *name.split()[:2])
                quantizers.append({"kernel": name, "T": T, "K": K, "us": us})
        points = {"gemms": gemms, "quantizers": quantizers, "steady": True}
        found = list(time_model.entries(points, H200))
        whole = min(count, len(TARGET_GEMMS)) + 4 * max(count - len(TARGET_GEMMS), 0)
        assert len(found) >= whole * ways  # more where shapes share what they need
    assert len(found) == (len(TARGET_GEMMS) + 4 * len(time_model.linears())) * ways
    assert time_model.share(found) == 1.0


def test_rates_of_one_half_predict_the_other(capsys):
    """A device with other rates, whose power limit is in what it measures."""
    other = replace(
        H200,
        gemms=tuple(replace(r, tflops=0.7 * r.tflops, sustained=500.0) for r in H200.gemms),
        quantizers=tuple(replace(r, share=0.7 * r.share) for r in H200.quantizers),
    )
    device = {"device": "H200", "capability": (9, 0), "sms": 132, "host": []}
    points = perfect_points(other) | device | {"copy_bytes_per_s": 1e6 * H200.copy_bytes_per_us}
    assert time_model.share(list(time_model.entries(points, H200))) < 0.1
    mine, others = time_model.divided(points, list(time_model.work())[-1:])
    for kind, least in (("gemms", 9), ("quantizers", 30)):
        assert least <= len(mine[kind]) == len(points[kind]) - len(others[kind])
        assert not [row for row in mine[kind] if row in others[kind]]
    time_model.print_fit(points, time_model.Console(width=120))
    printed = capsys.readouterr().out
    assert "GemmRate(format='int8'" in printed
    (held_out,) = re.findall("other half of the shapes: ([0-9.]+) of", printed)
    assert float(held_out) > 0.95


def test_bursts_are_compared_without_the_power_limit():
    rates = tuple(replace(rate, sustained=math.inf) for rate in H200.gemms)
    points = perfect_points(replace(H200, gemms=rates))
    assert time_model.share(list(time_model.entries(points, H200))) < 0.9
    assert time_model.share(list(time_model.entries(points | {"steady": False}, H200))) == 1.0


def test_no_shape_is_an_error_and_no_share():
    with pytest.raises(ValueError, match="no shape was measured whole"):
        time_model.share([])


def test_kernels_are_compiled_ahead(monkeypatch):
    calls = []
    monkeypatch.setattr(precompile, "compile_ahead", lambda found, _: calls.extend(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    first = next(iter(time_model.work()))
    linear = list(time_model.work())[-1]
    time_model.compile_ahead([first, linear])
    assert {op for op, _ in calls} == {
        "scaled_mm",
        "quantize_rows",
        "quantize_columns",
        "quantize_both",
    }
    for op, arguments in calls:
        if arguments[0].dtype != torch.float8_e4m3fn:  # a library multiplies that
            assert precompile.requests_for(op, arguments, (9, 0)), (op, arguments)


def test_the_committed_grid_is_predicted():
    found = list(time_model.entries(RECORD, H200))
    assert {each.what for each in found} == {"GEMM", "Linear"}
    assert len({each.shape for each in found if each.group == "targets"}) == len(TARGET_GEMMS)
    assert time_model.share(found) > 0.9
    off = replace(H200, copy_bytes_per_us=H200.copy_bytes_per_us / 3)
    assert time_model.share(list(time_model.entries(RECORD, off))) < 0.6


def rows(**times):
    worst = {"int8_rotated": 31.0, "fp8_rowwise": 27.0, "fp8_tensorwise": 22.0}
    found = {
        name: {"recipe": name, "ms": ms, "worst_db": worst[name]}
        for name, ms in times.items()
        if name in worst
    }
    found["inductor bf16"] = {"recipe": "bf16", "ms": times["bf16"]}
    return found


def test_auto_is_compared_with_what_meets_its_budget():
    found = rows(bf16=10.0, int8_rotated=8.0, fp8_rowwise=7.0, fp8_tensorwise=6.0)
    for budget, ms, worst in ((30.0, 8.1, 31.0), (24.0, 7.5, 26.0), (50.0, 10.0, None)):
        name = f"auto, {budget:g} dB"
        found[name] = {"recipe": "auto", "ms": ms, "worst_db": worst, "budget": budget}
    by_name = {claim["auto"]: claim for claim in auto_bench.claims(found)}
    assert by_name["auto, 30 dB"]["fastest"] == "int8_rotated"
    assert by_name["auto, 30 dB"]["within"]
    assert by_name["auto, 24 dB"]["fastest"] == "fp8_rowwise"
    assert not by_name["auto, 24 dB"]["within"]
    assert by_name["auto, 50 dB"]["fastest"] == "inductor bf16"
    assert all(claim["meets_budget"] for claim in by_name.values())
    found["auto, 30 dB"]["worst_db"] = 26.5  # fixed recipes as precise as that qualify
    missed = auto_bench.claims(found)[0]
    assert not missed["meets_budget"] and missed["short_db"] == 3.5 and not missed["within_model"]
    assert missed["fastest"] == "fp8_rowwise"
    del found["auto, 30 dB"]["ms"]  # it failed
    assert len(auto_bench.claims(found)) == 2


def test_a_host_that_slows_down_halfway_changes_no_verdict():
    slower = (1.0, 1.0, 1.0, 1.3, 1.3)
    found = rows(bf16=10.0, int8_rotated=8.0)
    found["auto, 30 dB"] = {"recipe": "auto", "ms": 10.4, "worst_db": 31.0, "budget": 30.0}
    for name, ms in (("inductor bf16", 10.0), ("int8_rotated", 8.0), ("auto, 30 dB", 8.0)):
        found[name]["round_ms"] = [ms * factor for factor in slower]
    found["auto, 30 dB"]["round_ms"][2] *= 1.3  # it slowed down within this round
    (claim,) = auto_bench.claims(found)
    assert claim["fastest"] == "int8_rotated"
    assert claim["ratio"] == pytest.approx(1.0) and claim["within"]


def test_the_committed_verdicts_follow_from_their_rounds():
    for case in json.loads((BENCH / "results" / "auto.json").read_text())["cases"]:
        assert case["claims"] == auto_bench.claims(case["variants"])


@pytest.mark.slow
def test_a_tiny_run(monkeypatch, tmp_path):
    out = tmp_path / "auto.json"
    arguments = (
        "auto.py --cases blocks --shape tiny --blocks 1 --batch 1 --sequence 64 --rounds 1 "
        f"--repeats 1 --budgets 30 --out {out}"
    )
    monkeypatch.setattr(sys, "argv", arguments.split())
    auto_bench.main()
    (case,) = json.loads(out.read_text())["cases"]
    assert all("ms" in row for row in case["variants"].values())
    assert len(case["claims"]) == 2 and all(c["meets_budget"] for c in case["claims"])
