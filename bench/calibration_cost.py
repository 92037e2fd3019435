"""What does a calibrated step cost? Forward and backward of Llama-shaped blocks with every Linear
observed, over the same step without observers, both in bf16 through the backend.

    python bench/calibration_cost.py --shape llama3-8b --layers 2 --out bench/results/...

Runs on the CPU as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from llama_blocks import SHAPES, make_blocks
from record import header, interleaved, median, save
from rich.console import Console

import hadagraph

ENDLESS = 1 << 30
MODES = {"plain": {"recipe": "bf16"}, "calibrated": {"calibrate_steps": ENDLESS}}


def step(args: argparse.Namespace, device: str, mode: str) -> Callable[[], object]:
    """One forward and backward."""
    model = make_blocks(args.shape, args.layers, args.sequence, device)
    options = {**MODES[mode], "executor": args.executor, "keep": []}
    compiled = torch.compile(model, backend="hadagraph", options=options)
    size = (args.batch, args.sequence, SHAPES[args.shape].width)
    x = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)

    def run() -> None:
        compiled(x).float().square().mean().backward()

    for _ in range(3):
        run()
    return run


def peak_gib(call: Callable[[], object]) -> float | None:
    """Memory that one call takes at most on the GPU, in GiB; None on the CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--executor", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = {mode: step(args, device, mode) for mode in MODES}
    peaks = {mode: peak_gib(call) for mode, call in calls.items()}
    times = {mode: median(found) for mode, found in interleaved(calls, args.rounds, 1).items()}
    ratio = times["calibrated"] / times["plain"]
    Console().print(
        f"{args.shape}, {args.layers} blocks, {args.batch}x{args.sequence} tokens: "
        f"plain {times['plain']:.1f} ms, calibrated {times['calibrated']:.1f} ms: {ratio:.1f}x"
    )
    graphs = [report.kind for report in hadagraph.report()]
    content = header("calibration_cost", args) | {"milliseconds": times, "ratio": ratio}
    save(content | {"peak_gib": peaks, "graphs": graphs}, args.out)


if __name__ == "__main__":
    main()
