"""Option target: the plan of another chip, carried out on a CPU by the references and refused where
it would have to run on a device that is another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hadagraph
from hadagraph import backend
from hadagraph.config import Config, parse_options
from hadagraph.device import CHIPS, chip_named


def options(target="b200", **others):
    given = {"recipe": "auto", "target": target, "error_budget_db": 10.0, "never_slower": False}
    return given | others


@pytest.mark.parametrize("name", ["B200", "b200", "rtx 5090", "RTX 5090"])
def test_chips_by_name_in_any_case(name):
    assert chip_named(name).name.lower() == name.lower()
    assert parse_options(None, {"target": name}).target == name


def test_an_unknown_chip_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"option target must be one of H200, .*got 'b2000'"):
        parse_options(None, {"target": "b2000"})
    with pytest.raises(ValueError, match="option target must be NoneType or str, got int: 200"):
        parse_options(None, {"target": 200})


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_is_a_number_of_decibels(budget):
    with pytest.raises(ValueError, match="option error_budget_db must be a finite number"):
        Config(error_budget_db=budget)
    assert parse_options(None, {"error_budget_db": 25}).error_budget_db == 25


def test_the_plan_of_another_chip_runs_emulated():
    torch.manual_seed(0)
    x = torch.randn(512, 512, requires_grad=True)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
    chips = {}
    for target in ("b200", "h200"):
        given = options(target, overrides={"0": "mxfp8"})
        explanation = hadagraph.explain(model, x, options=given)
        (report,) = explanation.reports
        assert report.target == CHIPS[target.upper()].name and report.emulated
        assert f"planned for {report.target}, emulated" in str(explanation)
        chips[target] = {d.site.name: d.lhs.emulated for d in report.plan.decisions if d.lowered}
    # mxfp8 is native on one of the chips.
    assert chips["b200"]["0"] is False and chips["h200"]["0"] is True
    torch.compiler.reset()
    compiled = torch.compile(
        model, backend="hadagraph", options=options(executor="eager", overrides={"0": "mxfp8"})
    )
    out = compiled(x)
    out.sum().backward()
    assert x.grad is not None
    error = (out - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.3


def test_nothing_compiles_for_another_chip_on_a_cpu():
    torch.compiler.reset()
    compiled = torch.compile(nn.Linear(32, 32), backend="hadagraph", options=options())
    with pytest.raises(
        Exception, match="option target='b200' plans for B200, but nothing compiles"
    ):
        compiled(torch.randn(32, 32))


def test_another_device_is_refused_and_the_same_one_is_itself(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(backend, "_cuda_devices", lambda inputs: [cuda])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(backend, "profile_of", lambda device: CHIPS["H200"])
    for executor in ("inductor", "eager"):
        with pytest.raises(ValueError, match="but the model is on NVIDIA H200"):
            backend._planned_for(Config(target="b200", executor=executor), ())
    config, profile = backend._planned_for(Config(target="h200"), ())
    assert config.target is None and profile is CHIPS["H200"]


def test_the_cache_key_covers_target_and_budget():
    keys = {
        config.cache_key()
        for config in (Config(), Config(target="b200"), Config(error_budget_db=20.0))
    }
    assert len(keys) == 3
