"""Cuts a joint graph in two by any partitioner, such that the forward makes what its passes want it
to. Chooses nothing that is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from hadagraph.graph import SAVED


def made_in_forward(
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    *,
    num_fwd_outputs: int,
    **kwargs: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Partition a joint graph so that the forward makes what is marked `graph.SAVED`.

    Only what a forward output needs is the forward's; a partitioner leaves anything else to the
    backward, which then gets the high-precision tensor to make it from. So the marked nodes are
    outputs of the forward while it is cut.
    """
    marked = [node for node in gm.graph.nodes if SAVED in node.meta]
    if not marked:
        return partition(gm, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
    first = num_fwd_outputs
    _replace_outputs(gm.graph, first, first, marked)
    forward, backward = partition(
        gm, joint_inputs, num_fwd_outputs=num_fwd_outputs + len(marked), **kwargs
    )
    for graph_module in (gm, forward):
        _replace_outputs(graph_module.graph, first, first + len(marked), ())
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()
    return forward, backward


DESCRIBED = ("desc", "output_stack_traces")


def _replace_outputs(graph: fx.Graph, start: int, stop: int, nodes: Sequence[fx.Node]) -> None:
    """Put `nodes` in place of the outputs from `start` to `stop`, described as the one before."""
    output = graph.output_node()
    (returned,) = output.args
    returned = list(returned)  # type: ignore[arg-type]
    for key in DESCRIBED:
        described = output.meta.get(key)
        if described is not None and len(described) == len(returned):
            again = [described[max(start - 1, 0)]] * len(nodes)
            output.meta[key] = [*described[:start], *again, *described[stop:]]
    output.args = ((*returned[:start], *nodes, *returned[stop:]),)
