"""Block-diagonal Walsh-Hadamard rotations and their sign diagonals: what they are and how to apply
them in plain PyTorch. Knows nothing of graphs, formats or kernels.

A rotation of block b maps a row vector x to x D H / sqrt(b) within each run of b elements, with H
the Sylvester Hadamard matrix (symmetric, entries +-1) and D a diagonal of signs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch

MIN_BLOCK = 16
MAX_BLOCK = 128


@dataclass(frozen=True)
class Fixed:
    """A sign diagonal drawn once from `seed`; the same in every step and every process."""

    seed: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed of fixed signs must not be negative, got {self.seed!r}")


@dataclass(frozen=True)
class PerStep:
    """A sign diagonal drawn anew each step from the named stream (letters, digits, `_` and `.`);
    the key is resolved on device."""

    stream: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.]+", self.stream):
            raise ValueError(
                f"stream of per-step signs must be letters, digits, '_' and '.', "
                f"got {self.stream!r}"
            )


Signs = Fixed | PerStep | None


@dataclass(frozen=True)
class Rotation:
    """A normalized block-diagonal Hadamard rotation of `block` elements times a sign diagonal.

    Two rotations are the same map, and cancel against each other's inverse, iff they are equal.
    """

    block: int
    signs: Signs = None

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1):
            raise ValueError(f"rotation block must be a power of two >= 2, got {self.block!r}")

    def __str__(self) -> str:
        """`h128`, `h128:fixed(7)` or `h128:per_step(name)`; `Rotation.parse` reads it back."""
        if isinstance(self.signs, Fixed):
            return f"h{self.block}:fixed({self.signs.seed})"
        if isinstance(self.signs, PerStep):
            return f"h{self.block}:per_step({self.signs.stream})"
        return f"h{self.block}"

    @staticmethod
    def parse(text: str) -> Rotation:
        """The rotation that `str` wrote. ValueError on any other text."""
        match = _ROTATION.fullmatch(text)
        if match is None:
            raise ValueError(
                f"rotation must read h<block>, h<block>:fixed(<seed>) or "
                f"h<block>:per_step(<stream>), got {text!r}"
            )
        block, seed, stream = match.groups()
        if seed is not None:
            return Rotation(int(block), Fixed(int(seed)))
        return Rotation(int(block), PerStep(stream) if stream is not None else None)


_ROTATION = re.compile(r"h(\d+)(?::fixed\((\d+)\)|:per_step\(([\w.]+)\))?")


def block_for(size: int, most: int = MAX_BLOCK) -> int:
    """The rotation block for a dim of `size`: the largest power of two that divides it, at most
    `most` and at least MIN_BLOCK (a dim that MIN_BLOCK does not divide is padded with zeros)."""
    return max(MIN_BLOCK, min(most, size & -size))


@lru_cache(maxsize=64)
def hadamard_matrix(block: int) -> torch.Tensor:
    """The unnormalized Sylvester Hadamard matrix [block, block], fp64, entries +-1."""
    index = torch.arange(block)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    for bit in range(block.bit_length()):
        parity ^= (common >> bit) & 1
    return (1 - 2 * parity).double()


@lru_cache(maxsize=64)
def sign_vector(signs: Signs, block: int) -> torch.Tensor:
    """The diagonal of D: [block], fp64, entries +-1; all ones for `None`.

    PerStep signs have no value outside a running step and are refused with ValueError.
    """
    if signs is None:
        return torch.ones(block, dtype=torch.float64)
    if isinstance(signs, PerStep):
        raise ValueError(f"signs per_step({signs.stream}) are known only on the device, in a step")
    generator = torch.Generator().manual_seed(signs.seed)
    return torch.randint(0, 2, (block,), generator=generator).double() * 2 - 1


@lru_cache(maxsize=64)
def signed_hadamard(rotation: Rotation) -> torch.Tensor:
    """D H, unnormalized: [block, block], fp64, entries +-1; the matrix that the kernels multiply
    by from the right."""
    block = rotation.block
    return sign_vector(rotation.signs, block)[:, None] * hadamard_matrix(block)


def rotate_reference(
    x: torch.Tensor, dim: int, rotation: Rotation, *, normalize: bool = True
) -> torch.Tensor:
    """x rotated along `dim`, which is padded with zeros to a multiple of the block.

    Any float dtype; computed and returned in it (`normalize=False` leaves out 1/sqrt(block)).
    """
    matrix = signed_hadamard(rotation).to(x)
    return _apply_blockwise(x, dim, matrix, rotation.block, normalize)


def unrotate_reference(x: torch.Tensor, dim: int, rotation: Rotation, size: int) -> torch.Tensor:
    """The inverse of `rotate_reference`: x un-rotated along `dim` and cut back to `size`."""
    matrix = signed_hadamard(rotation).to(x).t()
    return _apply_blockwise(x, dim, matrix, rotation.block, True).narrow(dim, 0, size)


@lru_cache(maxsize=64)
def projection_matrix(kept: int, block: int) -> torch.Tensor:
    """The `kept` rows of lowest sequency (sign changes along the row) of the normalized Walsh
    matrix: [kept, block], fp64, orthonormal rows."""
    matrix = hadamard_matrix(block)
    changes = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    return matrix[changes.argsort()[:kept]] * block**-0.5


def project_reference(x: torch.Tensor, dim: int, tokens_kept: tuple[int, int]) -> torch.Tensor:
    """x [.., T, ..] projected along `dim` to the r lowest-sequency Walsh rows of each block of b:
    [.., ceil(T / b) r, ..]; padded with zeros. Source: HLA of arXiv 2406.15102."""
    kept, block = tokens_kept
    matrix = projection_matrix(kept, block).to(x).t()
    last = x.movedim(dim, -1)
    padded = torch.nn.functional.pad(last, (0, -last.shape[-1] % block))
    with torch.autocast(x.device.type, enabled=False):
        projected = padded.unflatten(-1, (-1, block)) @ matrix
    return projected.flatten(-2).movedim(-1, dim)


def unproject_reference(
    x: torch.Tensor, dim: int, tokens_kept: tuple[int, int], size: int
) -> torch.Tensor:
    """The transpose of `project_reference`: the smooth part of what was projected, cut to `size`
    along `dim`."""
    kept, block = tokens_kept
    matrix = projection_matrix(kept, block).to(x)
    blocks = x.movedim(dim, -1).unflatten(-1, (-1, kept))
    with torch.autocast(x.device.type, enabled=False):
        smooth = (blocks @ matrix).flatten(-2)
    return smooth.movedim(-1, dim).narrow(dim, 0, size)


def padded_size(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple (SymInts welcome)."""
    return (size + multiple - 1) // multiple * multiple


def _apply_blockwise(
    x: torch.Tensor, dim: int, matrix: torch.Tensor, block: int, normalize: bool
) -> torch.Tensor:
    dim %= x.dim()
    size = x.shape[dim]
    padded = padded_size(size, block)
    if padded != size:
        after = x.dim() - 1 - dim
        x = torch.nn.functional.pad(x, (0, 0) * after + (0, padded - size))
    blocks = x.unflatten(dim, (padded // block, block))
    with torch.autocast(x.device.type, enabled=False):
        if dim == x.dim() - 1:
            y = blocks @ matrix
        else:
            # [..., blocks, block, rest]: multiplied from the left, so that nothing is transposed.
            y = matrix.t() @ blocks.flatten(dim + 2)
    if normalize:
        y = y * block**-0.5
    return y.reshape(x.shape)
