"""quantize_columns_int8_h4_bf16: x [T, K] to codes [K, T padded], from known maxima of its columns."""

import triton
import triton.language as tl

OPTIONS = {'num_warps': 2, 'num_stages': 3, 'enable_fp_fusion': False}
SIGNATURE = {
    "x_ptr": "*bf16",
    "amax_ptr": "*i32",
    "codes_ptr": "*i8",
    "scale_ptr": "*fp32",
    "T": "i32",
    "K": "i32",
    "codes_stride": "i32",
}


@triton.jit
def quantize_columns_int8_h4_bf16(
    x_ptr,
    amax_ptr,
    codes_ptr,
    scale_ptr,
    T,
    K,
    codes_stride,
):
    k = tl.program_id(0) * 128 + tl.arange(0, 128)
    t_first = (tl.num_programs(1) - 1 - tl.program_id(1)) * 64
    bits = tl.load(amax_ptr + k)  # [128]
    finite = bits < 0x7F800000
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), 7.888609052210118e-31)
    inverse = tl.div_rn(127.0, amax)
    scale = tl.where(finite, tl.div_rn(amax, 127.0) * 0.5, float('nan'))
    scale = tl.where(bits == 0, 1.0, scale)
    kept = tl.where(finite, -1, 0)  # bits of the words of codes
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + k, scale)
    for step in tl.range(0, 2):
        t_chunk = t_first + step * 32
        t = t_chunk
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
        c0 = (y0_0 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c1 = (y0_1 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c2 = (y0_2 * inverse + 12645696.0).to(tl.int32, bitcast=True)
        c3 = (y0_3 * inverse + 12582912.0).to(tl.int32, bitcast=True)
        c4 = (y0_4 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c5 = (y0_5 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c6 = (y0_6 * inverse + 12645696.0).to(tl.int32, bitcast=True)
        c7 = (y0_7 * inverse + 12582912.0).to(tl.int32, bitcast=True)
        c8 = (y0_8 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c9 = (y0_9 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c10 = (y0_10 * inverse + 12645696.0).to(tl.int32, bitcast=True)
        c11 = (y0_11 * inverse + 12582912.0).to(tl.int32, bitcast=True)
        c12 = (y0_12 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c13 = (y0_13 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c14 = (y0_14 * inverse + 12645696.0).to(tl.int32, bitcast=True)
        c15 = (y0_15 * inverse + 12582912.0).to(tl.int32, bitcast=True)
        c16 = (y0_16 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c17 = (y0_17 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c18 = (y0_18 * inverse + 12645696.0).to(tl.int32, bitcast=True)
        c19 = (y0_19 * inverse + 12582912.0).to(tl.int32, bitcast=True)
        c20 = (y0_20 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c21 = (y0_21 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c22 = (y0_22 * inverse + 12645696.0).to(tl.int32, bitcast=True)
        c23 = (y0_23 * inverse + 12582912.0).to(tl.int32, bitcast=True)
        c24 = (y0_24 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c25 = (y0_25 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c26 = (y0_26 * inverse + 12645696.0).to(tl.int32, bitcast=True)
        c27 = (y0_27 * inverse + 12582912.0).to(tl.int32, bitcast=True)
        c28 = (y0_28 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c29 = (y0_29 * inverse + 12583040.0).to(tl.int32, bitcast=True)
        c30 = (y0_30 * inverse + 12645696.0).to(tl.int32, bitcast=True)
        c31 = (y0_31 * inverse + 12582912.0).to(tl.int32, bitcast=True)
        word0_0 = (c0 + (c1 << 8)) + ((c2 + (c3 << 8)) << 16)
        word0_0 = (word0_0 ^ -2139062144) & kept
        word0_1 = (c4 + (c5 << 8)) + ((c6 + (c7 << 8)) << 16)
        word0_1 = (word0_1 ^ -2139062144) & kept
        word0_2 = (c8 + (c9 << 8)) + ((c10 + (c11 << 8)) << 16)
        word0_2 = (word0_2 ^ -2139062144) & kept
        word0_3 = (c12 + (c13 << 8)) + ((c14 + (c15 << 8)) << 16)
        word0_3 = (word0_3 ^ -2139062144) & kept
        word0_4 = (c16 + (c17 << 8)) + ((c18 + (c19 << 8)) << 16)
        word0_4 = (word0_4 ^ -2139062144) & kept
        word0_5 = (c20 + (c21 << 8)) + ((c22 + (c23 << 8)) << 16)
        word0_5 = (word0_5 ^ -2139062144) & kept
        word0_6 = (c24 + (c25 << 8)) + ((c26 + (c27 << 8)) << 16)
        word0_6 = (word0_6 ^ -2139062144) & kept
        word0_7 = (c28 + (c29 << 8)) + ((c30 + (c31 << 8)) << 16)
        word0_7 = (word0_7 ^ -2139062144) & kept
        joined0_0 = tl.join(word0_0, word0_4)
        joined0_1 = tl.join(word0_1, word0_5)
        joined0_2 = tl.join(word0_2, word0_6)
        joined0_3 = tl.join(word0_3, word0_7)
        joined1_0 = tl.join(joined0_0, joined0_2)
        joined1_1 = tl.join(joined0_1, joined0_3)
        joined2_0 = tl.join(joined1_0, joined1_1)
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32))  # of four codes
        place = t_chunk // 4 + tl.arange(0, 8)
        codes_ptrs = words_ptr + k.to(tl.int64)[:, None] * (codes_stride // 4) + place[None, :]
        tl.store(codes_ptrs, tl.reshape(joined2_0, (128, 8)))


if __name__ == "__main__":  # compiles without a GPU and prints the assembly
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = [["tt.divisibility", 16]]
    arguments = enumerate(SIGNATURE.values())
    attributes = {(i,): aligned for i, kind in arguments if kind == "i32" or "*" in kind}
    source = ASTSource(quantize_columns_int8_h4_bf16, SIGNATURE, attrs=attributes)
    target = GPUTarget("cuda", 90, 32)
    print(triton.compile(source, target=target, options=OPTIONS).asm["ptx"])
