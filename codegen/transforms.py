"""The CUDA implementations of `rotate`, `unrotate`, `project` and `unproject`: a kernel each, which
sums in fp32 and rounds once. What it doesn't take goes to the references on the same device, with a
logged reason. Never waits for the device.

R the size of the other dim, C that of the dim that is transformed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hadagraph.codegen.calls import launch_of
from hadagraph.codegen.choose import DTYPE_NAMES
from hadagraph.codegen.choose_encode import select_transform, transform_refusal
from hadagraph.codegen.direct import empty
from hadagraph.codegen.encode_spec import EncodeSpec
from hadagraph.codegen.launch import layout_of, log_refusal, run_ready
from hadagraph.codegen.matrices import inverse_on, matrix_on, projection_on
from hadagraph.codegen.spec import Capability
from hadagraph.encode import rotate_with_seed, unrotate_with_seed
from hadagraph.formats import PER_TENSOR, Encoding
from hadagraph.ops import LIBRARY
from hadagraph.philox import stream_number
from hadagraph.rotation import (
    PerStep,
    Rotation,
    project_reference,
    unproject_reference,
)

Transform = Callable[..., Tensor]
"""(x, and the seed if the operator was given one) -> out."""


def order_of(x: Tensor, dim: int) -> tuple[bool, int]:
    """Whether neighbors in memory of a readable matrix differ in the other index than that of
    `dim`, and the stride of the index in which they don't differ."""
    other, along = x.stride(1 - dim), x.stride(dim)
    if x.shape[dim] > 1 and along != 1:
        return True, along
    return False, other


def is_readable(x: Tensor) -> bool:
    """Whether the kernels read the matrix as it lies: one dim has unit stride."""
    return 1 in x.shape or 1 in x.stride()


def signs_stream(encoding: Encoding) -> int:
    """The number of the stream of an encoding's per-step signs."""
    assert encoding.rotation is not None and isinstance(encoding.rotation.signs, PerStep)
    return stream_number(encoding.rotation.signs.stream)


def matrix_of(
    spec: EncodeSpec, encoding: Encoding, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """What the pass multiplies by, if it does."""
    if encoding.tokens_kept is not None:
        wide = max(spec.in_width, spec.width)
        return (projection_on(device, dtype, encoding.tokens_kept, wide, inverse=spec.inverse),)
    rotation = encoding.rotation
    if rotation is None:
        return ()
    if spec.draws_signs:
        rotation = Rotation(rotation.block)
    if spec.inverse and rotation.signs is not None:
        return (inverse_on(device, dtype, rotation, spec.width),)
    return (matrix_on(device, dtype, rotation, spec.fragment_order, spec.width),)


def transformer(
    x: Tensor,
    dim: int,
    encoding: Encoding,
    size: int | None,
    capability: Capability,
    reference: Transform,
) -> Transform:
    """(x, seed) -> x rotated or projected along `dim` as the encoding does first or, given the
    `size` there, that taken back; for every x that lies so."""
    reason = transform_refusal(encoding)
    if x.dtype not in DTYPE_NAMES:
        reason = f"it multiplies {', '.join(DTYPE_NAMES.values())}, not {x.dtype}"
    elif x.dim() != 2:
        reason = f"it takes matrices, not tensors of {x.dim()} dims"
    if reason is not None:
        log_refusal(str(encoding.rotation or encoding.tokens_kept), reason)
    if reason is not None or x.numel() == 0 or size == 0:
        return reference
    if not is_readable(x):
        again = transformer(x.contiguous(), dim, encoding, size, capability, reference)
        return lambda x, *seed: again(x.contiguous(), *seed)
    dim %= 2
    kept_first, stride = order_of(x, dim)
    R, C, device, dtype = x.shape[1 - dim], x.shape[dim], x.device, x.dtype
    out_size = encoding.transformed_size(C) if size is None else size
    spec = select_transform(
        DTYPE_NAMES[dtype],
        encoding,
        capability,
        kept_first=kept_first,
        kept_last=dim == 0,
        inverse=size is not None,
    )
    grid = (-(-R // spec.rows) * -(-out_size // spec.span),)
    streams = (signs_stream(encoding),) if spec.draws_signs else ()
    launch = launch_of(spec, grid, (R, C, out_size, out_size, stride), streams)
    matrix = matrix_of(spec, encoding, dtype, device)
    shape = (out_size, R) if dim == 0 else (R, out_size)
    drawn = spec.draws_signs

    def run(x: Tensor, *seed: Any) -> Tensor:
        out = empty(shape, dtype, device)
        launch(x, *matrix, *(seed if drawn else ()), out)
        return out

    return run


# ------------------------------------------------------------------ operators


def ready_rotate(
    capability: Capability, x: Tensor, dim: int, rotation: str, seed: Tensor | None = None
) -> Transform:
    """What the operator `rotate` runs for tensors laid out as these."""
    parsed = _seeded(rotation, seed)

    def reference(x: Tensor, seed: Tensor | None = None) -> Tensor:
        return rotate_with_seed(x, dim, parsed, seed).contiguous()

    encoding = Encoding("int8", PER_TENSOR, parsed)
    return transformer(x, dim, encoding, None, capability, reference)


def ready_unrotate(
    capability: Capability,
    x: Tensor,
    dim: int,
    rotation: str,
    size: int,
    seed: Tensor | None = None,
) -> Transform:
    """What the operator `unrotate` runs for tensors laid out as these."""
    parsed = _seeded(rotation, seed)

    def reference(x: Tensor, seed: Tensor | None = None) -> Tensor:
        return unrotate_with_seed(x, dim, parsed, size, seed).contiguous()

    encoding = Encoding("int8", PER_TENSOR, parsed)
    return transformer(x, dim, encoding, size, capability, reference)


def _seeded(text: str, seed: Tensor | None) -> Rotation:
    """The rotation. ValueError if it needs a seed and has none."""
    rotation = Rotation.parse(text)
    if seed is None and isinstance(rotation.signs, PerStep):
        raise ValueError(f"rotation {rotation} draws its signs in each step and needs a seed")
    return rotation


def ready_project(capability: Capability, x: Tensor, dim: int, kept: int, block: int) -> Transform:
    """What the operator `project` runs for tensors laid out as these."""
    encoding = Encoding("int8", PER_TENSOR, tokens_kept=(kept, block))

    def reference(x: Tensor) -> Tensor:
        return project_reference(x, dim, (kept, block)).contiguous()

    return transformer(x, dim, encoding, None, capability, reference)


def ready_unproject(
    capability: Capability, x: Tensor, dim: int, kept: int, block: int, size: int
) -> Transform:
    """What the operator `unproject` runs for tensors laid out as these."""
    encoding = Encoding("int8", PER_TENSOR, tokens_kept=(kept, block))

    def reference(x: Tensor) -> Tensor:
        return unproject_reference(x, dim, (kept, block), size).contiguous()

    return transformer(x, dim, encoding, size, capability, reference)


def _implement(op: str, make: Callable[..., Transform], values: int) -> None:
    """An operator of x, as many other values, and perhaps a seed."""

    def run(x: Tensor, *rest: Any) -> Any:
        seeds = rest[values:]
        seeded = bool(seeds) and seeds[0] is not None
        key = (op, *layout_of(x), *rest[:values], seeded)
        return run_ready(key, make, (x, *rest), (x, *seeds))

    LIBRARY.impl(op, run, "CUDA")


_implement("rotate", ready_rotate, values=2)
_implement("unrotate", ready_unrotate, values=3)
_implement("project", ready_project, values=3)
_implement("unproject", ready_unproject, values=4)
