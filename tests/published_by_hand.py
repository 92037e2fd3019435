"""The published systems written out once more, a formula a line, to hold recipes against: what the
three GEMMs of a Linear give for X [T, K], W [N, K] and the output's gradient E [T, N]. Shares no
code with hadagraph.

Every function takes (x, w, e, draw) and gives (Y, dX, dW); `draw` is a generator for stochastic
rounding and random signs. H is a block-diagonal normalized Hadamard matrix, its block the largest
power of two that divides the dim, between 16 and what the recipe says; T is padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad

Matrix = torch.Tensor
Draw = torch.Generator
FP4, FP6 = (2, 1), (3, 2)
FP6_WIDE_MANTISSA = (2, 3)


def hadamard(block: int) -> Matrix:
    h = torch.ones(1, 1)
    while len(h) < block:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    return h


def block_of(size: int, most: int) -> int:
    return max(16, min(most, size & -size))


def had(x: Matrix, most: int, signs: Matrix | None = None) -> Matrix:
    """x H along the last dim."""
    block = block_of(x.shape[1], most)
    blocks = pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    blocks = blocks if signs is None else blocks * signs
    return ((blocks @ hadamard(block)) * block**-0.5).flatten(1)


def unhad(x: Matrix, most: int, size: int) -> Matrix:
    """x H^T: H is symmetric."""
    block = block_of(size, most)
    return ((x.unflatten(1, (-1, block)) @ hadamard(block)) * block**-0.5).flatten(1)[:, :size]


def random_signs(most: int, size: int, draw: Draw) -> Matrix:
    return torch.randint(0, 2, (block_of(size, most),), generator=draw) * 2.0 - 1


def walsh(x: Matrix, kept: int = 8, block: int = 16) -> Matrix:
    """Along the last dim, the `kept` smoothest Walsh rows of each block."""
    rows = hadamard(block)
    smooth = sorted(rows, key=lambda row: int((row[1:] != row[:-1]).sum()))[:kept]
    blocks = pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))
    return (blocks @ torch.stack(smooth).T * block**-0.5).flatten(1)


def unwalsh(x: Matrix, size: int, kept: int = 8, block: int = 16) -> Matrix:
    rows = hadamard(block)
    smooth = sorted(rows, key=lambda row: int((row[1:] != row[:-1]).sum()))[:kept]
    return (x.unflatten(1, (-1, kept)) @ torch.stack(smooth) * block**-0.5).flatten(1)[:, :size]


def grid(format: tuple[int, int]) -> Matrix:
    """The numbers >= 0 of a small format, in order; even positions have an even mantissa."""
    exponents, mantissas = 1 << format[0], 1 << format[1]
    bias = exponents // 2 - 1
    values = [m / mantissas * 2.0 ** (1 - bias) for m in range(mantissas)]
    for exponent in range(1, exponents):
        values += [(1 + m / mantissas) * 2.0 ** (exponent - bias) for m in range(mantissas)]
    return torch.tensor(values)


def on_grid(x: Matrix, format: tuple[int, int], draw: Draw | None = None) -> Matrix:
    values = grid(format)
    size = x.abs().clamp(max=float(values[-1]))
    above = torch.searchsorted(values, size.contiguous()).clamp(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    share = (size - low) / (high - low)
    if draw is None:
        up = (share > 0.5) | ((share == 0.5) & (above % 2 == 0))
    else:
        up = torch.rand(x.shape, generator=draw) < share
    return torch.where(up, high, low) * x.sign()


def on_integers(x: Matrix, largest: int, draw: Draw | None = None) -> Matrix:
    x = x.clamp(-largest, largest)
    if draw is None:
        return x.round()
    return (x.abs() + torch.rand(x.shape, generator=draw)).floor() * x.sign()


def over(a: Matrix | float, b: Matrix | float) -> Matrix:
    """a / b, rounded once: torch multiplies by a rounded reciprocal where one is a number."""
    return torch.as_tensor(a, dtype=torch.float32) / torch.as_tensor(b, dtype=torch.float32)


def per_scale(
    x: Matrix, amax: Matrix, largest: float, rounded: Callable[[Matrix], Matrix]
) -> Matrix:
    amax = torch.where(amax == 0, largest, amax)
    return rounded(x * over(largest, amax)) * over(amax, largest)


def integer(x: Matrix, bits: int, amax: Matrix, draw: Draw | None = None) -> Matrix:
    largest = 2 ** (bits - 1) - 1
    return per_scale(x, amax, largest, lambda y: on_integers(y, largest, draw))


def fp8(x: Matrix, dtype: torch.dtype, amax: Matrix) -> Matrix:
    largest = torch.finfo(dtype).max
    return per_scale(x, amax, largest, lambda y: y.to(dtype).float())


def rows(x: Matrix) -> Matrix:
    return x.abs().amax(1, keepdim=True)


def power(x: Matrix) -> Matrix:
    """The largest power of two that is not above x > 0."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1)


def blocks_of(x: Matrix, block: int) -> Matrix:
    return pad(x, (0, -x.shape[1] % block)).unflatten(1, (-1, block))


def mx(
    x: Matrix, rounded: Callable[[Matrix], Matrix], largest: float, *, up: bool = False
) -> Matrix:
    """OCP MX blocks of 32: the power of two below amax, divided by that below the format's largest
    number; or `up`, the least power of two that clips nothing."""
    y = blocks_of(x, 32)
    amax = y.abs().amax(-1, keepdim=True)
    amax = torch.where(amax == 0, 1.0, amax)
    scale = power(amax) / power(torch.tensor(largest))
    if up:
        least = over(amax, largest)
        scale = torch.where(power(least) < least, 2 * power(least), power(least))
    return (rounded(y / scale) * scale).flatten(1)[:, : x.shape[1]]


def mxfp4(x: Matrix, draw: Draw | None = None, *, up: bool = False) -> Matrix:
    return mx(x, lambda y: on_grid(y, FP4, draw), 6.0, up=up)


def mxfp4_unbiased(x: Matrix, draw: Draw) -> Matrix:
    """4/3 SR(3/4 x): the scale is that of x, so that nothing is clipped (arXiv 2502.20586)."""
    return 4 / 3 * mx(x, lambda y: on_grid(0.75 * y, FP4, draw), 6.0)


def minifloat(x: Matrix, mantissa_bits: int) -> Matrix:
    """Positive numbers to nearest even in so many mantissa bits."""
    step = power(x) * 2.0**-mantissa_bits
    return (x / step).round() * step


def e4m3(x: Matrix) -> Matrix:
    return x.clamp(max=448.0).to(torch.float8_e4m3fn).float()


def e4m3_up(x: Matrix) -> Matrix:
    nearest = e4m3(x.clamp(max=448.0))
    above = (nearest.to(torch.float8_e4m3fn).view(torch.uint8) + 1).view(torch.float8_e4m3fn)
    return torch.where(nearest < x.clamp(max=448.0), above.float(), nearest)


def scaled_fp4(
    x: Matrix,
    block: int,
    scale_of: Callable[[Matrix], Matrix],
    draw: Draw | None = None,
    *,
    tiles: bool = False,
    four_six: bool = False,
) -> Matrix:
    """FP4 with scales of blocks, below one of the tensor that maps its maximum to 6 times 448, the
    largest block scale; 256 leaves room for the scales of 4 (arXiv 2512.02010)."""
    reach = 6.0 * (256 if four_six else 448)
    y = blocks_of(x * over(reach, x.abs().max()), block)
    top = y.abs().amax(-1, keepdim=True)
    if tiles:
        top = top.unflatten(0, (-1, block)).amax(1).repeat_interleave(block, 0)
    top = torch.where(top == 0, 6.0, top)

    def by(most: float) -> Matrix:
        scale = scale_of(over(top, most))
        return on_grid(y * over(1.0, scale), FP4, draw) * scale

    made = by(6.0)
    if four_six:
        error = [(z - y).square().sum(-1, keepdim=True) for z in (made, by(4.0))]
        made = torch.where(error[1] < error[0], by(4.0), made)
    return (made * over(x.abs().max(), reach)).flatten(1)[:, : x.shape[1]]


def nvfp4(x: Matrix, draw: Draw | None = None, **how: bool) -> Matrix:
    return scaled_fp4(x, 16, e4m3, draw, **how)


# ------------------------------------------------------------------------------------- systems

Products = tuple[Matrix, Matrix, Matrix]


def plain(q: Callable[[Matrix], Matrix]) -> Callable[..., Products]:
    """Every operand q(.) along the contracted dim."""

    def products(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
        return q(x) @ q(w).T, q(e) @ q(w.T).T, q(e.T) @ q(x.T).T

    return products


def bf16(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    return x @ w.T, e @ w, e.T @ x


def int8_rotated(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    def q(a: Matrix, most: int) -> Matrix:
        y = had(a, most)
        return integer(y, 8, rows(y))

    y, dx = q(x, 128) @ q(w, 128).T, q(e, 128) @ q(w.T, 128).T
    return y, dx, q(e.T, 32) @ q(x.T, 32).T


def fp8_tensorwise(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    def narrow(a: Matrix) -> Matrix:
        return fp8(a, torch.float8_e4m3fn, a.abs().max())

    wide = fp8(e, torch.float8_e5m2, e.abs().max())
    return narrow(x) @ narrow(w).T, wide @ narrow(w), wide.T @ narrow(x)


def halo(level: int, q: Callable[[Matrix], Matrix]) -> Callable[..., Products]:
    """Table of arXiv 2501.02625: the level's rotations around one quantizer of whole tensors."""

    def products(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
        if level == 0:
            return q(x) @ q(w).T, q(e) @ q(w), q(e).T @ q(x)
        size = x.shape[1]
        xh, wh = q(had(x, 128)), q(had(w, 128))
        dx = unhad(q(e) @ wh, 128, size)
        if level == 2:
            dx = unhad(unhad(q(had(e.T, 128).T) @ wh, 128, size).T, 128, len(x)).T
        return xh @ wh.T, dx, unhad(q(e).T @ xh, 128, size)

    return products


def hot(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    def int4(a: Matrix) -> Matrix:
        y = had(a, 16)
        return integer(y, 4, y.abs().max(), draw)

    def kept(a: Matrix) -> Matrix:
        y = walsh(a)
        return integer(y, 8, y.abs().max())

    return x @ w.T, int4(e) @ int4(w.T).T, kept(e.T) @ kept(x.T).T


def hlq(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    y, dx, _ = hot(x, w, e, draw)
    left, right = walsh(e.T), walsh(x.T)
    return y, dx, integer(left, 8, left.abs().max()) @ integer(right, 4, right.abs().max()).T


def lbp_wht(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    low = walsh(e.T)
    return x @ w.T, unwalsh((low.T @ w).T, len(x)).T, low @ walsh(x.T).T


def fp4_rht_sr(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    def product(a: Matrix, b: Matrix) -> Matrix:
        signs = random_signs(32, a.shape[1], draw)
        left, right = (
            scaled_fp4(had(each, 32, signs), 32, lambda s: minifloat(s, 3), draw) for each in (a, b)
        )
        return left @ right.T

    return product(x, w), product(e, w.T), product(e.T, x.T)


def rotated_sr(a: Matrix, b: Matrix, draw: Draw, most: int) -> Matrix:
    signs = random_signs(most, a.shape[1], draw)
    left, right = (mxfp4_unbiased(had(each, most, signs), draw) for each in (a, b))
    return left @ right.T


def mxfp4_rht_sr(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    return x @ w.T, rotated_sr(e, w.T, draw, 64), rotated_sr(e.T, x.T, draw, 64)


def clipped(x: Matrix) -> tuple[Matrix, Matrix]:
    """Codes and mask of Quartet's forward: the power of two nearest to the scale of least error for
    normal data of each block's rms; 2.92 standard deviations lie on 6."""
    y = blocks_of(had(x, 32), 32)
    rms = y.square().mean(-1, keepdim=True).sqrt()
    scale = power(torch.where(rms == 0, 1.0, rms * 2.922) / 6 * 2**0.5)
    made, mask = on_grid(y / scale, FP4) * scale, (y / scale).abs() <= 6
    return made.flatten(1), mask.flatten(1)


def quartet(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    (xq, x_mask), (wq, w_mask) = clipped(x), clipped(w)
    size = x.shape[1]
    dx = unhad(rotated_sr(e, wq.T, draw, 32) * x_mask, 32, size)
    return xq @ wq.T, dx, unhad(rotated_sr(e.T, xq.T, draw, 32) * w_mask, 32, size)


def tetrajet(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    xq, wq = mxfp4(x, up=True), mxfp4(w, up=True)

    def sr(a: Matrix) -> Matrix:
        return mxfp4(a, draw, up=True)

    return xq @ wq.T, sr(e) @ sr(wq.T).T, sr(e.T) @ sr(xq.T).T


def nvidia(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    tiles = nvfp4(w, tiles=True)
    signs = torch.randint(0, 2, (16,), generator=torch.Generator().manual_seed(16)) * 2.0 - 1
    dw = nvfp4(had(e.T, 16, signs), draw) @ nvfp4(had(x.T, 16, signs)).T
    return nvfp4(x) @ tiles.T, nvfp4(e, draw) @ tiles, dw


def quartet2(x: Matrix, w: Matrix, e: Matrix, draw: Draw) -> Products:
    xq, wq = nvfp4(x, four_six=True), nvfp4(w, four_six=True)

    def product(a: Matrix, b: Matrix) -> Matrix:
        signs = random_signs(128, a.shape[1], draw)
        left, right = (scaled_fp4(had(each, 128, signs), 16, e4m3_up, draw) for each in (a, b))
        return left @ right.T

    return xq @ wq.T, product(e, wq.T), product(e.T, xq.T)


def _halos() -> dict[str, Callable[..., Products]]:
    quantizers: dict[str, Callable[[Matrix], Matrix]] = {
        "int8": lambda a: integer(a, 8, a.abs().max()),
        "fp8": lambda a: fp8(a, torch.float8_e4m3fn, a.abs().max()),
        "fp6": lambda a: per_scale(a, a.abs().max(), 28.0, lambda y: on_grid(y, FP6)),
    }
    return {f"halo{level}_{n}": halo(level, q) for n, q in quantizers.items() for level in range(3)}


SYSTEMS: dict[str, Callable[..., Products]] = {
    "bf16": bf16,
    "int8_rotated": int8_rotated,
    "fp8_rowwise": plain(lambda a: fp8(a, torch.float8_e4m3fn, rows(a))),
    "fp8_tensorwise": fp8_tensorwise,
    "mxfp8": plain(lambda a: mx(a, lambda y: y.to(torch.float8_e4m3fn).float(), 448.0, up=True)),
    "mxfp6": plain(lambda a: mx(a, lambda y: on_grid(y, FP6_WIDE_MANTISSA), 7.5)),
    "mxfp4": plain(mxfp4),
    **_halos(),
    "hot": hot,
    "hlq": hlq,
    "lbp_wht": lbp_wht,
    "adahop": plain(lambda a: mxfp4(had(a, 32))),
    "adahop_lv2": plain(lambda a: mxfp4(had(a, 32))),
    "fp4_rht_sr": fp4_rht_sr,
    "mxfp4_rht_sr": mxfp4_rht_sr,
    "quartet": quartet,
    "tetrajet": tetrajet,
    "nvfp4": nvidia,
    "quartet2": quartet2,
}
