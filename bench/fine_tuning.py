"""Does training in low precision reach the same held-out loss? Fine-tunes a real model on real text
with Inductor, with hadagraph, and with a control that must fail, over several seeds each.

The control trains in bf16, uncompiled, while every Linear's output gradient carries noise 10 dB
below it: a test that lets it pass proves nothing about the others. `--memory balanced min` adds
hadagraph with less saved for the backward, `--option NAME=VALUE` gives every hadagraph an option.
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


def named_option(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` with the value in JSON, or as a string where it is none."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE, such as never_slower=false")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def ways_of_training(ours: argparse.Namespace, recipe: str) -> dict[str, dict[str, Any] | None]:
    """Name -> hadagraph's options, None for those that do without it; the baseline first."""
    options = {"recipe": recipe, **dict(ours.option)}
    ways: dict[str, dict[str, Any] | None] = {INDUCTOR: None, HADAGRAPH: options}
    for memory in ours.memory:
        ways[f"{HADAGRAPH}, memory={memory}"] = options | {"memory": memory}
    return ways if ours.no_control else ways | {CONTROL: None}


def compile_way(
    way: str, hadagraph_options: dict[str, Any] | None, plain: torch.nn.Module, recipe: str
) -> torch.nn.Module:
    """`plain` compiled from scratch. The control runs uncompiled: its noise is not worth it."""
    if way == CONTROL:
        return plain
    if hadagraph_options is None:
        return compile_loss(plain, way, recipe)
    torch.compiler.reset()
    compiled: torch.nn.Module = torch.compile(plain, backend=HADAGRAPH, options=hadagraph_options)
    return compiled


def run(
    options: argparse.Namespace,
    ours: argparse.Namespace,
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
    device_ids = ids.to(settings.device)
    lowering = examine(
        plain.train(), device_ids, settings.recipe, settings.precision(), dict(ours.option)
    )
    console.print(f"errors measured, {time.perf_counter() - started:.0f} s since the start")
    results: dict[str, list[RunResult]] = {}
    ways = ways_of_training(ours, settings.recipe)
    for way, hadagraph_options in ways.items():
        results[way] = []
        hooks = add_noise(language.module) if way == CONTROL else []
        compiled = compile_way(way, hadagraph_options, plain, settings.recipe)
        for seed in range(ours.seeds):
            language.module.load_state_dict(initial)
            chosen = dataclasses.replace(settings, seed=seed)
            measure_saved = ours.saved and seed == 0 and way != CONTROL
            result = train(way, compiled, plain, corpus, chosen, lambda *_: None, measure_saved)
            results[way].append(result)
            console.print(
                f"{way}, seed {seed}: {result.start:.4f} -> {result.end:.4f}, "
                f"{1e3 * (result.median_step_s or 0):.1f} ms a step, "
                f"{time.perf_counter() - started:.0f} s since the start"
            )
            save({"finished": {k: [dataclasses.asdict(r) for r in v] for k, v in results.items()}})
        for hook in hooks:
            hook.remove()
    content = report(settings, language.name, corpus.name, results, lowering.sqnr_db, console)
    return content | {"hadagraph_options": {way: given for way, given in ways.items() if given}}


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
    table.add_column("saved MiB")
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
            "-" if runs[0].saved_bytes is None else f"{runs[0].saved_bytes / 2**20:.1f}",
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
    """Command line: what is added here, everything else as in examples/finetune.py."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="seeds 0, 1, ... (%(default)s)")
    add("--json", type=Path, help="write the results here")
    add("--memory", nargs="+", default=[], metavar="M", help="values of hadagraph's option memory")
    add(
        "--option",
        nargs="+",
        type=named_option,
        default=[],
        metavar="NAME=VALUE",
        help="for every hadagraph; never_slower=false lowers a small model's matmuls too",
    )
    add("--saved", action="store_true", help="count the bytes saved for the backward")
    add("--no-control", action="store_true", help="leave the control out")
    ours, rest = parser.parse_known_args()

    def save(content: dict[str, Any]) -> None:
        if ours.json is not None:
            ours.json.parent.mkdir(parents=True, exist_ok=True)
            ours.json.write_text(json.dumps(content, indent=1) + "\n")

    save(run(parse(__doc__ or "", rest), ours, Console(width=120), save))


if __name__ == "__main__":
    main()
