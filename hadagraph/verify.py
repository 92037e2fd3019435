"""The verifier that runs after every pass in tests and under `debug`: is the graph well formed, do
the bases type-check, does every node have its metadata? Changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hadagraph import compat, ops
from hadagraph.basis import infer_bases
from hadagraph.graph import arguments

EXACT_OPS = (ops.gemm,)


class VerificationError(AssertionError):
    """A pass left a graph that breaks one of the compiler's invariants: a bug of hadagraph's."""


def verify(
    graph: fx.Graph, after: str, *, lowered: bool = False, partitioned: bool = False
) -> None:
    """Check a graph after the pass named `after`.

    With `lowered`, no exact-stage op may be left. With `partitioned`, bases are not checked: codes
    that the forward saved are plain inputs of the backward. Raises VerificationError, or BasisError
    with the node whose inputs do not type-check.
    """
    graph.lint()
    for node in graph.nodes:
        foreign = partitioned and not _is_ours(node)  # checkpointing's calls with a saved RNG state
        untyped = node.op == "call_function" and "val" not in node.meta and not foreign
        if untyped and _has_tensor_input(node):
            raise VerificationError(f"after {after}: {node} has no meta['val']")
        if lowered and node.op == "call_function" and node.target in EXACT_OPS:
            raise VerificationError(f"after {after}: {node} was not lowered")
        if node.op == "call_function" and _is_ours(node):
            _check_value(node, after)
    if not partitioned:
        infer_bases(graph)


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == ops.NAMESPACE


def _has_tensor_input(node: fx.Node) -> bool:
    return any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes)


def _check_value(node: fx.Node, after: str) -> None:
    """The recorded value must be what the op gives on its present inputs."""
    values = fx.map_arg(arguments(node), lambda argument: argument.meta["val"])
    fake_mode = compat.detect_fake_mode(values)
    if fake_mode is None:
        return
    with fake_mode:
        operator: Any = node.target
        expected = operator(*values)
    for want, have in zip(_flat(expected), _flat(node.meta["val"]), strict=True):
        if (str(want.shape), want.dtype) != (str(have.shape), have.dtype):
            raise VerificationError(
                f"after {after}: {node} is recorded as {have.dtype}{list(have.shape)}, "
                f"but computes {want.dtype}{list(want.shape)}"
            )


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return list(value)
