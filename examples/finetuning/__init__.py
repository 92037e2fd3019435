"""What `finetune.py` is made of: a model, a text, two backends, a training loop and a result."""

import os

# tqdm reads this when it is first imported, which torch does: ours is the only progress bar.
os.environ.setdefault("TQDM_DISABLE", "1")


class UsageError(Exception):
    """Something the user gave cannot work; its message is the one line that they are shown."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message that says something, without a trailing full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
