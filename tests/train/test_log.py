"""metrics.jsonl: what is written, what survives a crash and a resume, and TensorBoard."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import read_metrics, to_json
from nalora_jax.train.log import MetricsLog

MACHINE = {"versions": {"jax": "0.10"}, "device": "cpu"}


def write_steps(folder, steps):
    with MetricsLog(folder) as log:
        log.start({"steps": 100}, **MACHINE)
        for step in steps:
            log.write({"step": step, "loss": np.float32(1.0 / step)})


def steps_of(folder):
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl") if "step" in record]


def test_what_json_lacks_becomes_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": np.float32("nan"), "list": [np.array(-np.inf), 1]})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.startswith('{"step": 1, "loss": null, "list": [null, 1], "sha256')


def test_a_flipped_bit_of_a_log_is_reported(tmp_path):
    write_steps(tmp_path, [10])
    path = tmp_path / "metrics.jsonl"
    records, content = read_metrics(path), path.read_bytes()
    for bit in range(0, 8 * len(content), 5):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with suppress(NaloraError):
            # Otherwise the name of the digest is damaged, or a blank between fields.
            for record, original in zip(read_metrics(path), records, strict=True):
                assert {name: record[name] for name in original} == original


def test_floats_tell_any_two_float32_apart():
    value = np.float32(0.1)
    nearby = np.nextafter(value, np.float32(1))
    assert np.float32(to_json(value)) == value
    assert np.float32(to_json(nearby)) == nearby


def test_resume_drops_what_comes_after_the_restored_step(tmp_path):
    write_steps(tmp_path, [10, 20, 30])
    with MetricsLog(tmp_path, resume=20) as log:
        assert steps_of(tmp_path) == [10, 20]  # before anything new is written
        log.start({"steps": 100}, **MACHINE)
        log.write({"step": 30, "loss": 9.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record.get("step") for record in records] == [None, 10, 20, None, 30]
    assert records[3]["resumed"] == {"step": 20, **MACHINE}
    assert records[4]["loss"] == 9.0


def test_lines_lost_before_the_checkpoint_are_named(tmp_path, caplog):
    write_steps(tmp_path, [10, 20])
    with MetricsLog(tmp_path, resume=40) as log:
        log.start({"steps": 100}, **MACHINE)
    assert "metrics.jsonl: the lines of steps 21 to 40 are lost" in caplog.text
    resumed = read_metrics(tmp_path / "metrics.jsonl")[-1]["resumed"]
    assert resumed == {"step": 40, "lost_after": 20, **MACHINE}
    caplog.clear()
    with MetricsLog(tmp_path, resume=40) as log:
        log.start({"steps": 100}, **MACHINE)
    assert caplog.text == ""


def test_a_line_that_a_crash_tore_is_dropped(tmp_path):
    write_steps(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert steps_of(tmp_path) == [10]
    with MetricsLog(tmp_path, resume=20) as log:
        log.write({"step": 30})
    assert steps_of(tmp_path) == [10, 30]


def test_a_broken_line_before_the_last_is_named_and_nothing_is_changed(tmp_path):
    path, content = tmp_path / "metrics.jsonl", b'{"step": 1}\n\xff\xfe\n{"step": 2}\n'
    path.write_bytes(content)
    with pytest.raises(NaloraError, match="line 2: expected one JSON object"):
        MetricsLog(tmp_path, resume=1)
    assert path.read_bytes() == content
