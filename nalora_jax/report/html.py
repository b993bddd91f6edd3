"""report.html: a self-contained page about a run, made from its metrics.jsonl alone.

The page loads no resources (its content security policy forbids it), follows the reader's light or
dark setting and fits a phone. The template engine escapes all text from the log.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from nalora_jax.common.files import write_atomically
from nalora_jax.config import RunConfig
from nalora_jax.config.structured import flatten_settings
from nalora_jax.evaluate.run_log import to_json
from nalora_jax.report import plots, sections
from nalora_jax.report.drawing import style
from nalora_jax.report.history import History, read_history
from nalora_jax.report.tables import number
from nalora_jax.weights.origin import Origin

REPORT_FILE = "report.html"
# column heads that differ from metric names
HEADS = {"favoured": "share with mask ≥ 1"}
_LARGEST = 1e300  # limit of numbers; JSON's integers may exceed a float
_NO_ROLLOUTS = sections.Rollouts([], 0)


def write_report(folder: str | Path) -> Path:
    """Writes ``report.html`` from metrics.jsonl into the run's folder; returns its path.

    Raises:
      NaloraError: the folder's log is missing or damaged.
    """
    folder = Path(folder)
    has_adapter = (folder / "adapter" / "adapter_config.json").exists()
    page = render(
        read_history(folder),
        has_adapter=has_adapter,
        needle=sections.read_needle(folder),
        rollouts=sections.read_rollouts(folder),
    )
    write_atomically(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def render(
    history: History,
    *,
    has_adapter: bool = False,
    needle: Sequence[Mapping[str, Any]] = (),
    rollouts: sections.Rollouts = _NO_ROLLOUTS,
) -> str:
    """Returns the page as text.

    Args:
      history: the run's log.
      has_adapter: the run's folder has an exported adapter, so the page explains how to use it.
      needle: tables of `nalora_jax.report.sections.read_needle`.
      rollouts: groups of samples of `nalora_jax.report.sections.read_rollouts`.
    """
    config = history.config
    base = ""
    if history.header.get("base"):
        base = Origin.from_dict(history.header["base"]).describe()
    output = None
    if has_adapter:
        output = shlex.quote(str(config.get("output", "RUN")))
    model = config.get("model", "a model")
    dataset = config.get("data", {}).get("dataset", "a data set")
    return template("page.html.j2").render(
        css=Markup(resource("style.css")),
        title=f"{model} on {dataset}",
        status=_status(history),
        tiles=list(sections.tiles(history)),
        headline=sections.headline(history),
        sections=_draw(history),
        samples=sections.samples(history),
        sampled_after=sections.shown_sample_step(history),
        changes=sections.changes(history),
        confusion=sections.confusions(history),
        needle=needle,
        rollouts=rollouts,
        task=config.get("vision", {}).get("task", ""),
        folder=output,
        config=_config_rows(config),
        layers=_layer_rows(history),
        versions=history.header.get("versions", {}),
        device=history.header.get("device", ""),
        base=base,
    )


def _draw(history: History) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """Returns the sections of plots: (title, plots), and of each plot (name, SVG).

    A mechanism's spread over channels has the name ``histogram LABEL``.
    """
    spreads = {
        f"histogram {label}": partial(plots.histogram, mechanism=label)
        for label in history.mechanisms
    }
    groups = {"Training": plots.TRAINING, "Gates": plots.GATES | spreads}
    drawn = []
    with style():
        for title, group in groups.items():
            pictures = []
            for name, draw in group.items():
                svg = draw(history)
                if svg:
                    if name == "loss":
                        name = history.loss_kind
                    # Plots escape their text; escaping here again would show their markup.
                    pictures.append((name, Markup(svg)))
            drawn.append((title, pictures))
    return drawn


def _status(history: History) -> str:
    """Returns how the run ended, e.g. "stopped early, step 80 of 100, best at step 60"."""
    last = history.last_step
    total = history.total_steps
    best = history.done.get("best_step")
    if not history.done:
        return f"step {last} of {total}, not finished"
    ended = history.done.get("message")
    if not ended:
        ended = f"{total} steps"
        if last < total:
            ended = f"stopped early, step {last} of {total}"
    if best not in (None, last):
        return f"{ended}, best at step {best}"
    return str(ended)


def _config_rows(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Returns (dotted name, value, differs from the default) of every field."""
    defaults = dict(flatten_settings(to_json(RunConfig().to_dict())))  # as in the log
    rows = []
    for name, value in flatten_settings(config):
        differs = name in defaults and defaults[name] != value
        rows.append((name, plain_text(value), differs))
    return rows


def plain_text(value: Any) -> str:
    """Returns a value as a user would type it; adapter rules as on the command line."""
    if isinstance(value, list | tuple):
        return "  ".join(map(plain_text, value)) or "none"
    if isinstance(value, Mapping) and {"pattern", "rank"} <= set(value):
        alpha = value.get("alpha")
        if isinstance(alpha, int | float) and abs(alpha) < _LARGEST:
            alpha = f"{alpha:g}"
        text = f"{value['pattern']}:{value['rank']}"
        if alpha is not None:
            text += f":{alpha}"
        return text
    return str(value)


def _layer_rows(history: History) -> tuple[list[str], list[list[str]]]:
    """Returns heads and rows of the table of every layer at the last log step."""
    first = ["misalignment", "limit", "feature", "importance", "favoured", "mask_mean"]
    names = dict.fromkeys(first)
    if history.steps:
        names |= dict.fromkeys(history.steps[-1].get("layers", {}))
    columns = {}
    for name in names:
        values = history.layers(name)[1]
        if values.ndim == 2:  # [T, L], one value per layer
            columns[name] = values[-1]
    if not columns:
        return [], []
    heads = [HEADS.get(name, name.replace("_", " ")) for name in columns]
    layers = len(next(iter(columns.values())))
    labels = sections.layer_labels(history, layers)
    rows = []
    for layer, label in enumerate(labels):
        row = [label]
        for values in columns.values():
            row.append(number(values[layer]))
        rows.append(row)
    return ["layer", *heads], rows


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
