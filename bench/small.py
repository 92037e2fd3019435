"""Is hadagraph ever slower than Inductor bf16? Skinny Linears (tensor-parallel shards), forward and
backward, and steps with AdamW of decoder models of 100 M to 1.5 B parameters, random weights.

    python bench/small.py --out bench/results/small.json

Under 300 s on one H200. Models are compiled with `--layers` of their blocks, which keeps compiling
short but makes embedding, head and optimizer weigh more than in the whole model. So a model of no
blocks is timed too, and the ratio at the published depth predicted from the two.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from language_models import VOCABULARY, make_language_model, token_batch
from linear import features
from llama_blocks import SHAPES
from record import header, interleaved, median, milliseconds, save
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from step import Step, activations, captured
from torch import nn
from variants import BASELINE, variants

import hadagraph

OURS = "hadagraph int8_rotated"
LINEARS = ((8192, 1280), (1024, 8192), (8192, 7168), (3584, 8192))
TOKENS = (2048, 8192)
MODEL_NAMES = ("smollm2-135m", "smollm2-360m", "qwen2.5-0.5b", "llama3-1b")
BATCHES = ((8, 512), (4, 2048))
CAPTURE_WARMUP = 3
Row = dict[str, Any]


def batch_of(text: str) -> tuple[int, int]:
    """`BxS` as numbers."""
    return features(text)


def lowered_gemms() -> Row:
    """How many GEMMs of the graphs compiled since the last reset were lowered, and why not."""
    sites = [site for report in hadagraph.report() for site in report.sites]
    reasons = Counter(site.reason for site in sites if not site.lowered)
    return {
        "gemms": len(sites),
        "lowered": sum(site.lowered for site in sites),
        "reasons": dict(reasons.most_common()),
    }


def compare(makers: dict[str, Callable[[], Step]], args: argparse.Namespace) -> Row:
    """Warm up each variant, then time all over interleaved rounds; on a GPU also as CUDA graphs.
    A failure is recorded and leaves its variant out."""
    # Sizes seen one after the other must not make dynamo guess that they are dynamic.
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    row: Row = {"variants": {name: {} for name in makers}}
    steps: dict[str, Callable[[], None]] = {}
    for name, make in makers.items():
        hadagraph.reset_report()
        began = time.perf_counter()
        try:
            step = make()
            step()
            milliseconds(step, 2)
        except RuntimeError as error:  # out of memory is one
            row["variants"][name]["error"] = f"{type(error).__name__}: {error}"[:500]
            continue
        steps[name] = step
        row["variants"][name]["compile_seconds"] = time.perf_counter() - began
        if name == OURS:
            row |= lowered_gemms()
    _time(row, steps, args, "ms")
    if torch.cuda.is_available() and not args.no_capture:
        graphs = {}
        for name, step in steps.items():
            try:
                graphs[name] = captured(step, CAPTURE_WARMUP)
            except RuntimeError as error:
                row["variants"][name]["capture_error"] = f"{error}"[:500]
        _time(row, graphs, args, "captured_ms")
    return row


def _time(
    row: Row, calls: dict[str, Callable[[], None]], args: argparse.Namespace, key: str
) -> None:
    for name, rounds in interleaved(calls, args.rounds, args.repeats).items():
        row["variants"][name] |= {f"{key}_rounds": rounds, key: median(rounds)}
    times = _both(row, key)
    row[f"ratio_{key}"] = times[0] / times[1] if all(times) else None


def _both(row: Row, key: str) -> list[float | None]:
    """A time of the baseline and of ours; None where one failed."""
    return [row["variants"].get(name, {}).get(key) for name in (BASELINE, OURS)]


def linear_step(name: str, tokens: int, K: int, N: int, device: str) -> Step:
    """One compiled Linear without bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, bias=False)).to(device, torch.bfloat16)
    x, _ = activations((tokens, K), device)
    _, gradient = activations((tokens, N), device, seed=2)
    return Step(variants()[name](model), list(model.parameters()), (x,), gradient)


def model_step(name: str, model_name: str, layers: int, size: tuple[int, int], device: str) -> Step:
    """One compiled model (tied head) with its loss and a fused AdamW."""
    model = make_language_model(model_name, layers, size[1], device, tied=True)
    parameters = list(model.parameters())
    # Learning is not what is timed: a rate that leaves bf16 weights sane for any number of steps.
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True, capturable=device == "cuda")
    inputs = token_batch(model_name, *size, device)
    return Step(variants()[name](model), parameters, inputs, optimizer=optimizer)


def parameter_count(name: str) -> int:
    """Of the published depth, head tied, norms left out."""
    shape = SHAPES[name]
    return shape.layers * shape.linear_parameters + VOCABULARY[name] * shape.width


def predict_depth(row: Row, empty_ms: float, depth: int, key: str) -> None:
    """The ratio at `depth` blocks: the model without blocks, plus a part proportional to depth."""
    times = _both(row, key)
    if not all(times) or not row["layers"]:
        return
    whole = [empty_ms + (ms - empty_ms) * depth / row["layers"] for ms in times]
    row[f"predicted_{key}"] = dict(zip((BASELINE, OURS), whole, strict=True))
    row[f"predicted_ratio_{key}"] = whole[0] / whole[1]


def measure_linear(K: int, N: int, T: int, args: argparse.Namespace, device: str) -> Row:
    """Both variants of one Linear."""
    makers = {name: partial(linear_step, name, T, K, N, device) for name in (BASELINE, OURS)}
    return {"T": T, "K": K, "N": N, **compare(makers, args)}


def measure_model(name: str, size: tuple[int, int], args: argparse.Namespace, device: str) -> Row:
    """One model at one batch: both variants, and the baseline without blocks."""
    depth = SHAPES[name].layers
    layers = min(args.layers, depth) if args.layers else depth
    makers = {
        variant: partial(model_step, variant, name, layers, size, device)
        for variant in (BASELINE, OURS)
    }
    found = compare(makers, args)
    row: Row = {
        "model": name,
        "batch": size[0],
        "sequence": size[1],
        "layers": layers,
        "published_layers": depth,
        "parameters": parameter_count(name),
        **found,
    }
    if layers < depth:
        empty = compare({BASELINE: partial(model_step, BASELINE, name, 0, size, device)}, args)
        row["without_blocks"] = empty["variants"][BASELINE]
        for key in ("ms", "captured_ms"):
            if key in row["without_blocks"]:
                predict_depth(row, row["without_blocks"][key], depth, key)
    return row


def run(args: argparse.Namespace, console: Console) -> Row:
    """Linears, then models; what there is, is saved after each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A graph out of the caches runs no pass and leaves no report.
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.fx_graph_cache = False
    content = header("small", args) | {"baseline": BASELINE, "linears": [], "models": []}
    began = time.perf_counter()
    work: list[tuple[str, Callable[[], Row]]] = [
        ("linears", partial(measure_linear, K, N, T, args, device))
        for (K, N), T in product(args.linears, args.tokens)
    ]
    work += [
        ("models", partial(measure_model, name, size, args, device))
        for name, size in product(args.models, args.batches)
    ]
    with Progress(console=console, transient=True) as progress:
        for section, measure in progress.track(work, description="linears, models"):
            content[section].append(measure())
            content["seconds"] = time.perf_counter() - began
            save(content, args.out)
    return content


def table(content: Row) -> Table:
    """One row a Linear or model; ratios above 1 mean that hadagraph is faster."""
    shown = Table(title=f"{OURS} beside {BASELINE}, {content['device']}")
    for column in ("", "bf16 ms", "ms", "x bf16", "captured x", "at full depth x", "lowered"):
        shown.add_column(column, justify="right" if column else "left")
    for row in (*content["linears"], *content["models"]):
        if "model" in row:
            label = f"{row['model']} {row['batch']}x{row['sequence']}, {row['layers']} layers"
        else:
            label = f"Linear {row['K']}x{row['N']}, T={row['T']}"
        ratios = ("ratio_ms", "ratio_captured_ms", "predicted_ratio_ms")
        shown.add_row(
            label,
            *("failed" if ms is None else f"{ms:.3f}" for ms in _both(row, "ms")),
            *("-" if row.get(key) is None else f"{row[key]:.3f}" for key in ratios),
            f"{row['lowered']} of {row['gemms']}" if "gemms" in row else "-",
        )
    return shown


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    add = parser.add_argument
    add("--linears", type=features, nargs="*", default=list(LINEARS), metavar="KxN")
    add("--tokens", type=int, nargs="+", default=list(TOKENS), help="rows of the Linears' input")
    add(
        "--models", nargs="*", choices=sorted(VOCABULARY), default=list(MODEL_NAMES), metavar="NAME"
    )
    add("--batches", type=batch_of, nargs="+", default=list(BATCHES), metavar="BxS")
    add("--layers", type=int, default=6, help="blocks of each model; 0: as published")
    add("--rounds", type=int, default=5, help="interleaved over the variants")
    add("--repeats", type=int, default=10, help="steps timed together in a round")
    add("--no-capture", action="store_true", help="do not time steps as CUDA graphs too")
    add("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    console = Console(width=130)
    content = run(args, console)
    console.print(table(content))
    console.print(f"{content['device']}, {content['seconds']:.0f} s")


if __name__ == "__main__":
    main()
