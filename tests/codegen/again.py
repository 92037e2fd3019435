"""Runs a test file again in a process of its own: in Triton's interpreter, which must be chosen
before triton is imported, or with another triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_36 = os.environ.get("HADAGRAPH_TRITON36")
interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs under TRITON_INTERPRET=1")
compiler = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
starts_interpreter = pytest.mark.skipif(INTERPRETED, reason="starts the process that this one is")
with_triton_36 = pytest.mark.skipif(not TRITON_36, reason="HADAGRAPH_TRITON36 names no triton 3.6")


def assert_passes_interpreted(path: str) -> None:
    _assert_passes(path, {"TRITON_INTERPRET": "1"})


def assert_passes_with_triton_36(path: str, *arguments: str) -> None:
    """`arguments`: pytest's, such as which tests."""
    assert TRITON_36 is not None
    _assert_passes(path, {"PYTHONPATH": TRITON_36, "HADAGRAPH_TRITON36": ""}, *arguments)


def _assert_passes(path: str, variables: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, *arguments]
    environment = os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout  # not all skipped
