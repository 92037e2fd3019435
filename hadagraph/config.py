"""The options of `torch.compile(backend="hadagraph", options={...})`: one frozen, validated record.
The only place that reads hadagraph's environment variables."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hadagraph import compat
from hadagraph.device import chip_named
from hadagraph.profile import Profile
from hadagraph.recipes import DEFAULT_RECIPE, ROLES, Recipe, load_recipe

EXECUTORS = ("inductor", "eager")
EVAL_CHOICES = ("train", "bf16")
MEMORY_CHOICES = ("fast", "exact", "balanced", "min")
# Language-model heads and mixture-of-experts routers: small errors there cost loss directly.
DEFAULT_KEEP = ("lm_head", "*.lm_head", "*.embed_out", "*.router", "*.gate")


OBSERVED_RECIPE = "int8_rotated"  # which lowers every GEMM that any recipe could


@dataclass(frozen=True)
class Config:
    """What the user asked for.

    recipe: a name from `hadagraph.RECIPES`, or a recipe of the user's own: a mapping, the path of a
        .toml file or a `Recipe` (see docs/recipes.md).
    overrides: glob over `module.path` or `module.path:role` -> what `recipe` may be; the last match
        wins.
    keep: globs over module paths whose GEMMs stay in high precision unless an override names them.
    min_size: a GEMM with a known dim below this stays in high precision.
    error_budget_db: the SQNR in dB that recipe `auto` asks of every GEMM, as predicted: with
        `profile` each from its own statistics, without by priors, of which one in ten falls short.
    target: a chip of `hadagraph.device.CHIPS` to plan for, whatever device there is.
    never_slower: what the device's profile predicts to lose against bf16 stays, unless an override
        names it.
    fuse: quantizers compute the pointwise ops that make their input, where that moves fewer bytes.
    executor: `inductor`, or `eager` to run the rewritten graph without a compiler.
    eval: in graphs without a backward, the training forward's plan (`train`) or none (`bf16`).
    memory: what is kept for the backward: exact values, with pointwise ops (`fast`) or attention's
        output projection, too (`exact`), recomputed; or 8-bit codes of what pointwise ops and norms
        read (`balanced`), 4-bit ones and attention's operands in 8 bits (`min`).
    dump: a folder for graphs, diffs, the plan and kernels; also by HADAGRAPH_DUMP.
    debug: verify the graph after every pass; also by HADAGRAPH_DEBUG=1.
    measure: compare every quantized GEMM with fp64 on the same operands (executor `eager` only).
    mode: a torch.compile mode; its Inductor options are set first, `inductor` then goes on top.
    inductor: Inductor's own options.
    profile: what `hadagraph.calibrate` returned, or the path of its JSON: recipes that choose by
        statistics (`auto`, `adahop`, `hot`) take them from it.
    calibrate_steps: so many runs of each matmul are in high precision and observed, then the model
        is compiled once more with the profile (`hadagraph.last_profile()`).
    observer: not an option: the number of the observer that sees all operands of this graph.
    """

    recipe: str | Recipe = DEFAULT_RECIPE
    overrides: tuple[tuple[str, str | Recipe], ...] = ()
    keep: tuple[str, ...] = DEFAULT_KEEP
    min_size: int = 16
    error_budget_db: float = 30.0
    target: str | None = None
    never_slower: bool = True
    fuse: bool = True
    executor: str = "inductor"
    eval: str = "train"
    memory: str = "exact"
    dump: str | None = None
    debug: bool = False
    measure: bool = False
    mode: str | None = None
    inductor: tuple[tuple[str, Any], ...] = field(default=())
    profile: Profile | None = None
    calibrate_steps: int = 0
    observer: int | None = None

    def __post_init__(self) -> None:
        load_recipe(self.recipe)
        for pattern, recipe in self.overrides:
            _check_override(pattern, recipe)
        _one_of("executor", self.executor, EXECUTORS)
        _one_of("eval", self.eval, EVAL_CHOICES)
        _one_of("memory", self.memory, MEMORY_CHOICES)
        if not 0 < self.error_budget_db < math.inf:
            raise ValueError(
                f"option error_budget_db must be a finite number of dB above 0, "
                f"got {self.error_budget_db!r}"
            )
        if self.target is not None:
            chip_named(self.target)
        if self.calibrate_steps < 0:
            raise ValueError(
                f"option calibrate_steps must not be negative, got {self.calibrate_steps!r}"
            )
        if self.min_size < 1:
            raise ValueError(f"option min_size must be at least 1, got {self.min_size!r}")
        if self.measure and self.executor != "eager":
            raise ValueError("option measure=True needs executor='eager'")
        if self.mode is not None:
            _one_of("mode", self.mode, tuple(compat.list_mode_options()))

    @property
    def recipe_name(self) -> str:
        return self.recipe if isinstance(self.recipe, str) else self.recipe.name

    def inductor_patches(self) -> dict[str, Any]:
        """The Inductor configuration that `mode` and the user's own options ask for."""
        patches = dict(compat.list_mode_options(self.mode)) if self.mode else {}
        patches.update(self.inductor)
        return patches

    @property
    def captures_launches(self) -> bool:
        """Whether kernels are replayed from CUDA graphs, so that launches cost the host nothing."""
        default = compat.inductor_option_default("triton.cudagraphs")
        return bool(self.inductor_patches().get("triton.cudagraphs", default))

    def cache_key(self) -> str:
        """Text that differs whenever the compiled code could: every option but the dump folder."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "dump"]
        return repr([(n, v.fingerprint() if isinstance(v, Profile) else v) for n, v in values])

    def observing(self, observer: int) -> Config:
        """These options for a graph whose matmuls run in high precision and are observed: all that
        a recipe could lower."""
        return replace(
            self,
            recipe=OBSERVED_RECIPE,
            observer=observer,
            eval="train",
            never_slower=False,
            target=None,
            profile=None,
            calibrate_steps=0,
        )


_TYPES: dict[str, tuple[type, ...]] = {
    "recipe": (str, Mapping, os.PathLike, Recipe),
    "overrides": (Mapping,),
    "keep": (list, tuple),
    "min_size": (int,),
    "error_budget_db": (float, int),
    "target": (str, type(None)),
    "never_slower": (bool,),
    "fuse": (bool,),
    "executor": (str,),
    "eval": (str,),
    "memory": (str,),
    "dump": (str, os.PathLike),
    "debug": (bool,),
    "measure": (bool,),
    "mode": (str, type(None)),
    "profile": (Profile, str, os.PathLike, type(None)),
    "calibrate_steps": (int,),
}


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> Config:
    """The configuration from what `torch.compile` hands to a backend.

    ValueError on an unknown or ill-typed option names it, its value and what is allowed. Options
    that Inductor knows are passed on to it.
    """
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    inductor_names = compat.inductor_option_names()
    for name, value in (options or {}).items():
        if name in _TYPES:
            ours[name] = _checked(name, value)
        elif name.replace("-", "_") in inductor_names:
            inductor[name.replace("-", "_")] = _checked_inductor(name.replace("-", "_"), value)
        else:
            raise ValueError(_unknown(name, inductor_names))
    if mode is not None and ours.get("mode") not in (None, mode):
        raise ValueError(f"option mode={ours['mode']!r} contradicts torch.compile(mode={mode!r})")
    if mode is not None:
        ours["mode"] = mode
    ours.setdefault("dump", os.environ.get("HADAGRAPH_DUMP") or None)
    if ours["dump"] is not None:
        _checked_folder(ours["dump"])
    ours.setdefault("debug", os.environ.get("HADAGRAPH_DEBUG", "") not in ("", "0"))
    return Config(**ours, inductor=tuple(sorted(inductor.items(), key=lambda item: item[0])))


def _checked(name: str, value: Any) -> Any:
    allowed = _TYPES[name]
    right_type = isinstance(value, allowed)
    if not right_type or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join(sorted(kind.__name__ for kind in allowed))
        raise ValueError(f"option {name} must be {wanted}, got {type(value).__name__}: {value!r}")
    if name == "recipe":
        return _own_recipe(value, "option recipe")
    if name == "overrides":
        return tuple(
            (glob, _own_recipe(recipe, f"overrides[{glob!r}]")) for glob, recipe in value.items()
        )
    if name == "keep":
        for pattern in value:
            if not isinstance(pattern, str):
                raise ValueError(f"option keep must hold globs, got {pattern!r}")
        return tuple(value)
    if name == "profile" and isinstance(value, str | os.PathLike):
        return _loaded_profile(value)
    return os.fspath(value) if name == "dump" else value


def _loaded_profile(path: str | os.PathLike[str]) -> Profile:
    try:
        return Profile.load(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"option profile must be a Profile or the path of one, got {os.fspath(path)!r}: {error}"
        ) from error


def _own_recipe(value: Any, option: str) -> Any:
    """A name as it is, a recipe of the user's own as what it says now, whatever its file says
    later."""
    told = isinstance(value, Mapping | os.PathLike) or str(value).endswith(".toml")
    return load_recipe(value, option) if told else value


def _checked_inductor(name: str, value: Any) -> Any:
    default = compat.inductor_option_default(name)
    if default is not None and type(value) is not type(default):
        raise ValueError(
            f"option {name} of Inductor must be {type(default).__name__}, "
            f"got {type(value).__name__}: {value!r}"
        )
    return value


def _checked_folder(path: str) -> str:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"option dump must be a folder that can be made, got {path!r}: {error.strerror}"
        ) from error
    return path


def _check_override(pattern: str, recipe: str | Recipe) -> None:
    if not isinstance(pattern, str) or not isinstance(recipe, str | Recipe):
        raise ValueError(f"option overrides must map glob to recipe, got {pattern!r}: {recipe!r}")
    _, colon, role = pattern.rpartition(":")
    if colon and role not in ROLES:
        raise ValueError(
            f"option overrides: role after ':' must be one of {', '.join(ROLES)}, got {pattern!r}"
        )
    load_recipe(recipe, option=f"overrides[{pattern!r}]")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"option {option} must be one of {', '.join(allowed)}, got {value!r}")


def _unknown(name: str, inductor_names: frozenset[str]) -> str:
    close = difflib.get_close_matches(name, [*_TYPES, *inductor_names], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"unknown option {name!r}{hint}; allowed are {', '.join(sorted(_TYPES))}, "
        f"and the names in torch._inductor.config"
    )
