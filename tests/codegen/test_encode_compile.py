"""Emitted kernels of general encodings compile for each target, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from again import assert_passes_with_triton_36, compiler, with_triton_36
from encode_checks import ENCODINGS
from test_compile import INSTRUCTION, SHARED_LIMIT, compiled, local_memory
from triton.backends.compiler import GPUTarget

from hadagraph.codegen import precompile
from hadagraph.codegen.choose_encode import (
    bf16_mm,
    select_decode,
    select_encode,
    select_transform,
)
from hadagraph.codegen.emit import emit
from hadagraph.codegen.encode_spec import AnySpec
from hadagraph.formats import Encoding

pytestmark = compiler
TENSOR = "int4/per_tensor/h16/stochastic"
NVFP4 = "fp4_e2m1/block_contracted(16)/h16:fixed(7)/ue4m3/stochastic/prescale"
SIX = "fp6_e2m3/block_contracted(32)/h128:per_step(z)/e8m0"
MXFP4 = "fp4_e2m1/block_contracted(32)/h64:per_step(s)/e8m0/stochastic/three_quarters"
SQUARE = "fp4_e2m1/block_2d(16)/ue4m3/prescale"


def cases() -> dict[str, AnySpec]:
    mxfp4, square = Encoding.parse(MXFP4), Encoding.parse(SQUARE)
    amax, write = select_encode("bf16", square, (9, 0), kept_first=False).specs
    return {
        "encode_mxfp4": select_encode("bf16", mxfp4, (9, 0), kept_first=True).write,
        "encode_nvfp4_amax": amax,
        "encode_nvfp4": write,
        "decode_nvfp4": select_decode(square, "bf16", (9, 0)),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_golden(name, assert_golden):
    source = emit(cases()[name])
    assert_golden(f"{name}.py", source)
    assert max(len(line) for line in source.splitlines()) <= 132


def kernels(text: str, capability: tuple[int, int], dtype: str = "bf16") -> list[AnySpec]:
    """Those that write it in both orders of memory, its clip mask's, and the one that reads it."""
    encoding = Encoding.parse(text)
    specs: list[AnySpec] = []
    for kept_first in (False, True):
        specs += select_encode(dtype, encoding, capability, kept_first=kept_first).specs
    specs += select_encode(dtype, encoding, capability, kept_first=True, mask=True).specs[-1:]
    return [*specs, select_decode(encoding, "bf16", capability)]


FAST = [(TENSOR, (9, 0)), (SIX, (9, 0)), (NVFP4, (10, 0)), (TENSOR, (10, 0))]
OTHERS = [
    pytest.param(text, capability, marks=pytest.mark.slow)
    for text in (TENSOR, NVFP4, SIX)
    for capability in INSTRUCTION
    if (text, capability) not in FAST
]


@pytest.mark.parametrize(("text", "capability"), [*FAST, *OTHERS])
def test_encodings(text, capability):
    for spec in kernels(text, capability):
        kernel = compiled(spec)
        multiplies = "tl.dot" in emit(spec)
        assert multiplies == any(name in kernel.asm["ptx"] for name in ("mma", "tcgen05"))
        assert kernel.metadata.shared <= SHARED_LIMIT[capability]
        assert local_memory(kernel.asm["cubin"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("text", ENCODINGS)
def test_hopper_spills_nothing(text):
    for dtype in ("bf16", "fp32") if text in ENCODINGS[::4] else ("bf16",):
        for spec in kernels(text, (9, 0), dtype):
            assert local_memory(compiled(spec).asm["cubin"]) == 0


FP8 = "fp8_e4m3/per_tensor/stochastic"
THREADS = [(TENSOR, False), (FP8, True)]
THREADS += [
    pytest.param(text, kept_first, marks=pytest.mark.slow)
    for text in (TENSOR, FP8, MXFP4, NVFP4)
    for kept_first in (False, True)
    if (text, kept_first) not in THREADS
]


@pytest.mark.parametrize(("text", "kept_first"), THREADS)
def test_stochastic_rounding_is_cheap(text, kept_first):
    """Ten rounds, of two products each, for four elements of a thread: their words are in it, and
    no conversion of layouts is added. Signs take one counter a thread."""
    encoding = Encoding.parse(text)
    spec = select_encode("bf16", encoding, (9, 0), kept_first=kept_first).write
    nearest = replace(spec, encoding=replace(spec.encoding, rounding="nearest"))
    kernel, plain = compiled(spec), compiled(nearest)
    elements = spec.rows * spec.span // (32 * spec.warps)
    counters = elements // 4 + spec.draws_signs
    assert kernel.asm["ptx"].count("mul.hi.u32") <= 20 * counters
    conversions = [each.asm["ttgir"].count("ttg.convert_layout") for each in (kernel, plain)]
    assert conversions[0] <= conversions[1]


@pytest.mark.parametrize(
    "sizes", [(4096, 4096, 4096), pytest.param((100, 72, 80), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("capability", INSTRUCTION)
def test_decoded_products(capability, sizes):
    kernel = compiled(bf16_mm(sizes, (False, True), "bf16", "bf16", capability))
    assert INSTRUCTION[capability] in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_LIMIT[capability]


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_rotations_alone(capability):
    for text in ("int8/per_tensor/h128:per_step(z)", "int8/per_tensor/keep8of16"):
        for inverse in (False, True):
            spec = select_transform(
                "fp32",
                Encoding.parse(text),
                capability,
                kept_first=inverse,
                kept_last=inverse,
                inverse=inverse,
            )
            assert local_memory(compiled(spec).asm["cubin"]) == 0


@pytest.mark.slow
def test_for_gfx950():
    for spec in kernels(NVFP4, (8, 0)):
        kernel = compiled(spec, GPUTarget("hip", "gfx950", 64))
        assert ("v_mfma" in kernel.asm["amdgcn"]) == ("tl.dot" in emit(spec))


def test_signs_and_streams_are_not_in_the_source():
    """One kernel for all layers: neither fixed signs nor the names of streams make another."""
    texts = ("h64:per_step(a)", "h64:per_step(b)"), ("h64:fixed(1)", "h64:fixed(2)", "h64")
    for group in texts:
        encodings = [
            Encoding.parse(f"fp4_e2m1/block_contracted(32)/{signs}/e8m0") for signs in group
        ]
        assert len({select_encode("bf16", e, (9, 0), kept_first=True) for e in encodings}) == 1


def test_calls_are_compiled_ahead():
    """An operator's kernels are known from meta tensors; its stream makes no other request."""
    x, seed = torch.empty(256, 384, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    requests = [
        precompile.requests_for("encode", (x, seed, NVFP4, 1, stream), (9, 0))
        for stream in (1, 16, 77)
    ]
    assert requests[0] == requests[1] == requests[2]
    assert [request.spec.result for request in requests[0]] == ["amax", "codes"]
    codes = torch.empty(256, 192, dtype=torch.uint8, device="meta")
    scale, one = torch.empty(256, 24, dtype=torch.uint8, device="meta"), torch.empty(1)
    operand = (codes, scale, one)
    arguments = (*operand, *operand, None, NVFP4, NVFP4, torch.bfloat16)
    names = [r.spec.name for r in precompile.requests_for("encoded_mm", arguments, (9, 0))]
    assert names[-1] == "scaled_mm_bf16_bf16"
    assert all(name.startswith("decode_fp4_e2m1") for name in names[:-1])
    sources = precompile.sources_for("encoded_mm", arguments, (9, 0))
    assert len(sources) == 2
    assert all("@triton.jit" in source for source in sources.values())


@pytest.mark.slow
@with_triton_36
def test_with_triton_36():
    assert_passes_with_triton_36(
        __file__,
        "-k",
        "hopper or stochastic or (decoded and capability2)",
        "-m",
        "slow or not slow",
    )
