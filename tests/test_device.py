"""Device profiles: the table by chip, look-ups, and JSON there and back."""

from __future__ import annotations

import pytest

from hadagraph.device import BLOCK_KINDS, CHIPS, KINDS, LAYOUTS, DeviceProfile, chip_profile


@pytest.mark.parametrize("chip", CHIPS)
def test_every_row_is_complete(chip):
    profile = CHIPS[chip]
    assert profile.name == chip and profile.source
    for layouts in LAYOUTS:
        for kind in KINDS + BLOCK_KINDS * (layouts != "both"):
            assert 0 < profile.quantizer(layouts, kind).share <= 1
    formats = {rate.format for rate in profile.gemms}
    assert formats >= {"bf16", "int8"}
    assert ("fp8" in formats) == (profile.capability >= (8, 9))
    for rate in profile.gemms:
        assert 0 < rate.sustained <= rate.tflops and 0 < rate.alone <= 1 and rate.splits >= 1


@pytest.mark.parametrize("chip", CHIPS)
def test_json_round_trip(chip):
    profile = CHIPS[chip]
    again = DeviceProfile.from_json(profile.to_json())
    assert again == profile and hash(again) == hash(profile) and repr(again) == repr(profile)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x", "capability": [9, 0]}'])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError):
        DeviceProfile.from_json(text)


@pytest.mark.parametrize(
    ("name", "capability", "chip", "source"),
    [
        ("NVIDIA H200", (9, 0), "H200", "measured on one H200"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100", "measured on an H200, bandwidth scaled"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100", "datasheet"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "RTX 4090", "datasheet"),
        ("NVIDIA L40S", (8, 9), "L40S", "datasheet"),
        ("NVIDIA B200", (10, 0), "B200", CHIPS["B200"].source),
        ("NVIDIA GeForce RTX 5090", (12, 0), "RTX 5090", "datasheet"),
    ],
)
def test_chips_are_known_by_name(name, capability, chip, source):
    assert chip_profile(name, capability) == CHIPS[chip]
    assert CHIPS[chip].source == source


def test_an_unknown_chip_is_taken_for_another_of_its_generation_or_for_nothing():
    profile = chip_profile("NVIDIA L4", (8, 9))
    assert profile is not None
    assert (profile.name, profile.source) == ("NVIDIA L4", "datasheet; taken for L40S")
    assert profile.gemms == CHIPS["L40S"].gemms
    assert chip_profile("Tesla T4", (7, 5)) is None


def test_look_ups_name_what_there_is():
    with pytest.raises(ValueError, match="format must be one of bf16, int8 on A100, got 'fp8'"):
        CHIPS["A100"].gemm("fp8")
    with pytest.raises(ValueError, match=r"rows plain, .* got 'rows' 'square'"):
        CHIPS["A100"].quantizer("rows", "square")
