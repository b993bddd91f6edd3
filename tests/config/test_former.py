"""Settings of earlier versions, groups ``mask`` and ``step_scale``, become equal rules."""

from __future__ import annotations

from typing import Any

import pytest

from nalora_jax.config import RunConfig, config_from_dict
from nalora_jax.config.former import RULES, FormerGroups, FormerMask, FormerStepScale, translated
from nalora_jax.method.rules import MECHANISMS, CurvatureCap, HardMask, HomogeneityStep, SoftMask, make
from nalora_jax.method.transform import make_mechanisms
from nalora_jax.train.mechanisms import former_labels

COMMON = {"decay": 0.5, "warmup": 3, "permute": 2}


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (
            {"mask": {"kind": "hard", "keep": 0.25, "mask_gradient": False, **COMMON}},
            HardMask(**COMMON, keep=0.25, mask_gradient=False),
        ),
        ({"mask": {"kind": "soft"}}, SoftMask(power=2.0)),
        (
            {"mask": {"kind": "soft", "power": 1.0, "low": 0.1, "high": 3.0}},
            SoftMask(power=1.0, low=0.1, high=3.0),
        ),
        ({"step_scale": {"kind": "curvature", "tau": 0.2, **COMMON}}, CurvatureCap(**COMMON, tau=0.2)),
        (
            {"step_scale": {"kind": "homogeneity", "gains": [0, 0, 0, 1], "min_occupancy": 0.1}},
            HomogeneityStep(gains=(0.0, 0.0, 0.0, 1.0), min_occupancy=0.1),
        ),
    ],
)
def test_each_setting_of_a_group_is_a_setting_of_its_rule(groups: dict[str, Any], expected: Any) -> None:
    off = {"mask": {"kind": "off"}, "step_scale": {"kind": "off"}}
    config = config_from_dict(off | groups | {"mechanisms": ["delta"]})
    assert [make(text) for text in config.mechanisms] == [expected, make("delta")]


def test_the_last_defaults_of_the_groups_are_the_defaults_of_the_rules() -> None:
    for (group, _), (rule, names) in RULES.items():
        former = getattr(FormerGroups(), group)
        for name in set(names) - {"frozen_after"}:  # rules no longer have it
            expected = 1.0 if name == "power" else getattr(former, name)
            assert getattr(MECHANISMS.get(rule), name) == expected, name
    assert FormerGroups().rules == RunConfig().mechanisms
    assert FormerGroups(FormerMask("off"), FormerStepScale("off")).rules == ()


def test_settings_of_this_version_stay() -> None:
    assert translated({"steps": 3, "mechanisms": ["delta"]}) == {"steps": 3, "mechanisms": ["delta"]}
    assert config_from_dict({"steps": 3}).mechanisms == RunConfig().mechanisms
    assert config_from_dict({"mask": {"kind": "soft", "gone": 1}}).mechanisms == (
        "soft:power=2.0",
        "curvature_cap",
    )


@pytest.mark.parametrize(
    "groups",
    [{"mask": []}, {"mask": {"kind": "medium"}}, {"mask": {"keep": "x"}}, {"step_scale": {"gains": [1]}}],
)
def test_damaged_groups_are_no_settings(groups: dict[str, Any]) -> None:
    with pytest.raises((AttributeError, TypeError)):
        translated(groups)


def test_labels_in_checkpoints_of_earlier_versions_are_known() -> None:
    both = {"mask": {"kind": "soft"}, "step_scale": {}, "mechanisms": ["soft", "curvature_cap", "delta"]}
    labels = ["mask", "step_scale", "soft", "curvature_cap", "delta"]
    rules = translated(both)["mechanisms"]
    assert [label for label, _ in make_mechanisms(rules, activation="silu").entries] == labels
    assert former_labels(both) == {label: label for label in labels}
    alone = {
        "mask": {"kind": "off"},
        "step_scale": {"kind": "off"},
        "mechanisms": ["delta", "soft", "curvature_cap"],
    }
    assert former_labels(alone) == {"delta": "delta", "mask": "soft", "step_scale": "curvature_cap"}
    assert former_labels(RunConfig().to_dict()) == {}
