"""Emitted kernels compile for each target, without a GPU, to its matrix instructions."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hadagraph.codegen.choose import select_scaled_mm
from hadagraph.codegen.listing import specs_for
from hadagraph.codegen.spec import KernelSpec
from hadagraph.codegen.store import kernel_module

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"
)
INSTRUCTION = {
    (8, 0): "mma.sync",
    (8, 9): "mma.sync",
    (9, 0): "wgmma.mma_async",
    (10, 0): "tcgen05.mma",
    (12, 0): "mma.sync",
}
SHARED_LIMIT = {
    (8, 0): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
}
TEXT = "int8/per_kept_index/h128"


def compiled(spec: KernelSpec, target: GPUTarget | None = None):
    module = kernel_module(spec)
    aligned = [["tt.divisibility", 16]]
    kinds = enumerate(module.SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in kinds if kind == "i32" or "*" in kind}
    source = ASTSource(getattr(module, spec.name), module.SIGNATURE, attrs=attributes)
    major, minor = spec.capability
    target = target or GPUTarget("cuda", major * 10 + minor, 32)
    return triton.compile(source, target=target, options=module.OPTIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["quantize_rows", "quantize_both"])
@pytest.mark.parametrize("capability", INSTRUCTION)
def test_quantizers(capability, op, dtype):
    x = torch.empty(16384, 4096, dtype=dtype, device="meta")
    texts = [TEXT] * (2 if op == "quantize_both" else 1)
    for spec in specs_for(op, (x, *texts), capability):
        kernel = compiled(spec)
        assert INSTRUCTION[capability] in kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED_LIMIT[capability]


def matmul(name: str, capability: tuple[int, int]) -> KernelSpec:
    bf16 = torch.bfloat16
    return select_scaled_mm(8192, 4096, 4096, name, name, (False, False), None, bf16, capability)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("capability", INSTRUCTION)
def test_scaled_mm(capability, name):
    if name != "int8" and capability == (8, 0):
        with pytest.raises(ValueError, match=r"needs compute capability 8\.9"):
            matmul(name, capability)
        return
    kernel = compiled(matmul(name, capability))
    expected = INSTRUCTION[capability]
    if (name, capability) == ("int8", (10, 0)):
        expected = "mma.sync"  # triton emits no tcgen05 for integers
    assert expected in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_LIMIT[capability]
    if expected == "wgmma.mma_async":
        assert "cp.async.bulk.tensor" in kernel.asm["ptx"]


def test_scaled_mm_for_gfx950():
    kernel = compiled(matmul("int8", (8, 0)), GPUTarget("hip", "gfx950", 64))
    assert "v_mfma_i32" in kernel.asm["amdgcn"]


@pytest.mark.skipif(
    not os.environ.get("HADAGRAPH_TRITON36"), reason="HADAGRAPH_TRITON36 names no triton 3.6"
)
def test_with_triton_36():
    environment = os.environ | {"PYTHONPATH": os.environ["HADAGRAPH_TRITON36"]}
    environment.pop("HADAGRAPH_TRITON36")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "capability0 or capability2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
