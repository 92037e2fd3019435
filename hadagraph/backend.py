"""The torch.compile backend: from an FX graph and the user's options to Inductor (or eager
execution) with the passes hooked in. Decides nothing about precision itself."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from hadagraph import compat, ops, seeds
from hadagraph.codegen import launch, precompile, tuned
from hadagraph.config import Config, parse_options
from hadagraph.device import DeviceProfile, chip_named
from hadagraph.dump import GraphDump
from hadagraph.graph import backward_nodes, calls
from hadagraph.measurement import profile_of
from hadagraph.observation import step_observer
from hadagraph.partition import made_in_forward
from hadagraph.passes import PassState, compress_saved, fuse, narrow_quantizers, run_pipeline
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
# The operators that emitted kernels carry out: of plain encodings, and all others.
PLAIN = (*ops.QUANTIZERS, ops.quantize_chain, ops.scaled_mm)
ENCODED = (
    ops.encode,
    ops.clip_mask,
    ops.decode,
    ops.encoded_mm,
    ops.rotate,
    ops.unrotate,
    ops.project,
    ops.unproject,
)


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
    config = parse_options(mode, options)
    if config.calibrate_steps:
        config = _calibrating(config, options)
    return compile_graph(gm, inputs, config, PROCESS)


def _calibrating(config: Config, options: Mapping[str, Any] | None) -> Config:
    """The options as they are while the first steps are observed, with code that becomes invalid
    when they are over; and with the profile from then on."""
    observer = step_observer(options, config.calibrate_steps, config.profile)
    if observer.done:
        return replace(config, profile=observer.profile(), calibrate_steps=0)
    compat.guard_on(step_observer.__module__, "FLAGS", observer.flag)
    return config.observing(observer.number)


hadagraph.reset = compat.reset_cudagraph_trees  # type: ignore[attr-defined]


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Config, collector: Collector
) -> Callable[..., Any]:
    """One graph with one configuration; reports go to `collector`."""
    config, profile = _planned_for(config, inputs)
    session = Session(config, _capability(inputs), collector, profile)
    for device in _cuda_devices(inputs):
        launch.prepare(device)
        seeds.counter(device)  # made before any capture of a CUDA graph
        compat.settle_triton_cache(device.index)
    if config.executor == "eager":
        if config.inductor_patches():
            names = ", ".join(config.inductor_patches())
            log.warning("executor='eager' runs no compiler and ignores %s", names)
        return _run_eagerly(gm, inputs, session)
    with compat.inductor_config.patch(config.inductor_patches()):
        theirs = compat.inductor_config.joint_custom_pre_pass
        after_grad = compat.inductor_config.post_grad_custom_post_pass
        partitioner = compat.inductor_config.custom_partitioner_fn
    rewrite, fuse_producers = (SessionPass(session, f) for f in (session.rewrite, session.fuse))
    patches = config.inductor_patches() | {
        "joint_custom_pre_pass": ComposedPass([*_as_list(theirs), rewrite]),
        "post_grad_custom_post_pass": ComposedPass([*_as_list(after_grad), fuse_producers]),
        "custom_partitioner_fn": Partitioner(session, partitioner),
    }
    if config.dump is not None or config.observer is not None:
        # A graph out of a cache runs no pass, and would leave nothing to see.
        patches["force_disable_caches"] = True
    if config.observer is not None:
        patches["triton.cudagraphs"] = False  # a replayed graph calls no observer
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
    found = [compat.compute_capability(device) for device in _cuda_devices(inputs)]
    return min(found, default=None)


def _profile(inputs: Sequence[Any]) -> DeviceProfile | None:
    """What is known of the first CUDA device's speed; None on the CPU."""
    devices = _cuda_devices(inputs)
    return profile_of(devices[0]) if devices else None


def _planned_for(config: Config, inputs: Sequence[Any]) -> tuple[Config, DeviceProfile | None]:
    """What is known of the chip to plan for, and the configuration without a target that is this
    device. ValueError on another than this device's, unless it is emulated on a CPU."""
    if config.target is None:
        return config, _profile(inputs)
    chip = chip_named(config.target)
    devices = _cuda_devices(inputs)
    if not devices and config.executor == "eager":
        return config, chip
    names = [torch.cuda.get_device_name(device) for device in devices]
    if names and all(chip.name in name for name in names):
        return replace(config, target=None), _profile(inputs)
    where = f"the model is on {names[0]}" if names else "nothing compiles for it here"
    raise ValueError(
        f"option target={config.target!r} plans for {chip.name}, but {where}. For its plan alone, "
        "use hadagraph.explain or executor='eager' with model and inputs on the CPU, or the "
        "command `hadagraph explain`"
    )


class Session:
    """What the hooks of one compiled graph share: options, device, report and dump."""

    def __init__(
        self,
        config: Config,
        capability: tuple[int, int] | None,
        collector: Collector,
        profile: DeviceProfile | None = None,
    ) -> None:
        self.config = config
        self.capability = capability
        self.profile = profile
        self.collector = collector
        self.report: GraphReport | None = None
        self.dump: GraphDump | None = None

    @property
    def planned_capability(self) -> tuple[int, int] | None:
        """Of the chip that is planned for; None where every format is emulated."""
        if self.config.target is not None and self.profile is not None:
            return self.profile.capability
        return self.capability

    def uuid(self) -> str:
        """Everything that decides what the passes do and what runs: options, device, what was tuned
        on it, every source file."""
        machine = (self.capability, self.profile, tuned.fingerprint())
        key = repr((self.config.cache_key(), machine, _source_hash()))
        return hashlib.sha256(key.encode()).hexdigest()

    def rewrite(self, graph: fx.Graph) -> None:
        """Run the pipeline over a joint or an inference graph, and report."""
        if self.config.dump is not None:
            self.dump = GraphDump(self.config.dump)
        training = bool(backward_nodes(graph))
        plan = Plan(self.config.recipe_name)
        state = PassState(self.config, plan, self.planned_capability, self.profile)
        plan = run_pipeline(graph, state, self._observe)
        self.report = GraphReport(
            kind="training" if training else "inference",
            emulated=self.capability is None,
            target=self.profile.name if self.config.target and self.profile else None,
            plan=plan,
            shared=shared_quantizers(graph, plan),
        )
        observed = self.config.observer is not None
        if not observed and not any(decision.lowered for decision in plan.decisions):
            log.warning("no GEMM of this graph was lowered; see hadagraph.explain for the reasons")
        if self.report.emulated_gemms:
            log.info(
                "%d GEMMs are emulated: no speed gain is expected of these",
                self.report.emulated_gemms,
            )
        self.collector.reports.append(self.report)
        self._write_plan(graph)
        self._compile_ahead(graph, (ops.scaled_mm,))  # what fusing does not change

    def _observe(self, name: str, graph: fx.Graph) -> None:
        if self.dump is not None:
            self.dump.observe(name, graph)
        if self.config.debug and name != "input":
            verify(graph, name, lowered=name == "lower_precision")

    def _write_plan(self, graph: fx.Graph) -> None:
        if self.dump is None or self.report is None:
            return
        self.dump.plan(self.report)
        self._write_kernels(graph)

    def _write_kernels(self, graph: fx.Graph) -> None:
        assert self.dump is not None
        sources: dict[str, str] = {}
        capability = self.capability or DUMP_CAPABILITY
        listings = ((PLAIN, launch.sources_for), (ENCODED, precompile.sources_for))
        for targets, sources_for in listings:
            for name, arguments in _operator_calls(graph, targets):
                sources |= sources_for(name, arguments, capability)
        self.dump.kernels({f"{name}.py": source for name, source in sources.items()})

    def partitioned(
        self, forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int
    ) -> None:
        """Compress what the forward saves, if asked to, and report it."""
        if self.config.memory in ("balanced", "min"):
            compress_saved(forward.graph, backward.graph, num_fwd_outputs, self.config.memory)
            forward.recompile()
            backward.recompile()
        if self.report is None:
            return
        self.report.saved = saved_for_backward(forward, num_fwd_outputs)
        self.report.saved_bytes = sum(size for _, _, size in self.report.saved)
        if self.dump is not None:
            self.dump.phase("forward", forward.graph)
            self.dump.phase("backward", backward.graph)
            self.dump.plan(self.report)

    def fuse(self, graph: fx.Graph) -> None:
        """Fuse the producers of a partitioned graph's quantizers, and report."""
        rounded = self.config.executor == "eager" or compat.inductor_config.emulate_precision_casts
        narrow_quantizers(graph)
        regions = fuse(graph, producers=self.config.fuse, rounded=rounded)
        for region in regions:
            log.debug("%s", region)
        if self.report is not None:
            self.report.regions.extend(regions)
        if self.config.debug:
            verify(graph, "fuse", lowered=True, partitioned=True)
        if self.dump is not None and self.report is not None:
            self.dump.plan(self.report)
            self._write_kernels(graph)
        self._compile_ahead(graph, (*PLAIN, *ENCODED))

    def _compile_ahead(self, graph: fx.Graph, targets: Sequence[Any]) -> None:
        """Let workers compile the kernels of these operators' calls from now on."""
        if self.capability is not None:
            precompile.compile_ahead(_operator_calls(graph, targets), self.capability)


def _operator_calls(
    graph: fx.Graph, targets: Sequence[Any]
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments, tensors fake, of each call of hadagraph's operators `targets`."""
    for node in calls(graph, targets):
        arguments = fx.map_arg(node.args, lambda argument: argument.meta["val"])
        yield node.target._opname, arguments  # type: ignore[union-attr]


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


class SessionPass(compat.CustomGraphPass):  # type: ignore[misc]
    """A part of a session as Inductor's hook: the pipeline on joint and inference graphs, or
    producer fusion on the partitioned ones."""

    def __init__(self, session: Session, run: Callable[[fx.Graph], None]) -> None:
        self.session = session
        self.run = run

    def __call__(self, graph: fx.Graph) -> None:
        self.run(graph)

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
    """The user's partitioner or torch's min-cut, what it saves compressed as asked for, and a
    report of it."""

    def __init__(self, session: Session, theirs: Any) -> None:
        self.session = session
        self.theirs = theirs

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        partition = self.theirs or compat.min_cut_partition
        forward, backward = made_in_forward(partition, gm, joint_inputs, **kwargs)
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
