"""Pages of code that trains: each worked change is a whole file outside the package, and the
library on one page."""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from nalora_jax import config as cfg
from nalora_jax.assembly.program import assemble
from nalora_jax.cli import command
from nalora_jax.common import imports, trees
from nalora_jax.data import sources
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.run_log import recorded_settings
from nalora_jax.kinds.record import KINDS
from nalora_jax.mesh import distributed, sharding
from nalora_jax.method import activations, rules, statistics
from nalora_jax.models import family
from nalora_jax.models.config import ModelConfig
from nalora_jax.planner.abstract_step import architecture, step_and_arguments
from nalora_jax.report.history import read_history
from tests import tiny
from tests.param_trees import init_params

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "change_one_thing.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```python title="(\w+)\.py"\n(.*?)```', TEXT, re.DOTALL))
LLAMA = tiny.HF | {"vocab_size": 40, "intermediate_size": 24}


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a file of the page; afterwards the registries are as they were."""
    registries = (rules.MECHANISMS, statistics.TABLE, activations.ACTIVATIONS, family.REGISTERED)
    for registry in (*registries, sources._OPENERS, KINDS):
        others = {name: value for name, value in registry._values.items() if name not in FILES}
        monkeypatch.setattr(registry, "_values", others)  # without the sums of studies/sums_data.py
    monkeypatch.syspath_prepend(str(tmp_path))

    def use(name: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(FILES[name])
        return importlib.import_module(name)

    yield use
    for name in FILES:
        sys.modules.pop(name, None)
    activations.partition.cache_clear()


def train(base: ModelConfig, *mechanisms: str, steps: int = 3) -> tuple[Any, dict[str, Any]]:
    """The state after a few steps, and the last step's metrics."""
    config = cfg.RunConfig(
        steps=10,
        lora=cfg.LoRAConfig(rules=(cfg.LoRARule("ffn/(gate|up)_proj", 2),)),
        mechanisms=mechanisms,
        optimizer=cfg.OptimizerConfig(learning_rate=1e-2),
        compute=cfg.ComputeConfig(dtype="float32", stats_stride=1, probe_stride=1),
    )
    assembly = assemble(config, base, init_params(base, jax.random.key(0)), tiny.one_device())
    batch, state = tiny.whole_batch(0, (1, 4, 8)), assembly.state
    for _ in range(steps):
        state, metrics = assembly.step(assembly.params, state, batch)
    return state, metrics


def test_an_activation(use: Any) -> None:
    use("softer")
    softer, z = activations.get_activation("softer"), np.linspace(-8, 8, 101)
    np.testing.assert_allclose(
        softer.phi(jnp.float32(z)), z * special.expit(z / 2), rtol=1e-5, atol=1e-6
    )
    part = activations.partition("softer")
    # phi(z) = 2 silu(z / 2), so that the cuts are twice those of SiLU.
    np.testing.assert_allclose([part.z0, part.z1], [2 * -1.2785, 2 * 4.485], rtol=1e-3)
    assert part.meaningful
    base = ModelConfig.from_hf({**LLAMA, "hidden_act": "softer"})
    _, metrics = train(base, "squared:warmup=1")
    assert np.isfinite(metrics["loss"])
    assert np.all(metrics["layers"]["layers/ffn"]["misalignment"] > 0.01)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bad", r"'bad': expected a function that returns rho\(z\) and its deriv"),
        ("silu", "a name that is free"),
    ],
)
def test_an_activation_whose_derivative_is_wrong_is_refused(
    use: Any, name: str, message: str
) -> None:
    with pytest.raises(NaloraError, match=message):
        activations.register_activation(name)(lambda z: (jax.nn.sigmoid(z), jax.nn.sigmoid(z)))


def test_a_mask_rule(use: Any) -> None:
    use("loud")
    state, metrics = train(ModelConfig.from_hf(LLAMA), "loud:warmup=1")
    shown = metrics["layers"]["layers/ffn"]
    assert np.all(shown["loud_max"] > shown["loud_min"])
    assert np.all(shown["factor_max"] > 1)
    assert np.all(np.asarray(state.gate.memory["loud"]["layers/ffn"]["slope"]) > 0)


def test_the_command_of_the_page_trains_with_the_rule(use, tmp_path, monkeypatch, one_device):
    monkeypatch.setattr(imports, "_IMPORTED", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loud.py").write_text(FILES["loud"])
    commands = re.findall(r"^python train.py (--import .*)$", TEXT, re.MULTILINE)
    config = tiny.make_config(tmp_path, steps=2)
    settings = ["--config", str(tiny.write_settings(config, tmp_path / "settings.py"))]
    assert len(commands) == 2
    command.execute(["train", *settings, *commands[0].split()])
    recorded = recorded_settings(tmp_path / "runs" / "loud")
    digest = hashlib.sha256(FILES["loud"].encode()).hexdigest()
    assert recorded["imports"] == [f"loud.py@{digest[:12]}"]
    assert recorded["mechanisms"] == ["loud"]
    (tmp_path / "loud.py").write_text(FILES["loud"] + "# changed\n")
    monkeypatch.setattr(imports, "_IMPORTED", {})
    rules.MECHANISMS._values.pop("loud")
    with pytest.raises(
        NaloraError, match=r"expected the settings that it was made with: imports.0 = "
    ):
        command.execute(["train", "--import", "loud.py", "--resume", "runs/loud", "--steps", "3"])


def test_a_mechanism_with_a_cotangent_statistic(use: Any) -> None:
    use("early")
    state, metrics = train(
        ModelConfig.from_hf(LLAMA), "early:share=0.5,warmup=1", "delta:q=1,warmup=1"
    )
    memory = state.gate.memory["early"]["layers/ffn"]["early"]
    assert memory.shape == (2, 24)
    assert np.all(np.asarray(memory) > 0)
    shown = metrics["layers"]["layers/ffn"]
    assert np.all(shown["early"] > 0)  # in the log, by the name that the entry gives it
    assert np.all(shown["early_max"] > shown["early_min"])
    # sqrt(E|delta|^(1/2))^2 <= E|delta|, by Jensen: both have the same units.
    root = np.asarray(state.gate.memory["delta"]["layers/ffn"]["delta_squared"]) ** 0.5
    assert np.all(np.asarray(memory) ** 2 <= root * 1.001)


def test_a_family(use: Any) -> None:
    use("my_llama")
    raw = {**LLAMA, "model_type": "my_llama", "depth_scale": 0.5}
    base = ModelConfig.from_hf(raw)
    assert (base.n_kv_heads, base.qkv_bias, base.residual_scale) == (2, True, 0.5)
    assert family.family_of("my_llama").tensors == family.family_of("llama").tensors
    _, metrics = train(base)
    assert np.isfinite(metrics["loss"])


def test_a_data_source(use: Any) -> None:
    use("sums")
    opened = sources.open_source(cfg.DataConfig(dataset="sums:40"), "train")
    assert len(opened) == 40
    assert opened[3] == {"prompt": "3 + 21 =", "completion": " 24"}
    held_out = sources.open_source(cfg.DataConfig(dataset="sums"), "validation")
    sources.check_disjoint(opened, held_out)
    assert (len(held_out), held_out[0]["prompt"]) == (100, "10000 + 0 =")
    assert (
        opened.fingerprint
        != sources.open_source(cfg.DataConfig(dataset="sums:41"), "train").fingerprint
    )


def test_an_objective_trains_resumes_plans_sweeps_and_reports(
    use: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    one_device: None,
) -> None:
    use("z_loss")
    monkeypatch.chdir(tmp_path)
    config = replace(tiny.make_config(tmp_path, steps=2), kind="z_loss:weight=0.5")
    settings = ["--config", str(tiny.write_settings(config, tmp_path / "settings.py"))]
    command.execute(["train", *settings, "--dry-run"])
    assert "kind: z_loss:weight=0.5" in capsys.readouterr().out
    command.execute(["train", *settings, "--output", "z", "--train.log-every", "1"])
    command.execute(["train", "--resume", "z", "--steps", "4"])
    log = read_history(tmp_path / "z")
    assert [record["step"] for record in log.steps] == [1, 2, 3, 4]
    assert all(record["z_loss"] > 0 for record in log.steps)
    # The loss is the cross-entropy plus half of the penalty, of which both are means of a token.
    command.execute(
        ["train", *settings, "--kind", "text", "--output", "plain", "--train.log-every", "1"]
    )
    plain = read_history(tmp_path / "plain").steps[0]["loss"]
    first = log.steps[0]
    np.testing.assert_allclose(first["loss"], plain + 0.5 * first["z_loss"], rtol=1e-5)
    assert "z_loss" in recorded_settings(tmp_path / "z")["kind"]
    assert (tmp_path / "z" / "report.html").exists()
    swept = ["--sweep", "kind=z_loss:weight=0.1,text", "--output", "swept"]
    command.execute(["train", *settings, *swept])
    assert (tmp_path / "swept" / "comparison.html").exists()
    command.execute(["eval", "z"])
    assert "loss" in capsys.readouterr().out
    placed = replace(
        config, train=replace(config.train, batch_size=8), data=replace(config.data, max_length=16)
    )
    mesh = distributed.make_mesh(cfg.MeshConfig(), jax.devices()[:1])
    base = architecture(str(config.model))
    step, arguments = step_and_arguments(placed, base, mesh)
    assert step.lower(*arguments).compile().memory_analysis() is not None


def test_a_kind_with_data_of_its_own_trains_and_resumes(
    use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_device: None
) -> None:
    use("token_windows")
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "ids.npy", np.arange(400) % 23 + 3)
    config = replace(tiny.make_config(tmp_path, steps=6), kind="token_windows")
    settings = ["--config", str(tiny.write_settings(config, tmp_path / "settings.py"))]
    flags = [
        "--data.dataset",
        "ids.npy",
        "--data.max-length",
        "10",
        "--optimizer.learning-rate",
        "1e-2",
    ]
    command.execute(["train", *settings, *flags, "--output", "run", "--train.log-every", "1"])
    command.execute(["train", "--resume", "run", "--steps", "8"])
    log = read_history(tmp_path / "run")
    assert [record["step"] for record in log.steps] == list(range(1, 9))
    assert log.measured[-1]["eval"]["loss"] < log.measured[0]["eval"]["loss"]
    with pytest.raises(NaloraError, match="--data.dataset: expected an array of token ids"):
        command.execute(["train", *settings, "--data.max-length", "10", "--output", "other"])


@pytest.mark.parametrize(("name", "lines"), [("z_loss", 80), ("token_windows", 150)])
def test_a_file_from_outside_is_short(name: str, lines: int) -> None:
    assert FILES[name].count("\n") <= lines


# The settings that ask for a kind of run, and comparisons of its name.
OF_KINDS = re.compile(
    r"\.(vision\.task|preference\.loss|rl\.rewards)\b|run_kind\(\w+\)\.name|kind_name\b"
)
# A study's subject of encoders has two tasks, and the report of a comparison is by settings.
KNOW_KINDS = ("kinds/", "config/settings.py", "study/image_subject.py")


def test_no_other_module_asks_of_which_kind_a_run_is() -> None:
    root = Path(cfg.__file__).parents[1]
    asking = {}
    for path in root.rglob("*.py"):
        name = str(path.relative_to(root))
        code = re.sub(r'"""(.|\n)*?"""|#.*', "", path.read_text(encoding="utf-8"))
        found = [match.group() for match in OF_KINDS.finditer(code)]
        if found and not name.startswith(KNOW_KINDS):
            asking[name] = found
    assert asking == {}


# docs/nalora_minimal.py trains as the library does.
STEPS, ROWS, TOKENS, RATE, WARMUP = 12, 4, 17, 4e-3, 3


def library_adapters(
    page: Any,
    rule: str,
    params: Any,
    lora: Any,
    batches: list[np.ndarray],
    mesh: cfg.MeshConfig | None = None,
) -> Any:
    """Returns the adapters after training with the library, in float32 with plain XLA."""
    config = cfg.RunConfig(
        lora=cfg.LoRAConfig(rules=(cfg.LoRARule("ffn/", page.rank, page.alpha),)),
        optimizer=cfg.OptimizerConfig(learning_rate=RATE, schedule="constant", warmup_share=0.0),
        train=cfg.TrainConfig(batch_size=len(batches[0])),
        steps=len(batches),
        compute=cfg.ComputeConfig(
            dtype="float32", implementation="xla", stats_stride=1, probe_stride=1
        ),
        mechanisms=(f"{rule}:warmup={page.warmup}",),
    )
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    sizes = (page.vocab, page.d_model, page.d_ff, page.layers, page.heads)
    fields = tiny.HF | dict(zip(names, sizes, strict=True))
    fields |= {
        "num_key_value_heads": page.heads,
        "rope_theta": page.rope_theta,
        "rms_norm_eps": page.eps,
    }
    devices = tiny.one_device()
    if mesh is not None:
        devices = distributed.make_mesh(mesh)
        params = jax.device_put(params, sharding.shardings(params, devices, sharding.PARAM_RULES))
    assembly = assemble(config, ModelConfig.from_hf(fields), params, devices)
    state = assembly.begin(jax.tree.map(jnp.array, lora), 0)
    for tokens in batches:
        batch = tiny.whole_batch(0, (1, *tokens[:, 1:].shape))
        batch |= {"tokens": tokens[None, :, :-1], "targets": tokens[None, :, 1:]}
        if mesh is not None:
            batch = distributed.make_global_batch(batch, devices, rows_axis=1)
        state, _ = assembly.step(assembly.params, state, batch)
    return state.lora


@pytest.mark.parametrize("rule", ["squared", "homogeneity", "curvature_cap"])
def test_the_page_makes_the_updates_of_the_library(
    monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    minimal = importlib.import_module("nalora_minimal")
    page = minimal.Config(rule=rule, warmup=WARMUP)
    params, lora = minimal.init(jax.random.key(0), page)
    params["embed"]["embedding"] *= 0.3
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, page.vocab, (ROWS, TOKENS), dtype=np.int32) for _ in range(STEPS)]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.0))
    step = jax.jit(functools.partial(minimal.train_step, optimizer=optimizer, config=page))
    state = minimal.init_state(lora, optimizer, page)
    with jax.numpy_rank_promotion("allow"):  # the page is written for reading
        for tokens in batches:
            state, _ = step(params, state, tokens)
    assert_same_updates(state.lora, library_adapters(page, rule, params, lora, batches), lora)


def assert_same_updates(lora: Any, other: Any, start: Any) -> None:
    """Asserts that two adapters differ by at most 0.002 of the largest change of each array."""
    ours = trees.flatten(lora)
    theirs = trees.flatten(other)
    starts = trees.flatten(start)
    assert set(ours) == set(theirs)
    for path, value in theirs.items():
        change = np.abs(np.asarray(value) - starts[path]).max()
        np.testing.assert_allclose(ours[path], value, rtol=0, atol=2e-3 * change, err_msg=path)


def test_the_sharded_page_makes_the_updates_of_the_library_on_eight_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    minimal = importlib.import_module("nalora_minimal")
    sharded = importlib.import_module("sharded_minimal")
    page = minimal.Config(rule="squared", warmup=1)
    params, lora = minimal.init(jax.random.key(0), page)
    params["embed"]["embedding"] *= 0.3
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, page.vocab, (8, TOKENS), dtype=np.int32) for _ in range(4)]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=0.0))
    mesh = sharded.make_mesh((2, 2, 2))
    with jax.numpy_rank_promotion("allow"):
        step, placed, state = sharded.make_step(params, lora, optimizer, page, mesh)
        for tokens in batches:
            state, loss = step(placed, state, sharded.place_rows(tokens, mesh))
    assert loss.sharding.is_fully_replicated
    kernel = placed["layers"]["ffn"]["gate_proj"]["kernel"]
    shard = kernel.addressable_shards[0].data
    assert shard.shape == (page.layers, page.d_model // 2, page.d_ff // 2)
    whole = cfg.MeshConfig(data=2, fsdp=2, tensor=2)
    others = library_adapters(page, "squared", params, lora, batches, whole)
    assert_same_updates(state.lora, others, lora)
    with pytest.raises(ValueError, match="lm_head/kernel: no rule"):
        sharded.find_shardings({"lm_head": {"kernel": kernel}}, mesh)


def test_the_sharded_page_runs_as_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    processes = []
    for index in ("0", "1"):
        command_line = [str(DOCS / "sharded_minimal.py"), address, "2", index]
        processes += tiny.start(command_line, devices=4)
    results = tiny.finish(processes)
    lines = []
    for status, output, error in results:
        assert status == 0, error
        lines.append([line for line in output.splitlines() if line.startswith("step")])
    assert len(lines[0]) == 20
    assert lines[0] == lines[1]
