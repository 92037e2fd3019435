"""What `finetune.py` is made of: a model, a text, two backends, a training loop and a result."""

import os

# Both are read while torch is imported, so they stand before any import of it.
os.environ.setdefault("TQDM_DISABLE", "1")  # ours is the only progress bar
# Waiting threads that spin make a step ten times slower as soon as anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class UsageError(Exception):
    """Something the user gave cannot work; its message is the one line that they are shown."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message that says something, without a trailing full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
