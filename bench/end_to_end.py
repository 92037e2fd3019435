"""Forward + backward of Llama-shaped blocks: Inductor bf16, torchao float8 and hadagraph, in one
run and interleaved, with the bytes saved for the backward and the peak memory of a step."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from llama_blocks import SHAPES, Blocks, linear_flops, make_blocks
from rich.console import Console
from rich.table import Table
from torch import nn

BASELINE = "inductor bf16"


@dataclass
class Result:
    """One variant: median step in ms with all its rounds, and memory in bytes."""

    name: str
    compile_seconds: float
    round_ms: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    peak_bytes: int = 0
    gradient_error: float = 0.0

    @property
    def ms(self) -> float:
        return statistics.median(self.round_ms)


def variants() -> dict[str, Callable[[nn.Module], Any]]:
    """Name -> how to compile a model of bf16 blocks."""

    def ours(recipe: str) -> Callable[[nn.Module], Any]:
        return lambda model: torch.compile(model, backend="hadagraph", options={"recipe": recipe})

    return {
        BASELINE: torch.compile,
        "torchao tensorwise": lambda model: torch.compile(torchao_float8(model, "tensorwise")),
        "torchao rowwise": lambda model: torch.compile(torchao_float8(model, "rowwise")),
        "hadagraph int8_rotated": ours("int8_rotated"),
        "hadagraph fp8_tensorwise": ours("fp8_tensorwise"),
        "hadagraph fp8_rowwise": ours("fp8_rowwise"),
    }


def torchao_float8(model: nn.Module, recipe: str) -> nn.Module:
    """The model with torchao's float8 training Linears."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    return convert_to_float8_training(model, config=config)


class Step:
    """Forward and backward of one compiled variant on fixed inputs."""

    def __init__(self, model: Blocks, compiled: Any, x: torch.Tensor, gradient: torch.Tensor):
        self.model, self.compiled, self.x, self.gradient = model, compiled, x, gradient

    def __call__(self) -> None:
        self.compiled(self.x).backward(self.gradient)
        for parameter in self.model.parameters():
            parameter.grad = None

    def gradients(self) -> torch.Tensor:
        """All gradients of one step, as one fp32 vector on the host."""
        self.compiled(self.x).backward(self.gradient)
        flat = [p.grad.flatten().float().cpu() for p in self.model.parameters()]
        for parameter in self.model.parameters():
            parameter.grad = None
        return torch.cat(flat)

    def memory(self) -> tuple[int, int]:
        """Bytes held between forward and backward (the output left out), and the step's peak."""
        if not torch.cuda.is_available():
            return 0, 0
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = self.compiled(self.x)
        saved = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
        out.backward(self.gradient)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        for parameter in self.model.parameters():
            parameter.grad = None
        return saved, peak


def timed(step: Step, repeats: int) -> float:
    """Milliseconds a step, over `repeats` in a row, by device events where there is a device."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats * 1e3
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(repeats):
        step()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / repeats


def prepare(
    name: str, compile_model: Callable[[nn.Module], Any], args: argparse.Namespace
) -> tuple[Step, Result]:
    """Build, compile and run one variant until it is warm."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_blocks(args.shape, args.blocks, args.sequence, device)
    generator = torch.Generator(device).manual_seed(1)
    shape = (args.batch, args.sequence, SHAPES[args.shape].width)
    x = torch.randn(shape, generator=generator, device=device).bfloat16().requires_grad_()
    gradient = torch.randn(shape, generator=generator, device=device).bfloat16() / 100
    step = Step(model, compile_model(model), x, gradient)
    start = time.perf_counter()
    step()
    timed(step, 2)
    return step, Result(name, time.perf_counter() - start)


def run(args: argparse.Namespace, console: Console) -> list[Result]:
    """All variants; a failing one is reported and left out."""
    # All variants stay compiled side by side, so that the rounds can interleave.
    torch._dynamo.config.recompile_limit = 64
    chosen = {name: make for name, make in variants().items() if name in args.variants}
    prepared: list[tuple[Step, Result]] = []
    want: torch.Tensor | None = None
    for name, make in chosen.items():
        try:
            step, result = prepare(name, make, args)
        except (ImportError, RuntimeError) as error:
            console.print(f"[red]{name}: {type(error).__name__}: {str(error)[:300]}[/red]")
            continue
        got = step.gradients()
        want = got if want is None else want
        result.gradient_error = float((got - want).norm() / want.norm())
        result.saved_bytes, result.peak_bytes = step.memory()
        prepared.append((step, result))
        console.print(f"{name}: ready after {result.compile_seconds:.0f} s")
    for _ in range(args.rounds):
        for step, result in prepared:
            result.round_ms.append(timed(step, args.repeats))
    return [result for _, result in prepared]


def table(results: list[Result], args: argparse.Namespace) -> Table:
    """The results beside the baseline."""
    base = next((r for r in results if r.name == BASELINE), results[0])
    title = f"{args.blocks} {args.shape} blocks, B={args.batch}, S={args.sequence}"
    columns = ("", "ms", "x bf16", "saved GiB", "of bf16", "peak GiB", "grad. diff", "compile s")
    shown = Table(title=title)
    for column in columns:
        shown.add_column(column, justify="right" if column else "left")
    for r in results:
        shown.add_row(
            r.name,
            f"{r.ms:.1f}",
            f"{base.ms / r.ms:.3f}",
            f"{r.saved_bytes / 2**30:.2f}",
            f"{r.saved_bytes / max(base.saved_bytes, 1):.2f}",
            f"{r.peak_bytes / 2**30:.2f}",
            f"{r.gradient_error:.4f}",
            f"{r.compile_seconds:.0f}",
        )
    return shown


def as_json(results: list[Result], args: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, with device and versions."""
    import importlib.metadata

    import triton

    cuda = torch.cuda.is_available()
    base = next((r for r in results if r.name == BASELINE), results[0])
    try:
        torchao = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        torchao = None
    return {
        "benchmark": "end_to_end",
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "torchao": torchao},
        "shape": asdict(SHAPES[args.shape]),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "linear_flops": linear_flops(args.shape, args.blocks, args.batch * args.sequence),
        "baseline": base.name,
        "results": [
            {**asdict(r), "median_ms": r.ms, "speedup_over_baseline": base.ms / r.ms}
            for r in results
        ],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved over the variants")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed together in a round")
    names = list(variants())
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    console = Console(width=120)
    results = run(args, console)
    console.print(table(results, args))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(as_json(results, args), indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
