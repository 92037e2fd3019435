"""Recipes by name, by mapping and by file. Knows nothing of graphs; the rows are those of
`hadagraph.published`, what they are made of stands in `hadagraph.rules`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hadagraph.published import BLOCK_FORMATS, ROWS
from hadagraph.recipe_text import recipe_from_mapping, recipe_from_toml, recipe_to_toml
from hadagraph.rules import (
    AXES,
    OPERANDS,
    PER_GEMM,
    READS,
    ROLES,
    SELECTORS,
    SIDES,
    OperandRule,
    Recipe,
)

__all__ = [
    "AXES",
    "BLOCK_FORMATS",
    "DEFAULT_RECIPE",
    "OPERANDS",
    "PER_GEMM",
    "READS",
    "RECIPES",
    "ROLES",
    "SELECTORS",
    "SIDES",
    "OperandRule",
    "Recipe",
    "load_recipe",
    "recipe_named",
    "recipe_to_toml",
]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in ROWS}
DEFAULT_RECIPE = "auto"
_BY_NAME = {name: recipe for recipe in ROWS for name in (recipe.name, *recipe.aliases)}


def recipe_named(name: str, option: str = "recipe") -> Recipe:
    """The recipe of that name or alias. ValueError names the option and lists what is allowed."""
    if name not in _BY_NAME:
        raise ValueError(f"{option} must be one of {', '.join(sorted(_BY_NAME))}, got {name!r}")
    return _BY_NAME[name]


def load_recipe(source: Any, option: str = "recipe") -> Recipe:
    """A recipe from whatever the user gave: a `Recipe`, a name or alias, a mapping (see
    `hadagraph.recipe_text`), or the path of a TOML file, which ends in `.toml`.

    ValueError names the option and what is wrong.
    """
    if isinstance(source, str) and not source.endswith(".toml"):
        return recipe_named(source, option)
    if isinstance(source, Recipe):
        return source
    try:
        if isinstance(source, Mapping):
            return recipe_from_mapping(source, _base_named)
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            return recipe_from_toml(path.read_text(encoding="utf-8"), _base_named, path.stem)
    except OSError as error:
        raise ValueError(
            f"{option} must be a file that can be read, got {str(source)!r}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    raise ValueError(
        f"{option} must be a name, a mapping, a Recipe or the path of a .toml file, "
        f"got {type(source).__name__}: {source!r}"
    )


def _base_named(name: str) -> Recipe:
    return recipe_named(name, "base")
