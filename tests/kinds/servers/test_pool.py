"""Rollouts on servers: a proof of each version, planned failures with one outcome each, and stored
samples."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from nalora_jax.common.trees import map_named
from nalora_jax.config import LoRAConfig, LoRARule, RLConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.rl.engine import Request
from nalora_jax.kinds.rl.servers import pool as pools
from nalora_jax.kinds.rl.servers import proof, trial
from nalora_jax.kinds.rl.servers.pool import ServerPool
from nalora_jax.kinds.rl.servers.received import Received
from nalora_jax.kinds.rl.servers.versions import Exports
from nalora_jax.loading.adapted import load
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from tests import tiny
from tests.doubles.rollout_server import LENGTH, serving

PROMPTS = [[3, 4, 5, 6, 7], [20, 9, 11], [7, 7, 19, 23], [12, 5, 25, 8]]
REQUESTS = [Request(ids, seed, 5) for seed, ids in enumerate(PROMPTS * 2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base's folder, its weights, and adapters of three steps."""
    folder = tiny.make_model(tmp_path_factory.mktemp("servers") / "base")
    base = load(folder, dtype="float32").base
    rule = LoRAConfig(rules=(LoRARule("", 4),))
    spec = resolve(rule, projection_shapes(base.config), base.config.n_layers)
    first = jax.device_get(init_lora(base.config, spec, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def moved(path: str, leaf: Any) -> Any:
        return leaf + rng.normal(0, 0.05, leaf.shape).astype("float32")

    loras = [first]
    for _ in range(2):
        loras.append(map_named(moved, loras[-1]))
    loras = [jax.tree.map(jax.numpy.asarray, lora) for lora in loras]
    return SimpleNamespace(folder=folder, base=base, spec=spec, loras=loras)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_PAUSE", 0.02)


def make_pool(place: Any, folder: Any, urls: list[str], **changes: Any) -> ServerPool:
    settings = {"temperature": 0.8, "server_wait": 0.1, "server_seconds": 20.0}
    rl = RLConfig(servers=tuple(urls), **(settings | changes))
    exports = Exports(
        str(folder / "served"), str(folder / "served"), "ab", place.base.config, place.spec
    )
    probes = proof.make_probes(PROMPTS)
    model = Decoder(place.base.config, place.spec)

    def expect(lora: Any) -> np.ndarray:
        return proof.expected_log_probs(model, place.base.params, lora, probes)

    received = Received(folder / "received")
    size = place.base.config.vocab_size
    options = {"stops": (0,), "vocab": size, "folder": folder}
    folder.mkdir(exist_ok=True)
    return ServerPool(rl, exports, probes, expect, received, **options)


def proofs(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / pools.PROOFS).read_text().splitlines()]


def test_each_version_is_loaded_proved_and_unloaded(place, tmp_path):
    with serving(place.folder) as server:
        pool = make_pool(place, tmp_path, [server.url])
        for step, lora in enumerate(place.loras):
            pool.load(lora, step)
            requests = [request._replace(seed=10 * step + i) for i, request in enumerate(REQUESTS)]
            samples = pool.sample(requests)
            assert [sample.version for sample in samples] == [step] * len(requests)
            assert all(1 <= len(sample.tokens) == len(sample.log_probs) for sample in samples)
            figures = pool.figures()
            assert figures["adapter_bytes"] > 1000
            assert figures["wait_seconds"] > 0
        assert list(server.adapters) == server.loads[-1:]
        assert [name.split("-")[2] for name in server.loads] == ["0", "1", "2"]
        assert [path.name for path in (tmp_path / "served").iterdir()] == server.loads[-1:]
        pool.close()
    first, *others = proofs(tmp_path)
    # The first adapter is the identity, the base and its half too.
    assert first["untold"] == [proof.BASE, proof.HALF]
    for line in others:
        assert line["outcome"] == "served"
        assert line["untold"] == []
        assert line["distance"] < 1e-4 < 0.01 < line["effect"]


# What the message says of a server that serves this instead of the version of step 1.
SERVED = {
    "ignores": "served the base without an adapter",
    "previous": "served an earlier version (step 0)",
    "half": "served half of this version",
    "mixes": "served several versions: an earlier version (step 0) to probe 1",
}


@pytest.mark.parametrize("fault", SERVED)
def test_a_server_of_something_else_stops_the_run(place, tmp_path, fault):
    with serving(place.folder) as server:
        pool = make_pool(place, tmp_path, [server.url])
        pool.load(place.loras[1], 0)
        pool.sample(REQUESTS[:1])
        server.fault = fault
        pool.load(place.loras[2], 1)
        with pytest.raises(NaloraError, match="--rl.servers") as error:
            pool.sample(REQUESTS[1:2])
        pool.close()
    assert SERVED[fault] in str(error.value)
    assert next(iter(proofs(tmp_path)))["outcome"] == "served"
    assert proofs(tmp_path)[-1]["outcome"] in SERVED[fault]
    assert len(pool._received._samples) == 1


def test_a_server_that_loads_in_the_background_is_proved_again(place, tmp_path):
    with serving(place.folder) as server:
        pool = make_pool(place, tmp_path, [server.url])
        pool.load(place.loras[1], 0)
        pool.sample(REQUESTS[:1])
        server.fault = "delays"
        pool.load(place.loras[2], 1)
        (sample,) = pool.sample([Request([3, 4], 99, 5)])
        assert sample.version == 1
        pool.close()


# Fault of an answer -> what the run says of the server.
ANSWERS = {
    "twice": "choices [0, 0] for 1 prompts",
    "wrong_ids": "the token id 10000",
    "no_ids": "no token ids",
    "other_ids": "an answer to another prompt",
    "no_log_probs": "no log-probabilities",
    "after_stop": "tokens after a stop token",
    "dies": "4 failures in a row, the last one: IncompleteRead",
    "late": "4 failures in a row, the last one: no answer within 0.3 s",
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_a_bad_answer_drops_the_server_and_another_one_takes_over(place, tmp_path, fault):
    seconds = 0.3 if fault == "late" else 20.0
    with serving(place.folder, fault) as bad:
        pool = make_pool(place, tmp_path / "a", [bad.url], server_seconds=20.0)
        pool.load(place.loras[1], 1)
        pool.ahead(REQUESTS[:0])
        for server in pool._servers:
            pool._prove(server, pool._current)
            server.client = replace(server.client, seconds=seconds)
        with pytest.raises(NaloraError) as error:
            pool.sample(REQUESTS[:1])
        assert ANSWERS[fault] in str(error.value)
        with pytest.raises(NaloraError):  # the error of the run stays
            pool.sample(REQUESTS[1:2])
        pool.close()
        if fault == "late":
            return
        with serving(place.folder) as good:
            pool = make_pool(place, tmp_path / "b", [bad.url, good.url])
            pool.load(place.loras[1], 1)
            samples = pool.sample(REQUESTS)
            assert len(samples) == len(REQUESTS)
            assert [server.dropped == "" for server in pool._servers] in ([False, True], [True] * 2)
            pool.close()


@pytest.mark.parametrize("fault", ["dies", "late"])
def test_a_passing_failure_loses_no_sample(place, tmp_path, fault):
    with serving(place.folder, fault, times=2) as server:
        pool = make_pool(place, tmp_path, [server.url])
        pool.load(place.loras[1], 1)
        server.times = 0
        pool.sample([Request([5], 77, 2)])
        server.times = 1
        pool._servers[0].client = replace(pool._servers[0].client, seconds=1.0)
        samples = pool.sample(REQUESTS)
        assert [sample.version for sample in samples] == [1] * len(REQUESTS)
        assert pool._servers[0].dropped == ""
        # A failed request is asked again, and one of its answers is used.
        assert len(set(server.samples)) == len(REQUESTS) + 1
        pool.close()
    lines = (tmp_path / "received/1.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == len(REQUESTS) + 1


def test_a_restarted_server_loads_the_version_again(place, tmp_path):
    with serving(place.folder) as server:
        pool = make_pool(place, tmp_path, [server.url])
        pool.load(place.loras[1], 1)
        pool.sample(REQUESTS[:2])
        server.adapters.clear()
        samples = pool.sample(REQUESTS)
        assert len(samples) == len(REQUESTS)
        assert len(server.loads) == 2
        assert len(proofs(tmp_path)) == 2
        pool.close()


def test_a_killed_server_is_awaited(place, tmp_path):
    with serving(place.folder) as server:
        pool = make_pool(place, tmp_path, [server.url], server_wait=20.0)
        pool.load(place.loras[1], 1)
        first = pool.sample(REQUESTS[:2])
        port = server.server_port
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(pool.sample(REQUESTS)))
    thread.start()
    time.sleep(0.3)
    assert not results
    with serving(place.folder, port=port) as server:
        thread.join()
        assert len(server.samples) == len(REQUESTS) - 2
        pool.close()
    for sample, again in zip(first, results[0], strict=False):
        np.testing.assert_array_equal(sample.tokens, again.tokens)


def test_stored_samples_are_not_asked_for_again(place, tmp_path):
    with serving(place.folder) as server:
        pool = make_pool(place, tmp_path, [server.url])
        pool.load(place.loras[1], 1)
        whole = pool.sample(REQUESTS)
        pool.close()
        file = tmp_path / "received/1.jsonl"
        content = file.read_bytes()
        file.write_bytes(content[:-20])  # a kill cut the last line off
        server.samples.clear()
        pool = make_pool(place, tmp_path, [server.url])
        pool.load(place.loras[1], 1)
        resumed = pool.sample(REQUESTS)
        assert len(server.samples) == 1
        pool.close()
        for sample, again in zip(whole, resumed, strict=True):
            np.testing.assert_array_equal(sample.tokens, again.tokens)
            np.testing.assert_array_equal(sample.log_probs, again.log_probs)
        pool.forget_before(2)
        assert not file.exists()
        assert pool._received.get("absent") is None


def test_samples_asked_ahead_keep_the_version_that_wrote_them(place, tmp_path):
    with serving(place.folder) as server:
        pool = make_pool(place, tmp_path, [server.url], staleness=1)
        pool.load(place.loras[1], 1)
        pool.ahead(REQUESTS)
        pool.load(place.loras[2], 2)
        samples = pool.sample([*REQUESTS, Request([4], 55, 3)])
        assert [sample.version for sample in samples] == [1] * len(REQUESTS) + [2]
        assert len(server.samples) == len(samples)
        pool.close()


def in_trial(place: Any, folder: Any, url: str, temperature: float = 0.8) -> None:
    rl = RLConfig(servers=(url,), temperature=temperature, server_seconds=20.0)
    path = str(folder / "served")
    exports = Exports(path, path, "ab", place.base.config, place.spec)
    trial.try_servers(rl, exports, PROMPTS[0], LENGTH, place.base.config.vocab_size)


def test_a_trial_leaves_nothing_and_unloads_earlier_versions(place, tmp_path):
    with serving(place.folder) as server:
        server.adapters |= {"nalora-ab-7-0123": None, "mine": None}
        in_trial(place, tmp_path, f"{server.url}/v1/")
        assert list(server.adapters) == ["mine"]
        assert list((tmp_path / "served").iterdir()) == []
    with serving(place.folder, "raw") as server:
        in_trial(place, tmp_path, server.url, temperature=1.0)


REFUSED = {
    "no_loading": "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank 4",
    "no_lora": "LoRA is not enabled",
    "low_rank": "found status 500 at /v1/load_lora_adapter",
    "raw": "--logprobs-mode processed_logprobs; or --rl.temperature 1",
    "no_log_probs": "no log-probabilities of likely tokens",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_server_that_lacks_a_flag_is_refused(place, tmp_path, fault, monkeypatch):
    with serving(place.folder, fault) as server:
        if fault == "no_log_probs":
            monkeypatch.setattr(trial, "TOP", 0)
        with pytest.raises(NaloraError) as error:
            in_trial(place, tmp_path, server.url)
    assert REFUSED[fault] in str(error.value)
    assert str(error.value).startswith(f"--rl.servers {server.url}")
    assert not any((tmp_path / "served").iterdir())


def test_a_server_that_is_absent_or_too_short_is_refused(place, tmp_path):
    with serving(place.folder) as server:
        path = str(tmp_path / "served")
        exports = Exports(path, "/elsewhere", "ab", place.base.config, place.spec)
        rl = RLConfig(servers=(server.url,))
        with pytest.raises(NaloraError, match="a limit of at least 65 tokens.*found 64"):
            trial.try_servers(rl, exports, [3], LENGTH + 1, 28)
        with pytest.raises(NaloraError, match="No adapter found for /elsewhere"):
            trial.try_servers(rl, exports, [3], LENGTH, 28)
    with pytest.raises(NaloraError, match="expected an OpenAI-compatible server, found .*refused"):
        in_trial(place, tmp_path, server.url)
