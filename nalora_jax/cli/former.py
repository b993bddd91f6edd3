"""Errors about the mechanism settings of earlier versions, which print the new spelling."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nalora_jax.cli.usage import until_flag
from nalora_jax.config.former import GROUPS, RULES, has_groups, translated
from nalora_jax.errors import NaloraError

_FLAG = re.compile(r"(--(mask|step[-_]scale)(?:\.(no-)?([\w-]+))?)(?:=(.*))?", re.DOTALL)
_FOUND = "the spelling of an earlier version"
_REMEDY = "the mask and the step scale are rules of that list (docs/method.md)"


def check_flags(argv: Sequence[str], start: Sequence[str], added: Sequence[str] | None) -> None:
    """Raises an error for a flag ``--mask...`` or ``--step-scale...``.

    Args:
      argv: words of a command line.
      start: mechanisms of its config file or resumed run, else the defaults.
      added: rules after ``--mechanisms``, which earlier versions added to mask and step scale.

    Raises:
      NaloraError: prints the rules that the flags set, with their values.
    """
    flags = [(match, index) for index, word in enumerate(argv) if (match := _FLAG.fullmatch(word))]
    former = {rule for rule, _ in RULES.values()}
    rules = start
    if added is not None:
        rules = [*(rule for rule in start if _name(rule) in former), *added]
    settings = []
    for match, index in flags:
        words = until_flag(argv[index + 1 :]) if match[5] is None else [match[5]]
        value = "false" if match[3] else "/".join(words) or "true"
        settings.append((match[2].replace("-", "_"), (match[4] or "kind").replace("-", "_"), value))
    for setting in sorted(settings, key=lambda setting: setting[1] != "kind"):  # a kind replaces the rule
        rules = _with_setting(rules, *setting)
    if flags:
        expected = f"--mechanisms {' '.join(rules) or 'none'}"
        raise NaloraError(flags[0][0][1], expected=expected, found=_FOUND, remedy=_REMEDY)


def check_file(values: Any, where: str) -> None:
    """Raises an error for the groups ``mask`` and ``step_scale`` in a config file.

    Args:
      values: content of the file.
      where: flag and file, for the message.

    Raises:
      NaloraError: prints the rules that the groups set.
    """
    if not isinstance(values, Mapping) or not has_groups(values):
        return
    try:
        rules = json.dumps(translated(values)["mechanisms"])
    except (AttributeError, TypeError):
        rules = "a list of rules"
    name = next(name for name in GROUPS if name in values)
    raise NaloraError(f"{where}: {name}", expected=f"mechanisms: {rules}", found=_FOUND, remedy=_REMEDY)


def _with_setting(rules: Sequence[str], group: str, name: str, value: str) -> list[str]:
    """Returns rules after a former flag, e.g. ``--mask.power 1.5``."""
    settings_of = {rule: settings for (of, _), (rule, settings) in RULES.items() if of == group}
    at = next((index for index, rule in enumerate(rules) if _name(rule) in settings_of), None)
    if name == "kind" and value in ("off", *(kind for of, kind in RULES if of == group)):
        unchanged = [rule for index, rule in enumerate(rules) if index != at]
        masks = [
            rule for rule in unchanged[:1] if group == "step_scale" and _name(rule) in ("hard", "soft")
        ]
        chosen = translated({"mask": {}, "step_scale": {"kind": "off"}, group: {"kind": value}})[
            "mechanisms"
        ]
        return [*masks, *chosen, *unchanged[len(masks) :]]
    if at is None:
        return list(rules)
    rule, _, options = rules[at].partition(":")
    settings = dict(option.split("=", 1) for option in options.split(",") if "=" in option)
    if name in settings_of[rule]:
        settings[name] = value
    changed = ",".join(f"{key}={text}" for key, text in settings.items())
    return [*rules[:at], f"{rule}:{changed}".removesuffix(":"), *rules[at + 1 :]]


def _name(rule: str) -> str:
    return rule.partition(":")[0]
