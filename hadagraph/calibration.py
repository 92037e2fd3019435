"""An explicit calibration run: forward and backward over some batches with every matmul in high
precision and observed. Changes neither the model nor what is compiled already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hadagraph.config import parse_options
from hadagraph.explanation import compiled_aside, run_backward, same_state, training_mode
from hadagraph.observation import Observer
from hadagraph.profile import Profile
from hadagraph.reports import Collector


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    profile: Profile | None = None,
) -> Profile:
    """The statistics of the operands of every matmul that could be lowered, over some batches.

    batches: each a mapping (keyword arguments), a tuple or list (arguments) or one argument. loss
    makes a scalar of the model's output (by default its `.loss`, or the output itself if it is a
    scalar; ValueError otherwise). options: as for `torch.compile`; `keep`, `min_size` and
    `overrides` say what is observed. profile: an earlier one, which this run goes on with.

    Runs in eager mode, in the module's own mode (`train`, `eval`), under the caller's autocast if
    there is one, and with gradients even under `torch.no_grad`; weights, buffers, gradients and the
    random state are left as they were, whatever is raised.
    Tensors are not kept: statistics are added up on the device. Where torch.distributed is
    initialized all ranks must call this, each with batches of its own, and get the same profile.
    ValueError if there was no batch or no matmul.
    """
    asked = parse_options(None, {**(options or {}), "executor": "eager"})
    observer = Observer(before=profile)
    count = 0
    try:
        compiled = compiled_aside(model, asked.observing(observer.number), Collector())
        with same_state(model), training_mode():
            for batch in batches:
                inputs, kwargs = _arguments(batch)
                output = compiled(*inputs, **kwargs)
                run_backward("calibrate", model, inputs, kwargs, output, loss)
                count += 1
        found = observer.profile()
    finally:
        observer.close()
    if count == 0:
        raise ValueError("calibrate: no batches were given")
    if not found.sites:
        raise ValueError("calibrate: found no matmul that could be lowered in this model")
    return found


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}
