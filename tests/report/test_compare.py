"""Several runs on one page: groups by settings, seeds as a band."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from nalora_jax.__main__ import main
from nalora_jax.config import OptimizerConfig, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.report.compare import group_runs, render_comparison, write_comparison
from nalora_jax.report.history import read_history
from tests.report.conftest import fake_records, write_run

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
