"""Emitted source: the same for the same spec, stable against goldens, only the lines it needs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from hadagraph.codegen.choose import select_scaled_mm
from hadagraph.codegen.emit import emit
from hadagraph.codegen.listing import specs_for
from hadagraph.codegen.spec import KernelSpec
from hadagraph.codegen.store import load_module, write_source

GOLDEN = Path(__file__).parent.parent / "golden"
X = torch.empty(16384, 4096, dtype=torch.bfloat16, device="meta")
ROTATED, PLAIN = "int8/per_kept_index/h128", "fp8_e4m3/per_kept_index"


def matmul(bias: torch.dtype | None, M: int = 8192, C: int = 4096) -> KernelSpec:
    bf16 = torch.bfloat16
    return select_scaled_mm(M, 4096, C, "int8", "int8", (False, False), bias, bf16, (9, 0))


def cases() -> dict[str, KernelSpec]:
    both = specs_for("quantize_both", (X, ROTATED, ROTATED), (9, 0))
    return {
        "quantize_rows_rotated": specs_for("quantize_rows", (X, ROTATED), (9, 0))[0],
        "quantize_rows_plain": specs_for("quantize_rows", (X, PLAIN), (9, 0))[0],
        "amax_both": both[0],
        "quantize_both": both[1],
        "scaled_mm": matmul(None),
        "scaled_mm_bias_pointers": select_scaled_mm(
            100, 50, 80, "int8", "int8", (False, True), torch.bfloat16, torch.float16, (8, 0)
        ),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_golden(name, update_golden):
    source = emit(cases()[name])
    path = GOLDEN / f"{name}.py"
    if update_golden:
        path.write_text(source)
    assert source == path.read_text()


@pytest.mark.parametrize("name", list(cases()))
def test_source_is_one_readable_function(name):
    source = emit(cases()[name])
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == [cases()[name].name]
    assert max(len(line) for line in source.splitlines()) <= 132


def test_only_the_lines_that_a_spec_needs():
    plain = emit(cases()["quantize_rows_plain"])
    assert "tl.dot" not in plain
    assert "matrix" not in plain
    assert "mask" not in plain
    assert "bias" not in emit(matmul(None)).replace("+ bias", "")
    assert "bias_ptr" in emit(matmul(torch.float32))
    assert "mask" in emit(matmul(None, M=8191))
    assert "total" in emit(matmul(None, C=1 << 18))


def test_the_stored_file_is_whole_and_shared(tmp_path):
    source = emit(cases()["scaled_mm"])
    first = write_source(source, "scaled_mm", tmp_path)
    assert write_source(source, "scaled_mm", tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert first.read_text() == source
    assert hasattr(load_module(first), cases()["scaled_mm"].name)
