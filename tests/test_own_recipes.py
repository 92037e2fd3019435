"""Any recipe that is accepted is carried out: through the backend, a Linear gives what rotations,
projections, encodings and outliers give when they are put together by hand."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import decibels
from torch import nn

from hadagraph import compat
from hadagraph.encode import encode_reference, encoded_mm_reference
from hadagraph.formats import FITS, PER_KEPT_INDEX, PER_TENSOR, Encoding, Granularity
from hadagraph.rotation import (
    Fixed,
    Rotation,
    block_for,
    project_reference,
    rotate_reference,
    unproject_reference,
    unrotate_reference,
)
from hadagraph.rules import AXES, BLOCKS, ROLES, OperandRule, Recipe

T, K, N = 33, 48, 80
FORMATS = (
    ("int8", "int4"),
    ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1"),
)
GRANULARITIES = (
    PER_TENSOR,
    PER_KEPT_INDEX,
    Granularity("block_contracted", 16),
    Granularity("block_contracted", 32),
    Granularity("block_2d", 16),
)
# Where rounding differs in the last bit before the codes, a few of them differ by one.
NEARLY_SAME_CODES_DB = 40


def is_accepted(format, granularity, fields):
    try:
        OperandRule(format, granularity, **fields)
    except ValueError:
        return False
    return True


@st.composite
def rules(draw, role, side, formats, shared, outer, apart):
    """One operand's rule. `outer`: whether the GEMM may have rotations along kept dims; `apart`:
    outliers."""
    fields = dict(shared)
    format, granularity = draw(st.sampled_from(formats)), draw(st.sampled_from(GRANULARITIES))
    if granularity.block is not None:
        fields["scale"] = draw(st.sampled_from(["fp32", "e8m0", "ue4m3", "ue5m3"]))
    if fields.get("scale", "fp32") != "fp32":
        fields["prescale"] = draw(st.booleans())
    fits = [fit for fit in FITS if is_accepted(format, granularity, {**fields, "fit": fit})]
    fields["fit"] = draw(st.sampled_from(fits))
    if outer and role != "grad_weight" and side == 0 and draw(st.booleans()):
        fields["outer_tokens_kept"] = (4, 16)
    elif outer:
        fields["outer_block"] = draw(st.sampled_from([None, *BLOCKS]))
    if apart:
        fields["outliers"] = draw(st.sampled_from([0, 1, 5, 500]))
        fields["outlier_axis"] = draw(st.sampled_from(AXES))
    return OperandRule(format, granularity, **fields)


@st.composite
def recipes(draw):
    """Recipes that round to nearest, with signs known beforehand."""
    pairs = {}
    for role in ROLES:
        formats = draw(st.sampled_from(FORMATS))
        shared = {"max_block": draw(st.sampled_from([None, *BLOCKS]))}
        if shared["max_block"] is not None:
            shared["signs"] = draw(st.sampled_from([None, Fixed(3)]))
        elif role == "grad_weight":
            shared["tokens_kept"] = draw(st.sampled_from([None, (8, 16), (5, 32)]))
        besides = draw(st.sampled_from(["nothing", "outer", "apart"]))
        pairs[role] = tuple(
            draw(rules(role, side, formats, shared, besides == "outer", besides == "apart"))
            for side in (0, 1)
        )
    return Recipe("drawn", "", "", **pairs)


def split(matrix, rule):
    """What of a matrix [kept, contracted] is quantized, and what goes apart."""
    axis = AXES.index(rule.outlier_axis)
    rms = matrix.square().mean(1 - axis)
    apart = torch.zeros_like(rms)
    apart[rms.topk(min(rule.outliers, len(rms))).indices] = 1
    exact = matrix * (apart[:, None] if axis == 0 else apart)
    return matrix - exact, exact


def encoded(matrix, rule):
    if rule.outer_block is not None:
        matrix = rotate_reference(matrix, 0, Rotation(block_for(len(matrix), rule.outer_block)))
    if rule.outer_tokens_kept is not None:
        matrix = project_reference(matrix, 0, rule.outer_tokens_kept)
    rotation = None
    if rule.max_block is not None:
        rotation = Rotation(block_for(matrix.shape[1], rule.max_block), rule.signs)
    encoding = Encoding(
        rule.format, rule.granularity, rotation, rule.scale, rule.rounding, rule.fit,
        rule.prescale, rule.tokens_kept,
    )  # fmt: skip
    return encode_reference(matrix, encoding, 1), encoding


def product(pair, left, right):
    """left [M, C] right [N, C]^T as a pair of rules has it."""
    sizes = len(left), len(right)
    rest_left, apart_left = split(left, pair[0])
    rest_right, apart_right = split(right, pair[1])
    (a, a_encoding), (b, b_encoding) = encoded(rest_left, pair[0]), encoded(rest_right, pair[1])
    out = encoded_mm_reference(a, b, None, a_encoding, b_encoding, torch.float32)
    for dim, rule in enumerate(pair):
        if rule.outer_block is not None:
            rotation = Rotation(block_for(sizes[dim], rule.outer_block))
            out = unrotate_reference(out, dim, rotation, sizes[dim])
        if rule.outer_tokens_kept is not None:
            out = unproject_reference(out, dim, rule.outer_tokens_kept, sizes[dim])
    return out + apart_left @ right.T + rest_left @ apart_right.T


@settings(max_examples=15)
@given(recipes(), st.booleans(), st.integers(0, 99))
def test_what_is_accepted_is_carried_out(recipe, with_bias, seed):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(seed)
    x, w, e = (torch.randn(s, generator=generator) for s in ((T, K), (N, K), (T, N)))
    x[3] *= 8
    linear = nn.Linear(K, N, bias=with_bias)
    with torch.no_grad():
        linear.weight.copy_(w)
    options = {"executor": "eager", "debug": True, "recipe": recipe}
    x.requires_grad_()
    with compat.without_caches():
        y = torch.compile(linear, backend="hadagraph", options=options)(x)
        y.backward(e)
    operands = {
        "output": (x.detach(), w),
        "grad_input": (e, w.T),
        "grad_weight": (e.T, x.detach().T),
    }
    want = {role: product(recipe.rules(role), *operands[role]) for role in ROLES}
    if with_bias:
        want["output"] += linear.bias.detach()
    got = {"output": y.detach(), "grad_input": x.grad, "grad_weight": linear.weight.grad}
    for role in ROLES:
        assert decibels(got[role], want[role]) >= NEARLY_SAME_CODES_DB, role
