"""column_amax_h32_bf16: maximum magnitudes of the columns of x [T, K], as fp32 bits, from 0."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 4, 'num_stages': 3, 'enable_fp_fusion': False}
SIGNATURE = {
    "x_ptr": "*bf16",
    "amax0_ptr": "*i32",
    "T": "i32",
    "K": "i32",
}


@triton.jit
def column_amax_h32_bf16(
    x_ptr,
    amax0_ptr,
    T,
    K,
):
    k = tl.program_id(0) * 256 + tl.arange(0, 256)
    t_first = tl.program_id(1) * 512
    top0 = tl.zeros((256,), dtype=tl.float32)
    for step in tl.range(0, 16):
        t = t_first + step * 32
        x_t_ptr = x_ptr + t.to(tl.int64) * 4096 + k
        y0_0 = tl.load(x_t_ptr).to(tl.float32)
        y0_1 = tl.load(x_t_ptr + 4096).to(tl.float32)
        y0_2 = tl.load(x_t_ptr + 8192).to(tl.float32)
        y0_3 = tl.load(x_t_ptr + 12288).to(tl.float32)
        y0_4 = tl.load(x_t_ptr + 16384).to(tl.float32)
        y0_5 = tl.load(x_t_ptr + 20480).to(tl.float32)
        y0_6 = tl.load(x_t_ptr + 24576).to(tl.float32)
        y0_7 = tl.load(x_t_ptr + 28672).to(tl.float32)
        y0_8 = tl.load(x_t_ptr + 32768).to(tl.float32)
        y0_9 = tl.load(x_t_ptr + 36864).to(tl.float32)
        y0_10 = tl.load(x_t_ptr + 40960).to(tl.float32)
        y0_11 = tl.load(x_t_ptr + 45056).to(tl.float32)
        y0_12 = tl.load(x_t_ptr + 49152).to(tl.float32)
        y0_13 = tl.load(x_t_ptr + 53248).to(tl.float32)
        y0_14 = tl.load(x_t_ptr + 57344).to(tl.float32)
        y0_15 = tl.load(x_t_ptr + 61440).to(tl.float32)
        y0_16 = tl.load(x_t_ptr + 65536).to(tl.float32)
        y0_17 = tl.load(x_t_ptr + 69632).to(tl.float32)
        y0_18 = tl.load(x_t_ptr + 73728).to(tl.float32)
        y0_19 = tl.load(x_t_ptr + 77824).to(tl.float32)
        y0_20 = tl.load(x_t_ptr + 81920).to(tl.float32)
        y0_21 = tl.load(x_t_ptr + 86016).to(tl.float32)
        y0_22 = tl.load(x_t_ptr + 90112).to(tl.float32)
        y0_23 = tl.load(x_t_ptr + 94208).to(tl.float32)
        y0_24 = tl.load(x_t_ptr + 98304).to(tl.float32)
        y0_25 = tl.load(x_t_ptr + 102400).to(tl.float32)
        y0_26 = tl.load(x_t_ptr + 106496).to(tl.float32)
        y0_27 = tl.load(x_t_ptr + 110592).to(tl.float32)
        y0_28 = tl.load(x_t_ptr + 114688).to(tl.float32)
        y0_29 = tl.load(x_t_ptr + 118784).to(tl.float32)
        y0_30 = tl.load(x_t_ptr + 122880).to(tl.float32)
        y0_31 = tl.load(x_t_ptr + 126976).to(tl.float32)
        y0_0, y0_1 = y0_0 + y0_1, y0_0 - y0_1
        y0_2, y0_3 = y0_2 + y0_3, y0_2 - y0_3
        y0_4, y0_5 = y0_4 + y0_5, y0_4 - y0_5
        y0_6, y0_7 = y0_6 + y0_7, y0_6 - y0_7
        y0_8, y0_9 = y0_8 + y0_9, y0_8 - y0_9
        y0_10, y0_11 = y0_10 + y0_11, y0_10 - y0_11
        y0_12, y0_13 = y0_12 + y0_13, y0_12 - y0_13
        y0_14, y0_15 = y0_14 + y0_15, y0_14 - y0_15
        y0_16, y0_17 = y0_16 + y0_17, y0_16 - y0_17
        y0_18, y0_19 = y0_18 + y0_19, y0_18 - y0_19
        y0_20, y0_21 = y0_20 + y0_21, y0_20 - y0_21
        y0_22, y0_23 = y0_22 + y0_23, y0_22 - y0_23
        y0_24, y0_25 = y0_24 + y0_25, y0_24 - y0_25
        y0_26, y0_27 = y0_26 + y0_27, y0_26 - y0_27
        y0_28, y0_29 = y0_28 + y0_29, y0_28 - y0_29
        y0_30, y0_31 = y0_30 + y0_31, y0_30 - y0_31
        y0_0, y0_2 = y0_0 + y0_2, y0_0 - y0_2
        y0_1, y0_3 = y0_1 + y0_3, y0_1 - y0_3
        y0_4, y0_6 = y0_4 + y0_6, y0_4 - y0_6
        y0_5, y0_7 = y0_5 + y0_7, y0_5 - y0_7
        y0_8, y0_10 = y0_8 + y0_10, y0_8 - y0_10
        y0_9, y0_11 = y0_9 + y0_11, y0_9 - y0_11
        y0_12, y0_14 = y0_12 + y0_14, y0_12 - y0_14
        y0_13, y0_15 = y0_13 + y0_15, y0_13 - y0_15
        y0_16, y0_18 = y0_16 + y0_18, y0_16 - y0_18
        y0_17, y0_19 = y0_17 + y0_19, y0_17 - y0_19
        y0_20, y0_22 = y0_20 + y0_22, y0_20 - y0_22
        y0_21, y0_23 = y0_21 + y0_23, y0_21 - y0_23
        y0_24, y0_26 = y0_24 + y0_26, y0_24 - y0_26
        y0_25, y0_27 = y0_25 + y0_27, y0_25 - y0_27
        y0_28, y0_30 = y0_28 + y0_30, y0_28 - y0_30
        y0_29, y0_31 = y0_29 + y0_31, y0_29 - y0_31
        y0_0, y0_4 = y0_0 + y0_4, y0_0 - y0_4
        y0_1, y0_5 = y0_1 + y0_5, y0_1 - y0_5
        y0_2, y0_6 = y0_2 + y0_6, y0_2 - y0_6
        y0_3, y0_7 = y0_3 + y0_7, y0_3 - y0_7
        y0_8, y0_12 = y0_8 + y0_12, y0_8 - y0_12
        y0_9, y0_13 = y0_9 + y0_13, y0_9 - y0_13
        y0_10, y0_14 = y0_10 + y0_14, y0_10 - y0_14
        y0_11, y0_15 = y0_11 + y0_15, y0_11 - y0_15
        y0_16, y0_20 = y0_16 + y0_20, y0_16 - y0_20
        y0_17, y0_21 = y0_17 + y0_21, y0_17 - y0_21
        y0_18, y0_22 = y0_18 + y0_22, y0_18 - y0_22
        y0_19, y0_23 = y0_19 + y0_23, y0_19 - y0_23
        y0_24, y0_28 = y0_24 + y0_28, y0_24 - y0_28
        y0_25, y0_29 = y0_25 + y0_29, y0_25 - y0_29
        y0_26, y0_30 = y0_26 + y0_30, y0_26 - y0_30
        y0_27, y0_31 = y0_27 + y0_31, y0_27 - y0_31
        y0_0, y0_8 = y0_0 + y0_8, y0_0 - y0_8
        y0_1, y0_9 = y0_1 + y0_9, y0_1 - y0_9
        y0_2, y0_10 = y0_2 + y0_10, y0_2 - y0_10
        y0_3, y0_11 = y0_3 + y0_11, y0_3 - y0_11
        y0_4, y0_12 = y0_4 + y0_12, y0_4 - y0_12
        y0_5, y0_13 = y0_5 + y0_13, y0_5 - y0_13
        y0_6, y0_14 = y0_6 + y0_14, y0_6 - y0_14
        y0_7, y0_15 = y0_7 + y0_15, y0_7 - y0_15
        y0_16, y0_24 = y0_16 + y0_24, y0_16 - y0_24
        y0_17, y0_25 = y0_17 + y0_25, y0_17 - y0_25
        y0_18, y0_26 = y0_18 + y0_26, y0_18 - y0_26
        y0_19, y0_27 = y0_19 + y0_27, y0_19 - y0_27
        y0_20, y0_28 = y0_20 + y0_28, y0_20 - y0_28
        y0_21, y0_29 = y0_21 + y0_29, y0_21 - y0_29
        y0_22, y0_30 = y0_22 + y0_30, y0_22 - y0_30
        y0_23, y0_31 = y0_23 + y0_31, y0_23 - y0_31
        m0 = tl.abs(y0_0) + tl.abs(y0_16)
        m1 = tl.abs(y0_1) + tl.abs(y0_17)
        m2 = tl.abs(y0_2) + tl.abs(y0_18)
        m3 = tl.abs(y0_3) + tl.abs(y0_19)
        m4 = tl.abs(y0_4) + tl.abs(y0_20)
        m5 = tl.abs(y0_5) + tl.abs(y0_21)
        m6 = tl.abs(y0_6) + tl.abs(y0_22)
        m7 = tl.abs(y0_7) + tl.abs(y0_23)
        m8 = tl.abs(y0_8) + tl.abs(y0_24)
        m9 = tl.abs(y0_9) + tl.abs(y0_25)
        m10 = tl.abs(y0_10) + tl.abs(y0_26)
        m11 = tl.abs(y0_11) + tl.abs(y0_27)
        m12 = tl.abs(y0_12) + tl.abs(y0_28)
        m13 = tl.abs(y0_13) + tl.abs(y0_29)
        m14 = tl.abs(y0_14) + tl.abs(y0_30)
        m15 = tl.abs(y0_15) + tl.abs(y0_31)
        m0 = tl.maximum(m0, m1, propagate_nan=tl.PropagateNan.ALL)
        m2 = tl.maximum(m2, m3, propagate_nan=tl.PropagateNan.ALL)
        m4 = tl.maximum(m4, m5, propagate_nan=tl.PropagateNan.ALL)
        m6 = tl.maximum(m6, m7, propagate_nan=tl.PropagateNan.ALL)
        m8 = tl.maximum(m8, m9, propagate_nan=tl.PropagateNan.ALL)
        m10 = tl.maximum(m10, m11, propagate_nan=tl.PropagateNan.ALL)
        m12 = tl.maximum(m12, m13, propagate_nan=tl.PropagateNan.ALL)
        m14 = tl.maximum(m14, m15, propagate_nan=tl.PropagateNan.ALL)
        m0 = tl.maximum(m0, m2, propagate_nan=tl.PropagateNan.ALL)
        m4 = tl.maximum(m4, m6, propagate_nan=tl.PropagateNan.ALL)
        m8 = tl.maximum(m8, m10, propagate_nan=tl.PropagateNan.ALL)
        m12 = tl.maximum(m12, m14, propagate_nan=tl.PropagateNan.ALL)
        m0 = tl.maximum(m0, m4, propagate_nan=tl.PropagateNan.ALL)
        m8 = tl.maximum(m8, m12, propagate_nan=tl.PropagateNan.ALL)
        m0 = tl.maximum(m0, m8, propagate_nan=tl.PropagateNan.ALL)
        top0 = tl.maximum(top0, m0, propagate_nan=tl.PropagateNan.ALL)
    tl.atomic_max(amax0_ptr + k, top0.to(tl.int32, bitcast=True), sem="relaxed")


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(column_amax_h32_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
