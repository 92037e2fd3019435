"""How precise are the recipes, matmul by matmul? SQNR against fp64 on its own operands of every
lowered matmul of a real model's first step on real text, for each recipe on the same weights and
batch, and how many dB `int8_rotated` is ahead of each fp8 recipe at each site.

    python bench/recipe_sqnr.py --out bench/results/recipe_sqnr.json
    python bench/recipe_sqnr.py --batch 1 --recipes all --out bench/results/recipe_sqnr_all.json

Runs on the CPU as well: it measures precision, not time. `fp8_tensorwise` is torchao's tensorwise
recipe (e4m3, output gradients e5m2), `fp8_rowwise` its rowwise one without the rounding of scales
to powers of two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from record import header, save
from rich.console import Console
from rich.table import Table

import hadagraph

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from finetuning.model import CausalLoss, find_model, load_model
from finetuning.text import batches, read_works, split_works, tokenize

OURS = "int8_rotated"
THEIRS = ("fp8_rowwise", "fp8_tensorwise")
Levels = dict[str, dict[str, dict[str, float]]]


def measure(args: argparse.Namespace) -> Levels:
    """Recipe -> role -> site -> dB."""
    name, works = read_works(None)
    language = load_model(find_model(args.model))
    corpus = tokenize(name, split_works(works), language.tokenizer, args.sequence)
    loss = CausalLoss(language.module).train()
    ids = next(batches(corpus.train, 1, args.batch, args.sequence, 0))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss, ids = loss.to(device), ids.to(device)
    levels: Levels = {}
    for recipe in args.recipes:
        torch.compiler.reset()
        with torch.autocast(device, dtype=torch.bfloat16):
            options = {"recipe": recipe, "never_slower": False}
            levels[recipe] = hadagraph.measure_sqnr(loss, ids, options=options)
        print(f"{recipe}: {sum(map(len, levels[recipe].values()))} matmuls", flush=True)
    return levels


def chosen(names: list[str]) -> list[str]:
    """The recipes of these names, `int8_rotated` first; `all`: every one that lowers anything."""
    if names == ["all"]:
        names = [name for name in hadagraph.RECIPES if name not in ("bf16", "auto")]
    return list(dict.fromkeys((OURS, *names)))


def ahead(levels: Levels, other: str) -> dict[str, Any]:
    """dB by which `int8_rotated` is more precise than the other recipe, over all sites."""
    gaps = {
        f"{site}:{role}": decibels - levels[other][role][site]
        for role, sites in levels[OURS].items()
        for site, decibels in sites.items()
    }
    worst = min(gaps, key=gaps.__getitem__)
    return {
        "sites": len(gaps),
        "mean_db": statistics.mean(gaps.values()),
        "least_db": gaps[worst],
        "least_site": worst,
        "share_behind_by_over_1_db": sum(gap < -1 for gap in gaps.values()) / len(gaps),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as in examples/finetune.py (default: SmolLM2-135M)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    names = ["all", *hadagraph.RECIPES]
    parser.add_argument("--recipes", nargs="+", choices=names, default=list(THEIRS), metavar="R")
    args = parser.parse_args()
    args.recipes = chosen(args.recipes)
    levels = measure(args)
    table = Table(title=f"SQNR in dB, first step of {args.batch}x{args.sequence} tokens")
    for column in ("recipe", "role", "median", "mean", "worst"):
        table.add_column(column)
    for recipe, roles in levels.items():
        for role, sites in roles.items():
            values = list(sites.values())
            if not values:  # the recipe leaves this role in high precision
                continue
            cells = (statistics.median(values), statistics.mean(values), min(values))
            table.add_row(recipe, role, *(f"{cell:.1f}" for cell in cells))
    Console().print(table)
    gains = {other: ahead(levels, other) for other in THEIRS if other in levels}
    for other, gain in gains.items():
        Console().print(f"{OURS} against {other}: {gain}")
    save(header("recipe_sqnr", args) | {"ahead": gains, "sqnr_db": levels}, args.out)


if __name__ == "__main__":
    main()
