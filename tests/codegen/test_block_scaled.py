"""Block-scaled matmuls: which operands they take, that they compile for sm_100 and sm_120 to the
instructions of block-scaled tensor cores without a GPU, and, in Triton's interpreter, that codes
and scales are read as they lie. As in `test_interpreter`, one ordinary test runs this file again in
a process of its own.

The interpreter has no `tl.dot_scaled`: it is given one that decodes by tables, as the instructions
are documented (PTX ISA, "Block scaling for mma"; two fp4 codes a byte, the first in the low bits).
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from again import (
    INTERPRETED,
    assert_passes_interpreted,
    assert_passes_with_triton_36,
    compiler,
    interpreter,
    starts_interpreter,
    with_triton_36,
)
from encode_checks import multiplied_on
from test_compile import SHARED_LIMIT, compiled

from hadagraph.codegen.calls import arranged, block_scaled_mm_call
from hadagraph.codegen.choose_block_scaled import block_scaled_mm, block_scaled_refusal
from hadagraph.codegen.choose_encode import NATIVE_BLOCKS, NATIVE_CODES, mm_route
from hadagraph.codegen.emit import emit
from hadagraph.codegen.tune import MmConfig
from hadagraph.encode import Encoded, encode_reference, encoded_mm_reference
from hadagraph.formats import FORMATS, Encoding
from hadagraph.operands import has_native_gemm
from hadagraph.plan import OperandPlan

SM100, SM120 = (10, 0), (12, 0)
MXFP8 = "fp8_e4m3/block_contracted(32)/e8m0"
MXFP8_E5M2 = "fp8_e5m2/block_contracted(32)/h32/e8m0"
MXFP8_TILES = "fp8_e4m3/block_2d(32)/e8m0"
MXFP4 = "fp4_e2m1/block_contracted(32)/h32/e8m0/mse"
NVFP4 = "fp4_e2m1/block_contracted(16)/ue4m3/prescale"
NVFP4_TILES = "fp4_e2m1/block_2d(16)/ue4m3/prescale"
FP8_UE4M3 = "fp8_e4m3/block_contracted(16)/ue4m3"
PAIRS = {
    (MXFP8, MXFP8): ("kind::mxf8f6f4.block_scale.scale_vec::1X", "e4m3.e4m3.f32.ue8m0"),
    (MXFP8_E5M2, MXFP8_TILES): ("kind::mxf8f6f4.block_scale.scale_vec::1X", "e5m2.e4m3.f32.ue8m0"),
    (MXFP4, MXFP4): ("kind::mxf4.block_scale.scale_vec::2X", "e2m1.e2m1.f32.ue8m0"),
    (NVFP4, NVFP4_TILES): ("kind::mxf4nvf4.block_scale.scale_vec::4X", "e2m1.e2m1.f32.ue4m3"),
}


def parsed(pair: tuple[str, str]) -> tuple[Encoding, Encoding]:
    return Encoding.parse(pair[0]), Encoding.parse(pair[1])


# -------------------------------------------------------------------------- what they take


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("capability", [SM100, (10, 3), SM120])
def test_they_take(pair, capability):
    assert block_scaled_refusal(*parsed(pair), capability) is None
    assert mm_route(*parsed(pair), capability) == NATIVE_BLOCKS
    assert mm_route(*parsed(pair), (9, 0)) != NATIVE_BLOCKS


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (MXFP8, MXFP4, "fp8 times fp4"),
        (MXFP4, NVFP4, "both operands must have scales alike, not e8m0 and ue4m3"),
        (FP8_UE4M3, FP8_UE4M3, "with ue4m3 scales they take fp4_e2m1 only, not fp8_e4m3"),
        ("fp6_e3m2/block_contracted(32)/e8m0", MXFP8, "they take .* not fp6_e3m2"),
        ("fp4_e2m1/block_contracted(32)/ue5m3", MXFP4, "not .* with ue5m3"),
        ("fp4_e2m1/block_contracted(64)/e8m0", MXFP4, r"not block_contracted\(64\) with e8m0"),
        ("fp4_e2m1/block_contracted(16)", NVFP4, "not .* with fp32"),
        ("int8/per_tensor", MXFP8, "not int8"),
        ("fp8_e4m3/per_tensor", MXFP8, "not per_tensor with fp32"),
    ],
)
def test_they_refuse(left, right, reason):
    said = block_scaled_refusal(*parsed((left, right)), SM100)
    assert said is not None
    assert re.search(reason, said)
    for pair in ((left, right), (right, left)):
        assert mm_route(*parsed(pair), SM100) != NATIVE_BLOCKS


def test_other_devices_have_none():
    said = block_scaled_refusal(*parsed((MXFP8, MXFP8)), (9, 0))
    assert said == "compute capability 9.0 has none, 10.0 is needed"


TEXTS = (
    *dict.fromkeys(text for pair in PAIRS for text in pair),
    FP8_UE4M3,
    "int8/per_tensor/keep8of16",
    "int8/per_kept_index/stochastic",
    "int4/per_tensor",
    "fp8_e4m3/per_kept_index/stochastic",
    "fp6_e3m2/block_contracted(32)/e8m0",
    "fp4_e2m1/block_contracted(32)/ue5m3",
    "int8/block_contracted(32)/e8m0",
)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), SM100, SM120])
def test_a_plan_says_emulated_where_codes_are_decoded(capability):
    for pair in itertools.combinations_with_replacement(TEXTS, 2):
        left, right = parsed(pair)
        if FORMATS[left.format].is_integer != FORMATS[right.format].is_integer:
            continue
        plans = [
            OperandPlan(e.format, e.granularity, scale=e.scale, tokens_kept=e.tokens_kept)
            for e in (left, right)
        ]
        # int4 is widened to int8 first.
        native = mm_route(left, right, capability) in (NATIVE_CODES, NATIVE_BLOCKS)
        native &= "int4" not in (left.format, right.format)
        assert has_native_gemm(*plans, capability) == native


# -------------------------------------------------------------------------- what they compile to


@compiler
@pytest.mark.parametrize(
    ("pair", "sizes"),
    [*((pair, (100, 72, 320)) for pair in PAIRS), ((MXFP8, MXFP8), (4096, 4096, 4096))],
)
@pytest.mark.parametrize("capability", [SM100, SM120])
def test_instructions(capability, pair, sizes):
    spec = block_scaled_mm(sizes, *parsed(pair), "bf16", "bf16", capability)
    kernel = compiled(spec)
    kind, types = PAIRS[pair]
    ptx = kernel.asm["ptx"]
    if capability == SM100:
        assert f"tcgen05.mma.cta_group::1.{kind}" in ptx
        assert "cp.async.bulk.tensor" in ptx  # codes come by TMA
        assert "tcgen05.cp.cta_group::1.warpx4.32x128b" in ptx  # scales go past the registers
    else:
        products = {line.split()[0] for line in ptx.splitlines() if "mma.sync" in line}
        assert len(products) == 1
        assert "block_scale" in min(products)
        assert types in min(products)
    assert kernel.metadata.shared <= SHARED_LIMIT[capability]


@compiler
@with_triton_36
def test_with_triton_36():
    assert_passes_with_triton_36(__file__, "-k", "instructions")


# -------------------------------------------------------------------------- what they compute

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP8 = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


def _values(data: np.ndarray, format_name: str, kept_first: bool) -> np.ndarray:
    """[kept, C] of codes [kept, bytes], or [bytes, kept]."""
    codes = np.ascontiguousarray(data if kept_first else data.T).view(np.uint8)
    if format_name != "E2M1":
        return torch.from_numpy(codes).view(FP8[format_name]).float().numpy()
    pairs = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1)
    return pairs.reshape(len(codes), -1)


def _scales(handle: object, columns: int) -> np.ndarray:
    codes = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.uint8))  # type: ignore[attr-defined]
    wide = codes.shape[1] * 32 == columns
    dtype = torch.float8_e8m0fnu if wide else torch.float8_e4m3fn
    return codes.view(dtype).float().numpy().repeat(columns // codes.shape[1], 1)


def _dot_scaled(self, a, a_scale, a_format, b, b_scale, b_format, fast, a_pack, b_pack, acc):  # type: ignore[no-untyped-def]
    from triton.runtime.interpreter import TensorHandle

    assert a_pack and b_pack
    left = _values(a.data, a_format.name, True)
    right = _values(b.data, b_format.name, False)
    left = left * _scales(a_scale, left.shape[1])
    right = right * _scales(b_scale, right.shape[1])
    return TensorHandle(acc.data + left @ right.T, tl.float32)


if INTERPRETED:
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot_scaled = _dot_scaled
    checked = TritonSemantic.dot_scaled

    def dot_scaled(self, a, a_scale, a_format, b, b_scale, b_format, *rest):  # type: ignore[no-untyped-def]
        """Formats as the compiler hands them over."""
        formats = tl.constexpr(a_format), tl.constexpr(b_format)
        return checked(self, a, a_scale, formats[0], b, b_scale, formats[1], *rest)

    TritonSemantic.dot_scaled = dot_scaled


@pytest.mark.slow
@starts_interpreter
def test_interpreter_process():
    assert_passes_interpreted(__file__)


def operands(pair: tuple[str, str], sizes: tuple[int, int, int]) -> tuple[Encoded, Encoded]:
    M, N, C = sizes
    generator = torch.Generator().manual_seed(M + N + C)
    rows = [torch.randn(n, C, generator=generator) for n in (M, N)]
    rows[0] *= torch.exp2(torch.randint(-8, 9, (M, 1), generator=generator))
    left, right = (encode_reference(x, e, 1) for x, e in zip(rows, parsed(pair), strict=True))
    return left, right


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 sums of a few hundred products in another order, relative to each row's largest."""
    largest = expected.abs().amax(1, keepdim=True)
    assert bool(((got - expected).abs() <= 1e-5 * largest).all())


@interpreter
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("sizes", [(64, 64, 128), (70, 33, 320), (1, 17, 64)])
@pytest.mark.parametrize("pair", PAIRS)
def test_codes_and_scales_are_read_as_they_lie(pair, sizes, descriptors):
    config = MmConfig(32, 32, 128, 4, 1, descriptors)
    a, b = operands(pair, sizes)
    bias = torch.randn(sizes[1])
    spec = block_scaled_mm(sizes, *parsed(pair), "fp32", "fp32", SM100, config, arranged=False)
    multiply = block_scaled_mm_call(spec, a, b, sizes[2], torch.float32)
    expected = encoded_mm_reference(a, b, bias, *parsed(pair), torch.float32)
    assert_close(multiply(a, b, bias), expected)


@interpreter
@pytest.mark.parametrize("sizes", [(256, 128, 256), (130, 33, 320)])
@pytest.mark.parametrize("pair", PAIRS)
def test_arranged_scales(pair, sizes):
    a, b = operands(pair, sizes)
    spec = block_scaled_mm(
        sizes, *parsed(pair), None, "fp32", SM100, MmConfig(256, 128, 128, 4, 1, True)
    )
    assert spec.arranged
    multiply = block_scaled_mm_call(spec, a, b, sizes[2], torch.float32)
    expected = encoded_mm_reference(a, b, None, *parsed(pair), torch.float32)
    assert_close(multiply(a, b, None), expected)


def test_the_arrangement():
    scale = torch.arange(200 * 7).reshape(200, 7).remainder(251).to(torch.uint8)
    got = arranged(scale, 256, 8)
    assert got.shape == (2, 2 * 512)
    for row, column in ((0, 0), (31, 3), (32, 0), (127, 5), (128, 6), (199, 2)):
        place = row % 128 % 32 * 16 + row % 128 // 32 * 4 + column % 4
        assert got[row // 128, column // 4 * 512 + place] == scale[row, column]
    assert int((got != 0).sum()) == int((scale != 0).sum())


@interpreter
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("capability", [SM100, SM120])
def test_the_route_of_encoded_mm(pair, capability):
    a, b = operands(pair, (40, 24, 96))
    got = multiplied_on(capability, a, b, None, *pair, torch.bfloat16)
    expected = encoded_mm_reference(a, b, None, *parsed(pair), torch.bfloat16)
    assert got.dtype == torch.bfloat16
    # Rounded to bf16 after sums in another order: at most a step of 2^-8 apart.
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-4)


@interpreter
def test_what_is_not_finite_spoils_its_rows():
    x = torch.randn(20, 64)
    x[3, 40] = float("inf")
    text = NVFP4.removesuffix("/prescale")
    encoding = Encoding.parse(text)
    a, b = encode_reference(x, encoding, 1), encode_reference(torch.randn(8, 64), encoding, 1)
    got = multiplied_on(SM100, a, b, None, text, text, torch.float32)
    assert torch.equal(got.isnan(), (torch.arange(20) == 3)[:, None].expand(20, 8))


def test_equal_specs_give_equal_source():
    spec = block_scaled_mm((64, 64, 64), *parsed((MXFP4, MXFP4)), None, "bf16", SM120)
    assert emit(spec) == emit(replace(spec))
    assert "bias" not in emit(spec)
