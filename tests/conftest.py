"""Shared by all tests: hypothesis profiles, the `gpu` marker, `--update-golden`, a seed, an
environment without hadagraph's variables, and compilation from scratch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

import hadagraph
from hadagraph import compat

GOLDEN = Path(__file__).parent / "golden"
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


@pytest.fixture
def assert_golden(update_golden: bool) -> Callable[[str, str], None]:
    """(name of a file in tests/golden, what it must hold)"""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if update_golden:
            path.write_text(text)
        assert text == path.read_text(), "changed on purpose? then pytest --update-golden"

    return check


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


@pytest.fixture
def uncached() -> Iterator[None]:
    """Every graph is compiled and reported anew: one out of a cache would run no pass."""
    torch._dynamo.reset()
    hadagraph.reset_report()
    with compat.without_caches():
        yield
    torch._dynamo.reset()
