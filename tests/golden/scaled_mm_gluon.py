"""scaled_mm_pingpong_int8_bf16: out [M, N] = (a [M, C] @ b [N, C]^T) * a_scale * b_scale."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

BLOCK_M = gl.constexpr(128)
BLOCK_N = gl.constexpr(128)
BLOCK_C = gl.constexpr(128)
WIDTH = gl.constexpr(64)  # columns that are stored at once
STAGES = gl.constexpr(6)
GROUP_M = gl.constexpr(8)  # rows of tiles that share columns in L2
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
RUN = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
OUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
OPTIONS = {'num_warps': 4, 'enable_fp_fusion': False}
SIGNATURE = {
    "a_descriptor": f"tensordesc<i8[128, 128],{CODES!r}>",
    "b_descriptor": f"tensordesc<i8[128, 128],{CODES!r}>",
    "out_descriptor": f"tensordesc<bf16[128, 64],{OUT!r}>",
    "a_scale_ptr": "*fp32",
    "b_scale_ptr": "*fp32",
    "M": "i32",
    "N": "i32",
    "C": "i32",
}


@gluon.jit
def tile_at(t, M, N):
    """Row and column at which tile t starts; GROUP_M tiles down before the next column."""
    tiles_n = gl.cdiv(N, BLOCK_N)
    first_m = t // (GROUP_M * tiles_n) * GROUP_M
    group_m = min(gl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    in_group = t % (GROUP_M * tiles_n)
    return (first_m + in_group % group_m) * BLOCK_M, in_group // group_m * BLOCK_N


@gluon.jit
def next_stage(stage, phase):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def load(a_descriptor, b_descriptor, a_stages, b_stages, full, empty, M, N, C):
    """One warp: keeps every free stage loading, over all of this program's tiles."""
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)  # of fresh barriers: every stage is free
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n = tile_at(t, M, N)
        for c in range(0, C, BLOCK_C):
            loaded = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(loaded, (BLOCK_M + BLOCK_N) * BLOCK_C)
            a_stage = a_stages.index(stage)
            tma.async_copy_global_to_shared(a_descriptor, [m, c], loaded, a_stage)
            b_stage = b_stages.index(stage)
            tma.async_copy_global_to_shared(b_descriptor, [n, c], loaded, b_stage)
            stage, phase = next_stage(stage, phase)


@gluon.jit
def store(sums, a_scale, b_scale, out_descriptor, out_stage, m, n):
    """WIDTH columns of a tile: scaled, rounded, and on their way to memory."""
    out = gl.convert_layout(sums, RUN).to(gl.float32)
    out = out * gl.expand_dims(a_scale, 1) * gl.expand_dims(b_scale, 0)
    tma.store_wait(pendings=0)  # until the stage was read
    out_stage.store(out.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_descriptor, [m, n], out_stage)


@gluon.jit
def multiply(
    out_descriptor, a_scale_ptr, b_scale_ptr, a_stages, b_stages, out_stages, full, empty, turns, M,
    N, C, WORKER: gl.constexpr,
):
    """One warpgroup: every other tile of this program. Two steps' products are in
    flight; a stage is free when its own have ended and the next step's have begun.
    """
    steps = gl.cdiv(C, BLOCK_C)
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    programs = gl.num_programs(0)
    step = WORKER * steps
    turn = gl.to_tensor(1 - WORKER)  # the first is worker 0's
    for t in range(gl.program_id(0) + WORKER * programs, tiles, 2 * programs):
        m, n = tile_at(t, M, N)
        stage = step % STAGES
        phase = (step // STAGES) & 1
        step += 2 * steps
        mbarrier.wait(turns.index(WORKER), turn)
        turn ^= 1
        rows = m + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, RUN))
        a_scale = gl.load(a_scale_ptr + rows)
        mbarrier.wait(full.index(stage), phase)
        a = a_stages.index(stage)
        b = b_stages.index(stage).permute((1, 0))
        sums = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, SUMS)
        sums = warpgroup_mma(a, b, sums, use_acc=False, is_async=True)
        sums = warpgroup_mma_wait(1, (sums,))
        before = stage
        stage, phase = next_stage(stage, phase)
        for _c in range(BLOCK_C, C, BLOCK_C):
            mbarrier.wait(full.index(stage), phase)
            a = a_stages.index(stage)
            b = b_stages.index(stage).permute((1, 0))
            sums = warpgroup_mma(a, b, sums, is_async=True)
            sums = warpgroup_mma_wait(1, (sums,))
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage, phase = next_stage(stage, phase)
        mbarrier.arrive(turns.index(1 - WORKER), count=1)
        columns_0 = n + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, RUN))
        b_scale_0 = gl.load(b_scale_ptr + columns_0)
        columns_1 = n + WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, RUN))
        b_scale_1 = gl.load(b_scale_ptr + columns_1)
        sums = warpgroup_mma_wait(0, (sums,))
        mbarrier.arrive(empty.index(before), count=1)
        out_stage = out_stages.index(WORKER)
        sums_l, sums_r = sums.reshape(BLOCK_M, 2, 64).permute(0, 2, 1).split()
        store(sums_l, a_scale, b_scale_0, out_descriptor, out_stage, m, n)
        store(sums_r, a_scale, b_scale_1, out_descriptor, out_stage, m, n + WIDTH)
    tma.store_wait(pendings=0)


@gluon.jit
def scaled_mm_pingpong_int8_bf16(
    a_descriptor, b_descriptor, out_descriptor, a_scale_ptr, b_scale_ptr, M, N, C,
):
    a_stages = gl.allocate_shared_memory(
        a_descriptor.dtype, [STAGES, BLOCK_M, BLOCK_C], a_descriptor.layout,
    )
    b_stages = gl.allocate_shared_memory(
        b_descriptor.dtype, [STAGES, BLOCK_N, BLOCK_C], b_descriptor.layout,
    )
    out_stages = gl.allocate_shared_memory(
        out_descriptor.dtype, [2, BLOCK_M, WIDTH], out_descriptor.layout,
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (multiply, (
                out_descriptor, a_scale_ptr, b_scale_ptr, a_stages, b_stages, out_stages, full,
                empty, turns, M, N, C, 0,
            )),
            (multiply, (
                out_descriptor, a_scale_ptr, b_scale_ptr, a_stages, b_stages, out_stages, full,
                empty, turns, M, N, C, 1,
            )),
            (load, (a_descriptor, b_descriptor, a_stages, b_stages, full, empty, M, N, C)),
        ],
        [4, 1],  # warps of the second and the third
        [240, 24],  # and their registers a thread
    )


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = GluonASTSource(scaled_mm_pingpong_int8_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
