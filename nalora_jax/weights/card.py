"""Model cards: the README.md of an adapter or a merged model, with the hub's metadata.

The text is in the template ``card.md.j2``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nalora_jax.common.files import write_atomically
from nalora_jax.common.redaction import (
    code,
    fence_around,
    is_hub_id,
    markdown,
    redact_private,
)
from nalora_jax.config import RunConfig
from nalora_jax.errors import visible
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.dual_base import LoadedDual
from nalora_jax.weights.hub import alias_of
from nalora_jax.weights.model_files import LoadedModel, rope_of
from nalora_jax.weights.origin import Origin, original


@dataclass(frozen=True)
class Card:
    """The content of a card.

    Evaluations are lines of metrics.jsonl: ``{"accuracy":, "low":, "high":, "loss":, "n":}``.
    """

    kind: Literal["adapter", "merged"]
    # a hub id, or a path; of a copy, its original (`origin` names the copy)
    base_model: str
    spec: AdapterSpec
    run: RunConfig | None = None  # settings of the training run, if this library ran it
    command: str = ""  # the command line as typed
    license: str = ""  # of the base model: an SPDX name or a hub identifier
    before: Mapping[str, Any] | None = None  # evaluation of the base
    after: Mapping[str, Any] | None = None  # evaluation with the adapter
    # of the libraries that trained it
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""  # hardware of the training run
    origin: Origin | None = None  # the base's file, number formats and digest
    resized: int = 0  # rows of the embedding if tokens were added to the base, else 0
    # steps in which the run's mechanisms acted, of the adapter's steps; None if not known
    acting: tuple[int, int] | None = None
    # RoPE fields of the base's config.json if the run changed them
    # (`models.rope_scaling.rope_settings`).
    rope: Mapping[str, Any] = field(default_factory=dict)
    vectors: bool = False  # sentence-transformers reads the folder
    stored: bool = (
        False  # memory held the base's kernels in the number format of its files
    )

    @property
    def is_plain(self) -> bool:
        """Returns True if the adapter was exported before the run's mechanisms acted."""
        return self.acting is not None and self.acting[0] == 0


_TEMPLATE = Path(__file__).with_name("card.md.j2")
_RULES = {
    "hard": "a hard temporal-importance mask on the gate's updates",
    "soft": "a soft temporal-importance mask on the gate's updates",
    "squared": "a soft temporal-importance mask with exponent 2 on the gate's updates",
    "curvature_cap": "a step scale by curvature",
    "homogeneity": "a step scale by homogeneity",
    "delta": "importance by the gradient at the gate's pre-activations",
}


def render_card(card: Card) -> str:
    """Returns the card's text: YAML front matter, and Markdown for people.

    The text shortens a local path of a base model or a data file to its last part. The front
    matter contains hub identifiers only, no paths.
    """
    # slow to import, and a run needs it at its end only
    from huggingface_hub import ModelCard

    run = card.run
    origin = card.origin
    loadable = card.base_model
    if origin and origin.copy_of:
        loadable = origin.copy_of
    if not is_hub_id(loadable):
        loadable = "path/to/the/base"
    first = "base"
    if run and run.adapter:
        first = "first adapter"
    results = []
    last = "with the adapter"
    if card.spec.tuned:
        last = "trained"
    for name, metrics in ((first, card.before), (last, card.after)):
        if metrics is not None:
            results.append((name, metrics))
    headline = "accuracy"
    for _, metrics in results:
        headline = next((name for name in _HEADLINES if name in metrics), headline)
    scored = any(metrics.get(headline) is not None for _, metrics in results)
    values: dict[str, Any] = {}
    for function in _FUNCTIONS:
        values[function.__name__.lstrip("_")] = function
    if run is not None:
        values["mechanisms"] = [_mechanism(rule) for rule in run.mechanisms]
        values["settings"] = json.dumps(redact_private(run.to_dict()), indent=2)
    versions = []
    for name, version in sorted(card.versions.items()):
        versions.append(markdown(f"{name} {version}"))
    written = ModelCard.from_template(
        _front_matter(card),
        template_path=str(_TEMPLATE),
        card=card,
        run=run,
        origin=origin,
        merged=card.kind == "merged",
        images=_is_of_images(run),
        loadable=loadable,
        results=results,
        scored=scored,
        headline=headline,
        headline_name=_HEADLINES[headline],
        rope=json.dumps(dict(card.rope), indent=2),
        command=visible(redact_private(card.command)),
        versions=versions,
        **values,
    )
    return f"{written}\n"


def _front_matter(card: Card) -> Any:
    """Returns the metadata that the hub reads (``huggingface_hub.ModelCardData``)."""
    from huggingface_hub import ModelCardData

    library = "peft"
    relation = "adapter"
    if card.kind == "merged":
        library = "transformers"
        relation = "finetune"
    pipeline = "text-generation"
    if card.spec.score:
        pipeline = "text-classification"
    if card.vectors:
        pipeline = "sentence-similarity"
    if _is_of_images(card.run):
        pipeline = "zero-shot-image-classification"
    tags = ["nalora_jax"]
    if card.run and card.run.mechanisms and not card.is_plain:
        tags.append("na-lora")
    if card.spec.targets:
        tags.append("lora")
    if card.spec.dora:
        tags.append("dora")
    facts: dict[str, Any] = {}
    if is_hub_id(card.base_model):
        facts["base_model"] = card.base_model
        facts["base_model_relation"] = relation
    if card.license:
        # SPDX: Apache-2.0; on the hub: apache-2.0
        facts["license"] = card.license.lower()
    return ModelCardData(
        library_name=library,
        pipeline_tag=pipeline,
        tags=tags,
        **facts,
    )


def _is_of_images(run: RunConfig | None) -> bool:
    return run is not None and bool(run.vision.kind)


def write_card(folder: str | Path, card: Card) -> Path:
    """Writes the card as ``README.md`` of an existing folder.

    Raises:
      NaloraError: it cannot be written.
    """
    path = Path(folder) / "README.md"
    write_atomically(path, render_card(card))
    return path


def _mechanism(rule: str) -> str:
    """Returns a rule's description with its settings; of a user's own rule the settings alone."""
    settings = markdown(str(redact_private(rule, "mechanisms")))
    name = rule.partition(":")[0]
    if name not in _RULES:
        return f"the rule {settings}"
    return f"{_RULES[name]} ({settings})"


# ---------------------------------------------------------------- functions of the template


def _short(name: str) -> str:
    """Returns a name for the card; a path is shortened to its last part."""
    return redact_private(name, "model")


def _link(name: str) -> str:
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    return code(_short(name))


def _span(values: tuple[int, ...] | tuple[float, ...]) -> str:
    """Formats the smallest and the largest value, or the only one."""
    ends = sorted({min(values), max(values)})
    return " to ".join(f"{value:g}" for value in ends)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(metrics: Mapping[str, Any], name: str, digits: int = 3) -> str:
    """Formats a measured number; "" if it was not measured."""
    value = metrics.get(name)
    if value is None:
        return ""
    return f"{value:.{digits}f}"


def _fenced(text: str, language: str) -> str:
    """Returns a code block whose fence is longer than any run of backticks in ``text``."""
    fence = fence_around(text, "```")
    return f"{fence}{language}\n{text}\n{fence}"


# Metric of an evaluation -> its name in the table of results.
_HEADLINES = {
    "accuracy": "accuracy",
    "recall": "recall at 1",
    "spearman_cosine": "Spearman correlation",
}
_FUNCTIONS = (code, markdown, _short, _link, _span, _cell, _number, _fenced)


def base_card(
    kind: Literal["adapter", "merged"],
    model: str,
    loaded: LoadedModel | LoadedDual,
    spec: AdapterSpec,
) -> Card:
    """Returns a card without settings and results of a run; ``model`` is the name of the base."""
    alias = alias_of(model)
    licence = alias.package.licence if alias else ""
    written = Card(kind, original(loaded), spec, license=licence, origin=loaded.origin)
    if isinstance(loaded, LoadedModel):
        return replace(
            written,
            resized=loaded.resized,
            rope=rope_of(loaded),
            stored=bool(loaded.config.stored_bits),
        )
    return written
