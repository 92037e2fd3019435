"""Emitted kernels compile for each target, without a GPU, to its matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache

import pytest
import torch
import triton
from again import assert_passes_with_triton_36, compiler, with_triton_36
from kernel_checks import CHAINS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from hadagraph.codegen import tune
from hadagraph.codegen.choose import select_scaled_mm
from hadagraph.codegen.emit import emit
from hadagraph.codegen.listing import specs_for
from hadagraph.codegen.spec import GluonMmSpec, KernelSpec
from hadagraph.codegen.store import kernel_module
from hadagraph.region import Chain

pytestmark = compiler
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
TEXT, H32 = "int8/per_kept_index/h128", "int8/per_kept_index/h32"


def target_name(value: object) -> str:
    """Of a capability; other parameters as they are."""
    return f"sm_{value[0]}{value[1]}" if isinstance(value, tuple) else str(value)


@cache
def compiled(spec: KernelSpec, target: GPUTarget | None = None):
    module = kernel_module(spec)
    aligned = [["tt.divisibility", 16]]
    kinds = enumerate(module.SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in kinds if kind == "i32" or "*" in kind}
    make = GluonASTSource if isinstance(spec, GluonMmSpec) else ASTSource
    source = make(getattr(module, spec.name), module.SIGNATURE, attrs=attributes)
    major, minor = spec.capability
    target = target or GPUTarget("cuda", major * 10 + minor, 32)
    return triton.compile(source, target=target, options=module.OPTIONS)


def check_resources(spec: KernelSpec, *, spills: bool = False) -> None:
    """The kernel uses the target's matrix instruction if it multiplies, fits shared memory, and on
    Hopper spills nothing unless it may."""
    kernel = compiled(spec)
    capability = spec.capability
    if "tl.dot" in emit(spec):
        alone = capability == (9, 0) and spec.warps < 4  # wgmma takes groups of four
        assert ("mma.sync" if alone else INSTRUCTION[capability]) in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_LIMIT[capability]
    spilled = local_memory(kernel.asm["cubin"]) if capability == (9, 0) else 0
    assert spills or not spilled, f"{spec.name}: {spilled} bytes a thread"


@pytest.mark.parametrize(
    ("capability", "op", "dtype"),
    [
        (each, op, torch.bfloat16)
        for each in INSTRUCTION
        for op in ("quantize_rows", "quantize_both")
    ]
    + [(each, "quantize_both", torch.float32) for each in ((8, 0), (9, 0))],
    ids=target_name,
)
def test_quantizers(capability, op, dtype):
    x = torch.empty(16384, 4096, dtype=dtype, device="meta")
    texts = [TEXT] * (2 if op == "quantize_both" else 1)
    specs = specs_for(op, (x, *texts), capability)
    assert any("tl.dot" in emit(spec) for spec in specs)
    for spec in specs:
        check_resources(spec, spills=True)


@pytest.mark.parametrize("K", [4096, 8192, 14336])
def test_hopper_quantizers_spill_nothing(K):
    x = torch.empty(16384, K, dtype=torch.bfloat16, device="meta")
    fp8 = ("fp8_e4m3/per_kept_index/h64", "fp8_e4m3/per_kept_index/h32")
    for texts in ((TEXT, H32), fp8):
        specs = specs_for("quantize_both", (x, *texts), (9, 0))
        assert len(specs) == 3
        for spec in specs[: 1 if K == 8192 else 3]:  # its columns are as those of 4096
            check_resources(spec)


CHAIN_CASES = {
    "silu_mul": (TEXT, ""),
    "silu_mul_backward": (TEXT, H32),
    "silu_mul_three": (TEXT, H32),
    "silu_mul_three_by_exp": (TEXT, H32),
    "silu_mul_three_rounded": (TEXT, H32),
    "gelu_tanh": ("", H32),
}


@pytest.mark.parametrize(
    ("capability", "name"),
    # Columns are not multiplied: of one source they differ in spills only, and compile for long.
    [*((each, "silu_mul") for each in INSTRUCTION), ((8, 0), "gelu_tanh")]
    + [((9, 0), name) for name in CHAIN_CASES if name != "silu_mul"],
    ids=target_name,
)
def test_chains(capability, name):
    chain = Chain.parse(CHAINS[name])
    x = torch.empty(16384, 14336, device="meta")
    count = len(chain.outputs)
    rows, columns = ([text] * count for text in CHAIN_CASES[name])
    arguments = ([x] * len(chain.inputs), str(chain), rows, columns, [False] * count)
    specs = specs_for("quantize_chain", arguments, capability)
    kernels = {"silu_mul": 1, "silu_mul_backward": 5, "gelu_tanh": 2}
    assert len(specs) == kernels.get(name, 7)
    for spec in dict.fromkeys(specs):
        check_resources(spec)


def test_the_code_of_silus_backward_does_not_depend_on_its_decomposition():
    """SwiGLU's, with silu(gate) * up again, by torch 2.13 and by 2.11."""
    x = torch.empty(16384, 14336, device="meta")
    instructions = []
    for name in ("silu_mul_three", "silu_mul_three_by_exp"):
        call = ([x] * 3, CHAINS[name], [TEXT] * 3, [H32] * 3, [False] * 3)
        ptx = compiled(specs_for("quantize_chain", call, (9, 0))[0]).asm["ptx"]
        instructions.append(re.findall(r"^\s*(?![.\s])(.*;)", ptx, re.M))
    assert instructions[0] == instructions[1] and len(instructions[0]) > 1000


def local_memory(cubin: bytes) -> int:
    """Bytes a thread that the assembler spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(size) for size in re.findall(r"STACK:(\d+)", usage))


GLUON = [config for config in tune.scaled_mm_candidates((9, 0)) if config.schedule]


def matmul(name: str, capability: tuple[int, int]) -> KernelSpec:
    """In Triton, also where one in Gluon would be chosen."""
    config = tune.scaled_mm_configuration(8192, 4096, name == "int8", capability)
    sizes, bf16 = (8192, 4096, 4096), torch.bfloat16
    return select_scaled_mm(*sizes, name, name, (False, False), None, bf16, capability, config)


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("capability", INSTRUCTION, ids=target_name)
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


@pytest.mark.parametrize(
    ("sizes", "bias", "out", "per_tensor"),
    [
        ((8192, 4096, 4096), None, torch.bfloat16, (False, False)),
        ((8191, 4088, 16), torch.float32, torch.bfloat16, (False, False)),
        ((8192, 4096, 4096), torch.float16, torch.float16, (True, True)),
        ((8191, 4088, 4096), torch.float32, torch.float32, (False, True)),
    ],
)
@pytest.mark.parametrize("config", GLUON, ids=lambda config: config.schedule)
def test_scaled_mm_in_gluon(config, sizes, bias, out, per_tensor):
    """The products of two steps are in flight, and no sum is spilled."""
    spec = select_scaled_mm(*sizes, "int8", "int8", per_tensor, bias, out, (9, 0), config)
    assert isinstance(spec, GluonMmSpec)
    kernel = compiled(spec)
    ptx = kernel.asm["ptx"]
    products = set(re.findall(r"wgmma\.mma_async\S+", ptx))
    assert products == {"wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"}
    # of each warpgroup: the last step's products, the first step's, and every other's
    assert re.findall(r"wgmma\.wait_group\S+\s+(\d)", ptx) == ["0", "1", "1"] * 2
    loads = 3 if spec.cooperative else 2
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", ptx)) == loads
    assert len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.global", ptx)) == 2 * spec.runs
    assert kernel.metadata.shared <= SHARED_LIMIT[9, 0]
    assert local_memory(kernel.asm["cubin"]) == 0
    assert kernel.metadata.global_scratch_size == 0
    assert len(kernel.metadata.tensordesc_meta) == 3


def test_scaled_mm_for_gfx950():
    kernel = compiled(matmul("int8", (8, 0)), GPUTarget("hip", "gfx950", 64))
    assert "v_mfma_i32" in kernel.asm["amdgcn"]


@with_triton_36
def test_with_triton_36():
    assert_passes_with_triton_36(__file__, "-k", "sm_80 or sm_90 or gluon")
