"""One bf16 nn.Linear, forward and backward, quantization included, at TransformerEngine's published
shapes: Inductor bf16, torchao float8 and hadagraph, interleaved in one run.

    python bench/linear.py --out bench/results/linear.json

Under 100 s on one H200.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from record import header, interleaved, median, milliseconds, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step import Step, activations
from torch import nn
from variants import BASELINE, variants

TOKENS = 15872
FEATURES = ((4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096))
DEFAULT_VARIANTS = (
    BASELINE,
    "torchao tensorwise",
    "torchao rowwise",
    "hadagraph int8_rotated",
    "hadagraph fp8_rowwise",
    "hadagraph fp8_tensorwise",
)


def features(text: str) -> tuple[int, int]:
    """`KxN` as numbers."""
    try:
        K, N = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not KxN, such as 4096x12288") from error
    return K, N


def make_step(name: str, tokens: int, K: int, N: int) -> Step:
    """A compiled Linear [K -> N] on [tokens, K], input and weight requiring gradients; warm."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # In a container, so that the Linear has a name and torchao a parent to replace it in.
    model = nn.Sequential(nn.Linear(K, N, bias=False)).to(device, torch.bfloat16)
    x, _ = activations((tokens, K), device)
    _, gradient = activations((tokens, N), device, seed=2)
    compiled = variants()[name](model)
    step = Step(compiled, list(model.parameters()), (x,), gradient)
    step()
    milliseconds(step, 2)
    return step


def measure_shape(K: int, N: int, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every variant at one shape. A failing one is reported and left out."""
    # A new shape must not make dynamo guess that the sizes are dynamic.
    torch.compiler.reset()
    gc.collect()
    steps: dict[str, Step] = {}
    entry: dict[str, Any] = {"M": args.tokens, "K": K, "N": N, "variants": {}}
    entry["flops"] = 3 * 2 * args.tokens * K * N
    for name in args.variants:
        began = time.perf_counter()
        try:
            steps[name] = make_step(name, args.tokens, K, N)
        except (ImportError, RuntimeError, ValueError) as error:
            entry["variants"][name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            console.print(f"[red]{K}x{N}, {name}: {entry['variants'][name]['error'][:200]}[/red]")
            continue
        entry["variants"][name] = {"compile_seconds": time.perf_counter() - began}
    times = interleaved(steps, args.rounds, args.repeats)
    base = median(times[args.variants[0]]) if args.variants[0] in times else None
    for name, rounds in times.items():
        ms = median(rounds)
        entry["variants"][name] |= {
            "round_ms": rounds,
            "ms": ms,
            "tflops": entry["flops"] / ms / 1e9,
            "speedup": base and base / ms,
        }
    return entry


def table(content: dict[str, Any], names: list[str]) -> Table:
    """Milliseconds and ratio to the first variant, one row a shape."""
    shown = Table(title=f"Linear forward + backward: ms (x {names[0]})")
    shown.add_column("M, K, N")
    for name in names:
        shown.add_column(name, justify="right")
    for entry in content["shapes"]:
        cells = []
        for name in names:
            found = entry["variants"].get(name, {})
            ratio = f" ({found['speedup']:.3f})" if found.get("speedup") else ""
            cells.append(f"{found['ms']:.3f}{ratio}" if "ms" in found else "failed")
        shown.add_row(f"{entry['M']}, {entry['K']}, {entry['N']}", *cells)
    return shown


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="rows of the input")
    parser.add_argument(
        "--features", type=features, nargs="+", default=list(FEATURES), metavar="KxN"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved over the variants")
    parser.add_argument("--repeats", type=int, default=10, help="steps timed together in a round")
    names = list(variants())
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=names,
        default=list(DEFAULT_VARIANTS),
        metavar="NAME",
        help="ratios are to the first",
    )
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    console = Console(width=150)
    # All variants stay compiled side by side, so that the rounds can interleave.
    torch._dynamo.config.recompile_limit = 64
    content = header("linear", args) | {"baseline": args.variants[0], "shapes": []}
    began = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        for K, N in progress.track(args.features, description="shapes"):
            content["shapes"].append(measure_shape(K, N, args, progress.console))
            content["seconds"] = time.perf_counter() - began
            save(content, args.out)
    console.print(table(content, args.variants))
    console.print(f"{content['device']}, {content['seconds']:.0f} s")


if __name__ == "__main__":
    main()
