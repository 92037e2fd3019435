"""The +-1 matrices that kernels multiply by, kept on each device so that no launch allocates them
(a CUDA-graph capture would put them into its private pool). Knows no kernels."""

from __future__ import annotations

import torch

from hadagraph.codegen.spec import WIDTH
from hadagraph.rotation import Rotation, block_for, signed_hadamard

WIDTHS = (WIDTH // 4, WIDTH // 2, WIDTH)
"""Of the matrices that kernels multiply by."""
_MATRICES: dict[tuple[torch.device, torch.dtype, Rotation, bool, int], torch.Tensor] = {}


def fragment_order(width: int = WIDTH) -> torch.Tensor:
    """int64 [width]: the column of the product that column c of a reordered matrix yields.

    In an mma accumulator a thread q of four owns columns 8 j + 2 q + {0, 1}. Computing the final
    columns (width / 4) q + 2 j + {0, 1} there leaves it with width / 4 contiguous ones, so that
    one-byte codes are stored in wide words with no exchange between threads.
    """
    column = torch.arange(width)
    j, q, e = column // 8, column // 2 % 4, column % 2
    order: torch.Tensor = width // 4 * q + 2 * j + e
    return order


def factor(rotation: Rotation, width: int) -> Rotation:
    """The rotation by the small matrix of a Kronecker product: that of at most `width` columns."""
    if rotation.block <= width:
        return rotation
    assert rotation.signs is None
    return Rotation(width)


def rotation_matrix(rotation: Rotation, reorder: bool, width: int = WIDTH) -> torch.Tensor:
    """D H of the rotation repeated along the diagonal of [width, width], fp64, entries +-1 and 0;
    `reorder`: its columns in `fragment_order`."""
    copies = width // rotation.block
    matrix: torch.Tensor = torch.block_diag(*[signed_hadamard(rotation)] * copies)
    return matrix[:, fragment_order(width)] if reorder else matrix


def matrix_on(
    device: torch.device,
    dtype: torch.dtype,
    rotation: Rotation,
    reorder: bool,
    width: int = WIDTH,
) -> torch.Tensor:
    """The rotation's matrix on the device, in the dtype that meets an input of `dtype`: fp16 for
    fp16, else bf16. Made once; RuntimeError if that would happen under CUDA-graph capture."""
    matrix_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    key = (device, matrix_dtype, rotation, reorder, width)
    matrix = _MATRICES.get(key)
    if matrix is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the matrix of rotation {rotation} is not on {device} yet: call "
                "hadagraph.codegen.launch.prepare(device, [rotation]) before capturing a CUDA graph"
            )
        matrix = rotation_matrix(rotation, reorder, width).to(matrix_dtype).to(device)
        if device.type == "cuda":  # other streams may read it next
            torch.cuda.current_stream(device).synchronize()
        _MATRICES[key] = matrix
    return matrix


def plain_rotations() -> list[Rotation]:
    """Every unsigned rotation that `block_for` can choose."""
    return [Rotation(block_for(1 << bits)) for bits in range(4, WIDTH.bit_length())]
