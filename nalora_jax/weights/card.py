"""Model cards: the README.md of an adapter or a merged model, with the front matter that the hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData

from nalora_jax.common.files import write_atomically
from nalora_jax.common.redaction import code, is_hub_id, markdown, published
from nalora_jax.config import OptimizerConfig, RunConfig
from nalora_jax.errors import visible
from nalora_jax.models.targets import AdapterSpec
from nalora_jax.weights.origin import Origin


@dataclass(frozen=True)
class Card:
    """The content of a card.

    Evaluations are lines of metrics.jsonl: ``{"accuracy":, "low":, "high":, "loss":, "n":}``.
    """

    kind: Literal["adapter", "merged"]
    base_model: str  # a hub id, or a path; of a copy, its original (`origin` names the copy)
    spec: AdapterSpec
    run: RunConfig | None = None  # settings of the training run, if this library ran it
    command: str = ""  # the command line as typed
    license: str = ""  # of the base model: an SPDX name or a hub identifier
    before: Mapping[str, Any] | None = None  # evaluation of the base
    after: Mapping[str, Any] | None = None  # evaluation with the adapter
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries that trained it
    device: str = ""  # hardware of the training run
    origin: Origin | None = None  # the base's file, number formats and digest
    resized: int = 0  # rows of the embedding if tokens were added to the base; otherwise 0
    # RoPE fields of the base's config.json if the run changed them (`models.families.rope_settings`).
    rope: Mapping[str, Any] = field(default_factory=dict)


def render_card(card: Card) -> str:
    """Returns the card's text: YAML front matter, and Markdown for people.

    The text shortens a local path of a base model or a data file to its last part. The front
    matter contains hub identifiers only, no paths.
    """
    parts = [
        f"---\n{_front_matter(card)}\n---",
        f"# {_title(card)}",
        _summary(card),
        _results(card),
        _precision(card),
        _rope(card),
        _usage(card),
        _settings(card),
        _provenance(card),
        _licence(card),
    ]
    return "\n\n".join(section for section in parts if section) + "\n"


def write_card(folder: str | Path, card: Card) -> Path:
    """Writes the card as ``README.md`` of an existing folder.

    Raises:
      NaloraError: it cannot be written.
    """
    path = Path(folder) / "README.md"
    write_atomically(path, render_card(card))
    return path


# ---------------------------------------------------------------- parts


_LIBRARY = {"adapter": "peft", "merged": "transformers"}  # by kind of a card
_RELATION = {"adapter": "adapter", "merged": "finetune"}
_TITLE = {"adapter": "adapter of", "merged": "fine-tuned from"}


def _front_matter(card: Card) -> str:
    entries: dict[str, Any] = {}
    if is_hub_id(card.base_model):
        entries |= {"base_model": card.base_model, "base_model_relation": _RELATION[card.kind]}
    if card.license:
        entries["license"] = card.license.lower()  # SPDX: Apache-2.0; on the hub: apache-2.0
    data = ModelCardData(
        library_name=_LIBRARY[card.kind],
        pipeline_tag="zero-shot-image-classification" if _on_images(card) else "text-generation",
        tags=["nalora_jax", "na-lora", "lora", *(["dora"] * card.spec.dora)],
        **entries,
    )
    text: str = data.to_yaml()
    return text.strip()


def _title(card: Card) -> str:
    title = f"LoRA {_TITLE[card.kind]} {markdown(_short(card.base_model))}"
    if card.run:
        title += f" for {markdown(_short(card.run.data.dataset))}"
    return title


def _summary(card: Card) -> str:
    kind = "rsLoRA" if card.spec.rslora else "LoRA"
    if card.spec.dora:
        kind = "DoRA"
    lines = [
        f"Base model: {_base_link(card.base_model)}. Adapters ({kind}), rank and alpha per projection:"
    ]
    rows = [
        (f"`{path}`", _range(target.ranks), _range(target.alphas)) for path, target in card.spec.targets
    ]
    lines += ["", *_table(("projection", "rank", "alpha"), rows)]
    if card.spec.saved and card.kind == "adapter":
        lines += [
            "",
            f"Also fully trained, and part of its files: {' and '.join(card.spec.saved)}.",
        ]
    if card.spec.token_indices and card.kind == "adapter":
        listed = " and ".join(f"{len(ids)} of {name}" for name, ids in card.spec.token_indices)
        lines += ["", f"Trained rows beside them, one a token, and part of its files: {listed}."]
    if card.run:
        lines += ["", _method(card.run)]
        if card.run.adapter:
            digest = code(card.run.adapter_sha256)
            lines += [
                "",
                f"It continues the adapter {code(_short(card.run.adapter))} (SHA-256 of its tensors: {digest}).",
            ]
    if card.kind == "merged":
        lines += ["", "The adapters are folded into these weights: in float32, rounded once."]
    return "\n".join(lines)


def _method(run: RunConfig) -> str:
    mean = run.adalora.target_rank
    allocated = f"AdaLoRA (arXiv 2303.10512) has left a mean rank of {mean} to every adapter."
    if not run.mechanisms:
        if not mean:
            return "Trained with plain LoRA."
        return f"Trained as plain LoRA, of whose ranks {allocated}"
    used = [
        f"{_RULES.get(rule.partition(':')[0], 'the mechanism')} ({_shown(rule)})" for rule in run.mechanisms
    ]
    method = (
        "Trained with NA-LoRA (nonlinearity-aware LoRA, arXiv 2606.31717, as nalora_jax instantiates it): "
        f"{' and '.join(used)}. They act in training only: the result is a plain adapter."
    )
    if mean:
        method += f" Of its ranks {allocated}"
    return method


_RULES = {
    "hard": "a hard temporal-importance mask on the gate's updates",
    "soft": "a soft temporal-importance mask on the gate's updates",
    "curvature_cap": "a step scale by curvature",
    "homogeneity": "a step scale by homogeneity",
}


def _shown(rule: str) -> str:
    return markdown(str(published(rule, "mechanisms")))


def _results(card: Card) -> str:
    first = "first adapter" if card.run and card.run.adapter else "base"
    rows = [
        (name, *_measured(metrics))
        for name, metrics in ((first, card.before), ("with the adapter", card.after))
        if metrics is not None
    ]
    if not rows:
        return ""
    split = ""
    if card.run:
        split = f" on {code(_short(card.run.data.dataset))}, {_held_out(card.run.data.eval_split)}"
    headline = "accuracy"
    if "recall" in (card.after or card.before or {}):
        headline = "recall at 1"
    head = f"## Measured result\n\nHeld out{split}; the interval is 95%.\n\n"
    if all(not row[1] for row in rows):  # no accuracy was measured: the interval is the loss's
        return head + "\n".join(
            _table(("", "loss", "interval", "examples"), [(r[0], r[3], r[2], r[4]) for r in rows])
        )
    return head + "\n".join(_table(("", headline, "interval", "loss", "examples"), rows))


def _measured(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    digits = {"accuracy": 3, "recall": 3, "low": 3, "high": 3, "loss": 4}
    shown = {name: f"{metrics[name]:.{n}f}" for name, n in digits.items() if metrics.get(name) is not None}
    accuracy = shown.get("accuracy", shown.get("recall", ""))
    interval = " to ".join(shown[name] for name in ("low", "high") if name in shown)
    return accuracy, interval, shown.get("loss", ""), markdown(metrics.get("n", ""))


def _precision(card: Card) -> str:
    """Describes the base's precision during the evaluation, and the effect of another one."""
    if card.origin is None:
        return ""
    held = f", {_held(card.run)}" if card.run else ""
    lines = [
        "## Precision of the base",
        f"Trained and measured on {code(_short(card.origin.file))} ({markdown(card.origin.format)}, "
        f"{markdown(card.origin.numbers)}{held}); digest of all its weights: {code(card.origin.fingerprint)}.",
    ]
    if card.origin.copy_of:
        lines += [
            f"That file is a community GGUF of {_base_link(card.origin.copy_of)}, not the model on the hub. "
            f"nalora_jax loads it by the name {code(card.origin.name)}."
        ]
    if card.kind == "adapter":
        lines += [
            "On the same model in another precision (the hub's files, another quantization) PEFT loads this adapter "
            "without a warning and adds the same low-rank update to slightly different weights. Most of what it "
            "learned carries over, but outputs differ by as much as the two bases do, and the measured result is valid "
            "only for the precision above. nalora_jax compares the digest and refuses another base."
        ]
    return "\n\n".join(lines)


def _rope(card: Card) -> str:
    """Describes a changed RoPE, which other tools do not read from an adapter."""
    if not card.rope:
        return ""
    fields = _fenced(json.dumps(dict(card.rope), indent=2), "json")
    if card.kind == "merged":
        return f"## RoPE\n\nThe context is longer than the base's. `config.json` holds these fields:\n\n{fields}"
    return (
        "## RoPE: change the base's config\n\n**Trained with another RoPE than the base's, for a longer context. On "
        "the unchanged base the adapter gives wrong results.** nalora_jax applies it by itself. Any other tool needs "
        f"these fields in the base's `config.json`:\n\n{fields}"
    )


def _numbers(origin: Origin | None, run: RunConfig) -> str:
    if origin is None:
        return _held(run)
    return f"{markdown(origin.numbers)} in the file, {_held(run)}"


def _held(run: RunConfig) -> str:
    kind = run.compute.quantize
    if kind == "none":
        return f"loaded as {run.compute.dtype}"
    return f"quantized to {kind}, computed in {run.compute.dtype}"


def _usage(card: Card) -> str:
    base = (card.origin and card.origin.copy_of) or card.base_model
    if not is_hub_id(base):
        base = "path/to/the/base"
    if card.kind == "merged":
        code = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
        )
    else:
        kind = "AutoModel" if _on_images(card) else "AutoModelForCausalLM"
        resize = ""
        if card.resized:
            resize = f"base.resize_token_embeddings({card.resized})\n"
        code = (
            f"from peft import PeftModel\nfrom transformers import {kind}\n\n"
            f"base = {kind}.from_pretrained({json.dumps(base)})\n{resize}"
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")'
        )
    return f"## Use\n\n```python\n{code}\n```"


def _on_images(card: Card) -> bool:
    return card.run is not None and bool(card.run.vision.task)


def _settings(card: Card) -> str:
    if card.run is None:
        return ""
    run, optimizer = card.run, card.run.optimizer
    size = f"{run.train.batch_size} of up to {run.data.max_length} tokens"
    rows = [
        ("data", f"{code(_short(run.data.dataset))}, split {code(_short(run.data.train_split))}"),
        ("steps", run.steps),
        ("rows per step", run.train.batch_size if _on_images(card) else size),
        ("loss on", run.vision.task or run.data.loss_on),
        ("optimizer", f"{optimizer.name}, weight decay {optimizer.weight_decay:g}"),
        (
            "learning rate",
            f"{optimizer.learning_rate:g}, {optimizer.schedule}, {_warmup(optimizer)} warm-up",
        ),
        ("adapter dropout", f"{run.lora.dropout:g}"),
        ("initialisation", run.lora.init),
        ("precision of the base", _numbers(card.origin, run)),
        ("seed", run.seed),
    ]
    everything = _fenced(json.dumps(published(run.to_dict()), indent=2), "json")
    details = f"<details><summary>Every setting</summary>\n\n{everything}\n\n</details>"
    return "## Training\n\n" + "\n".join(_table(("setting", "value"), rows)) + f"\n\n{details}"


def _warmup(optimizer: OptimizerConfig) -> str:
    if optimizer.warmup_steps:
        return f"{optimizer.warmup_steps} steps"
    return f"{optimizer.warmup_share:.0%}"


def _provenance(card: Card) -> str:
    lines = []
    if card.command:
        lines += ["Made by this command:", "", _fenced(visible(published(card.command)), "sh"), ""]
    if card.versions:
        versions = (markdown(f"{name} {version}") for name, version in sorted(card.versions.items()))
        lines += [f"Versions: {', '.join(versions)}."]
    if card.device:
        lines += [f"Device: {markdown(card.device)}."]
    if not lines:
        return ""
    return "## How it was made\n\n" + "\n".join(lines).strip()


def _licence(card: Card) -> str:
    licence = ", which this library does not know: look it up where the base is from"
    if card.license:
        licence = f" ({markdown(card.license)})"
    return f"## Licence\n\nThe licence of the base model{licence}. The licence of the training data may add conditions."


# ---------------------------------------------------------------- Markdown


def _held_out(split: str) -> str:
    """Describes the examples that the results were measured on."""
    if split == "auto":
        return "its validation split or else some of its records"
    return f"split {code(_short(split))}"


def _short(name: str) -> str:
    """Returns a name for the card; a path is shortened to its last part."""
    short: str = published(name, "model")
    return short


def _base_link(name: str) -> str:
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    return code(_short(name))


def _range(values: tuple[int, ...] | tuple[float, ...]) -> str:
    """Formats the smallest and the largest value, or the only one."""
    return " to ".join(f"{value:g}" for value in sorted({min(values), max(values)}))


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    cells = [[re.sub(r"\s+", " ", str(cell)).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _fenced(text: str, language: str) -> str:
    """Returns a code block whose fence is longer than any run of backticks in ``text``."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
