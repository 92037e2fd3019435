"""Shared by all tests: hypothesis profiles, the `gpu` marker, `--update-golden`, a seed, and an
environment without hadagraph's variables."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# Tracing a graph takes as long as it takes: no deadlines. CI draws the same examples every time.
hypothesis.settings.register_profile("dev", deadline=None, max_examples=20, print_blob=True)
DEV = hypothesis.settings.get_profile("dev")
hypothesis.settings.register_profile("ci", DEV, derandomize=True)
hypothesis.settings.register_profile("thorough", DEV, max_examples=300)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


class TorchRandom:
    """torch's generator in the form that hypothesis seeds before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()
hypothesis.register_random(TORCH_RANDOM)  # type: ignore[arg-type]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden", default=False))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("HADAGRAPH_DUMP", raising=False)
    monkeypatch.delenv("HADAGRAPH_DEBUG", raising=False)
