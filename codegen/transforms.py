"""The CUDA implementations of `rotate`, `unrotate`, `project` and `unproject`: a kernel each, which
sums in fp32 and rounds once. What it doesn't take goes to the references on the same device, with a
logged reason. Never waits for the device.

R the size of the other dim, C that of the dim that is transformed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hadagraph.codegen.calls import launch_of, on_device
from hadagraph.codegen.choose import DTYPE_NAMES
from hadagraph.codegen.choose_encode import select_transform, transform_refusal
from hadagraph.codegen.direct import empty
from hadagraph.codegen.encode_spec import EncodeSpec
from hadagraph.codegen.launch import capability_of, layout_of, ready
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
    rotate_reference,
    unproject_reference,
    unrotate_reference,
)

log = logging.getLogger(__name__)
Transform = Callable[[Tensor, Tensor | None], Tensor]
"""(x, seed) -> out."""


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
    return (matrix_on(device, dtype, rotation, False, spec.width),)


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
        _log_once(str(encoding.rotation or encoding.tokens_kept), reason)
    if reason is not None or x.numel() == 0 or size == 0:
        return reference
    if not is_readable(x):
        again = transformer(x.contiguous(), dim, encoding, size, capability, reference)
        return lambda x, seed: again(x.contiguous(), seed)
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

    def run(x: Tensor, seed: Tensor | None) -> Tensor:
        out = empty(shape, dtype, device)
        seeds = () if seed is None or not spec.draws_signs else (seed,)
        launch(x, *matrix, *seeds, out)
        return out

    return run


@cache
def _log_once(what: str, reason: str) -> None:
    log.info("%s: by torch's operators, not by an emitted kernel: %s", what, reason)


def ready_rotate(
    x: Tensor, dim: int, rotation: str, seed: Tensor | None, capability: Capability
) -> Transform:
    """What the operator `rotate` runs for tensors laid out as these."""
    parsed = Rotation.parse(rotation)

    def reference(x: Tensor, seed: Tensor | None) -> Tensor:
        if isinstance(parsed.signs, PerStep):
            return rotate_with_seed(x, dim, parsed, seed).contiguous()
        return rotate_reference(x, dim, parsed).contiguous()

    encoding = Encoding("int8", PER_TENSOR, parsed)
    return transformer(x, dim, encoding, None, capability, _seeded(reference, parsed, seed))


def ready_unrotate(
    x: Tensor, dim: int, rotation: str, size: int, seed: Tensor | None, capability: Capability
) -> Transform:
    """What the operator `unrotate` runs for tensors laid out as these."""
    parsed = Rotation.parse(rotation)

    def reference(x: Tensor, seed: Tensor | None) -> Tensor:
        if isinstance(parsed.signs, PerStep):
            return unrotate_with_seed(x, dim, parsed, size, seed).contiguous()
        return unrotate_reference(x, dim, parsed, size).contiguous()

    encoding = Encoding("int8", PER_TENSOR, parsed)
    return transformer(x, dim, encoding, size, capability, _seeded(reference, parsed, seed))


def _seeded(reference: Transform, rotation: Rotation, seed: Tensor | None) -> Transform:
    """The reference. ValueError if the rotation needs a seed and has none."""
    if seed is None and isinstance(rotation.signs, PerStep):
        raise ValueError(f"rotation {rotation} draws its signs in each step and needs a seed")
    return reference


def ready_project(x: Tensor, dim: int, kept: int, block: int, capability: Capability) -> Transform:
    """What the operator `project` runs for tensors laid out as these."""
    encoding = Encoding("int8", PER_TENSOR, tokens_kept=(kept, block))

    def reference(x: Tensor, seed: Tensor | None) -> Tensor:
        return project_reference(x, dim, (kept, block)).contiguous()

    return transformer(x, dim, encoding, None, capability, reference)


def ready_unproject(
    x: Tensor, dim: int, kept: int, block: int, size: int, capability: Capability
) -> Transform:
    """What the operator `unproject` runs for tensors laid out as these."""
    encoding = Encoding("int8", PER_TENSOR, tokens_kept=(kept, block))

    def reference(x: Tensor, seed: Tensor | None) -> Tensor:
        return unproject_reference(x, dim, (kept, block), size).contiguous()

    return transformer(x, dim, encoding, size, capability, reference)


def _rotate_cuda(x: Tensor, dim: int, rotation: str, seed: Tensor | None = None) -> Tensor:
    key = ("rotate", *layout_of(x), dim, rotation, seed is None)
    with on_device(x.device):
        run = ready(key, lambda: ready_rotate(x, dim, rotation, seed, capability_of(x.device)))
        out: Tensor = run(x, seed)
    return out


def _unrotate_cuda(
    x: Tensor, dim: int, rotation: str, size: int, seed: Tensor | None = None
) -> Tensor:
    key = ("unrotate", *layout_of(x), dim, rotation, size, seed is None)
    with on_device(x.device):
        run = ready(
            key, lambda: ready_unrotate(x, dim, rotation, size, seed, capability_of(x.device))
        )
        out: Tensor = run(x, seed)
    return out


def _project_cuda(x: Tensor, dim: int, kept: int, block: int) -> Tensor:
    key = ("project", *layout_of(x), dim, kept, block)
    with on_device(x.device):
        run = ready(key, lambda: ready_project(x, dim, kept, block, capability_of(x.device)))
        out: Tensor = run(x, None)
    return out


def _unproject_cuda(x: Tensor, dim: int, kept: int, block: int, size: int) -> Tensor:
    key = ("unproject", *layout_of(x), dim, kept, block, size)
    with on_device(x.device):
        run = ready(
            key, lambda: ready_unproject(x, dim, kept, block, size, capability_of(x.device))
        )
        out: Tensor = run(x, None)
    return out


LIBRARY.impl("rotate", _rotate_cuda, "CUDA")
LIBRARY.impl("unrotate", _unrotate_cuda, "CUDA")
LIBRARY.impl("project", _project_cuda, "CUDA")
LIBRARY.impl("unproject", _unproject_cuda, "CUDA")
