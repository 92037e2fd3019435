"""The recipes of the published systems and our own, as rows: from a GEMM's role alone, how each of
its operands is treated. A new paper is a new row. What ours do differently stands in
docs/recipes.md.

Notation of the comments: X input, W weight, E gradient of the output; T tokens, K and N features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hadagraph.formats import PER_KEPT_INDEX, PER_TENSOR, Granularity
from hadagraph.rotation import MAX_BLOCK, Fixed
from hadagraph.rules import PER_GEMM, OperandRule, Recipe

Pair = tuple[OperandRule, OperandRule]

BLOCK_FORMATS: dict[str, dict[str, Any]] = {
    # OCP microscaling formats: powers of two for 32 elements each.
    "mxfp8": {
        "format": "fp8_e4m3",
        "granularity": Granularity("block_contracted", 32),
        "scale": "e8m0",
        "prescale": False,
    },
    "mxfp6": {
        "format": "fp6_e2m3",
        "granularity": Granularity("block_contracted", 32),
        "scale": "e8m0",
        "prescale": False,
    },
    "mxfp4": {
        "format": "fp4_e2m1",
        "granularity": Granularity("block_contracted", 32),
        "scale": "e8m0",
        "prescale": False,
    },
    # NVIDIA's: e4m3 scales for 16 elements each, and one fp32 scale of the tensor.
    "nvfp4": {
        "format": "fp4_e2m1",
        "granularity": Granularity("block_contracted", 16),
        "scale": "ue4m3",
        "prescale": True,
    },
}
"""What the usual name of a block format stands for."""


def _both(rule: OperandRule) -> Pair:
    return rule, rule


def _plain(name: str, summary: str, source: str, rule: OperandRule) -> Recipe:
    return Recipe(name, summary, source, _both(rule), _both(rule), _both(rule))


_INT8 = OperandRule("int8", PER_KEPT_INDEX, max_block=MAX_BLOCK)
# Along the tokens a few rows are huge (attention sinks). A block of 128 spreads each over 128
# tokens at a level that hides theirs; 32 is best on real activations, by 4 dB at the worst site
# (bench/results/token_rotation.json).
_INT8_TOKENS = OperandRule("int8", PER_KEPT_INDEX, max_block=32)
_E4M3_ROW = OperandRule("fp8_e4m3", PER_KEPT_INDEX)
_E4M3 = OperandRule("fp8_e4m3", PER_TENSOR)
_E5M2 = OperandRule("fp8_e5m2", PER_TENSOR)
_MXFP8 = OperandRule(**BLOCK_FORMATS["mxfp8"])
_MXFP6 = OperandRule(**BLOCK_FORMATS["mxfp6"])
_MXFP4 = OperandRule(**BLOCK_FORMATS["mxfp4"])
_NVFP4 = OperandRule(**BLOCK_FORMATS["nvfp4"])

_OURS = (
    Recipe("bf16", "nothing is quantized", "the baseline: Inductor alone"),
    Recipe(
        "int8_rotated",
        "INT8, inner Hadamard rotation, one scale per kept index, round to nearest even",
        "hadagraph",
        output=_both(_INT8),
        grad_input=_both(_INT8),
        grad_weight=_both(_INT8_TOKENS),
        aliases=("int8",),
    ),
    # The rules are what is taken where nothing is known; see hadagraph.auto for the choice.
    Recipe(
        "auto",
        "per GEMM INT8 or FP8, rotated or not, by predicted time and precision",
        "hadagraph",
        output=_both(_INT8),
        grad_input=_both(_INT8),
        grad_weight=_both(_INT8_TOKENS),
    ),
    Recipe(
        "fp8_rowwise",
        "FP8 e4m3, no rotation, one scale per kept index",
        "row-wise FP8 training, as in torchao's float8 'rowwise'",
        output=_both(_E4M3_ROW),
        grad_input=_both(_E4M3_ROW),
        grad_weight=_both(_E4M3_ROW),
        aliases=("fp8",),
    ),
    Recipe(
        "fp8_tensorwise",
        "FP8, e4m3 for inputs and weights, e5m2 for gradients, one scale per tensor",
        "FP8 Formats for Deep Learning, arXiv 2209.05433",
        output=_both(_E4M3),
        grad_input=(_E5M2, _E4M3),
        grad_weight=(_E5M2, _E4M3),
    ),
    _plain(
        "mxfp8",
        "MXFP8 e4m3, no rotation, scales rounded up so that nothing is clipped",
        "Recipes for Pre-training LLMs with MXFP8, arXiv 2506.08027",
        replace(_MXFP8, fit="ceil"),
    ),
    _plain(
        "mxfp6",
        "MXFP6 e2m3, no rotation, round to nearest even",
        "Microscaling Data Formats for Deep Learning, arXiv 2310.10537",
        _MXFP6,
    ),
    _plain(
        "mxfp4",
        "MXFP4, no rotation, round to nearest even: the baseline of the 4-bit recipes",
        "Microscaling Data Formats for Deep Learning, arXiv 2310.10537",
        _MXFP4,
    ),
)


def _halo(level: int, suffix: str, format: str) -> Recipe:
    """HALO at one level. 0: no rotation. 1: X and W are rotated along K for the forward, and these
    rotations are taken back from the gradients. 2: E, too, along T for grad_input."""
    plain = OperandRule(format, PER_TENSOR)
    if level == 0:
        rotated = along_kept = gradient = plain
    else:
        rotated = replace(plain, max_block=MAX_BLOCK)
        along_kept = replace(plain, outer_block=MAX_BLOCK)
        gradient = along_kept if level == 2 else plain
    return Recipe(
        f"halo{level}_{suffix}",
        f"HALO level {level}: {suffix.upper()}, one scale per tensor, "
        + ("no rotation", "rotated forward", "rotated forward and gradient of the input")[level],
        "HALO: Hadamard-Assisted Lower-Precision Optimization for LLMs, arXiv 2501.02625",
        output=_both(rotated),
        grad_input=(gradient, along_kept),
        grad_weight=(plain, along_kept),
        aliases=(f"halo{level}",) if suffix == "int8" else (),
    )


_HALO_FORMATS = {"int8": "int8", "fp8": "fp8_e4m3", "fp6": "fp6_e3m2"}
_HALO = tuple(
    _halo(level, suffix, format) for suffix, format in _HALO_FORMATS.items() for level in (0, 1, 2)
)

_KEPT = (8, 16)
_INT4_H16 = OperandRule("int4", PER_TENSOR, max_block=16, rounding="stochastic")
_INT8_KEPT = OperandRule("int8", PER_TENSOR, tokens_kept=_KEPT)
_INT4_KEPT = OperandRule("int4", PER_TENSOR, tokens_kept=_KEPT)
_LOW_RANK = (
    Recipe(
        "hot",
        "exact forward; INT4 rotated grad_input, INT8 grad_weight of half of the Walsh rows",
        "HOT: Hadamard-based Optimized Training, arXiv 2503.21261",
        grad_input=_both(_INT4_H16),
        grad_weight=_both(_INT8_KEPT),
        select="lqs",
    ),
    Recipe(
        "hlq",
        "as hot, without a choice of granularity, saved inputs in INT4",
        "HLQ: Fast and Efficient Backpropagation via Hadamard Low-rank Quantization, "
        "arXiv 2406.15102",
        grad_input=_both(_INT4_H16),
        grad_weight=(_INT8_KEPT, _INT4_KEPT),
    ),
    Recipe(
        "lbp_wht",
        "both gradients of low-pass projected tokens, nothing quantized",
        "LBP-WHT: Efficient Low-rank Backpropagation for Vision Transformer Adaptation, "
        "arXiv 2309.15275",
        grad_input=(OperandRule("bf16", outer_tokens_kept=_KEPT), OperandRule("bf16")),
        grad_weight=_both(OperandRule("bf16", tokens_kept=_KEPT)),
    ),
)

_MXFP4_H32 = replace(_MXFP4, max_block=32)
_MXFP4_RHT_SR = replace(
    _MXFP4, max_block=64, signs=PER_GEMM, rounding="stochastic", fit="three_quarters"
)
_FP4_RHT = replace(_MXFP4, scale="ue5m3", prescale=True, max_block=32, signs=PER_GEMM)
_FP4_RHT_SR = replace(_FP4_RHT, rounding="stochastic")
_QUARTET_FORWARD = replace(_MXFP4_H32, fit="mse")
_QUARTET_SR = replace(_MXFP4_RHT_SR, max_block=32)
_QUARTET_FROM_FORWARD = replace(_QUARTET_SR, reads="forward")
_TETRAJET = replace(_MXFP4, fit="ceil")
_TETRAJET_SR = replace(_TETRAJET, rounding="stochastic")
_TETRAJET_FROM_FORWARD = replace(_TETRAJET_SR, reads="forward")


def _adahop(name: str, in_columns: str) -> Recipe:
    return Recipe(
        name,
        f"MXFP4, inner H32; by calibrated patterns outliers apart, {in_columns}",
        "AdaHOP, arXiv 2604.02525",
        _both(_MXFP4_H32),
        _both(_MXFP4_H32),
        _both(_MXFP4_H32),
        select=name,
    )


_MICROSCALING = (
    _adahop("adahop", "also where both are column-wise"),
    _adahop("adahop_lv2", "bf16 where both are column-wise"),
    Recipe(
        "fp4_rht_sr",
        "FP4 with UE5M3 scales of 32 and of the tensor, random signs, stochastic rounding",
        "Elucidating the Design Space of FP4 training, arXiv 2509.17791",
        output=_both(_FP4_RHT_SR),
        grad_input=_both(_FP4_RHT_SR),
        grad_weight=_both(_FP4_RHT_SR),
    ),
    Recipe(
        "mxfp4_rht_sr",
        "exact forward; MXFP4 gradients, random signs, unbiased stochastic rounding",
        "Training LLMs with MXFP4, arXiv 2502.20586",
        grad_input=_both(_MXFP4_RHT_SR),
        grad_weight=_both(_MXFP4_RHT_SR),
    ),
    Recipe(
        "quartet",
        "MXFP4: clipped rotated forward, gradients of its codes with random signs and stochastic "
        "rounding",
        "Quartet: Native FP4 Training Can Be Optimal for Large Language Models, arXiv 2505.14669",
        output=_both(_QUARTET_FORWARD),
        grad_input=(_QUARTET_SR, _QUARTET_FROM_FORWARD),
        grad_weight=(_QUARTET_SR, _QUARTET_FROM_FORWARD),
        clip_masked=True,
    ),
    Recipe(
        "tetrajet",
        "MXFP4, no rotation, nothing clipped; gradients of its codes with stochastic rounding",
        "TetraJet: Oscillation-Reduced MXFP4 Training for Vision Transformers, arXiv 2502.20853",
        output=_both(_TETRAJET),
        grad_input=(_TETRAJET_SR, _TETRAJET_FROM_FORWARD),
        grad_weight=(_TETRAJET_SR, _TETRAJET_FROM_FORWARD),
    ),
)

_NVFP4_TILES = replace(_NVFP4, granularity=Granularity("block_2d", 16))
_NVFP4_SR = replace(_NVFP4, rounding="stochastic")
_NVFP4_SIGNS = Fixed(16)
_QUARTET2_FORWARD = replace(_NVFP4, fit="four_six")
# Scales rounded up: nothing is clamped, so that the stochastic rounding is unbiased.
_QUARTET2_SR = replace(_NVFP4_SR, max_block=128, signs=PER_GEMM, fit="ceil")
_QUARTET2_FROM_FORWARD = replace(_QUARTET2_SR, reads="forward")
_NVFP4_RECIPES = (
    Recipe(
        "nvfp4",
        "NVFP4: weights in 16 x 16 tiles, grad_weight rotated with fixed signs, gradients rounded "
        "stochastically",
        "Pretraining Large Language Models with NVFP4, arXiv 2509.25149",
        output=(_NVFP4, _NVFP4_TILES),
        grad_input=(_NVFP4_SR, _NVFP4_TILES),
        grad_weight=(
            replace(_NVFP4_SR, max_block=16, signs=_NVFP4_SIGNS),
            replace(_NVFP4, max_block=16, signs=_NVFP4_SIGNS),
        ),
    ),
    Recipe(
        "quartet2",
        "NVFP4: forward scaled to 4 or 6, gradients of its codes with random signs and stochastic "
        "rounding",
        "Quartet II: Accurate LLM Pre-Training in NVFP4 by Improved Unbiased Gradient Estimation, "
        "arXiv 2601.22813",
        output=_both(_QUARTET2_FORWARD),
        grad_input=(_QUARTET2_SR, _QUARTET2_FROM_FORWARD),
        grad_weight=(_QUARTET2_SR, _QUARTET2_FROM_FORWARD),
    ),
)

ROWS: tuple[Recipe, ...] = (*_OURS, *_HALO, *_LOW_RANK, *_MICROSCALING, *_NVFP4_RECIPES)
"""Every recipe, in the order of the documentation."""
