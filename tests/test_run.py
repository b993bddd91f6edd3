"""Whole runs on a tiny model: what they leave behind, exact resumption, and how they end when something is wrong."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file, save_file

from nalora_jax.__main__ import main
from nalora_jax.common import trees
from nalora_jax.config import (
    AdaLoRAConfig,
    ComputeConfig,
    DebugConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from nalora_jax.layout import distributed
from nalora_jax.train import loop
from nalora_jax.train.adapted import load
from tests import emulator, tiny

pytestmark = pytest.mark.usefixtures("surroundings")

nalora_run = importlib.import_module("nalora_jax.cli.training")

FFN = (LoRARule("ffn", 4),)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this module's own; runs use one or two of the simulated devices where their mesh is no larger."""
    make = distributed.make_mesh

    def make_mesh(mesh: MeshConfig, devices: Any = None) -> Any:
        count = mesh.data * (mesh.fsdp or 1) * (mesh.tensor or 1)  # 0 is left to the library
        return make(mesh, jax.devices()[:count] if count in (1, 2) else devices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NALORA_CACHE", tiny.new_cache(tmp_path_factory.mktemp("new") / "cache"))
        patch.setattr(distributed, "make_mesh", make_mesh)
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Forty quick steps."""
    folder = tmp_path_factory.mktemp("data")
    tiny.make_model(folder / "model", tiny.HF | {"intermediate_size": 64})
    tiny.make_questions(folder / "questions.jsonl", 300)
    return tiny.make_config(
        folder,
        steps=40,
        lora=LoRAConfig(rules=(LoRARule("ffn", 8), LoRARule("attn", 4))),
        mechanisms=("soft:power=2,warmup=3", "homogeneity:warmup=3"),
        train=TrainConfig(batch_size=8, log_every=5, eval_every=20, save_every=10),
    )


@pytest.fixture(scope="module")
def finished(settings: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Any]:
    """A run that other tests read, and what it returned."""
    config = replace(settings, output=str(tmp_path_factory.mktemp("runs") / "whole"))
    return config, nalora_run.run(config)


@pytest.fixture
def config(settings: RunConfig, tmp_path: Path) -> RunConfig:
    """The settings of a run of the test's own."""
    return replace(settings, output=str(tmp_path / "run"))


def _adapter(folder: str) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def test_a_run_learns_and_leaves_an_adapter_a_report_and_a_log(finished: tuple[RunConfig, Any]) -> None:
    config, result = finished
    assert result.after["loss"] < 0.7 * result.before["loss"]
    assert result.report.read_text().startswith("<!doctype html>")
    assert {p.name for p in result.adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert {p.stat().st_mode & 0o777 for p in result.adapter.iterdir()} == {0o644}
    lines = tiny.lines(config.output)
    assert lines[0]["run"]["steps"] == 40
    assert lines[0]["mechanisms_from"] == 4  # after a warm-up of 3 steps
    initial, final = (next(line for line in lines if name in line) for name in ("initial", "final"))
    assert initial["eval"]["loss"] == pytest.approx(result.before["loss"])
    assert final["eval"]["n"] == 4
    assert final["eval"]["paired"]["n"] == 4
    assert {
        line["step"] for line in lines if "eval" in line and not {"initial", "final"} & line.keys()
    } == {0, 20, 40}
    last = [line for line in lines if "layers" in line][-1]["layers"]
    assert max(last["step_scale_max"]) > 1
    assert min(last["mask_mean"]) != 1
    assert lines[-1]["done"]["step"] == 40
    assert list(lines[-1]["done"]["seconds"])[::2] == ["preparing", "training", "exporting"]


def test_every_file_names_the_very_weights_that_were_trained_on(finished: tuple[RunConfig, Any]) -> None:
    config, result = finished
    noted = tiny.lines(config.output)[0]["base"]
    loaded = load(config.output, dtype="float32").base
    assert loaded.origin is not None
    assert noted == loaded.origin.to_dict()
    assert (noted["name"], noted["numbers"]) == (config.model, "F32")
    assert (
        json.loads((result.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        == noted["name"]
    )
    for page in ((result.adapter / "README.md").read_text(), result.report.read_text()):
        assert all(
            fact in page for fact in (noted["file"], "safetensors", "F32", noted["fingerprint"][:20])
        )


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        (
            {"lora": LoRAConfig(rules=FFN, dora=True), "debug": DebugConfig(check_gates=True)},
            ["--dtype", "float32"],
        ),
        (
            {
                "lora": LoRAConfig(rules=(LoRARule("attn", 4),)),
                "compute": ComputeConfig(compilation_cache=False),
                "mesh": MeshConfig(1, 2, 1),
            },
            ["--mesh.fsdp", "2"],
        ),
    ],
    ids=["dora, check-gates, float32", "no gates, bfloat16 on a mesh"],
)
def test_every_variant_learns_and_eval_gives_its_numbers_to_the_bit(
    config: RunConfig, changes: dict[str, Any], flags: list[str]
) -> None:
    train = TrainConfig(batch_size=8, eval_every=0, save_every=0)
    result = nalora_run.run(replace(config, steps=8, train=train, **changes))
    assert result.after["loss"] < result.before["loss"]
    model = load(config.output, dtype="float32")
    assert any(np.any(leaf) for path, leaf in trees.flatten(model.lora).items() if path.endswith("/b"))
    measured = config.output + ".json"
    assert main(["eval", config.output, "--output", measured, *flags]) == 0
    reported = next(line["eval"] for line in tiny.lines(config.output) if "final" in line)
    found = json.loads(Path(measured).read_text())
    del reported["paired"]
    assert {name: found[name] for name in reported} == reported
    assert reported["n"] == 4


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(
    finished: tuple[RunConfig, Any], config: RunConfig
) -> None:
    whole_run, stop, parts = finished[0], 20, config

    class Interrupt(Exception):
        pass

    fit = loop.run_steps

    def interrupted(step_fn: Any, *args: Any, **options: Any) -> Any:
        done = 0

        def step(*inner: Any) -> Any:
            nonlocal done
            if (
                done == stop + 3
            ):  # a crash between two checkpoints: the steps since the last one are done again
                raise Interrupt
            done += 1
            return step_fn(*inner)

        return fit(step, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_steps", interrupted)
        with pytest.raises(Interrupt):
            nalora_run.run(parts)
    nalora_run.run(replace(parts, resume=True))
    for name, tensor in _adapter(whole_run.output).items():
        np.testing.assert_array_equal(tensor, _adapter(parts.output)[name], err_msg=name)
    whole, resumed = (
        [(line["step"], line["loss"]) for line in tiny.lines(folder) if "loss" in line]
        for folder in (whole_run.output, parts.output)
    )
    assert dict(whole).keys() == dict(resumed).keys()
    assert dict(whole)[40] == dict(resumed)[40]


def test_two_processes_run_like_one_with_model_data_and_output_in_a_bucket(
    config: RunConfig, tmp_path: Path, two_processes: Any
) -> None:
    train = TrainConfig(batch_size=8, accumulate=2, log_every=5, eval_every=5, save_every=5)
    # PiSSA is exported relative to the adapters that all processes started from.
    lora = LoRAConfig(rules=(LoRARule("ffn", 4),), init="pissa")
    mesh, debug = MeshConfig(data=1, fsdp=2), DebugConfig(profile="3:1")
    config = replace(config, steps=10, mesh=mesh, train=train, lora=lora, debug=debug)
    alone = nalora_run.run(replace(config, output=str(tmp_path / "alone")))
    with emulator.emulator(tmp_path / "objects") as (held, address):
        for file in Path(config.model).iterdir():
            emulator.put(address, f"llama/{file.name}", file.read_bytes())
        dataset = emulator.put(address, "questions.jsonl", Path(config.data.dataset).read_bytes())
        remote = replace(config, model="gs://bucket/llama", data=replace(config.data, dataset=dataset))
        remote = replace(remote, output="gs://bucket/run")
        settings = tiny.write_settings(remote, tmp_path / "settings.py")
        variables = emulator.variables(address) | {"NALORA_CACHE": tiny.new_cache(tmp_path / "cache")}
        command = ["-m", "nalora_jax", "train", "--config", str(settings)]
        finished = two_processes(command, devices=1, JAX_DEFAULT_MATMUL_PRECISION="highest", **variables)
        written = emulator.stored(held, "run")
    (first, out, error), (second, *silence) = finished
    assert (first, second) == (0, 0), error + silence[1]
    assert "after (step" in out
    assert "parameters in float32" in error
    assert [line for line in silence[0].splitlines() if not line.startswith("[Gloo]")] == []
    assert "parameters in float32" not in silence[1]
    expected = _adapter(str(alone.folder))
    for name, tensor in safetensors.numpy.load(written["adapter/adapter_model.safetensors"]).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)
    ours = [json.loads(line) for line in written["metrics.jsonl"].splitlines()]
    theirs = tiny.lines(str(alone.folder))
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    done = [{name: line["done"][name] for name in ("step", "best_step")} for line in (ours[-1], theirs[-1])]
    assert done == [{"step": 10, "best_step": alone.best_step}] * 2
    assert {name.partition("/")[0] for name in written} == {path.name for path in alone.folder.iterdir()}
    traces = {name.rpartition("/")[2] for name in written if "/steps_3-3/" in name}
    assert traces == {"process_0.xplane.pb", "process_1.xplane.pb"}
    assert not list((tmp_path / "cache" / "buckets").rglob("*.safetensors"))  # weights are streamed


def test_adalora_leaves_the_ranks_that_were_asked_for(config: RunConfig) -> None:
    """Of the last allocation on: no earlier state is exported, however good it was."""
    rules = (LoRARule("ffn", 6),)
    config = replace(
        config,
        steps=20,
        lora=LoRAConfig(rules=rules),
        adalora=AdaLoRAConfig(target_rank=2, interval=2),
        optimizer=OptimizerConfig(learning_rate=5e-2),
        train=replace(config.train, eval_every=5, save_every=5),
    )
    result = nalora_run.run(config)
    assert result.after["loss"] < result.before["loss"]
    assert result.best_step in (15, 20)
    model = load(config.output, dtype="float32")
    ranks = {path: target.ranks for path, target in model.spec.targets}
    assert sum(map(sum, ranks.values())) == 2 * 3 * 2  # a mean of 2 on 3 projections of 2 layers
    logged = [line["ranks"] for line in tiny.lines(config.output) if line.get("ranks")]
    assert sum(map(sum, logged[0].values())) == 25  # 12 + 24 (10 / 12)^3, rounded down
    assert {path: tuple(rows) for path, rows in logged[-1].items() if any(rows)} == ranks
    assert "AdaLoRA" in (result.adapter / "README.md").read_text()


def _weights(change: Any) -> Any:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def _settings_of(name: str, **changes: Any) -> Any:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _larger_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"]["more"] = len(tiny.WORDS)
    path.write_text(json.dumps(values))


GATE = "model.layers.0.mlp.gate_proj.weight"
EXAMPLE = {"prompt": "a more", "completion": " z"}
FLAGS = [
    (["--lora.rules", "nothing:4"], "'nothing', which matches nothing"),
    (["--lora.rules", "ffn:17"], "rank"),
    (["--mechanisms", "hard:keep=0"], "mechanism hard: keep: expected a share in (0, 1], found 0"),
    (["--data.dataset", "missing.jsonl"], "missing.jsonl"),
    (["--mesh.data", "3"], "--mesh"),
    (["--resume"], "--resume: expected a checkpoint"),
    (["--data.max-length", "1", "--data.too-long", "error"], "expected at most"),
    (["--train.batch-size", "9", "--train.accumulate", "2"], "--train.batch-size"),
]
MODELS = [
    (_truncate, "model.safetensors: expected a complete safetensors file"),
    (_weights(lambda tensors: tensors.pop(GATE)), f"found no {GATE}"),
    (
        _weights(lambda tensors: tensors.update(more=np.zeros(2, np.float32))),
        "the unknown tensor more (2,)",
    ),
    (
        _weights(lambda tensors: tensors.update({GATE: tensors[GATE][1:]})),
        "expected the shape (64, 16), found",
    ),
    (lambda folder: (folder / "model.safetensors").unlink(), "found no safetensors file"),
    (_settings_of("config.json", hidden_act="frobnicate"), "'frobnicate'"),
    (_settings_of("config.json", model_type="mystery"), "'mystery'"),
    (_larger_tokenizer, "found 'more', which is token 28"),
]
DATA = [
    ([], "data.jsonl: expected at least one JSON line"),
    (['{"prompt": "a"'], "data.jsonl:9: "),
    ([{"prompt": "a", "completion": ""}], "data.jsonl:9: completion: expected an answer"),
    ([{"prompt": "a " * 20, "completion": " z"}], "data.jsonl:9: "),
    ([{"prompt": "a " * 80, "completion": " z"}], "the model's context, found one of 81"),
]
LONG = ["--data.max-length", "128"]
REFUSED = [
    *((flags, None, [EXAMPLE], message) for flags, message in FLAGS),
    *(([], damage, [EXAMPLE], message) for damage, message in MODELS),
    *((LONG if "context" in message else [], None, lines, message) for lines, message in DATA),
]


@pytest.mark.parametrize(("flags", "damage", "lines", "message"), REFUSED)
def test_what_cannot_run_is_one_line_and_exit_code_2(
    settings: RunConfig,
    tmp_path: Path,
    flags: list[str],
    damage: Any,
    lines: list[Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A flag, a damaged model, or what follows eight good examples in the data."""
    model, output, data = Path(settings.model), tmp_path / "out", tmp_path / "data.jsonl"
    if damage is not None:
        model = shutil.copytree(model, tmp_path / "model")
        damage(model)
    written = [EXAMPLE] * 8 + lines + [EXAMPLE] * 13 if lines else []
    data.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in written)
    )
    common = ["--model", str(model), "--output", str(output), "--steps", "1", "--mesh.data", "1"]
    common += ["--compute.no-compilation-cache", "--train.batch-size", "2", "--data.dataset", str(data)]
    common += ["--data.train-split", "train[:90%]", "--data.eval-split", "train[90%:]"]
    common += ["--data.max-length", "16", "--data.too-long", "error"]
    assert main(["train", *common, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert [line.startswith("error: ") for line in error.splitlines()].count(True) == 1
    assert "Traceback" not in error
    assert not [path for path in output.rglob("*") if path.is_file()]
