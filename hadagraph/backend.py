"""The torch.compile backend: from an FX graph and the user's options to Inductor (or eager
execution) with the passes hooked in. Decides nothing about precision itself."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from hadagraph import compat, ops
from hadagraph.codegen import launch
from hadagraph.config import Config, parse_options
from hadagraph.dump import GraphDump
from hadagraph.graph import backward_nodes, calls
from hadagraph.passes import PassState, fuse, run_pipeline
from hadagraph.plan import Plan
from hadagraph.reports import (
    PROCESS,
    Collector,
    GraphReport,
    saved_for_backward,
    shared_quantizers,
)
from hadagraph.verify import verify

log = logging.getLogger(__name__)
DUMP_CAPABILITY = (9, 0)  # whose kernels a dump shows where there is no GPU


def hadagraph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile(model, backend="hadagraph")` calls with each graph.

    Options: see `hadagraph.Config`; Inductor's own are passed on. ValueError on an unknown or
    ill-typed one.
    """
    return compile_graph(gm, inputs, parse_options(mode, options), PROCESS)


hadagraph.reset = compat.reset_cudagraph_trees  # type: ignore[attr-defined]


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, collector: Collector
) -> Callable[..., Any]:
    """One graph with one configuration; reports go to `collector`."""
    session = Session(config, _capability(inputs), collector)
    for device in _cuda_devices(inputs):
        launch.prepare(device)
    if config.executor == "eager":
        if config.inductor_patches():
            names = ", ".join(config.inductor_patches())
            log.warning("executor='eager' runs no compiler and ignores %s", names)
        return _run_eagerly(gm, inputs, session)
    with compat.inductor_config.patch(config.inductor_patches()):
        theirs = compat.inductor_config.joint_custom_pre_pass
        after_grad = compat.inductor_config.post_grad_custom_post_pass
        partitioner = compat.inductor_config.custom_partitioner_fn
    patches = config.inductor_patches() | {
        "joint_custom_pre_pass": ComposedPass([*_as_list(theirs), JointPass(session)]),
        "post_grad_custom_post_pass": ComposedPass([*_as_list(after_grad), FusePass(session)]),
        "custom_partitioner_fn": Partitioner(session, partitioner),
    }
    if config.dump is not None:
        # A graph out of a cache runs no pass, and would leave nothing to see.
        patches["force_disable_caches"] = True
    compiled: Callable[..., Any] = compat.compile_fx(gm, inputs, config_patches=patches)
    return compiled


def _as_list(passes: Any) -> list[Any]:
    if passes is None:
        return []
    return list(passes) if isinstance(passes, (list, tuple)) else [passes]


def _cuda_devices(inputs: Sequence[Any]) -> list[torch.device]:
    devices = {value.device for value in inputs if isinstance(value, torch.Tensor)}
    return sorted((d for d in devices if d.type == "cuda"), key=lambda d: d.index)


def _capability(inputs: Sequence[Any]) -> tuple[int, int] | None:
    """The least compute capability of the inputs' CUDA devices; None on the CPU."""
    found = [torch.cuda.get_device_capability(device) for device in _cuda_devices(inputs)]
    return min(found, default=None)


class Session:
    """What the hooks of one compiled graph share: options, device, report and dump."""

    def __init__(
        self, config: Config, capability: tuple[int, int] | None, collector: Collector
    ) -> None:
        self.config = config
        self.capability = capability
        self.collector = collector
        self.report: GraphReport | None = None
        self.dump: GraphDump | None = None

    def uuid(self) -> str:
        """Everything that decides what the passes do: options, device, every source file."""
        key = repr((self.config.cache_key(), self.capability, _source_hash()))
        return hashlib.sha256(key.encode()).hexdigest()

    def rewrite(self, graph: fx.Graph) -> None:
        """Run the pipeline over a joint or an inference graph, and report."""
        if self.config.dump is not None:
            self.dump = GraphDump(self.config.dump)
        training = bool(backward_nodes(graph))
        state = PassState(self.config, Plan(self.config.recipe), self.capability)
        plan = run_pipeline(graph, state, self._observe)
        self.report = GraphReport(
            kind="training" if training else "inference",
            emulated=self.capability is None,
            plan=plan,
            shared=shared_quantizers(graph, plan),
        )
        if not any(decision.lowered for decision in plan.decisions):
            log.warning("no GEMM of this graph was lowered; see hadagraph.explain for the reasons")
        self.collector.reports.append(self.report)
        self._write_plan(graph)

    def _observe(self, name: str, graph: fx.Graph) -> None:
        if self.dump is not None:
            self.dump.observe(name, graph)
        if self.config.debug and name != "input":
            verify(graph, name, lowered=name == "lower_precision")

    def _write_plan(self, graph: fx.Graph) -> None:
        if self.dump is None or self.report is None:
            return
        self.dump.plan(self.report)
        sources: dict[str, str] = {}
        for node in calls(graph, (*ops.QUANTIZERS, ops.scaled_mm)):
            arguments = fx.map_arg(node.args, lambda argument: argument.meta["val"])
            name = node.target._opname  # type: ignore[union-attr]
            sources |= launch.sources_for(name, arguments, self.capability or DUMP_CAPABILITY)
        self.dump.kernels({f"{name}.py": source for name, source in sources.items()})

    def partitioned(
        self, forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int
    ) -> None:
        """Report what the forward saves."""
        assert self.report is not None
        self.report.saved = saved_for_backward(forward, num_fwd_outputs)
        self.report.saved_bytes = sum(size for _, _, size in self.report.saved)
        if self.dump is not None:
            self.dump.phase("forward", forward.graph)
            self.dump.phase("backward", backward.graph)
            self.dump.plan(self.report)

    def fuse(self, graph: fx.Graph) -> None:
        """Group the chains of a partitioned graph."""
        regions = fuse(graph)
        if self.report is not None:
            self.report.regions.extend(regions)


@functools.cache
def _source_hash() -> str:
    import hadagraph.codegen
    import hadagraph.passes

    folders = [Path(__file__).parent]
    folders += [Path(str(m.__file__)).parent for m in (hadagraph.passes, hadagraph.codegen)]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class JointPass(compat.CustomGraphPass):  # type: ignore[misc]
    """The pipeline as Inductor's hook on joint and inference graphs."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, graph: fx.Graph) -> None:
        self.session.rewrite(graph)

    def uuid(self) -> str:
        return self.session.uuid()


class FusePass(compat.CustomGraphPass):  # type: ignore[misc]
    """Grouping as Inductor's hook on the partitioned graphs."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, graph: fx.Graph) -> None:
        self.session.fuse(graph)

    def uuid(self) -> str:
        return self.session.uuid()


class ComposedPass(compat.CustomGraphPass):  # type: ignore[misc]
    """The user's own passes, then ours, as one (torch 2.11 takes a single pass only)."""

    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> str | None:
        """None (no caching) if one of the user's passes has no identity."""
        keys = [each.uuid() if hasattr(each, "uuid") else None for each in self.passes]
        return None if None in keys else repr(keys)


class Partitioner(compat.CustomPartitionerFn):  # type: ignore[misc]
    """The user's partitioner or torch's min-cut, with a report of what is saved."""

    def __init__(self, session: Session, theirs: Any) -> None:
        self.session = session
        self.theirs = theirs

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        partition = self.theirs or compat.min_cut_partition
        forward, backward = partition(gm, joint_inputs, **kwargs)
        if self.session.report is not None:
            self.session.partitioned(forward, backward, kwargs["num_fwd_outputs"])
        return forward, backward

    def uuid(self) -> str | None:
        theirs = self.theirs.uuid() if self.theirs is not None else "min-cut"
        return None if theirs is None else repr((theirs, self.session.uuid()))


def _run_eagerly(gm: fx.GraphModule, inputs: Sequence[Any], session: Session) -> Callable[..., Any]:
    """The same graph, decompositions, passes and partition as with Inductor, run op by op."""

    def run(graph_module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        session.fuse(graph_module.graph)
        graph_module.recompile()
        return compat.boxed(graph_module.forward)

    def rewrite_and_run(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        session.rewrite(graph_module.graph)
        return run(graph_module, example)

    def partition(
        joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        session.rewrite(joint.graph)
        joint.recompile()
        return Partitioner(session, None)(joint, joint_inputs, **kwargs)

    backend = compat.aot_autograd(
        fw_compiler=run,
        bw_compiler=run,
        inference_compiler=rewrite_and_run,
        partition_fn=partition,
        decompositions=compat.select_decomp_table(),
    )
    compiled: Callable[..., Any] = backend(gm, inputs)
    return compiled
