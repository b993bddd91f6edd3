"""Whole runs that replay the routing of their rollouts, with faults planted in the generator's choice of
experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from nalora_jax import RunConfig, run
from nalora_jax.common import trees
from nalora_jax.config import MeshConfig, RLConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.programs import view_weights
from nalora_jax.kinds.record import check_run_config
from nalora_jax.kinds.rl import rollout
from nalora_jax.kinds.rl.rewards import register_reward
from nalora_jax.train.callbacks import Callback
from tests import tiny
from tests.kinds.test_environments import TEMPLATE
from tests.models.test_families import SIZES
from tests.models.test_replay import BY_FAMILY
from tests.test_run_environment import RL as TURNS
from tests.test_run_environment import WORDS

pytestmark = pytest.mark.usefixtures("surroundings")

RL = RLConfig(
    rewards=("early_letters",), samples=4, max_new_tokens=6, updates=2, replay_routing=True
)
TRAIN = TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=3)


@register_reward("early_letters")
def early_letters(prompt: str, completion: str, record: Any) -> float:
    words = completion.split()
    return sum(word < "m" for word in words) / max(len(words), 1)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny.on_named_devices(tmp_path_factory.mktemp("new") / "cache"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The settings of a run on a DeepSeek-V3 of four layers, two of them with experts."""
    folder = tmp_path_factory.mktemp("whole")
    sizes = SIZES | BY_FAMILY["deepseek_v3"].config | {"vocab_size": len(WORDS)}
    hf = transformers.AutoConfig.for_model("deepseek_v3", **sizes).to_dict()
    hf["architectures"] = ["DeepseekV3ForCausalLM"]
    tiny.make_model(folder / "model", hf, tiny.word_tokenizer(WORDS, TEMPLATE))
    config = tiny.make_config(folder, rl=RL, train=TRAIN, steps=6, mechanisms=())
    return replace(config, data=replace(config.data, max_length=0))


@pytest.fixture
def config(whole: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(whole, output=str(tmp_path / "run"))


@pytest.fixture
def flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator chooses other experts, with the weights that the router gives them: a correction
    of scores decides the choice alone."""

    def corrected(path: str, leaf: jax.Array) -> jax.Array:
        if not path.endswith("router/correction"):
            return leaf
        return leaf + 0.3 * jax.random.normal(jax.random.key(7), leaf.shape)

    def view(model: Any, variables: Any) -> Any:
        params = trees.map_named(corrected, variables["params"])
        return view_weights(model, variables | {"params": params})

    monkeypatch.setattr(rollout, "view_weights", view)


def adapter(config: RunConfig) -> dict[str, np.ndarray]:
    return load_file(Path(config.output) / "adapter/adapter_model.safetensors")


def same_steps(one: RunConfig, other: RunConfig) -> None:
    """Equal metrics of two steps, except for rounding: Adam's first steps amplify it in single
    weights, whose gradient is nearly 0."""
    for name in ("reward", "entropy", "loss", "grad_norm"):
        first, second = (tiny.logged(config.output, name) for config in (one, other))
        assert len(first) == 2
        assert first == pytest.approx(second, rel=1e-3, abs=1e-6), name


def mismatch(config: RunConfig, of: str = "mismatch") -> float:
    return max(tiny.logged(config.output, of).values())


@pytest.mark.parametrize("replays", [True, False])
def test_planted_flips_leave_rounding_with_replay_and_a_difference_without(
    config: RunConfig, flips: None, replays: bool
) -> None:
    run(replace(config, steps=2, rl=replace(RL, replay_routing=replays)))
    if replays:
        assert 0 < mismatch(config) < 1e-4
    else:
        assert mismatch(config) > 1e-2


def test_without_flips_replay_changes_the_update_by_rounding_only(config, tmp_path) -> None:
    """With one update: in later ones the routing of the rollout stays, as the policy's moves."""
    rl = replace(RL, updates=1)
    run(replace(config, steps=2, rl=rl))
    free = replace(config, output=str(tmp_path / "free"))
    run(replace(free, steps=2, rl=replace(rl, replay_routing=False)))
    same_steps(config, free)
    (with_routing,) = Path(config.output).glob("rollouts/*.npz")
    (without,) = Path(free.output).glob("rollouts/*.npz")
    names = set(np.load(with_routing)), set(np.load(without))
    assert {name for name in names[0] if name.endswith("-routing")} == names[0] - names[1]


class EndsInUpdate(Callback):
    """Ends the process after a step, whose samples are still stored."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, step: int, record: Any) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def test_a_killed_run_replays_stored_routing_and_equals_the_uninterrupted_one(
    whole, config, flips, monkeypatch
) -> None:
    """The samples of the third rollout are stored, not in a checkpoint; the checkpoint of step 3 is
    between two updates on the second."""
    run(whole)
    config = replace(config, resume="auto")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[EndsInUpdate(5)])

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled again")

    with monkeypatch.context() as patch:
        patch.setattr(rollout, "sample_groups", fail)
        run(config)
    first, second = adapter(whole), adapter(config)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert mismatch(config) < 1e-4
    assert tiny.logged(whole.output, "reward") == tiny.logged(config.output, "reward")


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=1, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, tensor=1, context=2)],
    ids=["without context", "with context"],
)
def test_routing_is_replayed_on_a_mesh(
    config: RunConfig, tmp_path: Path, flips: None, mesh
) -> None:
    run(replace(config, steps=2))
    split = replace(config, output=str(tmp_path / "split"), mesh=mesh)
    run(replace(split, steps=2))
    assert mismatch(split) < 1e-4
    same_steps(config, split)


def test_tokens_of_all_turns_are_replayed(config: RunConfig, flips: None) -> None:
    """A turn is drawn with the experts of its own call; later calls process it again in parallel."""
    rl = replace(TURNS, replay_routing=True)
    run(replace(config, steps=2, rl=rl))
    logged = tiny.logged(config.output, "turns")
    assert max(logged.values()) > 1.2
    assert mismatch(config) < 1e-4


def test_models_without_experts_and_servers_are_refused(config: RunConfig, tmp_path: Path) -> None:
    dense = tiny.make_model(tmp_path / "dense")
    with pytest.raises(NaloraError, match="--rl.replay-routing: expected a model with experts"):
        run(replace(config, model=str(dense)))
    served = replace(config, rl=replace(RL, servers=("http://localhost:1",)))
    with pytest.raises(NaloraError, match="replay-routing: expected False with --rl.servers"):
        check_run_config(served)
