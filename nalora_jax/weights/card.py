"""Model cards: the README.md of an adapter or a merged model, with the front matter that the hub
reads.

The text is in the template ``card.md.j2``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nalora_jax.common.files import write_atomically
from nalora_jax.common.redaction import code, is_hub_id, markdown, published
from nalora_jax.config import RunConfig
from nalora_jax.errors import visible
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.origin import Origin


@dataclass(frozen=True)
class Card:
    """The content of a card.

    Evaluations are lines of metrics.jsonl: ``{"accuracy":, "low":, "high":, "loss":, "n":}``.
    """

    kind: Literal["adapter", "merged"]
    base_model: (
        str  # a hub id, or a path; of a copy, its original (`origin` names the copy)
    )
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
    resized: int = (
        0  # rows of the embedding if tokens were added to the base; otherwise 0
    )
    # RoPE fields of the base's config.json if the run changed them
    # (`models.rope_scaling.rope_settings`).
    rope: Mapping[str, Any] = field(default_factory=dict)


_TEMPLATE = Path(__file__).with_name("card.md.j2")
_RULES = {
    "hard": "a hard temporal-importance mask on the gate's updates",
    "soft": "a soft temporal-importance mask on the gate's updates",
    "curvature_cap": "a step scale by curvature",
    "homogeneity": "a step scale by homogeneity",
}


def render_card(card: Card) -> str:
    """Returns the card's text: YAML front matter, and Markdown for people.

    The text shortens a local path of a base model or a data file to its last part. The front
    matter contains hub identifiers only, no paths.
    """
    # a run needs them at its end only
    from huggingface_hub import (
        ModelCard,
        ModelCardData,
    )

    run = card.run
    origin = card.origin
    merged = card.kind == "merged"
    images = run is not None and bool(run.vision.task)
    loadable = (origin and origin.copy_of) or card.base_model
    first = "first adapter" if run and run.adapter else "base"
    measured = {first: card.before, "with the adapter": card.after}
    results = [
        (name, metrics) for name, metrics in measured.items() if metrics is not None
    ]
    values: dict[str, Any] = {
        function.__name__.lstrip("_"): function for function in _FUNCTIONS
    }
    if run is not None:
        values["mechanisms"] = [_mechanism(rule) for rule in run.mechanisms]
        values["settings"] = json.dumps(published(run.to_dict()), indent=2)
    facts: dict[str, Any] = {}
    if is_hub_id(card.base_model):
        facts |= {
            "base_model": card.base_model,
            "base_model_relation": "finetune" if merged else "adapter",
        }
    if card.license:
        # SPDX: Apache-2.0; on the hub: apache-2.0
        facts["license"] = card.license.lower()
    front_matter = ModelCardData(
        library_name="transformers" if merged else "peft",
        pipeline_tag="zero-shot-image-classification" if images else "text-generation",
        tags=["nalora_jax", "na-lora", "lora", *(["dora"] * card.spec.dora)],
        **facts,
    )
    written = ModelCard.from_template(
        front_matter,
        template_path=str(_TEMPLATE),
        card=card,
        run=run,
        origin=origin,
        merged=merged,
        images=images,
        loadable=loadable if is_hub_id(loadable) else "path/to/the/base",
        results=results,
        scored=any(
            metrics.get("accuracy", metrics.get("recall")) is not None
            for _, metrics in results
        ),
        rope=json.dumps(dict(card.rope), indent=2),
        command=visible(published(card.command)),
        versions=[
            markdown(f"{name} {version}")
            for name, version in sorted(card.versions.items())
        ],
        **values,
    )
    return f"{written}\n"


def write_card(folder: str | Path, card: Card) -> Path:
    """Writes the card as ``README.md`` of an existing folder.

    Raises:
      NaloraError: it cannot be written.
    """
    path = Path(folder) / "README.md"
    write_atomically(path, render_card(card))
    return path


def _mechanism(rule: str) -> str:
    name = _RULES.get(rule.partition(":")[0], "the mechanism")
    return f"{name} ({markdown(str(published(rule, 'mechanisms')))})"


# ---------------------------------------------------------------- functions of the template


def _short(name: str) -> str:
    """Returns a name for the card; a path is shortened to its last part."""
    return published(name, "model")


def _link(name: str) -> str:
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    return code(_short(name))


def _span(values: tuple[int, ...] | tuple[float, ...]) -> str:
    """Formats the smallest and the largest value, or the only one."""
    return " to ".join(f"{value:g}" for value in sorted({min(values), max(values)}))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(metrics: Mapping[str, Any], name: str, digits: int = 3) -> str:
    """Formats a measured number; "" if it was not measured."""
    return "" if metrics.get(name) is None else f"{metrics[name]:.{digits}f}"


def _fenced(text: str, language: str) -> str:
    """Returns a code block whose fence is longer than any run of backticks in ``text``."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


_FUNCTIONS = (code, markdown, _short, _link, _span, _cell, _number, _fenced)
