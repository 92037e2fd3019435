"""Forward + backward of Llama-shaped blocks, or with `--whole` a training step of a whole small
Llama: Inductor bf16, torchao float8 and hadagraph, in one run and interleaved, with the bytes saved
for the backward and the peak memory of a step.

    python bench/end_to_end.py --out bench/results/end_to_end.json
    python bench/end_to_end.py --shape llama3-1b --whole --out bench/results/whole_model.json

Whole: embedding, blocks, norm, untied head, cross entropy of bf16 logits made fp32, backward, and a
fused AdamW on the bf16 parameters, all in the timed step (the optimizer is not compiled).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from language_models import VOCABULARY, make_language_model, token_batch
from llama_blocks import SHAPES, linear_flops, make_blocks
from record import header, interleaved, median, milliseconds, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step import Memory, Step, activations, relative_difference
from variants import BASELINE, Compile, variants

DEFAULT_BLOCKS = 4


@dataclass
class Result:
    """One variant: its rounds in ms and memory in bytes (see `step.Memory`).

    gradient_error: |its gradients - the first variant's| / |the first's|, at the same weights.
    """

    name: str
    compile_seconds: float
    round_ms: list[float] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    gradient_error: float = 0.0

    @property
    def ms(self) -> float:
        return median(self.round_ms)


def make_step(compile_model: Compile, args: argparse.Namespace) -> Step:
    """The compiled blocks or model on the device, with its fixed inputs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.whole:
        model = make_language_model(args.shape, args.blocks, args.sequence, device, tied=False)
        inputs = token_batch(args.shape, args.batch, args.sequence, device)
        return Step(compile_model(model), list(model.parameters()), inputs)
    blocks = make_blocks(args.shape, args.blocks, args.sequence, device)
    x, gradient = activations((args.batch, args.sequence, SHAPES[args.shape].width), device)
    return Step(compile_model(blocks), list(blocks.parameters()), (x,), gradient)


def prepare(
    name: str, args: argparse.Namespace, want: list[torch.Tensor] | None
) -> tuple[Step, Result, list[torch.Tensor]]:
    """One variant, compiled, compared with the gradients `want`, and warm; and its gradients."""
    start = time.perf_counter()
    step = make_step(variants()[name], args)
    got = step.gradients()
    result = Result(name, time.perf_counter() - start)
    result.gradient_error = relative_difference(got, want) if want is not None else 0.0
    if args.whole:
        # Learning is not what is timed: a rate that leaves bf16 weights sane for any step count.
        step.optimizer = torch.optim.AdamW(step.parameters, lr=1e-6, fused=True)
    step()
    milliseconds(step, 2)
    result.memory = step.memory()
    return step, result, got


def run(args: argparse.Namespace, console: Console) -> list[Result]:
    """All variants; a failing one is reported and left out. Saves after each and each round."""
    # All variants stay compiled side by side, so that the rounds can interleave.
    torch._dynamo.config.recompile_limit = 64
    steps: dict[str, Step] = {}
    results: list[Result] = []
    want: list[torch.Tensor] | None = None
    with Progress(console=console, transient=True) as progress:
        for name in progress.track(args.variants, description="variants"):
            try:
                steps[name], result, got = prepare(name, args, want)
            except (ImportError, RuntimeError, ValueError) as error:
                message = f"{name}: {type(error).__name__}: {str(error)[:300]}"
                progress.console.print(message, style="red", markup=False)
                continue
            want = got if want is None else want
            results.append(result)
            progress.console.print(f"{name}: ready after {result.compile_seconds:.0f} s")
            save(as_json(results, args), args.out)
        for _ in progress.track(range(args.rounds), description="rounds"):
            for name, times in interleaved(steps, 1, args.repeats).items():
                next(r for r in results if r.name == name).round_ms += times
            save(as_json(results, args), args.out)
    return results


def baseline_of(results: list[Result]) -> Result | None:
    """Inductor bf16, or the first variant where it was not asked for."""
    return next((r for r in results if r.name == BASELINE), results[0] if results else None)


def table(results: list[Result], args: argparse.Namespace) -> Table:
    """The results beside the baseline."""
    base = baseline_of(results)
    what = f"{args.shape} whole, {args.blocks}" if args.whole else f"{args.blocks} {args.shape}"
    shown = Table(title=f"{what} blocks, B={args.batch}, S={args.sequence}")
    columns = ("", "ms", "x bf16", "saved GiB", "of bf16", "peak GiB", "of bf16")
    for column in (*columns, "grad. diff", "compile s"):
        shown.add_column(column, justify="right" if column else "left")
    for r in results:
        assert base is not None
        cells = []
        for bytes_, of in ((r.memory.saved, base.memory.saved), (r.memory.peak, base.memory.peak)):
            cells += [f"{bytes_ / 2**30:.2f}", f"{bytes_ / max(of, 1):.2f}"]
        shown.add_row(
            r.name,
            f"{r.ms:.1f}",
            f"{base.ms / r.ms:.3f}",
            *cells,
            f"{r.gradient_error:.4f}",
            f"{r.compile_seconds:.0f}",
        )
    return shown


def as_json(results: list[Result], args: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, with device and versions."""
    base = baseline_of(results)
    name = "whole_model" if args.whole else "end_to_end"
    content = header(name, args) | {
        "shape": asdict(SHAPES[args.shape]),
        "linear_flops": linear_flops(args.shape, args.blocks, args.batch * args.sequence),
        "memory_is": " ".join((Memory.__doc__ or "").split()),
        "baseline": base.name if base else None,
        "results": [],
    }
    if args.whole:
        content["vocabulary"] = VOCABULARY[args.shape]
        content["head"] = "untied, bf16 in every variant, left out of linear_flops"
        content["optimizer"] = "AdamW, fused, not compiled, state in bf16"
    for r in results:
        entry = asdict(r) | {"median_ms": r.ms}
        if base is not None and r.ms:
            entry["speedup_over_baseline"] = base.ms / r.ms
        for key, value in entry.pop("memory").items():
            of = getattr(base.memory, key) if base else 0
            entry[f"{key}_bytes"] = value
            entry[f"{key}_of_baseline"] = value / of if of else None
        content["results"].append(entry)
    return content


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3-8b")
    parser.add_argument(
        "--blocks", type=int, help=f"{DEFAULT_BLOCKS}, or with --whole as many as published"
    )
    parser.add_argument("--whole", action="store_true", help="a whole model and its optimizer")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved over the variants")
    parser.add_argument("--repeats", type=int, default=5, help="steps timed together in a round")
    names = list(variants())
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    if args.whole and args.shape not in VOCABULARY:
        parser.error(f"--whole --shape {args.shape}: allowed are {', '.join(sorted(VOCABULARY))}")
    if args.blocks is None:
        args.blocks = SHAPES[args.shape].layers if args.whole else DEFAULT_BLOCKS
    console = Console(width=130)
    results = run(args, console)
    console.print(table(results, args))
    save(as_json(results, args), args.out)


if __name__ == "__main__":
    main()
