"""Checks of a run's settings that need no data: ranges, types, and settings that exclude each
other."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from nalora_jax.common import buckets
from nalora_jax.config.rope_scaling import parse_rope_scaling
from nalora_jax.config.settings import FULL, UNCHANGED, LoRARule, RunConfig
from nalora_jax.config.structured import (
    AMOUNT,
    COUNT,
    POSITIVE,
    RANK,
    check_ranges,
    first_wrong,
    type_name,
)
from nalora_jax.errors import NaloraError


def check(config: RunConfig) -> RunConfig:
    """Returns ``config`` after checking every field that can be checked without data.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    if not isinstance(config, RunConfig):
        remedy = (
            "RunConfig(steps=100, lora=LoRAConfig(...)); config_from_dict makes one of nested "
            "dicts"
        )
        found = f"a {type(config).__name__}"
        raise NaloraError("config", expected="a RunConfig", found=found, remedy=remedy)
    if (wrong := first_wrong(config, lenient=True)) is not None:
        actual = f"{reprlib.repr(wrong.value)}, a {type(wrong.value).__name__}"
        raise NaloraError(
            f"RunConfig.{wrong.field}",
            expected=f"a {type_name(wrong.hint)}",
            found=actual,
        )
    check_ranges(config)
    _check_rules(config.lora.rules)
    _check_run(config)
    _check_tokens(config)
    check_limits(config, _limits(config))
    return config


class Limits(NamedTuple):
    """Values that some settings may have because of others."""

    cause: str  # the flags of the others
    values: Mapping[str, tuple[Any, ...]]  # by dotted name of a setting
    remedy: str = ""


def check_limits(config: RunConfig, limits: Iterable[Limits]) -> None:
    """Checks settings that are valid by themselves but not in combination with others.

    Raises:
      NaloraError: names the flag, the values that it may have and their cause.
    """
    for limit in limits:
        for name, values in limit.values.items():
            value: Any = reduce(getattr, name.split("."), config)
            if value not in values:
                expected = " or ".join(map(_shown, values))
                raise NaloraError(
                    f"--{name.replace('_', '-')}",
                    expected=f"{expected} with {limit.cause}",
                    found=value,
                    remedy=limit.remedy,
                )


def _limits(config: RunConfig) -> Iterator[Limits]:
    """Yields the limits that the settings of any kind of run set each other."""
    lora = config.lora
    if config.adapter:
        kept = {"lora.init": ("default",), "adalora.target_rank": (0,)}
        yield Limits("--adapter, whose values the run starts from", kept)
    if config.adalora.target_rank:
        fits = {
            "lora.init": ("default",),
            "lora.dora": (False,),
            "train.patience": (0,),
        }
        yield Limits("--adalora.target-rank", fits)
    if config.tune:
        remedy = "a base in floats: leave --compute.quantize out"
        yield Limits("--tune", {"compute.quantize": ("none",)}, remedy)
        fixed: dict[str, tuple[Any, ...]] = {
            "lora.init": UNCHANGED,
            "adapter": ("",),
            "adalora.target_rank": (0,),
        }
        yield Limits("--tune", fixed)
    if not config.has_adapters:
        tables = {"lora.modules_to_save": ((),), "lora.trainable_token_indices": ((),)}
        yield Limits("--tune full", tables)
    for flag in trained_tables(config):
        yield Limits(flag, {"lora.init": UNCHANGED})
    if lora.init in ("pissa", "lora_ga"):
        yield Limits(f'--lora.init "{lora.init}"', {"compute.quantize": ("none",)})
    if lora.init == "lora_ga":
        yield Limits('--lora.init "lora_ga"', {"lora.gradient_weights": ("ones",)})
    if not config.vision.trains_encoders:
        yield Limits(
            "any --vision.task but classify and contrast", {"vision.image_size": (0,)}
        )


def trained_tables(config: RunConfig) -> list[str]:
    """Returns the flags that train whole tables or rows of them, if they are set."""
    lora = config.lora
    flags = []
    if lora.modules_to_save:
        flags.append("--lora.modules-to-save")
    if lora.trainable_token_indices:
        flags.append("--lora.trainable-token-indices")
    return flags


def _shown(value: Any) -> str:
    """Returns a value of ``--vision.task`` or another setting for messages."""
    return str(value) or "a language model"


def _check_run(config: RunConfig) -> None:
    """Checks paths, the traced steps, the rows of a batch, and the settings of optimizer, images,
    rewards and AdaLoRA."""
    check_path("--output", config.output)
    if config.adapter:
        check_path("--adapter", config.adapter)
    for dataset in filter(str.strip, config.data.dataset.split(",")):
        check_path("--data.dataset", dataset)
    if config.rope_scaling:
        parse_rope_scaling(config.rope_scaling)
    last = config.data.loss_last
    require(
        "--data.loss-last",
        # Below 1 a share of the tokens, else a number of tokens.
        last < 1 or last == int(last),
        "whole tokens, or a share below 1",
        last,
    )
    profile = config.debug.profile
    adalora = config.adalora
    fine = (
        # Nine and four digits keep both numbers and their sum in the range of an int32.
        not profile or re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,3}", profile) is not None
    )
    require("--debug.profile", fine, "START:STEPS, as 10:5", profile)
    # With epochs, the number of steps is not known yet.
    late = (
        bool(profile)
        and not config.epochs
        and config.debug.profiled.start > config.steps
    )
    require(
        "--debug.profile",
        not late,
        f"a step of the run, which has {config.steps}",
        profile,
    )
    alone = FULL not in config.tune or not config.has_adapters
    require("--tune", alone, "full alone, or patterns", " ".join(config.tune))
    batch = config.train.batch_size
    check_divides(batch, "train.accumulate", config.train.accumulate)
    rates = config.optimizer.rates
    fine = all(AMOUNT.holds(factor) for _, factor in rates)
    require("--optimizer.rates", fine, f"factors, each {AMOUNT}", rates)
    require(
        "--vision.templates",
        bool(config.vision.templates),
        "at least one prompt",
        "none",
    )
    for template in config.vision.templates:
        once = template.count("{}") == 1
        require(
            "--vision.templates",
            once,
            "one {} for the class's name in each prompt",
            repr(template),
        )
    if adalora.target_rank:
        highest = max(rule.rank for rule in config.lora.rules)
        below = (
            "less than the ranks that the adapters begin with (--lora.rules, at most "
            f"{highest})"
        )
        require(
            "--adalora.target-rank",
            adalora.target_rank < highest,
            below,
            adalora.target_rank,
        )
        share = adalora.warmup_share + adalora.final_share
        expected = "shares that leave steps between them, in which ranks are taken"
        flags = "--adalora.warmup-share, --adalora.final-share"
        require(flags, share < 1, expected, f"a sum of {share:g}")


def check_divides(batch: int, name: str, part: int) -> None:
    """Checks that a batch is divided into equal parts, of a size that a setting names.

    Raises:
      NaloraError: the batch is no multiple of it.
    """
    expected = f"a multiple of --{name} ({part})"
    require("--train.batch-size", batch % part == 0, expected, batch)


def _check_tokens(config: RunConfig) -> None:
    """Checks that tables with trained rows are named once, and that the rows of added tokens are
    trained.

    Both tables train them, since both are new to the base. The tokenizer decides which ids they
    get, and so whether `trainable_token_indices` contains all of them: see
    `nalora_jax.kinds.inputs.check_layout`.
    """
    data = config.data
    lora = config.lora
    ids = lora.trainable_token_indices
    saved = set(lora.modules_to_save)
    fine = len(set(ids)) == len(ids) and all(map(COUNT.holds, ids))
    require(
        "--lora.trainable-token-indices",
        fine,
        f"token ids, each {COUNT}, none named twice",
        ids,
    )
    tables = set(lora.trainable_token_modules)
    flag = "--lora.trainable-token-modules"
    require(flag, bool(tables) or not ids, "embed_tokens, lm_head or both", "none")
    expected = "tables that --lora.modules-to-save does not train as a whole"
    require(
        flag, not ids or not saved & tables, expected, " ".join(sorted(saved & tables))
    )
    added = {
        "--data.add-tokens": data.add_tokens,
        "--data.add-special-tokens": data.add_special_tokens,
    }
    for flag, texts in added.items():
        fine = all(text.strip() for text in texts) and len(set(texts)) == len(texts)
        require(
            flag, fine, "texts, none empty or named twice", ", ".join(map(repr, texts))
        )
    both = sorted(set(data.add_tokens) & set(data.add_special_tokens))
    expected = "no token of --data.add-special-tokens"
    require("--data.add-tokens", not both, expected, ", ".join(map(repr, both)))
    if data.add_tokens or data.add_special_tokens:
        # All rows of both tables, or chosen rows.
        trained = saved == {"embed_tokens", "lm_head"} or bool(ids)
        expected = (
            "embed_tokens lm_head beside added tokens, whose rows are new (or "
            "--lora.trainable-token-indices)"
        )
        require(
            "--lora.modules-to-save",
            trained,
            expected,
            " ".join(lora.modules_to_save) or "none",
        )


def _check_rules(rules: tuple[LoRARule, ...]) -> None:
    """Checks ranks, alphas and patterns of the adapters' rules; whether a pattern matches is
    checked with the model."""
    require("--lora.rules", bool(rules), "at least one rule", "none")
    for rule in rules:
        name = f"{rule.pattern}:{rule.rank}"
        require("--lora.rules", RANK.holds(rule.rank), f"a rank that is {RANK}", name)
        scale = rule.alpha is None or POSITIVE.holds(rule.alpha)
        require(
            "--lora.rules",
            scale,
            f"an alpha that is {POSITIVE}",
            f"{name}:{rule.alpha}",
        )
        try:
            re.compile(rule.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            remedy = f"it is no regular expression: {error}"
            found = repr(rule.pattern)
            raise NaloraError(
                "--lora.rules", expected="a pattern", found=found, remedy=remedy
            ) from None


def check_path(flag: str, path: object) -> None:
    """Raises an error for a path that no file system accepts, or a URL of an unknown store.

    Examples: a part of more than 255 bytes, a null character, an empty path, or foo://x.

    Raises:
      NaloraError: names the flag.
    """
    text = str(path)
    shown = repr(text[:80])
    if len(text) > 80:
        shown += "..."
    require(flag, is_valid_path(text), "a path whose parts have 1 to 255 bytes", shown)
    where = buckets.url(text)
    if where is not None and not buckets.is_url(where):
        raise buckets.missing_package(flag, where)


def is_valid_path(text: str) -> bool:
    """Returns True if a file system accepts ``text`` as a path."""
    if not text.strip() or "\0" in text:
        return False
    lengths = [len(name.encode(errors="replace")) for name in Path(text).parts]
    # Limits of Linux in bytes: NAME_MAX for a part, PATH_MAX for the path with its null byte.
    longest = max(lengths, default=0)
    return longest <= 255 and len(text.encode(errors="replace")) < 4096


def require(flag: str, holds: bool, expected: str, value: object) -> None:
    """Raises a NaloraError about ``flag`` unless ``holds``."""
    if not holds:
        raise NaloraError(flag, expected=expected, found=value)
