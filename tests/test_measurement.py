"""Measuring a device: what is kept, read back or ignored; no memory; a real device in time."""

from __future__ import annotations

import contextlib
import logging
import time

import pytest
import torch

import hadagraph
from hadagraph import measurement
from hadagraph.device import CHIPS, DeviceProfile

CUDA = torch.device("cuda", 0)
H200 = CHIPS["H200"]


class Properties:
    multi_processor_count = 120


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A machine with an H200, as far as the names go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(measurement.compat, "cuda_driver_version", lambda: 13000)
    monkeypatch.setattr(measurement, "source_directory", lambda: tmp_path / "hadagraph")
    return tmp_path / "hadagraph"


def test_without_a_gpu():
    assert measurement.profile_of(torch.device("cpu")) is None
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device must be a CUDA device, but torch finds none"):
            hadagraph.measure_device()


def test_the_table_until_there_is_a_measurement(pretended, monkeypatch):
    assert measurement.profile_of(CUDA) == H200
    monkeypatch.setattr(measurement, "_measured", lambda prior, deadline: prior)
    measured = hadagraph.measure_device()
    assert measured is not None and measured != H200
    assert (measured.name, measured.source) == ("NVIDIA H200", "measured")
    assert measured.multiprocessors == 120
    assert measurement.profile_of(CUDA) == measured
    (path,) = pretended.iterdir()
    assert DeviceProfile.from_json(path.read_text()) == measured


@pytest.mark.parametrize("what", ["driver", "torch", "name", "kernels"])
def test_a_measurement_holds_for_the_same_machine_and_kernels(pretended, monkeypatch, what):
    monkeypatch.setattr(measurement, "_measured", lambda prior, deadline: prior)
    measured = hadagraph.measure_device(0)
    assert measurement.profile_of(CUDA) == measured
    if what == "driver":
        monkeypatch.setattr(measurement.compat, "cuda_driver_version", lambda: 13010)
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    elif what == "name":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 NVL")
    else:
        monkeypatch.setattr(measurement, "kernel_sources_hash", lambda: "others")
    assert measurement.profile_of(CUDA) == H200


def test_a_spoilt_file_is_ignored_and_said(pretended, monkeypatch, caplog):
    monkeypatch.setattr(measurement, "_measured", lambda prior, deadline: prior)
    hadagraph.measure_device()
    (path,) = pretended.iterdir()
    path.write_text(path.read_text()[:50])
    assert measurement.profile_of(CUDA) == H200
    assert f"{path} is ignored" in caplog.text


def test_out_of_memory_leaves_the_table(pretended, monkeypatch, caplog):
    def fails(prior, deadline):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.\nmore")

    monkeypatch.setattr(measurement, "_measured", fails)
    with caplog.at_level(logging.WARNING, logger="hadagraph"):
        assert hadagraph.measure_device() == H200
    assert "NVIDIA H200 is not measured, no memory" in caplog.text
    assert not pretended.exists()


def test_devices_are_checked(pretended):
    with pytest.raises(ValueError, match="device must be a CUDA device, got device"):
        measurement.measure_device(torch.device("cpu"))


@pytest.mark.gpu
def test_a_real_device_in_time(monkeypatch, tmp_path):
    monkeypatch.setattr(measurement, "source_directory", lambda: tmp_path)
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.monotonic()
    profile = hadagraph.measure_device(seconds=10)
    assert time.monotonic() - began < 20  # the last point may begin just before the end
    assert torch.cuda.max_memory_allocated() - before <= 1 << 30
    assert profile == measurement.profile_of(torch.device("cuda", torch.cuda.current_device()))
    assert 0.3 < profile.copy_bytes_per_us / 1e6 < 20
    for rate in profile.gemms:
        assert rate.sustained > 10
