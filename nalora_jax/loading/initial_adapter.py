"""The adapter on disk that a run starts from: its settings before weights are read, and its values.

A run with ``RunConfig.adapter`` takes over the adapter's base model and the settings that are part
of the adapter. They are recorded with the SHA-256 of the adapter's tensors, so a resumed run does
not read the adapter again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from nalora_jax.common.digests import file_digest
from nalora_jax.config import (
    DataConfig,
    LoRAConfig,
    LoRARule,
    RunConfig,
    check,
    config_from_dict,
)
from nalora_jax.data.tokenizer import AddedTokens
from nalora_jax.errors import NaloraError
from nalora_jax.loading.located import adapter_folder, locate
from nalora_jax.models.adapters import adapter_spec
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import layer_numbers
from nalora_jax.models.targets import AdapterSpec, TargetSpec, layer_path
from nalora_jax.weights.hf import ResolvedSource
from nalora_jax.weights.hub import resolve_source
from nalora_jax.weights.model_files import LoadedModel, open_files
from nalora_jax.weights.new_tokens import take_adapter_tokens
from nalora_jax.weights.peft_config import TENSORS_NAME, recorded_fact
from nalora_jax.weights.peft_import import import_adapter

log = logging.getLogger(__name__)

# Settings that an adapter determines, by group.
_SETTINGS: dict[str, tuple[str, ...]] = {
    "": ("model", "rope_scaling", "adapter_sha256"),
    "data": ("add_tokens", "add_special_tokens"),
    "lora": (
        "rules",
        "rslora",
        "dora",
        "dropout",
        "modules_to_save",
        "trainable_token_indices",
        "trainable_token_modules",
    ),
}
S = TypeVar("S")


def take_adapter_settings(
    config: RunConfig,
    recorded: Mapping[str, Any] | None = None,
    named: Collection[str] = (),
) -> RunConfig:
    """Returns ``config`` with the settings of the adapter in ``config.adapter``; no weights are
    loaded.

    Settings that differ from their defaults count as named, and named settings stay as they are.
    With ``config.adapter_sha256`` the settings are complete, and only checked.

    Args:
      config: the run's settings; returned unchanged without an adapter.
      recorded: recorded settings of a run to resume, which does not read its adapter again.
      named: further settings that the user named, by dotted name.

    Raises:
      NaloraError: the adapter or its base cannot be read, it has something that a run cannot train,
        it is another one than recorded, or a named setting differs from the adapter's.
    """
    if not config.adapter:
        return config
    if recorded:
        return _filled(config, config_from_dict(recorded), named)
    check(config)
    folder = adapter_folder(Path(config.adapter))
    digest = _checked_digest(config, folder)
    model = config.model
    # The default model was not named: the adapter names its base.
    if model == RunConfig().model and not ("model" in named or config.adapter_sha256):
        model = locate(config.adapter).base
    files = replace(
        resolve_source(model), rope_scaling=recorded_fact(folder, "rope_scaling")
    )
    base, added = _with_tokens(files, folder, images=config.vision.reads_chats)
    spec = _spec(folder, digest, base)
    if not config.adapter_sha256:
        settings = RunConfig(
            model=model,
            rope_scaling=files.rope_scaling,
            adapter_sha256=digest,
            lora=_lora(spec, base, folder),
            data=DataConfig(add_tokens=added.plain, add_special_tokens=added.special),
        )
        config = check(_filled(config, settings, named))
    check_equal(adapter_spec(config, base), spec, folder)
    return config


def read_initial(config: RunConfig, loaded: LoadedModel) -> dict[str, Any]:
    """Returns the values of the run's initial adapter: a ``lora`` tree of float32 arrays on the
    host.

    Raises:
      NaloraError: the adapter cannot be read, is another one than recorded, belongs to another
        base, or differs from the run's settings.
    """
    folder = adapter_folder(Path(config.adapter))
    _checked_digest(config, folder)
    lora, spec = import_adapter(folder, loaded.config, fingerprint=loaded.fingerprint)
    check_equal(adapter_spec(config, loaded.config), spec, folder)
    return lora


def warn_if_changed(config: RunConfig) -> None:
    """Logs if the adapter that a resumed run started from is no longer what it was."""
    try:
        digest = adapter_digest(adapter_folder(Path(config.adapter)))
    except NaloraError as error:
        log.info(
            "the adapter that the run started from cannot be read, and is not needed: %s",
            error,
        )
        return
    if digest != config.adapter_sha256:
        log.warning(
            "%s has changed since the run started from it (SHA-256 %s..., then %s...): the run "
            "resumes from its checkpoint, so the change has no effect",
            *(config.adapter, digest[:16], config.adapter_sha256[:16]),
        )


def adapter_digest(folder: Path) -> str:
    """Returns the SHA-256, in hexadecimal, of an adapter's tensor file.

    Raises:
      NaloraError: there is no such file.
    """
    path = folder / TENSORS_NAME
    try:
        return file_digest(path)
    except OSError as error:
        found = error.strerror or error
        raise NaloraError(
            str(path), expected="the adapter's tensors", found=found
        ) from error


def _checked_digest(config: RunConfig, folder: Path) -> str:
    """Returns the adapter's digest, after comparing it with the settings' digest, if any."""
    digest = adapter_digest(folder)
    if config.adapter_sha256 not in ("", digest):
        raise NaloraError(
            f"--adapter {config.adapter}",
            expected=f"tensors with SHA-256 {config.adapter_sha256[:16]}..., as in adapter_sha256",
            found=f"{digest[:16]}...",
            remedy="restore the adapter, or remove adapter_sha256 and the settings under lora",
        )
    return digest


@functools.lru_cache(maxsize=8)
def _spec(folder: Path, digest: str, base: ModelConfig) -> AdapterSpec:
    """Returns the spec of the adapter with this digest, after checking all of its tensors."""
    return import_adapter(folder, base)[1]


def lora_rules(spec: AdapterSpec, base: ModelConfig) -> tuple[LoRARule, ...]:
    """Returns rules that select exactly the adapters of ``spec`` on a model.

    Example:
      An adapter of rank 8 and alpha 16 on every ``q_proj`` and ``v_proj`` has the rule
      ``^layers/\\d+/(attn/q_proj|attn/v_proj)$:8:16``.
    """
    # By path of a projection: the numbers of its layers in the whole model.
    numbers = layer_numbers(base)
    # By head and tail of a layer's path: rank and alpha of every layer. Several stacks have the
    # same.
    projections: dict[tuple[str, str], dict[int, tuple[int, float]]] = {}
    for path, layers_of_path in numbers.items():
        head, _, tail = layer_path(path, 0).partition("layers/0/")
        # No adapter: rank 0 in every layer, which gets no rule.
        target = spec.target(path) or TargetSpec.even(0, len(layers_of_path))
        # Logs keep nine digits, which determine a float32.
        values = zip(
            target.ranks,
            (float(f"{alpha:.9g}") for alpha in target.alphas),
            strict=True,
        )
        projections.setdefault((head, tail), {}).update(
            zip(layers_of_path, values, strict=True)
        )
    # By head, pattern of the layers, rank and alpha: the tails that share a rule.
    alike: dict[tuple[str, str, int, float], list[str]] = {}
    for (head, tail), layers in projections.items():
        for rank, alpha in dict.fromkeys(layers.values()):
            members = sorted(
                layer for layer, value in layers.items() if value == (rank, alpha)
            )
            # All layers have the same rank and alpha.
            if len(members) == len(layers):
                where = r"\d+"
            else:
                where = f"({'|'.join(map(str, members))})"
            if rank:
                alike.setdefault((head, where, rank, alpha), []).append(tail)
    return tuple(
        LoRARule(f"^{head}layers/{where}/({'|'.join(tails)})$", rank, alpha)
        for (head, where, rank, alpha), tails in alike.items()
    )


def check_equal(run: AdapterSpec, adapter: AdapterSpec, folder: Path) -> None:
    """Raises an error unless the settings of a run describe the adapter that it starts from.

    Raises:
      NaloraError: names the first setting that differs.
    """
    ours = _ranks(run)
    theirs = _ranks(adapter)

    def at(ranks: Mapping[str, str], place: str) -> str:
        """Returns the rank and alpha of a place, for messages."""
        return f"{ranks.get(place, 'no adapter')} at {place}"

    pairs: list[tuple[str, Any, Any]] = [
        ("--lora.rslora", run.rslora, adapter.rslora),
        ("--lora.dora", run.dora, adapter.dora),
        (
            "--lora.modules-to-save",
            " ".join(run.saved) or "none",
            " ".join(adapter.saved) or "none",
        ),
        (
            "--lora.trainable-token-indices",
            dict(run.token_indices),
            dict(adapter.token_indices),
        ),
        *(
            ("--lora.rules", at(ours, place), at(theirs, place))
            for place in ours | theirs
        ),
    ]
    for flag, found, expected in pairs:
        if found != expected:
            raise NaloraError(
                flag,
                expected=f"{expected}, as in the adapter {folder}",
                found=found,
                remedy=f"leave {flag} out: a run continues an adapter with the settings of the "
                "adapter",
            )


def _ranks(spec: AdapterSpec) -> dict[str, str]:
    """Returns rank and alpha of every adapter, by path and index on its stack."""
    return {
        f"{path}[{index}]": f"rank {rank}, alpha {alpha:.9g}"
        for path, target in spec.targets
        for index, (rank, alpha) in enumerate(
            zip(target.ranks, target.alphas, strict=True)
        )
        if rank
    }


def _lora(spec: AdapterSpec, base: ModelConfig, folder: Path) -> LoRAConfig:
    """Returns settings whose adapters on a model are those of ``spec``."""
    saved: Any = spec.saved
    lora = LoRAConfig(
        rules=lora_rules(spec, base),
        rslora=spec.rslora,
        dora=spec.dora,
        modules_to_save=saved,
        dropout=spec.dropout,
    )
    ids = dict(spec.token_indices)
    if not ids:
        return lora
    rows, *others = set(ids.values())
    if others:
        raise NaloraError(
            f"{folder}: trainable_token_indices",
            expected="the same rows of every table",
            found="other rows of the head than of the embedding",
            remedy="a run trains equal rows of both tables",
        )
    modules: Any = tuple(ids)
    return replace(lora, trainable_token_indices=rows, trainable_token_modules=modules)


def _with_tokens(
    files: ResolvedSource, folder: Path, *, images: bool
) -> tuple[ModelConfig, AddedTokens]:
    """Returns the architecture of an adapter's base with the adapter's added tokens, and the
    tokens."""
    opened = open_files(files, images=images)
    loaded = LoadedModel(
        opened.config, {}, opened.tokenizer_with(), files.name, "", opened.raw
    )
    loaded = take_adapter_tokens(loaded, folder)
    backend = loaded.tokenizer.backend
    ids = {text: backend.token_to_id(text) for text in loaded.added}
    marks = {
        token.content
        for token in backend.get_added_tokens_decoder().values()
        if token.special
    }
    plain = tuple(text for text in ids if text not in marks)
    added = AddedTokens(plain, tuple(text for text in ids if text in marks))
    config = replace(opened.config, vocab_size=loaded.config.vocab_size)
    if opened.added_ids(added) != ids or opened.described(added) != config:
        listed = (
            ", ".join(f"{text!r} ({token_id})" for text, token_id in ids.items())
            or "no added tokens"
        )
        raise NaloraError(
            str(folder),
            expected="added tokens whose ids follow the base's, special ones first, and a row "
            "for each",
            found=f"{listed}, and tables of {config.vocab_size} rows",
            remedy="merge the adapter (nalora merge), and train a new one on the result",
        )
    return config, added


def _filled(config: RunConfig, adapter: RunConfig, named: Collection[str]) -> RunConfig:
    """Returns ``config`` with the adapter's value of every setting in `_SETTINGS` that was not
    named."""
    groups = {
        group: _unnamed_from(
            getattr(config, group), getattr(adapter, group), group, named
        )
        for group in ("data", "lora")
    }
    return _unnamed_from(replace(config, **groups), adapter, "", named)


def _unnamed_from(settings: S, adapter: S, group: str, named: Collection[str]) -> S:
    """Returns ``settings`` with the adapter's values of the settings that the user did not name.

    Args:
      settings, adapter: a group of settings of the run and of the adapter; "" is the whole config.
      group: its name, a key of `_SETTINGS`.
      named: dotted names of settings that stay as they are; others that differ from their defaults
        stay as well.
    """
    defaults: Any = type(settings)()
    values = {
        name: getattr(adapter, name)
        for name in _SETTINGS[group]
        if f"{group}.{name}".lstrip(".") not in named
        and getattr(settings, name) == getattr(defaults, name)
    }
    changed: S = replace(settings, **values)  # type: ignore[type-var]
    return changed
