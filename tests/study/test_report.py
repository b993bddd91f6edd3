"""Tables and pictures from records that were made up, with the numbers that they must show."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nalora_jax.__main__ import main
from nalora_jax.study.analysis import comparisons, results
from nalora_jax.study.hypothesis_tests import holm
from nalora_jax.study.planned_runs import Run, list_pending
from nalora_jax.study.protocol import read_protocol
from nalora_jax.study.records import Records, StudyRecord
from nalora_jax.study.study_report import render_results, write_tables
from tests.study import conftest


@pytest.fixture
def told(study: Path) -> Path:
    """A study with two more multiples and six test seeds, whose losses are known."""
    path = study / "protocol.toml"
    seeds = "test_seeds = [1, 2, 3, 4, 5, 6]\ntest_multiples = [1.0, 4.0]\nmargin = 0.005"
    text = path.read_text().replace("test_seeds = [1, 2]", seeds)
    text = text.replace("\ntest_items = 20", "\ntest_items = 20\naccuracy_items = 7")
    path.write_text(text)
    protocol, records = read_protocol(study), Records(study)
    while left := list_pending(protocol, records.read()):
        for run in left:
            records.append(record_of(run))
    return study


def record_of(run: Run) -> StudyRecord:
    """Loss 3 plus the seed's part; "half" is 0.01 better but on one seed, and breaks at the
    multiple with seed 6."""
    rng = np.random.default_rng(run.seed)
    loss = 3.0 + rng.normal(0, 0.05) + abs(np.log(run.rate / 2e-2)) * 0.1
    loss += {"lora": 0.0, "half": -0.01 if run.seed != 3 else 0.004, "again": 0.0}[run.cell.method]
    loss += 0.001 * rng.normal() * (run.cell.method != "lora")
    log = {"loss": loss, "misalignment": 0.25, "misalignment_limit": 0.24}
    log |= {"mean_feature": 0.01, "mean_importance": 0.5}
    record = conftest.record_of(run, loss) | {
        "curve": [{"step": 0, "loss": 3.6}, {"step": 4, "loss": 3.3}, {"step": 8, "loss": loss}],
        "training": [{"step": 4, **log}, {"step": 8, **log}],
        "parameters": 320,
        "test": {"loss": loss + 0.1, "accuracy": 0.5, "n": 20},
        "probes": {"z_again": {"loss": loss, "before": 3.5, "n": 10}},
    }
    if run.cell.method == "half" and run.multiple == 4 and run.seed == 6:
        record |= {"diverged": True, "validation": {"loss": None}}
    for name in ("test", "probes") if record["diverged"] or run.stage == "tune" else ():
        del record[name]
    return record


def row(text: str, *cells: str) -> list[str]:
    """Cells of the only table row that begins so."""
    (found,) = [
        line for line in text.splitlines() if line.startswith("| " + " | ".join(cells) + " |")
    ]
    return [cell.strip() for cell in found.strip("| ").split("|")]


def losses(study: Path, method: str, multiple: float = 1.0) -> np.ndarray:
    """The test losses by seed; NaN for a run that diverged."""
    wanted = "test", method, multiple
    records = Records(study).read().values()
    tests = [one for one in records if (one["stage"], one["method"], one["multiple"]) == wanted]
    return np.array(
        [one.get("test", {}).get("loss", np.nan) for one in sorted(tests, key=itemgetter("seed"))]
    )


def gain_of(records: Iterable[StudyRecord]) -> float:
    """Returns the fall of the validation loss of the baseline's only tuning run at its chosen
    rate."""
    (tuned,) = [
        r for r in records if (r["stage"], r["method"], r["rate"]) == ("tune", "lora", 2e-2)
    ]
    return 3.6 - float(tuned["validation"]["loss"])


def test_statistics_in_the_tables_equal_scipys(told: Path) -> None:
    write_tables(read_protocol(told))
    text = (told / "results.md").read_text()
    assert "Accuracy: of 7 (z) of the items." in text
    difference = losses(told, "half") - losses(told, "lora")
    found = row(text, "half", "lora", "z")
    assert found[3] == "6"
    assert float(found[4]) == pytest.approx(difference.mean(), abs=6e-5)
    low, high = map(float, found[5].split(" to "))
    theirs = stats.ttest_1samp(difference, 0.0)
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval()), abs=6e-5)
    assert found[6] == "5/6"
    wilcoxon = stats.wilcoxon(difference, method="exact").pvalue
    p_values = theirs.pvalue, wilcoxon, stats.binomtest(5, 6).pvalue
    assert [float(cell.split()[0]) for cell in found[7:10]] == pytest.approx(p_values, abs=6e-4)
    assert float(found[10]) == pytest.approx(difference.mean() / difference.std(ddof=1), abs=6e-3)
    assert found[11] == "no"
    assert float(found[12]) == pytest.approx(difference.std(ddof=1), abs=6e-5)
    assert row(text, "again", "lora", "z")[11] == "yes"
    assert found[14] == f"0.005 ({0.005 / gain_of(Records(told).read().values()):.1%})"
    assert row(text, "half", "again", "z")  # against its placebo
    tested = [float(cell) for cell in row(text, "lora", "0.02", "320")[5:7]]
    own = losses(told, "lora")
    assert tested == pytest.approx([own.mean(), own.std(ddof=1)], abs=6e-5)
    assert re.search(r"\| lora \| \d\.\d+ \| \*\*\d\.\d+\*\* \|", text)  # the second rate is chosen
    assert re.search(r"\| half \|[^\n]*\(1\) \|", text)  # diverged at the multiple
    assert re.search(r"\| half \| 3\.5000 -0\.\d+ \|", text)
    above = (losses(told, "half", 4.0) - losses(told, "lora", 4.0))[
        :-1
    ]  # without the pair that diverged
    found = row(text, "x 4", "half", "lora", "z")
    assert (found[4], found[7]) == ("5", f"{sum(above < 0)}/5")
    assert float(found[5]) == pytest.approx(above.mean(), abs=6e-5)
    forgotten = float(row(text, "z_again", "half", "lora", "z")[5])
    assert forgotten == pytest.approx(difference.mean(), abs=6e-5)


def test_the_equivalence_margin_is_a_share_of_the_training_gain(told: Path) -> None:
    protocol, records = read_protocol(told), Records(told).read()
    by_share = replace(protocol, margin=0.0, margin_share=0.1)
    primary = [
        c for c in comparisons(by_share, results(by_share, records)) if c.measure.kind == "primary"
    ]
    expected = 0.1 * gain_of(records.values())
    assert [c.paired.margin for c in primary] == pytest.approx([expected] * 3)
    assert row(render_results(by_share, records), "half", "lora", "z")[11] == "yes"  # within 0.06
    for record in records.values():
        record["curve"] = []  # an unknown gain
    cells = row(render_results(by_share, records), "half", "lora", "z")
    assert (cells[11], cells[13:]) == ("no", ["-", "-"])
    assert row(render_results(protocol, records), "half", "lora", "z")[14] == "0.005 (no gain)"


def test_a_report_depends_on_protocol_and_records_alone_and_is_the_same_bytes_each_time(
    told: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {
        path.relative_to(told): path.read_bytes() for path in write_tables(read_protocol(told))
    }
    other = tmp_path_factory.mktemp("clone")
    for name in ("protocol.toml", "records.jsonl"):
        (other / name).write_bytes((told / name).read_bytes())
    assert main(["study", "report", str(other)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(first)
    assert {path: (other / path).read_bytes() for path in first} == first
    pictures = {"loss_by_rate.svg", "loss_by_step.svg", "misalignment.svg", "differences.svg"}
    assert {path.name for path in first} == {"results.md", *pictures}  # importance: lines within 1%


def test_p_values_are_corrected_over_all_comparisons_with_the_baseline(told: Path) -> None:
    protocol, records = read_protocol(told), Records(told).read()
    compared = comparisons(protocol, results(protocol, records))
    family = [c for c in compared if c.other == "lora"]
    # Two methods by the loss, the accuracy, a multiple and a probe.
    assert {c.family for c in family} == {8} == {len(family)}
    assert [c.t_holm for c in family] == holm([c.paired.t_p for c in family])
    assert [c.wilcoxon_holm for c in family] == holm([c.paired.wilcoxon_p for c in family])
    assert {c.family for c in compared if c.other != "lora"} == {4}
    corrected = (
        "corrected over the 8 comparisons with `lora` in this and the following tables, or the 4"
    )
    assert corrected in render_results(protocol, records)
