"""Checks of a run's settings that need no data: ranges, types, and settings that exclude each other."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path

from nalora_jax.common import buckets
from nalora_jax.config.rope_scaling import FLAG as ROPE_SCALING
from nalora_jax.config.rope_scaling import parse_rope_scaling
from nalora_jax.config.settings import (
    DUAL,
    UNCHANGED,
    DataConfig,
    LoRARule,
    PreferenceConfig,
    RunConfig,
    VisionConfig,
)
from nalora_jax.config.structured import (
    AMOUNT,
    COUNT,
    POSITIVE,
    RANK,
    WrongType,
    check_ranges,
    first_wrong,
    first_wrong_part,
    type_name,
)
from nalora_jax.errors import NaloraError


def check(config: RunConfig) -> RunConfig:
    """Returns ``config`` after checking every field that can be checked without data.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    if not isinstance(config, RunConfig):
        remedy = "RunConfig(steps=100, lora=LoRAConfig(...)); config_from_dict makes one of nested dicts"
        raise NaloraError(
            "config", expected="a RunConfig", found=f"a {type(config).__name__}", remedy=remedy
        )
    _check_type(first_wrong_part(config))
    check_ranges(config)
    _check_type(first_wrong(config, lenient=True))
    _check_rules(config.lora.rules)
    profile = config.debug.profile
    form = r"[1-9]\d{0,8}:[1-9]\d{0,3}"
    require(
        "--debug.profile",
        not profile or re.fullmatch(form, profile) is not None,
        "START:STEPS, as 10:5",
        profile,
    )
    late = bool(profile) and not config.epochs and config.debug.profiled.start > config.steps
    require("--debug.profile", not late, f"a step of the run, which has {config.steps}", profile)
    batch, accumulate = config.train.batch_size, config.train.accumulate
    require(
        "--train.batch-size",
        batch % accumulate == 0,
        f"a multiple of --train.accumulate ({accumulate})",
        batch,
    )
    quantized, init, weights = config.compute.quantize, config.lora.init, config.lora.gradient_weights
    both = quantized != "none" and init in ("pissa", "lora_ga")
    require("--compute.quantize", not both, f'none with --lora.init "{init}"', quantized)
    weighted = init == "lora_ga" and weights != "ones"
    require("--lora.gradient-weights", not weighted, 'ones with --lora.init "lora_ga"', weights)
    for _, factor in config.optimizer.rates:
        require(
            "--optimizer.rates", AMOUNT.holds(factor), f"factors, each {AMOUNT}", config.optimizer.rates
        )
    check_path("--output", config.output)
    _check_data(config.data, compares=config.preference.loss != "none")
    if config.rope_scaling:
        parse_rope_scaling(config.rope_scaling)
        task = config.vision.task
        require(ROPE_SCALING, task in ("", "chat"), "a language model", f"--vision.task {task}")
    _check_vision(config.vision, accumulate=config.train.accumulate, quantize=config.compute.quantize)
    _check_adalora(config)
    _check_saved(config)
    _check_added(config)
    _check_preference(config.preference, init=config.lora.init, task=config.vision.task)
    if config.rl.rewards:
        _check_rl(config)
    if config.adapter:
        _check_adapter(config)
    return config


def _check_rl(config: RunConfig) -> None:
    """Checks that a run with rewards has groups of samples, and settings that reinforcement learning has."""
    rl, batch = config.rl, config.train.batch_size
    require(
        "--train.batch-size", batch % rl.samples == 0, f"a multiple of --rl.samples ({rl.samples})", batch
    )
    count = len(rl.reward_weights)
    require("--rl.reward-weights", count in (0, len(rl.rewards)), f"{len(rl.rewards)}, one a reward", count)
    fits = UNCHANGED if rl.beta else (*UNCHANGED, "pissa")
    require(
        "--lora.init",
        config.lora.init in fits,
        f"one of {', '.join(fits)} with --rl.rewards",
        config.lora.init,
    )
    for flag, value, fit in (
        ("--preference.loss", config.preference.loss, "none"),
        ("--vision.task", config.vision.task, ""),
        ("--adalora.target-rank", config.adalora.target_rank, 0),
        ("--lora.dropout", config.lora.dropout, 0.0),
        ("--data.loss-last", config.data.loss_last, 0.0),
    ):
        require(flag, value == fit, f"{fit if fit != '' else 'a language model'} with --rl.rewards", value)
    if config.adapter and rl.beta:
        raise NaloraError(
            "--rl.beta",
            expected="0 with --adapter",
            found=rl.beta,
            remedy="its reference is the base without an adapter: merge this one first (nalora merge)",
        )


def _check_adapter(config: RunConfig) -> None:
    """Checks that the settings leave the adapter's values and ranks as they are."""
    check_path("--adapter", config.adapter)
    for flag, value, fits in (
        ("--lora.init", config.lora.init, "default"),
        ("--adalora.target-rank", config.adalora.target_rank, 0),
        ("--vision.task", config.vision.task.replace("chat", "") or "none", "none"),
    ):
        require(flag, value == fits, f"{fits} with --adapter, whose values the run starts from", value)
    if config.preference.loss != "none":
        raise NaloraError(
            "--preference.loss",
            expected="none with --adapter",
            found=config.preference.loss,
            remedy="its reference is the base without an adapter: merge this one first (nalora merge)",
        )


def _check_type(wrong: WrongType | None) -> None:
    if wrong is not None:
        actual = f"{reprlib.repr(wrong.value)}, a {type(wrong.value).__name__}"
        raise NaloraError(f"RunConfig.{wrong.field}", expected=f"a {type_name(wrong.hint)}", found=actual)


def _check_saved(config: RunConfig) -> None:
    """Checks that initialization and loss support trained tables.

    The initialization must leave the base unchanged.
    """
    lora = config.lora
    ids = lora.trainable_token_indices
    fine = len(set(ids)) == len(ids) and all(map(COUNT.holds, ids))
    require("--lora.trainable-token-indices", fine, f"token ids, each {COUNT}, none named twice", ids)
    named = bool(lora.trainable_token_modules)
    require("--lora.trainable-token-modules", named or not ids, "embed_tokens, lm_head or both", "none")
    both = set(lora.modules_to_save) & set(lora.trainable_token_modules)
    expected = "tables that --lora.modules-to-save does not train as a whole"
    require("--lora.trainable-token-modules", not (ids and both), expected, " ".join(sorted(both)))
    if not (lora.modules_to_save or ids):
        return
    setting = "trainable-token-indices"
    if lora.modules_to_save:
        setting = "modules-to-save"
    init = config.lora.init
    require("--lora.init", init in UNCHANGED, f"{' or '.join(UNCHANGED)} with --lora.{setting}", init)
    for flag, value, fits in (
        ("--vision.task", config.vision.task, ""),
        ("--preference.loss", config.preference.loss, "none"),
    ):
        require(flag, value == fits, f"{fits or 'a language model'} with --lora.{setting}", value)


def _check_added(config: RunConfig) -> None:
    """Checks that rows of added tokens are trained in both tables, since both are new to the base.

    The tokenizer decides which ids they get, and so whether `trainable_token_indices` contains all
    of them: see `nalora_jax.train.inputs.check_layout`.
    """
    data, saved = config.data, config.lora.modules_to_save
    for flag, texts in (("add-tokens", data.add_tokens), ("add-special-tokens", data.add_special_tokens)):
        fine = all(text.strip() for text in texts) and len(set(texts)) == len(texts)
        require(f"--data.{flag}", fine, "texts, none empty or named twice", ", ".join(map(repr, texts)))
    both = set(data.add_tokens) & set(data.add_special_tokens)
    require(
        "--data.add-tokens",
        not both,
        "no token of --data.add-special-tokens",
        ", ".join(map(repr, sorted(both))),
    )
    if data.add_tokens or data.add_special_tokens:
        trained = {"embed_tokens", "lm_head"} <= set(saved) or bool(config.lora.trainable_token_indices)
        flag, value = "--lora.modules-to-save", " ".join(saved) or "none"
        expected = "embed_tokens lm_head beside added tokens, whose rows are new (or --lora.trainable-token-indices)"
        require(flag, trained, expected, value)


def _check_rules(rules: tuple[LoRARule, ...]) -> None:
    require("--lora.rules", bool(rules), "at least one rule", "none")
    for rule in rules:
        name = f"{rule.pattern}:{rule.rank}"
        require("--lora.rules", RANK.holds(rule.rank), f"a rank that is {RANK}", name)
        scale = rule.alpha is None or POSITIVE.holds(rule.alpha)
        require("--lora.rules", scale, f"an alpha that is {POSITIVE}", f"{name}:{rule.alpha}")
        try:
            re.compile(rule.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            remedy = f"it is no regular expression: {error}"
            raise NaloraError(
                "--lora.rules", expected="a pattern", found=repr(rule.pattern), remedy=remedy
            ) from None


def _check_data(data: DataConfig, *, compares: bool) -> None:
    """Checks the settings of the data.

    Args:
      data: the settings.
      compares: True for losses that compare two answers.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    for dataset in filter(str.strip, data.dataset.split(",")):
        check_path("--data.dataset", dataset)
    last = data.loss_last
    require("--data.loss-last", last < 1 or last == int(last), "whole tokens, or a share below 1", last)
    if compares:
        require(
            "--data.loss-last", not last, "0 with --preference.loss, which compares entire answers", last
        )
        drops = data.too_long != "split"
        require("--data.too-long", drops, "drop, truncate or error with --preference.loss", "split")


def _check_vision(vision: VisionConfig, *, accumulate: int, quantize: str) -> None:
    """Raises an error for settings that are out of range.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    require("--vision.templates", bool(vision.templates), "at least one prompt", "none")
    for template in vision.templates:
        require(
            "--vision.templates",
            template.count("{}") == 1,
            "one {} for the class's name in each prompt",
            repr(template),
        )
    if vision.task == "contrast" and accumulate > 1:
        raise NaloraError(
            "--train.accumulate",
            expected='1 with --vision.task "contrast": pairs are told apart from those of their micro-batch only',
            found=accumulate,
            remedy="use a smaller batch, more devices, or --compute.remat full",
        )
    if vision.image_size and vision.task not in DUAL:
        require(
            "--vision.image-size",
            False,
            f"0 with any --vision.task but {' and '.join(DUAL)}",
            vision.image_size,
        )
    if vision.task in DUAL and quantize != "none":
        raise NaloraError("--compute.quantize", expected="none for image and text encoders", found=quantize)


def _check_preference(preference: PreferenceConfig, *, init: str, task: str) -> None:
    """Raises an error for settings that are incompatible with preference tuning.

    Args:
      preference: the settings, each number in its range.
      init: initialization of the adapters.
      task: of images; empty for text.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    if preference.loss == "none":
        return
    if init not in UNCHANGED:
        remedy = "the reference is the base with the adapter off, which these adapters change"
        expected = f"{' or '.join(UNCHANGED)} with --preference.loss"
        raise NaloraError("--lora.init", expected=expected, found=init, remedy=remedy)
    if task:
        raise NaloraError(
            "--preference.loss", expected="none for image and text encoders", found=preference.loss
        )


def _check_adalora(config: RunConfig) -> None:
    """Raises an error for settings that are incompatible with AdaLoRA, judging by the rules.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    adalora, lora = config.adalora, config.lora
    if not adalora.target_rank:
        return
    highest = max(rule.rank for rule in lora.rules)
    below = f"less than the ranks that the adapters begin with (--lora.rules, at most {highest})"
    require("--adalora.target-rank", adalora.target_rank < highest, below, adalora.target_rank)
    for flag, value, fits in (
        ("--lora.init", lora.init, "default"),
        ("--lora.dora", lora.dora, False),
        ("--vision.task", config.vision.task if config.vision.task != "chat" else "", ""),
        ("--train.patience", config.train.patience, 0),
    ):
        require(flag, value == fits, f"{fits or 'a language model'} with --adalora.target-rank", value)
    share = adalora.warmup_share + adalora.final_share
    expected = "shares that leave steps between them, in which ranks are taken"
    require("--adalora.warmup-share, --adalora.final-share", share < 1, expected, f"a sum of {share:g}")


def check_path(flag: str, path: object) -> None:
    """Raises an error for a path that no file system accepts, or a URL of an unknown store.

    Examples: a part of more than 255 bytes, a null character, an empty path, or foo://x.

    Raises:
      NaloraError: names the flag.
    """
    text = str(path)
    shown = repr(text[:80]) + ("..." if len(text) > 80 else "")
    require(flag, is_valid_path(text), "a path whose parts have 1 to 255 bytes", shown)
    where = buckets.url(text)
    if where is not None and not buckets.is_url(where):
        raise buckets.missing_package(flag, where)


def is_valid_path(text: str) -> bool:
    """Returns True if a file system accepts ``text`` as a path."""
    longest = max((len(name.encode(errors="replace")) for name in Path(text).parts), default=0)
    return (
        bool(text.strip())
        and "\0" not in text
        and longest <= 255
        and len(text.encode(errors="replace")) < 4096
    )


def require(flag: str, holds: bool, expected: str, value: object) -> None:
    """Raises a NaloraError about ``flag`` unless ``holds``."""
    if not holds:
        raise NaloraError(flag, expected=expected, found=value)
