"""Emitted source: the same for the same spec, stable against goldens, only the lines it needs."""

from __future__ import annotations

import ast
import re
from dataclasses import replace

import pytest
import torch
from kernel_checks import CHAINS
from torch._subclasses import FakeTensorMode

from hadagraph.codegen import tune
from hadagraph.codegen.choose import select_scaled_mm
from hadagraph.codegen.emit import emit
from hadagraph.codegen.listing import specs_for
from hadagraph.codegen.pointwise import EXPRESSIONS, SILU, chain_steps, zero_of_zeros
from hadagraph.codegen.spec import VECTORS, WIDTH, ColumnWriteSpec, KernelSpec
from hadagraph.codegen.store import load_module, write_source
from hadagraph.region import Chain

X = torch.empty(16384, 4096, dtype=torch.bfloat16, device="meta")
FP16 = torch.float16
ROTATED, PLAIN = "int8/per_kept_index/h128", "fp8_e4m3/per_kept_index"
H32, H4 = "int8/per_kept_index/h32", "int8/per_kept_index/h4"


def matmul(bias: torch.dtype | None, M: int = 8192, C: int = 4096) -> KernelSpec:
    """In Triton, also where one in Gluon would be chosen."""
    config = tune.scaled_mm_configuration(M, 4096, True, (9, 0))
    return matmul_of((M, 4096, C), bias, config=config)


def matmul_of(sizes, bias, out=torch.bfloat16, scales=(False, False), config=None) -> KernelSpec:
    return select_scaled_mm(*sizes, "int8", "int8", scales, bias, out, (9, 0), config)


def chain(name: str, row: str, column: str, value: bool) -> tuple[object, ...]:
    """Arguments of `quantize_chain` for 1000 x 4096 outputs."""
    text = CHAINS[name]
    parsed = Chain.parse(text)
    x = torch.empty(1000, 4096, device="meta")
    count = len(parsed.outputs)
    return [x] * len(parsed.inputs), text, [row] * count, [column] * count, [value] * count


def cases() -> dict[str, KernelSpec]:
    both = specs_for("quantize_both", (X, ROTATED, ROTATED), (8, 0))
    chain_rows = specs_for("quantize_chain", chain("silu_mul", ROTATED, "", True), (9, 0))
    chain_both = specs_for("quantize_chain", chain("add", ROTATED, H32, False), (9, 0))
    columns = specs_for("quantize_columns", (X, H32), (9, 0))
    write = specs_for("quantize_columns", (X, H4), (9, 0))[1]
    assert isinstance(write, ColumnWriteSpec)
    return {
        "chain_rows": chain_rows[0],
        "chain_column_amax": chain_both[0],
        "column_amax": columns[0],
        "quantize_columns": replace(write, chunk=VECTORS),
        "quantize_rows_rotated": specs_for("quantize_rows", (X, ROTATED), (9, 0))[0],
        "quantize_rows_plain": specs_for("quantize_rows", (X, PLAIN), (9, 0))[0],
        "amax_both": both[0],
        "quantize_both": both[1],
        "scaled_mm": matmul(None),
        "scaled_mm_gluon": matmul_of((8192, 4096, 4096), None),
        "scaled_mm_gluon_edges": matmul_of(
            (8191, 4088, 4096), torch.bfloat16, torch.float32, (False, True)
        ),
        "scaled_mm_gluon_cooperative": select_scaled_mm(
            *(8191, 4088, 4096),
            "int8",
            "int8",
            (True, False),
            None,
            FP16,
            (9, 0),
            l2_bytes=50 << 20,
        ),
        "scaled_mm_bias_pointers": select_scaled_mm(
            100, 50, 80, "int8", "int8", (False, True), torch.bfloat16, torch.float16, (8, 0)
        ),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_golden(name, assert_golden):
    assert_golden(f"{name}.py", emit(cases()[name]))


@pytest.mark.parametrize("name", list(cases()))
def test_source_is_one_readable_function(name):
    source = emit(cases()[name])
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    parts = ["tile_at", "next_stage", "load", "store", "multiply"] if "gluon" in name else []
    assert [function.name for function in functions] == [*parts, cases()[name].name]
    assert max(len(line) for line in source.splitlines()) <= 132


def test_only_the_lines_that_a_spec_needs():
    plain = emit(cases()["quantize_rows_plain"])
    assert "tl.dot" not in plain
    assert "matrix" not in plain
    assert "mask" not in plain.replace("mask=finite", "")
    assert "bias" not in emit(matmul(None)).replace("+ bias", "")
    assert "bias_ptr" in emit(matmul(torch.float32))
    assert "mask" in emit(matmul(None, M=8191))
    assert "total" in emit(matmul(None, C=1 << 18))


def test_only_the_lines_that_a_kernel_in_gluon_needs():
    plain, edges = (emit(cases()[f"scaled_mm_gluon{name}"]) for name in ("", "_edges"))
    assert "mask" not in plain and "bias" not in plain
    assert plain.count("gl.load(b_scale_ptr") == 2 and plain.count("    store(") == 2
    assert edges.count("gl.load(b_scale_ptr") == 1 and edges.count("    store(") == 4
    assert edges.count("gl.load(bias_ptr") == edges.count("< N, other=0.0") == 4
    assert edges.count("< M, other=0.0") == 1


def test_only_the_lines_that_a_chain_needs():
    rows, amax = (emit(cases()[f"chain_{name}"]) for name in ("rows", "column_amax"))
    assert "mask" not in rows.replace("mask=finite", "")
    assert rows.count("tl.store(value_ptr") == WIDTH // cases()["chain_rows"].width == 2  # parts
    assert amax.count("tl.load(v0_t_ptr") == amax.count("tl.load(v1_t_ptr") == 32
    assert amax.count("tl.store(value0_t_ptr") == 32
    rms_norm = specs_for("quantize_chain", chain("rms_norm", "", H32, False), (9, 0))
    write = emit(rms_norm[1])
    assert "libdevice" not in write
    assert "value0" not in write
    assert write.count("tl.load(v2_ptr") == 1
    gelu = specs_for("quantize_chain", chain("gelu_tanh", "", H32, False), (9, 0))[0]
    assert "libdevice.tanh" in emit(gelu)
    assert "import libdevice" in emit(gelu)


@pytest.mark.parametrize(
    ("steps", "by_sigmoid"),
    [
        ("neg %0; exp %2; add %3 1.0; div %0 %4", True),
        ("neg %0; exp %2; add %3 1.0; div %1 %4", False),
        ("neg %0; exp %2; add %3 2.0; div %0 %4", False),
        ("neg %0; exp %2; add %3 %1; div %0 %4", False),
        ("neg %0; exp %2; add 1.0 %3; div %0 %4", False),  # not how it is decomposed
        ("abs %0; exp %2; add %3 1.0; div %0 %4", False),
        ("exp %0; add %2 1.0; div %0 %3; neg %4", False),
        ("neg %0; exp %2; add %3 1.0; div %4 %0", False),
        ("neg %0; exp %2; add %3 1.0; div 1.0 %4", False),
        ("neg %0; exp %2; add %3 1.0; reciprocal %4", True),
        ("neg %1; exp %2; add %3 1.0; reciprocal %4", True),
        ("neg %0; exp %2; add %3 0.5; reciprocal %4", False),
        ("exp %0; neg %2; add %3 1.0; reciprocal %4", False),
        ("neg 1.0; exp %2; add %3 1.0; reciprocal %4", False),
    ],
)
def test_only_silu_and_sigmoids_are_computed_by_a_sigmoid(steps, by_sigmoid):
    chain = Chain.parse(f"in bf16 matrix; in bf16 matrix; {steps}; out %5 bf16")
    lines = chain_steps(chain)
    assert ("fast_dividef" in lines[-1]) == by_sigmoid
    assert len(lines) == (1 if by_sigmoid else 4)


def test_a_sigmoid_reads_its_own_argument():
    text = "in bf16 matrix; in bf16 matrix; neg %1; exp %2; add %3 1.0; reciprocal %4; "
    (line,) = chain_steps(Chain.parse(f"{text}mul %0 %1; out %5 bf16"))
    assert line == f"v5 = {EXPRESSIONS['sigmoid'].format('v1')}"


@pytest.mark.parametrize("name", ["silu_mul_three", "silu_mul_three_by_exp"])
def test_silu_and_its_backward_are_computed_by_sigmoids(name):
    """As decomposed by torch 2.13, and by 2.11."""
    expressions = [line.split(" = ")[1] for line in chain_steps(Chain.parse(CHAINS[name]))]
    of_x = [each for each in expressions if "exp" in each]
    assert of_x == [SILU.format("v0"), EXPRESSIONS["sigmoid"].format("v0")]


def test_what_reads_a_part_of_silu_too_has_it():
    text = "in bf16 matrix; neg %0; exp %1; add %2 1.0; div %0 %3; mul %4 %2; out %5 bf16"
    lines = chain_steps(Chain.parse(text))
    assert [line.split(" = ")[0] for line in lines] == ["v1", "v2", "v4", "v5"]


@pytest.mark.parametrize(
    ("text", "of_rows", "of_columns"),
    [
        (CHAINS["silu_mul"], True, True),
        (CHAINS["silu_mul_three"], True, True),
        (CHAINS["silu_mul_three_by_exp"], True, True),
        (CHAINS["gelu_tanh"], True, True),
        # one value a row, which columns that are not there have too
        (CHAINS["rms_norm"], False, False),
        ("in bf16 matrix; in fp32 rows; mul %0 %1; out %2 bf16", False, True),
        ("in bf16 matrix; in bf16 columns; mul %0 %1; out %2 bf16", True, False),
        ("in bf16 matrix; in fp32 scalar; mul %0 %1; out %2 bf16", False, False),
        # not 0 of zeros, or only where a function is exact
        (CHAINS["offset"], False, False),
        ("in bf16 matrix; exp %0; sub %1 1.0; out %2 bf16", False, False),
        ("in bf16 matrix; rsqrt %0; mul %0 %1; out %2 bf16", False, False),
        ("in bf16 matrix; exp %0; sub 1.0 %1; relu %2; out %3 bf16", False, False),
        ("in bf16 matrix; sigmoid %0; add %1 %1; exp %0; sub %2 %3; out %4 bf16", False, False),
        ("in bf16 matrix; neg %0; out %1 bf16", False, False),
        ("in bf16 matrix; add %0 1.001; sub %1 1.0; out %2 bf16", False, False),
    ],
)
def test_an_output_that_is_0_of_zeros_is_not_chosen(text, of_rows, of_columns):
    """Where a tile reaches beyond the matrix, elements must be 0: by a choice, if not as made."""
    parsed = Chain.parse(text)
    x = torch.empty(90, 100, dtype=torch.bfloat16, device="meta")
    count, inputs = len(parsed.outputs), [x] * len(parsed.inputs)
    for row, column, free in ((H32, "", of_rows), ("", H32, of_columns)):
        arguments = (inputs, text, [row] * count, [column] * count, [False] * count)
        with FakeTensorMode():  # as while a graph is compiled
            sources = [emit(spec) for spec in specs_for("quantize_chain", arguments, (9, 0))]
        made = [line for source in sources for line in re.findall(r"^ +x\d\w* = .*", source, re.M)]
        chosen = [line for line in made if "tl.where(" in line]
        assert made and bool(chosen) == (not free)


def test_what_is_0_of_zeros_does_not_depend_on_the_default_dtype():
    chain = Chain.parse("in bf16 matrix; add %0 1.001; sub %1 1.0; out %2 bf16")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert not zero_of_zeros(chain, 0, ("matrix",))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("before", [0, 87, 88, 89, 998, 999, 1000])
def test_no_length_of_a_chain_hides_what_an_approximation_makes(before):
    steps = ["add %0 0.0", *(f"add %{i} 0.0" for i in range(1, before))][:before]
    text = f"in bf16 matrix; {''.join(f'{step}; ' for step in steps)}exp %{before}; "
    chain = Chain.parse(f"{text}out %{before + 1} bf16")
    assert not zero_of_zeros(chain, 0, ("matrix",))
    assert zero_of_zeros(
        Chain.parse(f"{text}mul %{before + 1} %0; out %{before + 2} bf16"), 0, ("matrix",)
    )


def test_a_long_chain_is_emitted_at_once():
    """Every value is read twice: 2^60 ways from the output to the input."""
    steps = [f"sigmoid %{2 * i}; mul %{2 * i} %{2 * i + 1}" for i in range(60)]
    text = f"in bf16 matrix; {'; '.join(steps)}; out %120 bf16"
    x = torch.empty(90, 100, dtype=torch.bfloat16, device="meta")
    (spec,) = specs_for("quantize_chain", ([x], text, [H32], [""], [False]), (9, 0))
    assert "tl.where(column" not in emit(spec)


def test_the_stored_file_is_whole_and_shared(tmp_path):
    source = emit(cases()["scaled_mm"])
    first = write_source(source, "scaled_mm", tmp_path)
    assert write_source(source, "scaled_mm", tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert first.read_text() == source
    assert hasattr(load_module(first), cases()["scaled_mm"].name)
