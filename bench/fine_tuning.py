"""Does training in low precision reach the same held-out loss? Fine-tunes a real model on real text
with Inductor, with hadagraph, and with a control that must fail, over several seeds each.

The control trains in bf16, uncompiled, while every Linear's output gradient carries noise 10 dB
below it: a test that lets it pass proves nothing about the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from finetuning.backends import HADAGRAPH, INDUCTOR, compile_loss, examine
from finetuning.model import CausalLoss, find_model, load_model
from finetuning.options import parse, settle
from finetuning.results import device_name
from finetuning.text import batches, read_works, split_works, tokenize
from finetuning.training import RunResult, Settings, train

CONTROL = "control: 10 dB gradients"
CONTROL_DB = 10.0
ALLOWED_GAP = 0.02  # of the improvement


class NoisyGradient(torch.autograd.Function):
    """The identity, whose gradient comes with Gaussian noise CONTROL_DB below it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        rms = gradient.float().square().mean().sqrt()
        noise = torch.randn_like(gradient, dtype=torch.float32) * rms * 10 ** (-CONTROL_DB / 20)
        return (gradient.float() + noise).to(gradient.dtype)


def add_noise(model: torch.nn.Module) -> list[Any]:
    """Hooks that pass every Linear's output, but the head's, through NoisyGradient."""
    return [
        module.register_forward_hook(lambda module, inputs, out: NoisyGradient.apply(out))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    ]


@dataclasses.dataclass
class Verdict:
    """One way of training beside the baseline: mean held-out gap as a share of the baseline's
    improvement, and whether it is parity (within ALLOWED_GAP and within the seeds' spread)."""

    name: str
    gap: float
    difference: float
    spread: float

    @property
    def parity(self) -> bool:
        return self.gap <= ALLOWED_GAP and self.difference <= self.spread


def verdict(name: str, runs: list[RunResult], baseline: list[RunResult]) -> Verdict:
    """Compare seed by seed; the spread is the baseline's range of final losses over its seeds."""
    gaps = [(r.end - b.end) / (b.start - b.end) for r, b in zip(runs, baseline, strict=True)]
    ends = [b.end for b in baseline]
    difference = statistics.mean(r.end for r in runs) - statistics.mean(ends)
    return Verdict(name, statistics.mean(gaps), difference, max(ends) - min(ends))


def run(
    options: argparse.Namespace,
    seeds: int,
    console: Console,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Every way of training over every seed, and each matmul's error at the first step; `save`
    gets what there is after each run."""
    started = time.perf_counter()
    settings = settle(options)
    name, works = read_works(options.text)
    language = load_model(find_model(options.model))
    corpus = tokenize(name, split_works(works), language.tokenizer, settings.sequence)
    language.module.to(settings.device)
    initial = {key: value.clone() for key, value in language.module.state_dict().items()}
    plain = CausalLoss(language.module)
    ids = next(batches(corpus.train, 1, settings.batch, settings.sequence, settings.seed))
    lowering = examine(
        plain.train(), ids.to(settings.device), settings.recipe, settings.precision()
    )
    console.print(f"errors measured, {time.perf_counter() - started:.0f} s since the start")
    results: dict[str, list[RunResult]] = {}
    for way in (INDUCTOR, HADAGRAPH, CONTROL):
        results[way] = []
        hooks = add_noise(language.module) if way == CONTROL else []
        # The control runs uncompiled: its noise is not worth a compilation.
        compiled = plain if hooks else compile_loss(plain, way, settings.recipe)
        for seed in range(seeds):
            language.module.load_state_dict(initial)
            chosen = dataclasses.replace(settings, seed=seed)
            result = train(
                way, compiled, plain, corpus, chosen, lambda *_: None, measure_saved=False
            )
            results[way].append(result)
            console.print(
                f"{way}, seed {seed}: {result.start:.4f} -> {result.end:.4f}, "
                f"{1e3 * (result.median_step_s or 0):.1f} ms a step, "
                f"{time.perf_counter() - started:.0f} s since the start"
            )
            save({"finished": {k: [dataclasses.asdict(r) for r in v] for k, v in results.items()}})
        for hook in hooks:
            hook.remove()
    return report(settings, language.name, corpus.name, results, lowering.sqnr_db, console)


def report(
    settings: Settings,
    model: str,
    text: str,
    results: dict[str, list[RunResult]],
    sqnr_db: dict[str, list[float]],
    console: Console,
) -> dict[str, Any]:
    """Print the table; everything measured, for the JSON file."""
    baseline = results[INDUCTOR]
    verdicts = {way: verdict(way, runs, baseline) for way, runs in results.items()}
    table = Table(title=f"{model} on {text}, {settings.steps} steps, {settings.dtype}")
    for column in ("", "end, mean", "gap of improvement", "difference", "spread", "parity", "ms"):
        table.add_column(column)
    for way, runs in results.items():
        found = verdicts[way]
        table.add_row(
            way,
            f"{statistics.mean(r.end for r in runs):.4f}",
            f"{100 * found.gap:+.2f} %",
            f"{found.difference:+.4f}",
            f"{found.spread:.4f}",
            "baseline" if way == INDUCTOR else ("yes" if found.parity else "NO"),
            f"{1e3 * statistics.median(r.median_step_s or 0 for r in runs):.1f}",
        )
    console.print(table)
    levels = [level for role in sqnr_db.values() for level in role]
    summary = {"median": statistics.median(levels), "worst": min(levels), "count": len(levels)}
    console.print(f"SQNR of {settings.recipe} at the first step, dB: {summary}")
    return {
        "benchmark": "fine_tuning",
        "model": model,
        "text": text,
        "device": device_name(settings.device),
        "versions": {"torch": torch.__version__},
        "settings": dataclasses.asdict(settings),
        "sqnr_db": {"all": summary, "by_role": sqnr_db},
        "verdicts": [{**dataclasses.asdict(v), "parity": v.parity} for v in verdicts.values()],
        "runs": {
            way: [{**dataclasses.asdict(r), "median_step_s": r.median_step_s} for r in runs]
            for way, runs in results.items()
        },
    }


def main() -> None:
    """Command line: `--seeds` and `--json` here, everything else as in examples/finetune.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    ours, rest = parser.parse_known_args()

    def save(content: dict[str, Any]) -> None:
        if ours.json is not None:
            ours.json.parent.mkdir(parents=True, exist_ok=True)
            ours.json.write_text(json.dumps(content, indent=1) + "\n")

    save(run(parse(__doc__ or "", rest), ours.seeds, Console(width=120), save))


if __name__ == "__main__":
    main()
