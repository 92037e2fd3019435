"""Which rotation block along the tokens is most precise for grad_weight? SQNR of dW = E^T X in int8
with one scale a column, over every Linear of a real model on real text, for each block.

Runs on the CPU as well: it measures precision, not time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hadagraph.formats import PER_KEPT_INDEX, Encoding
from hadagraph.reference import quantize_reference, scaled_mm_reference
from hadagraph.rotation import Rotation

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from finetuning.model import CausalLoss, find_model, load_model
from finetuning.text import batches, read_works, split_works, tokenize

BLOCKS = (None, 16, 32, 64, 128)


def grad_weight_db(x_TK: torch.Tensor, e_TN: torch.Tensor, block: int | None) -> float:
    """SQNR in dB of E^T X, both operands bf16, quantized in int8 along the tokens."""
    encoding = Encoding("int8", PER_KEPT_INDEX, Rotation(block) if block else None)
    a, a_scale = quantize_reference(e_TN, encoding, 0)
    b, b_scale = quantize_reference(x_TK, encoding, 0)
    got = scaled_mm_reference(a, b, a_scale, b_scale, None, torch.float32).double()
    exact = e_TN.double().t() @ x_TK.double()
    return float(10 * torch.log10(exact.square().sum() / (got - exact).square().sum()))


def measure(batch: int, sequence: int, model: str | None) -> dict[str, dict[str, float]]:
    """Block -> Linear -> dB, at the pretrained weights, one batch, bf16 autocast."""
    name, works = read_works(None)
    language = load_model(find_model(model))
    corpus = tokenize(name, split_works(works), language.tokenizer, sequence)
    levels: dict[str, dict[str, float]] = {str(block): {} for block in BLOCKS}

    def watch(site: str, module: torch.nn.Linear) -> None:
        def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2).bfloat16()

            def compare(gradient: torch.Tensor) -> None:
                e = gradient.flatten(0, -2).bfloat16()
                for block in BLOCKS:
                    levels[str(block)][site] = grad_weight_db(x, e, block)

            out.register_hook(compare)

        module.register_forward_hook(keep)

    for site, module in language.module.named_modules():
        if isinstance(module, torch.nn.Linear) and not site.endswith("lm_head"):
            watch(site, module)
    ids = next(batches(corpus.train, 1, batch, sequence, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        CausalLoss(language.module).train()(ids).backward()
    return levels


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as in examples/finetune.py (default: SmolLM2-135M)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    levels = measure(args.batch, args.sequence, args.model)
    table = Table(title=f"grad_weight, int8, {args.batch}x{args.sequence} tokens: SQNR in dB")
    for column in ("rotation", "median", "worst"):
        table.add_column(column)
    for block, sites in levels.items():
        cells = (statistics.median(sites.values()), min(sites.values()))
        table.add_row("none" if block == "None" else f"H{block}", *(f"{c:.1f}" for c in cells))
    Console().print(table)
    if args.out is not None:
        content = {
            "benchmark": "token_rotation",
            "device": f"CPU ({platform.machine()}); precision only",
            "versions": {"torch": torch.__version__},
            "settings": {"batch": args.batch, "sequence": args.sequence},
            "sqnr_db": levels,
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
