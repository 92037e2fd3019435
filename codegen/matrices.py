"""The +-1 matrices that kernels multiply by, kept on each device so that no launch allocates them
(a CUDA-graph capture would put them into its private pool). Knows no kernels."""

from __future__ import annotations

import torch

from hadagraph.codegen.spec import WIDTH
from hadagraph.rotation import Rotation, block_for, projection_matrix, signed_hadamard

WIDTHS = (WIDTH // 8, WIDTH // 4, WIDTH // 2, WIDTH)
"""Of the matrices that kernels multiply by."""
Projection = tuple[int, int]
"""(r, b): the r lowest-sequency Walsh rows of each block of b."""
_MATRICES: dict[
    tuple[torch.device, torch.dtype, Rotation | Projection, bool, int, bool], torch.Tensor
] = {}


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
    return _kept(device, dtype, rotation, reorder, width, False)


def inverse_on(
    device: torch.device, dtype: torch.dtype, rotation: Rotation, width: int
) -> torch.Tensor:
    """The transpose of the rotation's matrix on the device, as `matrix_on`."""
    return _kept(device, dtype, rotation, False, width, True)


def projection_on(
    device: torch.device,
    dtype: torch.dtype,
    projection: Projection,
    wide: int,
    *,
    inverse: bool = False,
) -> torch.Tensor:
    """The projection's matrix on the device, as `matrix_on`: [wide, wide r / b], or transposed for
    the inverse; entries +-1 and 0, not normalized."""
    return _kept(device, dtype, projection, False, wide, inverse)


def _kept(
    device: torch.device,
    dtype: torch.dtype,
    what: Rotation | Projection,
    reorder: bool,
    width: int,
    inverse: bool,
) -> torch.Tensor:
    matrix_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
    if device.type == "meta":  # a kernel that is compiled ahead
        columns = width if isinstance(what, Rotation) else width // what[1] * what[0]
        shape = (columns, width) if inverse else (width, columns)
        return torch.empty(shape, dtype=matrix_dtype, device=device)
    key = (device, matrix_dtype, what, reorder, width, inverse)
    matrix = _MATRICES.get(key)
    if matrix is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the matrix of rotation {what} is not on {device} yet: call "
                "hadagraph.codegen.launch.prepare(device, [rotation]) before capturing a CUDA graph"
            )
        if isinstance(what, Rotation):
            made = rotation_matrix(what, reorder, width)
        else:
            rows = projection_matrix(*what).sign()
            made = torch.block_diag(*[rows.t()] * (width // what[1]))
        made = made.t().contiguous() if inverse else made.contiguous()
        matrix = made.to(matrix_dtype).to(device)
        if device.type == "cuda":  # other streams may read it next
            torch.cuda.current_stream(device).synchronize()
        _MATRICES[key] = matrix
    return matrix


def plain_rotations() -> list[Rotation]:
    """Every unsigned rotation that `block_for` can choose."""
    return [Rotation(block_for(1 << bits)) for bits in range(4, WIDTH.bit_length())]
