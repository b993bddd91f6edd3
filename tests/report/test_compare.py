"""Several runs on one page: groups by settings, seeds as a band."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nalora_jax.__main__ import main
from nalora_jax.config import OptimizerConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.report.compare import (
    compare_by_seed,
    group_runs,
    render_comparison,
    write_comparison,
)
from nalora_jax.report.history import History, history_of, read_history
from nalora_jax.report.html import render
from nalora_jax.report.sections import tiles
from tests.report.conftest import fake_records, words_of, write_run

NALORA = RunConfig(
    steps=40,
    mechanisms=("soft:power=2", "homogeneity"),
    optimizer=OptimizerConfig(learning_rate=1e-3),
)
LORA = NALORA.without_mechanisms()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two seeds of NA-LoRA and two of LoRA."""
    found = []
    for name, config in (("na", NALORA), ("lora", LORA)):
        for seed in range(2):
            own = replace(config, seed=seed, output=f"runs/{name}-{seed}")
            records = list(fake_records(40, layers=4, seed=seed + 10 * (name == "lora")))
            found.append(write_run(tmp_path / f"{name}-{seed}", records, own))
    return found


def test_seeds_are_one_group_and_methods_have_their_names(folders: list[Path]) -> None:
    runs = [read_history(folder) for folder in folders]
    groups = group_runs(runs)
    assert [(group.label, len(group.runs)) for group in groups] == [("NA-LoRA", 2), ("LoRA", 2)]
    faster = replace(LORA, optimizer=replace(LORA.optimizer, learning_rate=2e-3), seed=5)
    other = write_run(folders[0].parent / "faster", list(fake_records(40, layers=4)), faster)
    labels = [group.label for group in group_runs([*runs, read_history(other)])]
    assert labels[::2] == [
        "NA-LoRA, learning_rate 0.001",
        "LoRA, mechanisms none, learning_rate 0.002",
    ]


def test_the_page_holds_every_group_and_loads_nothing(folders: list[Path]) -> None:
    page = render_comparison([read_history(folder) for folder in folders])
    assert page.count("<svg") == 5
    assert not re.search(r'(src|href)="(?!#|data:)|https?://(?!www\.w3\.org)', page)
    cells = re.findall(r'<td data-head="(?:before|after|difference)">([^<]*)</td>', page)
    assert cells[:3] == ["0.401", "0.523", "+0.122"]
    assert '<th scope="row">mechanisms</th><td>soft:power=2  homogeneity</td><td>none</td>' in page
    last = [read_history(folder).column("misalignment")[1][-1] for folder in folders[:2]]
    assert f"{sum(last) / 2:.3f} ({min(last):.3f} to {max(last):.3f})" in page
    assert len(re.findall(r"fill-opacity: 0.2|opacity: 0.2", page)) >= 2 * 4  # bands


def test_the_verb_writes_one_page(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "both.html"
    assert main(["report", *map(str, folders), "--output", str(page)]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert "4 runs, 2 settings" in page.read_text()
    assert main(["report", str(folders[0])]) == 0
    assert (folders[0] / "report.html").exists()
    with pytest.raises(NaloraError, match="expected different runs"):
        write_comparison([folders[0], folders[0]], page)
    assert main(["report"]) == 2
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "expected the folder of a run, found a folder of 4 runs; give one of them" in error
    assert error.endswith(f"nalora report {tmp_path}/lora-0 {tmp_path}/lora-1 ...\n")


def test_more_settings_than_colours_are_refused() -> None:
    runs = [history_of([{"run": {"steps": steps}}]) for steps in range(8)]
    assert len(group_runs(runs[:7])) == 7
    with pytest.raises(NaloraError, match="report: expected at most 7 different settings, found 8"):
        group_runs(runs)


def of_seed(folder: Path, config: RunConfig, seed: int, after: float, **more: int) -> History:
    """A run of 40 steps with this seed, whose exported adapter has this accuracy."""
    records = list(fake_records(40, layers=4, seed=seed))
    result = next(record for record in records if "final" in record)
    result["eval"]["accuracy"] = after
    output = folder / f"{len(list(folder.iterdir()))}"
    return read_history(write_run(output, records, replace(config, seed=seed), **more))


def cells(page: str, head: str) -> list[str]:
    return re.findall(rf'<td data-head="{head}">([^<]*)</td>', page)


def test_tokens_per_second_are_those_of_the_program_with_its_number_of_runs(
    tmp_path: Path,
) -> None:
    runs = [of_seed(tmp_path, NALORA, 0, 0.5, runs_in_program=3), of_seed(tmp_path, LORA, 0, 0.5)]
    assert cells(render_comparison(runs), "tokens/s") == ["2,700 in a program of 3 runs", "900"]
    page = words_of(render(runs[0]))
    assert "Tokens per second 2,700 median, in a program of 3 runs; 40,000 tokens" in page
    assert "Tokens per second 900 median; 40,000 tokens" in words_of(render(runs[1]))


def test_a_resumed_run_has_the_rate_of_each_of_its_programs() -> None:
    records = [
        {"run": {}, "runs_in_program": 6},
        {"step": 10, "tokens_per_second": 100.0},
        {"resumed": {"step": 10, "runs_in_program": 2}},
        {"step": 20, "tokens_per_second": 250.0},
        {"resumed": {"step": 20}},
        {"step": 30, "tokens_per_second": 400.0},
    ]
    history = history_of(records)
    assert history.program_rate()[1].tolist() == [600.0, 500.0, 400.0]
    tile = {name: note for name, _, note in tiles(history)}
    assert tile["Tokens per second"] == "median, in programs of 6 and 2 and 1 runs"


def test_runs_of_one_seed_are_compared_in_pairs(tmp_path: Path) -> None:
    runs = [of_seed(tmp_path, NALORA, seed, 0.6 + 0.1 * seed) for seed in (0, 1, 2)]
    runs += [of_seed(tmp_path, LORA, seed, 0.5 + 0.12 * seed) for seed in (3, 2, 1, 0)]
    paired = compare_by_seed(group_runs(runs))
    assert paired is not None
    assert paired.reference == "LoRA"
    differences = [0.06, 0.08, 0.1]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(differences), scale=stats.sem(differences))
    interval = f"{low:+.3f} to {high:+.3f}"
    by_seed = "2: +0.060, 1: +0.080, 0: +0.100"
    assert paired.rows == [["NA-LoRA", "3", "+0.080", interval, by_seed]]
    page = words_of(render_comparison(runs))
    assert f"NA-LoRA 3 +0.080 {interval} {by_seed}" in page
    assert compare_by_seed(group_runs(runs[2:5])) is None  # one shared seed
    other_task = replace(LORA, data=replace(LORA.data, dataset="other"))
    runs += [of_seed(tmp_path, other_task, seed, 0.5) for seed in (0, 1)]
    assert "Paired by seed" not in render_comparison(runs)


def test_the_page_says_in_how_many_exported_steps_mechanisms_acted(tmp_path: Path) -> None:
    runs = [
        of_seed(tmp_path, NALORA, 0, 0.5, mechanisms_from=31),
        of_seed(tmp_path, LORA, 0, 0.5),
    ]
    assert cells(render_comparison(runs), "mechanisms acted in") == ["10 of 40 steps", "–"]
    assert "Mechanisms acted in 10 of its 40 steps." in words_of(render(runs[0]))
    assert "mechanisms acted in" not in render_comparison(runs[1:])
