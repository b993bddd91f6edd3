"""report.html: a self-contained page about a run, made from its metrics.jsonl alone.

The page loads no resources (its content security policy forbids it), follows the reader's light or
dark setting and fits a phone. The template engine escapes all text from the log.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from nalora_jax.common.files import write_atomically
from nalora_jax.config import RunConfig
from nalora_jax.config.structured import dotted
from nalora_jax.evaluate.run_log import to_json
from nalora_jax.report import plots, sections
from nalora_jax.report.history import History, read_history
from nalora_jax.report.tables import number
from nalora_jax.weights.origin import Origin

FILE = "report.html"
HEADS = {"favoured": "share with mask ≥ 1"}  # column heads that differ from metric names


@dataclass(frozen=True)
class Picture:
    """A plot of the report, with its heading and how to read it."""

    draw: Callable[[History], str | None]
    title: str
    caption: str


TRAINING = (
    Picture(
        plots.metric,
        "Held-out metric",
        "Each point is one evaluation on the examples that select the checkpoint, its bar the 95% interval, and the "
        "dashed line the evaluation before training. The headline uses other examples, which were not used to select "
        "the checkpoint, so its first value differs.",
    ),
    Picture(
        plots.loss,
        "Training loss",
        "Mean negative log-likelihood per loss token, lower is better. The loss tokens include the token that ends a "
        "completion, which is easy to predict.",
    ),
    Picture(
        plots.held_out_loss,
        "Held-out loss",
        "Mean negative log-likelihood of the completions of the examples that select the checkpoint, lower is better. "
        "Of multiple choice it leaves out the token that ends a completion, so it is larger than the training loss.",
    ),
    Picture(
        plots.rewards,
        "Rewards",
        "Beta times the log-ratio to the base, of chosen and of rejected responses; the margin is their difference.",
    ),
    Picture(
        plots.sampled_rewards,
        "Rewards of samples",
        "Mean over the samples of the rollouts between two log steps: of the weighted sum with the standard deviation "
        "of its samples, and of each of several rewards.",
    ),
    Picture(
        plots.entropy,
        "Entropy",
        "Mean negative log-probability of the policy's samples. Near 0 they hardly differ, and nothing is learned.",
    ),
    Picture(plots.divergence, "Divergence", "Of the policy from the base, the adapter off, by token."),
    Picture(plots.length, "Length of samples", "Mean tokens of a sample."),
    Picture(
        plots.groups_alike,
        "Groups without a difference",
        "Share of the groups whose rewards are all equal. They contribute nothing to the update.",
    ),
    Picture(plots.learning_rate, "Learning rate", "The schedule, as applied."),
    Picture(
        plots.speed,
        "Speed",
        "Real tokens per second between two log steps, without compiling, evaluating and saving.",
    ),
    Picture(plots.gradient, "Gradient norm", "Over all adapters, before clipping."),
    Picture(
        plots.adapters,
        "Adapter norms",
        "Update norm of each kind of module: the Frobenius norm of s·AB. Above: of all layers together, over the "
        "steps. Below: of every layer, at the last step.",
    ),
    Picture(
        plots.ranks,
        "Ranks",
        "Ranks that AdaLoRA keeps of each kind of module: above by step, below by layer at the last step.",
    ),
)
GATES = (
    Picture(
        plots.misalignment,
        "Misalignment",
        "The adapters' change of the gate's selection (S) over their change of its features (F), summed over all "
        "layers. The dashed line is the linear limit: the value for an update of the same direction and vanishing "
        "size. It depends on the pre-activations and on the channels that the adapters change, so it falls in most "
        "runs. Only the excess above it comes from the size of the update.",
    ),
    Picture(
        plots.misalignment_map,
        "Misalignment of every layer",
        "Left: misalignment over the steps. Right: its linear limit, in the same colours.",
    ),
    Picture(
        plots.excess_map,
        "Excess over the limit",
        "The difference of the two maps: the effect of the size of the gates' updates.",
    ),
    Picture(
        plots.feature,
        "Feature movement",
        "The adapters' change of the gate's features. Compare misalignment at equal values of it.",
    ),
    Picture(
        plots.importance,
        "Importance and mask",
        "Importance is the mean slope E|φ′| of a layer's gate channels; the mask gives channels above their layer's "
        "mean larger updates.",
    ),
    Picture(
        plots.occupancy,
        "Region occupancy",
        "Shares of the gate's pre-activations: inverted (output falls as the input rises), "
        "contracting, expanding, linear (selection saturated open).",
    ),
    Picture(
        plots.step_scale,
        "Step scale",
        "Factors of the gate's updates by the step-scaling rule: by homogeneity 1 on average over a layer, by "
        "curvature at most 1.",
    ),
)


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` from metrics.jsonl into the run's folder; returns its path.

    Raises:
      NaloraError: the folder's log is missing or damaged.
    """
    folder = Path(folder)
    has_adapter = (folder / "adapter" / "adapter_config.json").exists()
    history, needle, rollouts = (
        read_history(folder),
        sections.read_needle(folder),
        sections.read_rollouts(folder),
    )
    page = render(history, has_adapter=has_adapter, needle=needle, rollouts=rollouts)
    write_atomically(folder / FILE, page)
    return folder / FILE


def render(
    history: History,
    *,
    has_adapter: bool = False,
    needle: Sequence[Mapping[str, Any]] = (),
    rollouts: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Returns the page as text.

    Args:
      history: the run's log.
      has_adapter: the run's folder has an exported adapter, so the page explains how to use it.
      needle: tables of `nalora_jax.report.sections.read_needle`.
      rollouts: samples by step of `nalora_jax.report.sections.read_rollouts`.
    """
    config = history.config
    return template("page.html.j2").render(
        css=Markup(resource("style.css")),
        title=_title(config),
        status=_status(history),
        tiles=list(sections.tiles(history)),
        headline=sections.headline(history),
        sections=[
            ("Training", _draw(TRAINING, history)),
            ("Gates", _draw((*GATES, *_spreads(history)), history)),
        ],
        samples=sections.samples(history),
        sampled_after=sections.sampled_after(history),
        changes=sections.changes(history),
        confusion=sections.confusions(history),
        needle=needle,
        rollouts=rollouts,
        task=config.get("vision", {}).get("task", ""),
        folder=shlex.quote(str(config.get("output", "RUN"))) if has_adapter else None,
        config=_config_rows(config),
        layers=_layer_rows(history),
        versions=history.header.get("versions", {}),
        device=history.header.get("device", ""),
        base=_base(history.header.get("base")),
    )


def _spreads(history: History) -> list[Picture]:
    """Returns a plot for every mechanism with histograms in the log."""
    caption = (
        "The factor that each channel gets in the coming step, by size; above 1 it takes larger "
        "steps than the layer's others, below 1 smaller ones. Above: all layers together, the line "
        "when it first acted. Below: every layer. Factors are those of this mechanism alone, "
        "before the product of all is normalised; in the warm-up they are 1."
    )
    return [
        Picture(
            partial(plots.histogram, mechanism=label),
            f"{label[:40].replace('_', ' ').capitalize()}: spread over channels",
            caption,
        )
        for label in history.mechanisms
    ]


def _base(noted: Mapping[str, Any] | None) -> str:
    """Returns the base model's file, number formats and digest in one line, as logged."""
    if not noted:
        return ""
    return Origin.from_dict(noted).describe()


def _draw(pictures: tuple[Picture, ...], history: History) -> list[tuple[Picture, Markup]]:
    drawn = [(picture, picture.draw(history)) for picture in pictures]
    # Plots escape their text; escaping in the template would show their markup.
    return [(picture, Markup(svg)) for picture, svg in drawn if svg is not None]


def _title(config: Mapping[str, Any]) -> str:
    model, dataset = config.get("model", "a model"), config.get("data", {}).get("dataset", "a data set")
    return f"{model} on {dataset}"


def _status(history: History) -> str:
    last, total, best = history.last_step, history.total_steps, history.done.get("best_step")
    if not history.done:
        return f"step {last} of {total}, not finished"
    ended = history.done.get("message") or (
        f"{total} steps" if last >= total else f"stopped early, step {last} of {total}"
    )
    if best is not None and best != last:
        return f"{ended}, best at step {best}"
    return str(ended)


def _config_rows(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Returns (dotted name, value, differs from the default) of every field."""
    defaults = dict(dotted(to_json(RunConfig().to_dict())))  # as in the log
    return [
        (name, plain_text(value), name in defaults and defaults[name] != value)
        for name, value in dotted(config)
    ]


def plain_text(value: Any) -> str:
    """Returns a value as a user would type it; adapter rules as on the command line."""
    if isinstance(value, list | tuple):
        return "  ".join(map(plain_text, value)) or "none"
    if isinstance(value, Mapping) and {"pattern", "rank"} <= set(value):
        text = f"{value['pattern']}:{value['rank']}"
        if value.get("alpha") is not None:
            text += f":{_number_text(value['alpha'])}"
        return text
    return str(value)


def _number_text(value: object) -> str:
    if isinstance(value, int | float) and abs(value) < 1e300:
        return f"{value:g}"
    return str(value)


def _layer_rows(history: History) -> tuple[list[str], list[list[str]]]:
    """Returns heads and rows of the table of every layer at the last log step."""
    first = ["misalignment", "limit", "feature", "importance", "favoured", "mask_mean"]
    logged = list(history.steps[-1].get("layers", {})) if history.steps else []
    # All other statistics of mechanisms; those with several values per layer are left out below.
    names = [*first, *(name for name in logged if name not in first)]
    columns = [(name, history.layers(name)[1]) for name in names]
    columns = [(name, values[-1]) for name, values in columns if values.ndim == 2]
    if not columns:
        return [], []
    labels = sections.layer_labels(history, len(columns[0][1]))
    rows = [[label, *(number(values[i]) for _, values in columns)] for i, label in enumerate(labels)]
    return ["layer", *(HEADS.get(name, name.replace("_", " ")) for name, _ in columns)], rows


@cache
def template(name: str) -> Template:
    """Returns a page's template, with autoescaping."""
    environment = Environment(
        loader=FunctionLoader(resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def resource(name: str) -> str:
    """Returns a file of this package as text."""
    return files("nalora_jax.report").joinpath(name).read_text(encoding="utf-8")
