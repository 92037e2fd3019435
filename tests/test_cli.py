"""The command line: doctor and explain say what they should, without a GPU, a checkpoint or any
data; mistakes are told and give status 2."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import hadagraph
from hadagraph import cli, compat
from hadagraph.comparison import compare, trace
from hadagraph.config import Config
from hadagraph.device import CHIPS, DeviceProfile, chip_named
from hadagraph.measurement import profile_of
from hadagraph.shapes import SHAPES, blocks, example

SMALL = ["--layers", "1", "--batch", "1", "--sequence", "256"]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """What is no terminal gets a readable table all the same."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def graphs():
    """Of one layer of SmolLM2, on few tokens."""
    with compat.without_data():
        return trace(blocks("smollm2-135m", 1), example("smollm2-135m", 1, 256))


@pytest.fixture
def _traced_before(graphs, monkeypatch):
    monkeypatch.setattr(cli, "_traced", lambda options: (graphs, "traced before"))


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_console_script_is_this_one():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"hadagraph": "hadagraph.cli:main"}


def test_doctor_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert torch.__version__ in out and hadagraph.__version__ in out
    assert "No CUDA device" in out and all(chip in out for chip in CHIPS)
    assert "native" not in out
    status, _, err = run(capsys, "doctor", "--measure")
    assert status == 2 and "--measure needs a CUDA device" in err


def test_doctor_with_a_gpu(capsys, monkeypatch):
    """A mocked one: its profile's figures, where they come from, and what is native on it."""
    properties = type("Properties", (), {"total_memory": 141 * 2**30})()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    measured = []
    monkeypatch.setattr(cli, "measure_device", measured.append)
    status, out, _ = run(capsys, "doctor")
    assert status == 0 and not measured
    assert "NVIDIA H200, compute capability 9.0, 141 GiB" in out
    assert "profile: measured on one H200 (a table; --measure replaces it)" in out
    assert f"{chip_named('h200').gemm('int8').tflops:.0f}" in out
    (int8,) = [line for line in out.splitlines() if "int8" in line and "native" in line]
    assert "emulated" in int8  # its block scales
    assert run(capsys, "doctor", "--measure")[0] == 0
    assert measured == [torch.device("cuda", 0)]


def test_explain_prints_the_plan_and_compares(capsys):
    status, out, err = run(
        capsys, "explain", "smollm2-135m", "--target", "H200", "--recipe", "auto", *SMALL
    )
    assert status == 0, err
    assert "smollm2-135m: 1 of 30 layers, 1 x 256 tokens, bf16" in out
    assert "recipe auto, planned for H200" in out
    assert "0.down_proj" in out and "stays bf16: " in out
    for recipe in ("auto", "int8_rotated", "fp8_rowwise", "fp8_tensorwise"):
        (line,) = [line for line in out.splitlines() if line.startswith(f"│ {recipe} ")]
        assert "0 of 21" in line and "1.00" in line


def test_explain_for_a_chip_with_block_scales(capsys):
    status, out, _ = run(
        capsys, "explain", "llama3-8b", "--target", "b200", "--recipe", "auto", "--budget", "10",
        "--layers", "1",
    )  # fmt: skip
    assert status == 0
    assert "fp4_e2m1/block_contracted" in out and "│ mxfp8 " in out
    (line,) = [line for line in out.splitlines() if line.startswith("│ int8_rotated ")]
    assert "1.00" in line  # int8 has no fast instruction there, and stays


@pytest.mark.usefixtures("_traced_before")
def test_explain_without_a_profile(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, _ = run(capsys, "explain", "smollm2-135m", "--recipe", "int8_rotated")
    assert status == 0
    assert "without a device's profile" in out and "21 of 21" in out


@pytest.mark.slow
def test_explain_a_hugging_face_configuration(capsys, tmp_path):
    pytest.importorskip("transformers")
    configuration = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256,
        "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 5, "vocab_size": 1000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    status, out, err = run(capsys, "explain", tmp_path, "--target", "h200", *SMALL)
    assert status == 0, err
    assert "1 of 5 layers" in out
    assert "layers.0.mlp.down_proj" in out and "lm_head" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smollm2-135m", "--target", "h2000"), "option target must be one of H200, "),
        (("smollm2-135m", "--recipe", "int9"), "recipe must be one of "),
        (("smollm2-135m", "--budget", "-3"), "option error_budget_db must be a finite number"),
        (("smollm2-135m", "--batch", "0"), "--batch must be at least 1, got 0"),
        (("smollm2-135m", "--profile", "nowhere.json"), "option profile must be a Profile or"),
        (("no/such/folder",), "model must be one of "),
    ],
)
def test_mistakes_are_told(capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, _, err = run(capsys, "explain", *arguments)
    assert status == 2
    assert err.startswith("hadagraph explain: ") and message in err


def test_plans_leave_the_traced_graphs_alone(graphs):
    before = [str(graph) for graph in graphs]
    first, second = compare(graphs, Config(keep=()), ["int8_rotated"] * 2, None)
    assert [str(graph) for graph in graphs] == before
    assert first == second and first.predicted is None
    assert [report.kind for report in first.reports] == ["training"]
    assert first.worst_db >= 30.0 and first.emulated == 0


@pytest.mark.usefixtures("_traced_before")
def test_emulated_recipes_have_no_predicted_time(capsys):
    _, out, _ = run(capsys, "explain", "smollm2-135m", "--recipe", "mxfp4", "--target", "h200")
    (line,) = [line for line in out.splitlines() if line.startswith("│ mxfp4 ")]
    cells = [cell.strip() for cell in line.split("│")]
    assert cells[2:6] == ["-", "-", "21 of 21", "21"]


def test_every_graph_counts():
    class Two(nn.Module):
        def forward(self, x, w):
            y = x @ w
            torch._dynamo.graph_break()
            return y.sin() @ w

    profile: DeviceProfile = replace(CHIPS["H200"])
    w = torch.zeros(64, 64, requires_grad=True)
    graphs = trace(Two(), torch.zeros(32, 64), w)
    (found,) = compare(graphs, Config(), ["int8_rotated"], profile)
    assert len(found.reports) == 2 and found.predicted.us == found.predicted.none_us


def test_shapes_are_those_of_the_models():
    with compat.without_data():
        for name, shape in SHAPES.items():
            (block,) = blocks(name, 1)
            linears = sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
            head = shape.width // shape.heads
            attention = 2 * shape.width**2 + 2 * shape.width * shape.kv_heads * head
            assert linears == attention + 3 * shape.width * shape.hidden
    with pytest.raises(ValueError, match="shape must be one of llama3-8b, "):
        blocks("llama9", 1)


def test_no_profile_of_a_cpu():
    assert profile_of(torch.device("cpu")) is None
