"""Whole runs whose samples come from a stand-in server: they equal runs on this library's generator
with the same samples, and resume without asking twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax import RunConfig, run
from nalora_jax.config import RLConfig, TrainConfig
from nalora_jax.evaluate.generate.programs import NO_TOKEN
from nalora_jax.kinds.rl.rollout import Sampler
from nalora_jax.train.callbacks import Callback
from tests import tiny
from tests.doubles.rollout_server import serving

pytestmark = pytest.mark.usefixtures("surroundings")

RL = RLConfig(rewards=("regex:pattern=[a-h]",), samples=4, max_new_tokens=4, temperature=0.9)
TRAIN = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=2)
STEPS = 5


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.on_named_devices(tmp_path_factory.mktemp("new") / "cache"):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("served")
    return tiny.make_config(folder, rl=RL, train=TRAIN, steps=STEPS, mechanisms=())


def adapter(config: RunConfig) -> dict[str, np.ndarray]:
    return load_file(Path(config.output) / "adapter/adapter_model.safetensors")


def same_run(config: RunConfig, other: RunConfig, atol: float = 0.0) -> None:
    assert tiny.logged(config.output, "reward") == tiny.logged(other.output, "reward")
    first, second = adapter(config), adapter(other)
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], rtol=0, atol=atol, err_msg=name)


def served(config: RunConfig, url: str, folder: Path, **changes: Any) -> RunConfig:
    rl = replace(config.rl, servers=(url,), server_seconds=20.0, **changes)
    return replace(config, rl=rl, output=str(folder / "run"))


def wait_for_samples(config: RunConfig, version: int) -> None:
    """Waits for the samples that were asked for by threads of a run that ended in this process.

    tests/served_kills.py kills processes, whose requests end with them.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lines = 0
        for file in (Path(config.output) / "received").glob(f"*/{version}.jsonl"):
            lines += len(file.read_text().splitlines())
        if lines == TRAIN.batch_size:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{lines} samples of version {version}")


def test_the_same_samples_give_the_same_run_as_this_librarys_generator(
    place, tmp_path, monkeypatch
):
    """The server repeats what the generator drew, with its log-probabilities."""
    drawn: dict[tuple[Any, ...], Any] = {}
    plain = Sampler.__call__

    def recorded(self: Sampler, lora: Any, step: int, prompts: Any, *, attempt: int = 0) -> Any:
        samples = plain(self, lora, step, prompts, attempt=attempt)
        for row, request in enumerate(self.requests(step, prompts, attempt)):
            tokens = samples.tokens[row]
            ids = tokens[tokens != NO_TOKEN].tolist()
            values = samples.log_probs[row, : len(ids)].tolist()
            found = {"token_logprobs": values}
            drawn[(*request.ids, request.seed)] = {"token_ids": ids, "logprobs": found}
        return samples

    monkeypatch.setattr(Sampler, "__call__", recorded)
    own = replace(place, output=str(tmp_path / "own"))
    run(own)
    monkeypatch.setattr(Sampler, "__call__", plain)
    with serving(Path(place.model)) as server:
        server.replay = lambda body: drawn[(*body["prompt"], body["seed"])]
        config = served(place, server.url, tmp_path, importance_clip=0.0)
        run(config)
        assert len(server.samples) == len(drawn)
        assert server.adapters == {}
    same_run(own, config, atol=1e-7)
    assert list((tmp_path / "run/served").iterdir()) == []


class EndsAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, step: int, record: Any) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def test_samples_before_the_first_checkpoint_are_used_again(place, tmp_path):
    with serving(Path(place.model)) as server:
        config = served(place, server.url, tmp_path, staleness=0)
        config = replace(config, steps=2, resume="auto")
        with pytest.raises(KeyboardInterrupt):
            run(config, callbacks=[EndsAt(1)])
        assert len(server.samples) == TRAIN.batch_size
        run(config)
        assert len(server.samples) == 2 * TRAIN.batch_size


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_killed_run_uses_its_samples_again(place, tmp_path, staleness):
    with serving(Path(place.model)) as server:
        whole = served(place, server.url, tmp_path / "whole", staleness=staleness)
        run(whole)
        asked = len(server.samples)
        assert asked == STEPS * TRAIN.batch_size
        server.samples.clear()
        config = served(place, server.url, tmp_path / "killed", staleness=staleness)
        with pytest.raises(KeyboardInterrupt):
            run(config, callbacks=[EndsAt(3)])  # the last checkpoint is of step 2
        wait_for_samples(config, version=2)
        server.adapters.clear()
        run(replace(config, resume=True))
        assert len(server.samples) == len({row[:2] for row in server.samples}) == asked
    same_run(whole, config)
    steps = [line for line in tiny.lines(config.output) if "staleness" in line]
    assert [line["staleness"] for line in steps][-1] == staleness
    # The correction: float32 on both sides, so that only staleness has weights other than 1.
    assert abs(steps[-1]["weight"] - 1) < (1e-5 if staleness == 0 else 0.5)
    assert all(line["mismatch"] < 1e-4 for line in steps) == (staleness == 0)
    assert all(line["adapter_bytes"] > 0 for line in steps if "adapter_bytes" in line)
    shown = (Path(config.output) / "rollouts.jsonl").read_text().splitlines()
    versions = {sample["version"] for line in shown for sample in json.loads(line)["samples"]}
    assert versions == set(range(STEPS - staleness))
