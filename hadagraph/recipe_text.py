"""Recipes as mappings and as TOML: how a user writes one of their own, and how any is printed. What
a recipe says is checked by `hadagraph.rules`; here only names and types are.

    name = "mine"
    base = "int8_rotated"            # what is not said stays as it is there
    grad_input = "bf16"              # this GEMM in high precision
    output = "mxfp8"                 # both operands, nothing but the format
    [grad_weight]                    # fields of both operands, then of one
    format = "nvfp4"
    max_block = 16
    left.rounding = "stochastic"
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from hadagraph.formats import FORMATS, Granularity
from hadagraph.published import BLOCK_FORMATS
from hadagraph.rotation import Fixed, PerStep
from hadagraph.rules import PER_GEMM, ROLES, SIDES, OperandRule, Recipe

UNNAMED = "custom"
HIGH_PRECISION = "bf16"
"""As a role's value: that GEMM is left as it is."""
NONE = "none"
"""What stands for None, which TOML has no word for."""
_RULE_FIELDS = tuple(f.name for f in fields(OperandRule))
_DEFAULTS = {f.name: f.default for f in fields(OperandRule)}
_TYPES: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "granularity": (Granularity,),
    "max_block": (int, type(None)),
    "signs": (Fixed, PerStep, str, type(None)),
    "scale": (str,),
    "rounding": (str,),
    "fit": (str,),
    "prescale": (bool,),
    "tokens_kept": (tuple, type(None)),
    "outer_block": (int, type(None)),
    "outer_tokens_kept": (tuple, type(None)),
    "outliers": (int,),
    "outlier_axis": (str,),
    "reads": (str,),
}
_WANTED = {
    "granularity": "text like 'per_tensor' or 'block_contracted(32)'",
    "max_block": f"a whole number or {NONE!r}",
    "signs": f"{NONE!r}, {PER_GEMM!r}, 'fixed(<seed>)' or 'per_step(<stream>)'",
    "prescale": "true or false",
    "tokens_kept": f"two whole numbers [r, b] or {NONE!r}",
    "outer_block": f"a whole number or {NONE!r}",
    "outer_tokens_kept": f"two whole numbers [r, b] or {NONE!r}",
    "outliers": "a whole number",
}
_RECIPE_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "summary": (str,),
    "source": (str,),
    "base": (str,),
    "aliases": (list, tuple),
    "select": (str,),
    "clip_masked": (bool,),
}


def recipe_from_mapping(
    given: Mapping[str, Any], named: Callable[[str], Recipe], name: str = UNNAMED
) -> Recipe:
    """The recipe that a mapping describes; `named` finds its `base`, `name` is for one without.

    ValueError names the recipe, the role and operand, the field, its value and what is allowed.
    """
    name = given.get("name", name)
    where = f"recipe {name!r}"
    _check_names(where, given, (*_RECIPE_FIELDS, *ROLES))
    for key, kinds in _RECIPE_FIELDS.items():
        if key in given and not isinstance(given[key], kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{where}: {key} must be {wanted}, got {given[key]!r}")
    base = named(given["base"]) if "base" in given else None
    pairs = {}
    for role in ROLES:
        pair = base.rules(role) if base else None
        if role in given:
            pair = _pair(f"{where}, role {role!r}", given[role], pair)
        pairs[role] = pair
    return Recipe(
        name,
        given.get("summary", f"{base.name}, changed" if base else "a recipe of the user's"),
        given.get("source", base.source if base else "the user"),
        pairs["output"],
        pairs["grad_input"],
        pairs["grad_weight"],
        aliases=tuple(given.get("aliases", ())),
        select=given.get("select", base.select if base else ""),
        clip_masked=given.get("clip_masked", base.clip_masked if base else False),
    )


def recipe_from_toml(text: str, named: Callable[[str], Recipe], name: str = UNNAMED) -> Recipe:
    """The recipe in a TOML document. ValueError as `recipe_from_mapping`, and on wrong TOML."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {name!r} is not TOML: {error}") from error
    return recipe_from_mapping(given, named, name)


def recipe_to_mapping(recipe: Recipe) -> dict[str, Any]:
    """What `recipe_from_mapping` makes the equal recipe from, in plain types; defaults left out."""
    told: dict[str, Any] = {
        "name": recipe.name,
        "summary": recipe.summary,
        "source": recipe.source,
    }
    if recipe.aliases:
        told["aliases"] = list(recipe.aliases)
    if recipe.select:
        told["select"] = recipe.select
    if recipe.clip_masked:
        told["clip_masked"] = True
    for role in ROLES:
        pair = recipe.rules(role)
        if pair is None:
            continue
        left, right = (_told_of_rule(rule) for rule in pair)
        told[role] = {key: value for key, value in left.items() if right.get(key) == value}
        for side, own in zip(SIDES, (left, right), strict=True):
            rest = {key: value for key, value in own.items() if key not in told[role]}
            if rest:
                told[role][side] = rest
    return told


def recipe_to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML document, which `recipe_from_toml` reads back equal."""
    told = recipe_to_mapping(recipe)
    lines = [_line(key, value) for key, value in told.items() if not isinstance(value, dict)]
    for role in ROLES:
        if role not in told:
            continue
        lines += ["", f"[{role}]"]
        for key, value in told[role].items():
            if isinstance(value, dict):
                lines += [_line(f"{key}.{name}", inner) for name, inner in value.items()]
            else:
                lines.append(_line(key, value))
    return "\n".join(lines) + "\n"


def _pair(
    where: str, given: Any, base: tuple[OperandRule, OperandRule] | None
) -> tuple[OperandRule, OperandRule] | None:
    """The rules of one role from its value: text, or a table of fields and sides."""
    if given == HIGH_PRECISION:
        return None
    if isinstance(given, str):
        given, base = {"format": given}, None
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a format or a table, got {given!r}")
    _check_names(where, given, (*_RULE_FIELDS, *SIDES))
    shared = {key: value for key, value in given.items() if key not in SIDES}
    rules = []
    for side, old in zip(SIDES, base or (None, None), strict=True):
        own = given.get(side, {})
        if isinstance(own, str):
            own = {"format": own}
        at = f"{where}, {side} operand"
        if not isinstance(own, Mapping):
            raise ValueError(f"{at} must be a format or a table, got {own!r}")
        _check_names(at, own, _RULE_FIELDS)
        rules.append(_rule(at, {**shared, **own}, old))
    return rules[0], rules[1]


def _rule(where: str, given: Mapping[str, Any], base: OperandRule | None) -> OperandRule:
    if base is None and "format" not in given:
        allowed = ", ".join((*FORMATS, *BLOCK_FORMATS))
        raise ValueError(f"{where} needs a format: one of {allowed}")
    values = {} if base is None else {name: getattr(base, name) for name in _RULE_FIELDS}
    name = given.get("format")
    if isinstance(name, str) and name not in (*FORMATS, *BLOCK_FORMATS):
        allowed = ", ".join((*FORMATS, *BLOCK_FORMATS))
        raise ValueError(f"{where}: format must be one of {allowed}, got {name!r}")
    read = {key: _read(where, key, value) for key, value in given.items()}
    if isinstance(name, str):
        read = {**read, **BLOCK_FORMATS.get(name, {"format": name}), **_without(read, "format")}
    try:
        return OperandRule(**{**values, **read})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != name}


def _read(where: str, name: str, given: Any) -> Any:
    """One field's value from its text, or as it is. ValueError unless its type is right."""
    value = None if given == NONE and type(None) in _TYPES[name] else given
    try:
        if name == "granularity" and isinstance(given, str):
            value = Granularity.parse(given)
        elif name == "signs" and isinstance(value, str):
            value = _signs(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if isinstance(given, list):
        value = tuple(given)
    kinds = _TYPES[name]
    right = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    if isinstance(value, tuple):
        right = right and [type(number) for number in value] == [int, int]
    if not right:
        raise ValueError(f"{where}: {name} must be {_WANTED.get(name, 'text')}, got {given!r}")
    return value


def _signs(text: str) -> Fixed | PerStep | str:
    if text == PER_GEMM:
        return text
    match = re.fullmatch(r"fixed\((\d+)\)|per_step\(([\w.]+)\)", text)
    if match is None:
        raise ValueError(f"signs must be {_WANTED['signs']}, got {text!r}")
    return Fixed(int(match[1])) if match[1] is not None else PerStep(match[2])


def _told_of_rule(rule: OperandRule) -> dict[str, Any]:
    """A rule's fields in plain types, defaults and what a block format's name says left out."""
    implied, format = dict(_DEFAULTS), rule.format
    for name, meaning in BLOCK_FORMATS.items():
        if all(getattr(rule, key) == meaning[key] for key in ("format", "scale", "prescale")):
            implied.update(meaning)
            format = name
    told: dict[str, Any] = {"format": format}
    for name in _RULE_FIELDS[1:]:
        value = getattr(rule, name)
        if value != implied[name]:
            told[name] = _plain(value)
    return told


def _plain(value: Any) -> Any:
    if value is None:
        return NONE
    if isinstance(value, Fixed):
        return f"fixed({value.seed})"
    if isinstance(value, PerStep):
        return f"per_step({value.stream})"
    if isinstance(value, Granularity):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _line(key: str, value: Any) -> str:
    # Text, numbers, truth values and lists of them read alike in JSON and TOML.
    return f"{key} = {json.dumps(value, ensure_ascii=False)}"


def _check_names(where: str, given: Iterable[str], allowed: tuple[str, ...]) -> None:
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"{where}: unknown field {name!r}{hint}; allowed are {', '.join(allowed)}"
            )
