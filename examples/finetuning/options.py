"""The command line of `finetune.py`: options, their defaults by device, and their errors."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NoReturn

import torch

from finetuning import UsageError
from finetuning.backends import HADAGRAPH, INDUCTOR
from finetuning.training import AUTOCAST_DTYPES, Settings


@dataclass(frozen=True)
class Defaults:
    """What a run of a few minutes can afford."""

    steps: int
    batch: int
    sequence: int
    dtype: str
    held_out_windows: int
    evaluate_every: int


CPU_DEFAULTS = Defaults(25, 1, 128, "fp32", held_out_windows=16, evaluate_every=0)
GPU_DEFAULTS = Defaults(200, 8, 512, "bf16", held_out_windows=64, evaluate_every=50)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


_count.__name__ = "whole number"  # argparse's messages name the type
_positive.__name__ = "number"


def parse(description: str, arguments: list[str] | None) -> argparse.Namespace:
    """Command-line options; what depends on the device is still None."""
    parser = OneLineParser(prog="finetune", description=description.splitlines()[0])
    parser.add_argument("--model", help="hub id, folder or .gguf file (default: SmolLM2-135M)")
    parser.add_argument("--text", help="a text file or a folder of .txt (default: Shakespeare)")
    parser.add_argument("--steps", type=_count, help="optimizer steps (25 on a CPU, 200 on a GPU)")
    parser.add_argument("--recipe", default="int8_rotated", help="hadagraph's recipe (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype",
        choices=sorted(AUTOCAST_DTYPES),
        help="what matmuls compute in; weights are fp32 (fp32 on a CPU, bf16 on a GPU)",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the batches (%(default)s)")
    parser.add_argument("--batch", type=_count, help="sequences a step (1 on a CPU, 8 on a GPU)")
    parser.add_argument("--sequence", type=_count, help="tokens a sequence (128 or 512)")
    parser.add_argument("--lr", type=_positive, default=5e-5, help="learning rate (%(default)s)")
    parser.add_argument("--clip", type=_positive, default=1.0, help="gradient norm (%(default)s)")
    parser.add_argument(
        "--evaluate",
        choices=("plain", "compiled"),
        default="plain",
        help="held-out loss without compiling, or through each backend (%(default)s)",
    )
    parser.add_argument("--out", default="demo_output", help="folder for results (%(default)s)")
    parser.add_argument("--only", choices=(INDUCTOR, HADAGRAPH), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def settle(options: argparse.Namespace) -> Settings:
    """Options with their defaults for the device filled in; raises UsageError."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"--device {device}: allowed are cpu, cuda and cuda:N") from error
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: allowed are cpu, cuda and cuda:N")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there is no such GPU here")
    defaults = CPU_DEFAULTS if kind == "cpu" else GPU_DEFAULTS
    return Settings(
        steps=options.steps or defaults.steps,
        batch=options.batch or defaults.batch,
        sequence=options.sequence or defaults.sequence,
        lr=options.lr,
        clip=options.clip,
        seed=options.seed,
        device=device,
        dtype=options.dtype or defaults.dtype,
        recipe=options.recipe,
        held_out_windows=defaults.held_out_windows,
        evaluate_every=defaults.evaluate_every,
        evaluate=options.evaluate,
    )
