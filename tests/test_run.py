"""Whole runs on a tiny model: what they leave, how they stop and resume, adapters, long rows, and
what is refused."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
import signal
import string
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file

from nalora_jax import config as cfg
from nalora_jax.__main__ import main
from nalora_jax.cli.command import parse
from nalora_jax.errors import Interrupted, NaloraError
from nalora_jax.evaluate import needle as evaluate_needle
from nalora_jax.evaluate.run_log import recorded_settings
from nalora_jax.kinds import text
from nalora_jax.loading.adapted import load
from nalora_jax.train import run as run_module
from nalora_jax.train.progress import Progress
from tests import emulator, tiny

nalora_run = importlib.import_module("nalora_jax.cli.training")
STEPS = 16


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cfg.RunConfig]:
    folder = tmp_path_factory.mktemp("data")
    tiny.make_questions(folder / "questions.jsonl", 300)
    with tiny.on_named_devices(folder / "cache"):
        yield tiny.make_config(
            folder,
            steps=STEPS,
            lora=cfg.LoRAConfig(rules=(cfg.LoRARule("ffn", 8), cfg.LoRARule("attn", 4))),
            mechanisms=("soft:power=2,warmup=3", "homogeneity:warmup=3"),
            train=cfg.TrainConfig(batch_size=8, log_every=4, eval_every=8, save_every=4),
        )


@pytest.fixture(scope="module")
def finished(
    settings: cfg.RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[cfg.RunConfig, Any]:
    """A run that other tests read, and what it returned."""
    config = replace(settings, output=str(tmp_path_factory.mktemp("runs") / "whole"))
    return config, nalora_run.run(config)


@pytest.fixture(scope="module")
def stopped(settings: cfg.RunConfig, tmp_path_factory: pytest.TempPathFactory) -> cfg.RunConfig:
    """The same run, which SIGTERM stopped after its third step."""
    config = replace(settings, output=str(tmp_path_factory.mktemp("runs") / "stopped"))
    advance = Progress.advance

    def stop_at_3(self: Progress, step: int) -> None:
        advance(self, step)
        if step == 3:  # arrives while the loop is at work
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "advance", stop_at_3)
        with pytest.raises(Interrupted) as caught:
            nalora_run.run(config)
    assert (caught.value.status, caught.value.saved) == (143, 3)
    assert str(caught.value) == (
        f"interrupted by SIGTERM; saved step 3; continue with --output {config.output} --resume"
    )
    return config


@pytest.fixture
def config(settings: cfg.RunConfig, tmp_path: Path) -> cfg.RunConfig:
    """The settings of a run of the test's own."""
    return replace(settings, output=str(tmp_path / "run"))


def copied(config: cfg.RunConfig, folder: Path) -> cfg.RunConfig:
    """A run's settings with a copy of its folder, to resume it."""
    return replace(config, output=str(shutil.copytree(config.output, folder)), resume=True)


def test_a_run_learns_and_leaves_an_adapter_a_report_and_a_log(
    finished: tuple[cfg.RunConfig, Any],
) -> None:
    config, result = finished
    assert result.after["loss"] < 0.8 * result.before["loss"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in result.adapter.iterdir()}
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md")
    assert modes == dict.fromkeys(names, 0o644)
    lines = tiny.lines(config.output)
    assert lines[0]["run"]["steps"] == STEPS
    assert lines[0]["mechanisms_from"] == 4  # after a warm-up of 3 steps
    base, pages = lines[0]["base"], [result.report, result.adapter / "README.md"]
    assert (base["name"], base["numbers"]) == (config.model, "F32")
    assert all(base["fingerprint"][:20] in page.read_text() for page in pages)
    initial, final = (next(line for line in lines if name in line) for name in ("initial", "final"))
    assert initial["eval"]["loss"] == pytest.approx(result.before["loss"])
    assert final["eval"]["n"] == 4
    card = (result.adapter / "README.md").read_text()
    assert f"here in {final['step'] - 3} of {final['step']} steps: the result" in card
    assert final["eval"]["paired"]["n"] == 4
    others = [line for line in lines if "eval" in line and line not in (initial, final)]
    assert {line["step"] for line in others} == {0, 8, 16}
    last = [line for line in lines if "layers" in line][-1]["layers"]
    assert max(last["step_scale_max"]) > 1
    assert min(last["mask_mean"]) != 1
    assert lines[-1]["done"]["step"] == STEPS
    assert list(lines[-1]["done"]["seconds"])[::2] == ["preparing", "training", "exporting"]


def test_eval_gives_the_numbers_of_the_run_to_the_bit(finished, tmp_path):
    output, measured = finished[0].output, tmp_path / "eval.json"
    assert main(["eval", output, "--output", str(measured), "--dtype", "float32"]) == 0
    reported = next(line["eval"] for line in tiny.lines(output) if "final" in line)
    found = json.loads(measured.read_text())
    del reported["paired"]
    assert {name: found[name] for name in reported} == reported


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(finished, stopped, tmp_path):
    resumed = nalora_run.run(replace(copied(stopped, tmp_path / "run"), resume="auto"))
    whole = finished[1]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes(), name
    assert resumed.before == whole.before
    for name in ("loss", "tokens", "grad_norm"):  # the line of step 4 includes step 3
        lines = tiny.logged(whole.folder, name)
        assert list(lines) == [4, 8, 12, 16]
        assert tiny.logged(resumed.folder, name) == pytest.approx(lines, rel=1e-8)


def test_an_evaluation_file_that_was_edited_is_found_when_the_run_goes_on(stopped, tmp_path):
    questions = Path(stopped.data.dataset)
    text = questions.read_text()
    lines = text.splitlines(keepends=True)
    cut = len(lines) * 8 // 10  # of them are trained on
    questions.write_text(
        "".join(lines[:cut]) + "".join(lines[cut:]).replace('"gold": 1', '"gold": 0')
    )
    try:
        with pytest.raises(
            NaloraError,
            match="--data.eval-split: expected the questions .*evaluation data has changed",
        ):
            nalora_run.run(copied(stopped, tmp_path / "run"))
    finally:
        questions.write_text(text)


def test_resume_takes_the_run_s_own_settings_and_names_what_disagrees(stopped, capsys):
    asked = ["train", "--output", stopped.output, "--resume"]
    _, args = parse([*asked, "auto", "--train.keep", "5"])
    assert args.run == replace(stopped, resume="auto", train=replace(stopped.train, keep=5))  # type: ignore[union-attr]
    assert main([*asked, "--train.batch-size", "4", "--seed", "3"]) == 2
    error = capsys.readouterr().err
    for part in ("seed = 0", "seed = 3", "train.batch_size = 8", "train.batch_size = 4"):
        assert part in error
    with pytest.raises(
        NaloraError, match=r"--steps: expected 3 or more, .*found 2; leave --steps out"
    ):
        nalora_run.run(replace(stopped, resume=True, steps=2))


def test_more_steps_are_taken_with_a_warning_and_a_stop_after_the_last_says_how_to_go_on(
    finished, tmp_path, capsys
):
    output = copied(finished[0], tmp_path / "run").output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "finish", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert main(["train", "--output", output, "--resume", "--steps", "18"]) == 143
    error = capsys.readouterr().err
    assert "--steps 18 instead of 16: the learning-rate schedule spans the steps" in error
    assert f"interrupted by SIGTERM; continue with --output {output} --resume" in error
    lines = tiny.lines(output)
    assert [line["resumed"]["settings"]["steps"] for line in lines if "resumed" in line] == [18]
    _, args = parse(["train", "--output", output, "--resume"])
    assert args.run.steps == 18  # type: ignore[union-attr]


def test_two_processes_run_like_one_with_model_data_and_output_in_a_bucket(config, tmp_path):
    train = cfg.TrainConfig(batch_size=8, log_every=1, eval_every=1, save_every=1)
    # PiSSA is exported relative to the adapters that all processes started from; without a gate.
    lora = cfg.LoRAConfig(rules=(cfg.LoRARule("attn", 4),), init="pissa")
    mesh, debug = cfg.MeshConfig(data=1, fsdp=2), cfg.DebugConfig(profile="2:1")
    config = replace(config, steps=2, mechanisms=(), mesh=mesh, train=train, lora=lora, debug=debug)
    alone = nalora_run.run(replace(config, output=str(tmp_path / "alone")))
    with emulator.emulator(tmp_path / "objects") as (held, address):
        for file in Path(config.model).iterdir():
            emulator.put(address, f"llama/{file.name}", file.read_bytes())
        dataset = emulator.put(address, "questions.jsonl", Path(config.data.dataset).read_bytes())
        remote = replace(
            config, model="gs://bucket/llama", data=replace(config.data, dataset=dataset)
        )
        settings = tiny.write_settings(
            replace(remote, output="gs://bucket/run"), tmp_path / "settings.py"
        )
        variables = emulator.variables(address) | {
            "NALORA_CACHE": tiny.new_cache(tmp_path / "cache")
        }
        variables["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
        command = ["-m", "nalora_jax", "train", "--config", str(settings)]
        ended = tiny.finish(tiny.start(command, count=2, **variables))
        written = emulator.stored(held, "run")
    (first, out, error), (second, *silence) = ended
    assert (first, second) == (0, 0), error + silence[1]
    assert "after (step" in out
    assert "parameters in float32" in error
    assert [line for line in silence[0].splitlines() if not line.startswith("[Gloo]")] == []
    assert "parameters in float32" not in silence[1]
    expected = load_file(alone.adapter / "adapter_model.safetensors")
    for name, tensor in safetensors.numpy.load(
        written["adapter/adapter_model.safetensors"]
    ).items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-3, atol=1e-5, err_msg=name)
    ours = [json.loads(line) for line in written["metrics.jsonl"].splitlines()]
    theirs = tiny.lines(alone.folder)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    assert [lines[-1]["done"]["best_step"] for lines in (ours, theirs)] == [alone.best_step] * 2
    assert {name.partition("/")[0] for name in written} == {
        path.name for path in alone.folder.iterdir()
    }
    traces = {name.rpartition("/")[2] for name in written if "/steps_2-2/" in name}
    assert traces == {"process_0.xplane.pb", "process_1.xplane.pb"}
    assert not list((tmp_path / "cache" / "buckets").rglob("*.safetensors"))  # weights are streamed


def test_adalora_leaves_the_ranks_that_were_asked_for(config: cfg.RunConfig) -> None:
    """Of the last allocation on: no earlier state is exported, however good it was."""
    config = replace(
        config,
        steps=20,
        lora=cfg.LoRAConfig(rules=(cfg.LoRARule("ffn", 6),)),
        adalora=cfg.AdaLoRAConfig(target_rank=2, interval=2),
        optimizer=cfg.OptimizerConfig(learning_rate=5e-2),
        train=replace(config.train, eval_every=5, save_every=5),
    )
    result = nalora_run.run(config)
    assert result.after["loss"] < result.before["loss"]
    assert result.best_step in (15, 20)
    model = load(config.output, dtype="float32")
    ranks = {path: target.ranks for path, target in model.spec.targets}
    assert sum(map(sum, ranks.values())) == 2 * 3 * 2  # a mean of 2 on 3 projections of 2 layers
    logged = [line["ranks"] for line in tiny.lines(config.output) if line.get("ranks")]
    assert {path: tuple(rows) for path, rows in logged[-1].items() if any(rows)} == ranks


# DoRA, ranks of single layers, and trained rows of the embedding.
ADAPTER = {
    "r": 4,
    "lora_alpha": 6,
    "use_dora": True,
    "rank_pattern": {"up_proj": 2, "layers.1.mlp.down_proj": 3},
    "alpha_pattern": {"up_proj": 5},
    "target_modules": ["gate_proj", "up_proj", "down_proj", "o_proj"],
    "trainable_token_indices": {"embed_tokens": [3, 27]},
}


def assert_equal_logits(ours: Path | str, theirs: Any, tokens: Any) -> None:
    """Of a model of this library and one of transformers or PEFT."""
    torch = pytest.importorskip("torch")
    model = load(ours, dtype="float32")
    logits = np.asarray(tiny.logits_of(model.module, model.variables, np.asarray(tokens)))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT
def test_an_adapter_goes_from_peft_to_a_run_and_back(config: cfg.RunConfig, tmp_path: Path) -> None:
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    torch.manual_seed(0)
    theirs, base = (
        transformers.AutoModelForCausalLM.from_pretrained(config.model) for _ in range(2)
    )
    peft_settings = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTER)
    theirs = peft.get_peft_model(theirs, peft_settings)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equal_logits(tmp_path / "theirs", theirs, [[2, 9, 27, 0, 4, 8, 27, 0]])
    optimizer, lora = cfg.OptimizerConfig(learning_rate=5e-3), cfg.LoRAConfig()
    config = replace(
        config, adapter=str(tmp_path / "theirs"), lora=lora, optimizer=optimizer, mechanisms=()
    )
    result = nalora_run.run(config)
    assert result.after["loss"] < result.before["loss"]
    back = peft.PeftModel.from_pretrained(base, str(result.adapter), is_trainable=True)
    assert_equal_logits(config.output, back, [[2, 9, 27, 0, 4, 8, 27, 0]])
    shapes = [
        {
            name: tensor.shape
            for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        }
        for folder in (tmp_path / "theirs", result.adapter)
    ]
    assert shapes[0] == shapes[1]


def test_a_run_resumes_from_its_checkpoint_though_its_adapter_has_changed(
    finished, config, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "nalora_jax")
    shutil.copytree(finished[0].output, tmp_path / "earlier")
    train = cfg.TrainConfig(batch_size=8, log_every=1, eval_every=0, save_every=3)
    config = replace(
        config, steps=6, train=train, lora=cfg.LoRAConfig(), adapter=str(tmp_path / "earlier")
    )
    whole = nalora_run.run(config)
    np.testing.assert_allclose(whole.before["loss"], finished[1].after["loss"], rtol=1e-6)
    trained = (whole.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(whole.folder / "checkpoints" / "6")
    tensors = tmp_path / "earlier" / "adapter" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes() + b" ")
    resumed = nalora_run.run(replace(config, resume=True))
    assert "has changed since the run started from it (SHA-256" in caplog.text
    assert resumed.before == whole.before
    assert (resumed.adapter / "adapter_model.safetensors").read_bytes() == trained


def test_words_of_the_command_line_about_an_adapter(finished, capsys, monkeypatch, tmp_path):
    """Each in one line, with a way on that exists."""
    monkeypatch.chdir(tmp_path)  # not where README's first command has left runs/default
    adapter, data = str(finished[1].adapter), ["--data.dataset", finished[0].data.dataset]
    for words, expected in (
        (["--resume", adapter], f"an adapter, not a run: continue it with --adapter {adapter} and a new"),
        (["--model", adapter, *data], f"found an adapter, or a run with one; train it with --adapter {adapter}"),
        (["--model", finished[0].output, *data], f"train it with --adapter {finished[0].output}"),
        (["--adaptor", adapter], "did you mean --adapter?"),
        (["--adapter", adapter, "--lora.rules", "ffn:2"], "--lora.rules: expected rank"),
        (["--adapter", adapter, "--lora.rslora"], "--lora.rslora: expected False, as in the adapter"),
    ):  # fmt: skip
        assert main(["train", *words]) == 2
        assert expected in capsys.readouterr().err


SCALING = "yarn:factor=2"


@pytest.fixture(scope="module")
def long_rows(settings: cfg.RunConfig, tmp_path_factory: pytest.TempPathFactory) -> cfg.RunConfig:
    """A run on rows of 112 tokens, on a model whose context has 64."""
    folder = tmp_path_factory.mktemp("long")
    rng, letters = np.random.default_rng(0), list(string.ascii_lowercase)
    records = [
        {"prompt": " ".join(rng.choice(letters, 100)), "completion": " z"} for _ in range(40)
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    data = replace(settings.data, dataset=str(folder / "texts.jsonl"), max_length=112)
    config = replace(settings, output=str(folder / "run"), data=data, rope_scaling=SCALING, steps=2)
    nalora_run.run(config)
    return config


def test_every_file_of_the_run_names_the_scaling(long_rows: cfg.RunConfig) -> None:
    folder = Path(long_rows.output)
    assert recorded_settings(folder)["rope_scaling"] == SCALING
    base = load(folder / "adapter").base  # the adapter alone, without the run
    assert (base.config.max_positions, base.rope_scaling) == (128, SCALING)
    card = (folder / "adapter" / "README.md").read_text()
    assert "change the base's config" in card
    assert '"original_max_position_embeddings": 64' in card
    assert '"max_position_embeddings": 128' in card


def test_needles_before_and_after_are_printed_and_in_the_report(long_rows, monkeypatch, capsys):
    letters = [" ".join(string.ascii_lowercase[i : i + 7]) + "." for i in range(19)]
    monkeypatch.setattr(evaluate_needle, "sentences", lambda split: letters)
    assert main(["eval", long_rows.output, "--needle", "110", "--limit", "1"]) == 0
    headings = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[::3]]
    assert headings == ["needle retrieval", "needle retrieval, base", "difference"]
    folder = Path(long_rows.output)
    found = json.loads((folder / "needle.json").read_text())
    assert [row["length"] for row in found["before"]["rows"]] == [110]
    assert found["comparison"]["n"] == 5
    assert "110" in (folder / "report.html").read_text().split("Needle retrieval")[1]
    (folder / "needle.json").write_text('{"before": 3}')
    assert main(["report", long_rows.output]) == 2
    assert "needle.json: expected results of nalora eval --needle" in capsys.readouterr().err
    (folder / "needle.json").unlink()


def test_a_merged_run_is_the_same_model_in_transformers(
    long_rows: cfg.RunConfig, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    merged = tmp_path / "merged"
    assert main(["merge", long_rows.output, "--output", str(merged), "--dtype", "float32"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert theirs.config.max_position_embeddings == 128
    for source in (long_rows.output, merged):
        assert_equal_logits(
            source, theirs, np.random.default_rng(1).integers(2, len(tiny.WORDS), (1, 120))
        )


def test_a_scaling_that_shortens_the_context_is_refused(long_rows, capsys):
    flags = ["--model", long_rows.model, "--model.rope-scaling", "yarn:factor=0.5", "--dry-run"]
    assert main(["train", *flags]) == 2
    message = "expected a context of at least 64 tokens, the model's, found 32"
    assert message in capsys.readouterr().err


EXAMPLE = {"prompt": "a more", "completion": " z"}
# A part of the message, and its cause: flags, or the ninth example of the data.
# Options, one record of the data, and a part of the message.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("--lora.rules nothing:4", EXAMPLE, "'nothing', which matches nothing"),
    ("--data.dataset missing.jsonl", EXAMPLE, "missing.jsonl"),
    ("--mesh.tensor 4", EXAMPLE, "--mesh.tensor: expected a divisor of the model"),
    ("--mesh.data 4", EXAMPLE, "--train.batch-size"),
    ("--data.chat", EXAMPLE, "chat template"),
    ("--resume", EXAMPLE, "--resume: expected a checkpoint"),
    ("", {"prompt": "a", "completion": ""}, "data.jsonl:9: completion: expected an answer"),
    ("--data.max-length 128", {"prompt": "a " * 80, "completion": " z"}, "the model's context"),
]


@pytest.mark.parametrize(("options", "record", "message"), REFUSED)
def test_what_cannot_run_is_one_line_and_exit_code_2(
    settings, tmp_path, monkeypatch, options, record, message, capsys
):
    """Before weights are read."""
    output, data = tmp_path / "out", tmp_path / "data.jsonl"
    monkeypatch.setattr(text, "load_weights", None)
    examples = [*[EXAMPLE] * 8, record, *[EXAMPLE] * 13]
    data.write_text("".join(json.dumps(line) + "\n" for line in examples))
    flags = (
        f"train --model {settings.model} --output {output} --steps 1 --mesh.data 1 --compute.no-compilation-cache"
        f" --train.batch-size 2 --data.dataset {data} --data.train-split train[:90%]"
        f" --data.eval-split train[90%:] --data.too-long error --data.max-length 16 {options}"
    )
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert [line.startswith("error: ") for line in error.splitlines()].count(True) == 1
    assert "Traceback" not in error
    assert not [path for path in output.rglob("*") if path.is_file()]
