"""Options: refusals name the option, the value and what is allowed; Inductor's own pass through."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch

from hadagraph import compat
from hadagraph.config import Config, parse_options
from hadagraph.profile import Profile
from hadagraph.recipes import DEFAULT_RECIPE, load_recipe
from hadagraph.statistics import observed, site_statistics


def make_profile() -> Profile:
    """A calibration that saw one matmul."""
    x = torch.randn(32, 64)
    sums, maxima = observed(x, x, x @ x.t())
    site = site_statistics("x", "output", ("input", "weight"), (32, 32, 64), sums, maxima)
    assert site is not None
    return Profile((site,))


REFUSALS = {
    "recipe": ("int3", "recipe must be one of .*int8_rotated.*got 'int3'"),
    "executor": ("tvm", "executor must be one of inductor, eager, got 'tvm'"),
    "eval": ("int8", "eval must be one of train, bf16, got 'int8'"),
    "memory": ("low", "memory must be one of fast, exact, balanced, min, got 'low'"),
    "min_size": (0, "min_size must be at least 1, got 0"),
    "mode": ("fastest", "mode must be one of default, .*got 'fastest'"),
    "measure": (True, "measure=True needs executor='eager'"),
    "overrides": ({"*": "int3"}, r"overrides\['\*'\] must be one of .*got 'int3'"),
    "keep": (["lm_head", 3], "keep must hold globs, got 3"),
    "error_budget_db": (-1.0, "error_budget_db must be a finite number of dB above 0, got -1.0"),
    "target": ("b1", "target must be one of .*got 'b1'"),
    "calibrate_steps": (-1, "calibrate_steps must not be negative, got -1"),
    "profile": ("no/such.json", "profile must be a Profile or the path of one.*no/such.json"),
}
ILL_TYPED = {
    "recipe": 8,
    "overrides": [("*", "bf16")],
    "keep": "lm_head",
    "min_size": "16",
    "never_slower": 1,
    "fuse": "yes",
    "executor": True,
    "eval": False,
    "memory": 4,
    "dump": 1,
    "debug": 1,
    "measure": "yes",
    "mode": 3,
    "error_budget_db": "30",
    "target": 9,
    "calibrate_steps": True,
    "profile": 3,
}
OTHER = {
    "recipe": "fp8_rowwise",
    "overrides": {"*.down_proj:grad_weight": "bf16"},
    "keep": ("*.x",),
    "min_size": 32,
    "never_slower": False,
    "fuse": False,
    "executor": "eager",
    "eval": "bf16",
    "memory": "min",
    "debug": True,
    "mode": "max-autotune-no-cudagraphs",
    "error_budget_db": 25.0,
    "target": "b200",
    "calibrate_steps": 3,
    "profile": make_profile(),
}
# What is no option of the user's, or takes several.
INTERNAL = {"inductor", "observer"}


def test_defaults():
    config = parse_options(None, None)
    assert config == Config()
    assert config.recipe == DEFAULT_RECIPE
    assert config.inductor_patches() == {}


@pytest.mark.parametrize("option", REFUSALS)
def test_a_value_that_is_not_allowed_is_refused(option):
    value, message = REFUSALS[option]
    with pytest.raises(ValueError, match=message):
        parse_options(None, {option: value})


@pytest.mark.parametrize("option", ILL_TYPED)
def test_an_ill_typed_value_is_refused(option):
    value = ILL_TYPED[option]
    message = (
        rf"option {option} must be \w+.*, got {type(value).__name__}: {re.escape(repr(value))}"
    )
    with pytest.raises(ValueError, match=message):
        parse_options(None, {option: value})


def test_a_bool_is_no_number():
    with pytest.raises(ValueError, match="option min_size must be int, got bool: True"):
        parse_options(None, {"min_size": True})


@pytest.mark.parametrize("mapping", [{3: "bf16"}, {"*": 3}])
def test_overrides_hold_text(mapping):
    with pytest.raises(ValueError, match="overrides must map glob to recipe"):
        parse_options(None, {"overrides": mapping})


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match=r"one of output, .*, got '\*:forward'"):
        parse_options(None, {"overrides": {"*:forward": "bf16"}})


def test_an_unknown_option_is_refused_with_the_allowed_ones():
    with pytest.raises(
        ValueError, match=r"unknown option 'recipes'.*did you mean 'recipe'"
    ) as error:
        parse_options(None, {"recipes": "int8"})
    assert all(option in str(error.value) for option in ILL_TYPED)
    assert "torch._inductor.config" in str(error.value)


def test_every_field_is_an_option_and_refuses_wrong_types():
    assert {field.name for field in fields(Config)} - INTERNAL == set(ILL_TYPED)


def test_inductors_options_pass_through():
    config = parse_options(None, {"max_autotune": True, "triton.cudagraphs": True, "min_size": 32})
    assert config.min_size == 32
    assert config.inductor_patches() == {"max_autotune": True, "triton.cudagraphs": True}


def test_inductors_options_may_be_written_with_dashes():
    config = parse_options(None, {"max-autotune": True})
    assert config.inductor_patches() == {"max_autotune": True}


def test_a_mode_sets_its_options_and_the_users_go_on_top():
    expected = compat.list_mode_options("max-autotune")
    assert parse_options("max-autotune", {}).inductor_patches() == expected
    config = parse_options("max-autotune", {"max_autotune": False})
    assert config.inductor_patches() == {**expected, "max_autotune": False}
    assert parse_options(None, {"mode": "max-autotune"}).inductor_patches() == expected


def test_modes_that_contradict_are_refused():
    with pytest.raises(ValueError, match=r"mode='default' contradicts .*mode='max-autotune'"):
        parse_options("max-autotune", {"mode": "default"})


def test_environment_variables_fill_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HADAGRAPH_DUMP", str(tmp_path))
    monkeypatch.setenv("HADAGRAPH_DEBUG", "1")
    config = parse_options(None, {})
    assert (config.dump, config.debug) == (str(tmp_path), True)
    elsewhere = str(tmp_path / "elsewhere")
    config = parse_options(None, {"dump": elsewhere, "debug": False})
    assert (config.dump, config.debug) == (elsewhere, False)


@pytest.mark.parametrize("text", ["", "0"])
def test_debug_may_be_off_in_the_environment(monkeypatch, text):
    monkeypatch.setenv("HADAGRAPH_DEBUG", text)
    assert not parse_options(None, None).debug


def test_a_path_is_a_dump_folder(tmp_path):
    assert parse_options(None, {"dump": tmp_path / "b"}).dump == str(tmp_path / "b")


def test_the_cache_key_covers_every_option_but_the_dump():
    keys = {parse_options(None, {}).cache_key()}
    for option, value in OTHER.items():
        keys.add(parse_options(None, {option: value}).cache_key())
    keys.add(parse_options(None, {"executor": "eager", "measure": True}).cache_key())
    keys.add(parse_options(None, {"max_autotune": True}).cache_key())
    assert len(keys) == 1 + len(OTHER) + 2
    covered = set(OTHER) | {"measure", "dump"} | INTERNAL
    assert covered == {field.name for field in fields(Config)}
    assert Config(observer=1).cache_key() != Config(observer=2).cache_key()
    assert replace(Config(), dump="x").cache_key() == Config().cache_key()


def test_the_last_override_wins_and_order_is_kept():
    pairs = {"a": "bf16", "b": "fp8_rowwise"}
    assert parse_options(None, {"overrides": pairs}).overrides == tuple(pairs.items())


def test_ill_typed_inductor_options_and_impossible_dumps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="option max_autotune of Inductor must be bool, got str"):
        parse_options(None, {"max_autotune": "banana"})
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="option dump must be a folder"):
        parse_options(None, {"dump": str(blocked / "dump")})


def test_a_recipe_of_the_users_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "int8_rotated"\ngrad_input = "bf16"\n')
    mine = {"base": "int8_rotated", "grad_input": "bf16", "name": "mine"}
    config = parse_options(None, {"recipe": str(path), "overrides": {"*.down": mine, "*.up": path}})
    made = load_recipe(path)
    assert config.recipe == made
    assert config.recipe_name == "mine"
    assert config.overrides == (("*.down", load_recipe(mine)), ("*.up", made))
    assert Config().recipe_name == DEFAULT_RECIPE
    path.write_text("")
    assert config.recipe == made, "what the file said when it was read"


def test_recipes_of_ones_own_are_in_the_cache_key(tmp_path):
    keys = {
        parse_options(
            None, {"recipe": {"base": "int8", "output": {"max_block": block}}}
        ).cache_key()
        for block in (16, 32)
    }
    assert len(keys) == 2


def test_a_wrong_recipe_of_the_users_own_is_refused_by_option():
    with pytest.raises(ValueError, match="option recipe: recipe 'custom': unknown field 'output2'"):
        parse_options(None, {"recipe": {"output2": "int8"}})
    with pytest.raises(ValueError, match=r"overrides\['\*'\]: recipe 'custom', role 'output'"):
        parse_options(None, {"overrides": {"*": {"output": 3}}})
    with pytest.raises(ValueError, match="option recipe must be a file that can be read"):
        parse_options(None, {"recipe": "missing.toml"})
