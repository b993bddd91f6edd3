"""On-policy distillation: the update on drawn samples against the plain formula, exact resumption,
servers, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax.__main__ import main
from nalora_jax.cli.training import run
from nalora_jax.config import DataConfig, DistillConfig, MeshConfig, RLConfig, TrainConfig
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.programs import NO_TOKEN
from nalora_jax.kinds import distill, on_policy
from nalora_jax.kinds.record import check_run_config
from nalora_jax.kinds.rl.rollout import Sampler
from nalora_jax.mesh import distributed
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.divergences import divergence
from nalora_jax.planner import plan_report
from nalora_jax.planner.abstract_step import (
    architecture,
    moved_weights,
    rollout_and_arguments,
    step_and_arguments,
)
from nalora_jax.planner.figures import figures
from nalora_jax.planner.machines import topology
from nalora_jax.train.callbacks import Callback
from nalora_jax.weights.peft_config import TENSORS_NAME
from tests import tiny
from tests.doubles.rollout_server import serving
from tests.kinds.test_distill import (
    SYSTEM,
    TEACHERS,
    Built,
    EndsAfterStep,
    settings,
    teacher_settings,
)
from tests.kinds.test_distill import folder as folder  # a fixture

RL = RLConfig(samples=2, max_new_tokens=5, temperature=0.9)
TRAIN = TrainConfig(batch_size=8, accumulate=2, log_every=1, eval_every=2, save_every=2)


def sampled(folder: Path, output: Path, name: str, **changes: Any) -> Any:
    """Settings of a distillation on the student's samples."""
    distillation = teacher_settings(folder, name, beta=1.0, on_policy=True)
    options = {"rl": RL, "train": TRAIN, "distill": distillation, "steps": 4}
    return settings(folder, output, **(options | changes))


def plain_loss(lora: Any, built: Built, samples: Any, prompts: Any, system: str) -> jax.Array:
    """The mean divergence over all tokens of the samples, each in a row of its own."""
    assembly = built.assembly
    program = built.inputs.teacher.program
    tables = assembly.frozen["teacher"]
    of_teacher = {"params": assembly.params}
    if "weights" in tables:
        of_teacher = tables["weights"]
    if "lora" in tables:
        of_teacher = of_teacher | {"lora": tables["lora"]}
    teacher = Decoder(program.base, program.adapters)
    tokenizer = built.inputs.files.tokenizer

    def log_probs(model, variables, ids, count):
        hidden = model.apply(variables, np.array(ids)[None, :-1])
        logits = model.apply(variables, hidden, method="unembed")[0, :, : tiny.HF["vocab_size"]]
        return jax.nn.log_softmax(logits[-count:])

    total, count = 0.0, 0
    for row, tokens in enumerate(samples.tokens):
        prompt = list(prompts[row // RL.samples].ids)
        drawn = tokens[tokens != NO_TOKEN].tolist()
        longer = prompt
        if system:
            longer = tokenizer.encode(f"s {system} ", special=False) + prompt
        p = log_probs(
            assembly.eval_model, {"params": assembly.params, "lora": lora}, prompt + drawn,
            len(drawn),
        )  # fmt: skip
        q = log_probs(teacher, of_teacher, longer + drawn, len(drawn))
        total += divergence(p, jax.lax.stop_gradient(q), 1.0)[0].sum()
        count += len(drawn)
    return total / count


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", TEACHERS)
def test_the_update_has_loss_and_gradient_of_the_plain_formula(folder, tmp_path, monkeypatch, name):
    drawn = []
    plain = Sampler.__call__

    def recorded(self: Sampler, lora: Any, step: int, prompts: Any, **options: Any) -> Any:
        drawn.append((plain(self, lora, step, prompts, **options), prompts))
        return drawn[-1][0]

    monkeypatch.setattr(Sampler, "__call__", recorded)
    built = Built(sampled(folder, tmp_path, name), tmp_path)
    lora = jax.tree.map(jnp.copy, built.state.lora)  # the step donates the state
    metrics = built.step()
    ((samples, prompts),) = drawn
    system = built.assembly.config.distill.system
    measure = jax.value_and_grad(plain_loss)
    value, grads = measure(lora, built, samples, prompts, system)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert float(metrics["target_tokens"]) == (samples.tokens != NO_TOKEN).sum()
    assert metrics["measured"]["length"] == samples.lengths.mean()


@pytest.mark.parametrize("name", ["prompt", "model"])
def test_a_step_is_the_same_on_eight_devices(folder, tmp_path, monkeypatch, name):
    found = []
    make = distributed.make_mesh
    for mesh, count in ((MeshConfig(2, 2, 2), 8), (MeshConfig(1, 1, 1), 1)):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "make_mesh", lambda m, n=count: make(m, jax.devices()[:n]))
            built = Built(sampled(folder, tmp_path / str(count), name, mesh=mesh), tmp_path)
            metrics = built.step()
        found.append([metrics["loss"], metrics["grad_norm"], metrics["target_tokens"]])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def same_adapters(first: Any, second: Any, atol: float = 0.0) -> None:
    """Asserts that two runs have exported equal adapters."""
    others = load_file(second.adapter / TENSORS_NAME)
    for tensor, value in load_file(first.adapter / TENSORS_NAME).items():
        np.testing.assert_allclose(others[tensor], value, rtol=0, atol=atol)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", ["adapter", "prompt"])
def test_a_run_learns_on_its_samples_resumes_and_evaluates(folder, tmp_path, capsys, name):
    config = sampled(folder, tmp_path / "whole", name, steps=20)
    whole = run(config)
    assert whole.after["loss"] < whole.before["loss"]
    config = replace(config, output=str(tmp_path / "run"), resume="auto")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[EndsAfterStep()])
    resumed = run(config)
    same_adapters(whole, resumed)
    assert resumed.after == whole.after
    shown = (whole.folder / "rollouts.jsonl").read_text()
    assert shown == (resumed.folder / "rollouts.jsonl").read_text()
    assert len(json.loads(shown.splitlines()[0])["samples"]) == RL.samples
    assert "Samples" in (whole.folder / "report.html").read_text()
    capsys.readouterr()
    out = tmp_path / "eval.json"
    assert main(["eval", str(whole.folder), "--output", str(out)]) == 0
    assert "held-out divergence" in capsys.readouterr().out
    assert json.loads(out.read_text())["loss"] == pytest.approx(whole.after["loss"], rel=1e-4)


@pytest.mark.usefixtures("one_device")
def test_prompts_without_completions_are_enough(folder, tmp_path):
    lines = [json.dumps({"messages": [{"role": "user", "content": f"a {x}"}]}) for x in "bcdefghi"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    data = {"train_split": "train[:5]", "eval_split": "train[5:]"}
    config = sampled(folder, tmp_path / "run", "model and prompt", data=data, steps=1)
    config = replace(config, data=replace(config.data, dataset=str(tmp_path / "prompts.jsonl")))
    config = replace(config, rl=replace(RL, system_prompt="w", mask_cut=True))
    inputs = distill.open_inputs(config, None)
    tokenizer = inputs.files.tokenizer
    data = inputs.data
    own = [tokenizer.decode(item.prompt_ids) for item in data.items]
    longer = [tokenizer.decode(ids) for ids in data.teacher_prompts]
    assert own[0].startswith("s w u a ")
    assert [text.replace(f"s {SYSTEM} w ", "s w ") for text in longer] == own
    assert run(config).after["n"] > 0


class EndsAt(Callback):
    """Ends the process after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, step: int, record: Any) -> None:
        if step == self.step:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("one_device")
def test_servers_draw_the_samples_and_are_not_asked_twice(folder, tmp_path, monkeypatch):
    """The server repeats what the generator drew: both runs are equal."""
    drawn: dict[tuple[Any, ...], Any] = {}
    plain = Sampler.__call__

    def recorded(self: Sampler, lora: Any, step: int, prompts: Any, **options: Any) -> Any:
        samples = plain(self, lora, step, prompts, **options)
        for row, request in enumerate(self.requests(step, prompts)):
            tokens = samples.tokens[row]
            ids = tokens[tokens != NO_TOKEN].tolist()
            values = {"token_logprobs": samples.log_probs[row, : len(ids)].tolist()}
            drawn[(*request.ids, request.seed)] = {"token_ids": ids, "logprobs": values}
        return samples

    config = sampled(folder, tmp_path / "own", "prompt", mechanisms=())
    monkeypatch.setattr(Sampler, "__call__", recorded)
    own = run(config)
    monkeypatch.setattr(Sampler, "__call__", plain)
    with serving(folder / "model") as server:
        server.replay = lambda body: drawn[(*body["prompt"], body["seed"])]
        rl = replace(RL, servers=(server.url,), server_seconds=20.0)
        config = replace(config, rl=rl, output=str(tmp_path / "served"), resume="auto")
        with pytest.raises(KeyboardInterrupt):
            run(config, callbacks=[EndsAt(3)])  # the last checkpoint is of step 2
        asked = len(server.samples)
        served = run(config)
        assert len(server.samples) == asked + 8  # of the fourth step
        assert server.adapters == {}
    same_adapters(own, served, atol=1e-6)


@pytest.mark.parametrize("name", ["prompt", "model"])
def test_a_plan_moves_no_weights_between_samples_and_update(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(plan_report, "devices", lambda _: jax.devices())
    config = sampled(folder, tmp_path, name, mesh=MeshConfig(2, 2, 2))
    base = architecture(str(folder / "model"))
    step, arguments = step_and_arguments(config, base, distributed.make_mesh(config.mesh))
    update = figures(step, arguments, cache=tmp_path)
    plan = plan_report._plan_rollout(config, base, topology("v6e:2x4"), update, arguments)
    assert plan.moved == 0
    elsewhere = replace(plan.figures, inputs=("PartitionSpec()",) * len(plan.figures.inputs))
    _, drawn, _ = rollout_and_arguments(config, base, distributed.make_mesh(config.mesh))
    assert moved_weights(update, arguments, elsewhere, drawn) > 0


@pytest.mark.usefixtures("one_device")
def test_a_dry_run_describes_the_samples(folder, tmp_path, capsys):
    flags = ["--model", str(folder / "model"), "--data.dataset", str(folder / "chats.jsonl")]
    flags += ["--output", str(tmp_path / "run"), "--distill.system", SYSTEM, "--data.chat"]
    flags += ["--distill.on-policy", "--rl.max-new-tokens", "4", "--mesh.data", "1"]
    assert main(["train", "--dry-run", *flags]) == 0
    assert "rollouts: 8 samples of each of 1 prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rl": replace(RL, updates=2)}, "--rl.updates: expected 1 with --distill.on-policy, found 2"),
        ({"rl": replace(RL, resample=1)}, "--rl.resample: expected 0 with --distill.on-policy"),
        ({"rl": replace(RL, beta=0.1)}, "--rl.beta: expected 0.0 with --distill.on-policy"),
        ({"rl": replace(RL, staleness=1, servers=("http://a",))}, "--rl.staleness: expected 0 with"),
        ({"rl": replace(RL, samples=3)}, "--train.batch-size: expected a multiple of --rl.samples"),
        ({"rl": replace(RL, servers=("a",))}, "--rl.servers: expected addresses such as"),
        ({"data": {"loss_on": "assistant"}}, "--data.loss-on: expected answer with --distill"),
        (
            {"rl": replace(RL, servers=("http://a",)), "distill": DistillConfig(system=SYSTEM)},
            "--rl.servers: expected () with no --distill.on-policy",
        ),
        (
            {"rl": RLConfig(rewards=("exact",), samples=1), "distill": DistillConfig()},
            "--rl.samples: expected 2 or more, whose rewards are compared, found 1",
        ),
    ],
)  # fmt: skip
def test_settings_that_samples_do_not_have_are_refused(folder, tmp_path, changes, said):
    with pytest.raises(NaloraError) as error:
        check_run_config(sampled(folder, tmp_path, "prompt", **changes))
    assert said in str(error.value)


def test_prompts_that_a_teacher_cannot_read_are_refused(folder, tmp_path):
    config = sampled(folder, tmp_path, "prompt")
    said = "--rl.max-new-tokens: expected at most [0-9]+ with prompts of up to [0-9]+ tokens and"
    long = replace(config, distill=replace(config.distill, system="q " * 57))
    with pytest.raises(NaloraError, match=said):
        distill.open_inputs(long, None)
    text = replace(config, data=DataConfig(str(folder / "chats.jsonl")))
    with pytest.raises(NaloraError, match="expected a chat, since --rl.system-prompt"):
        distill.open_inputs(text, None)
    with pytest.raises(NaloraError, match="expected a chat, since --distill.system"):
        on_policy.write_taught_prompt(
            {"prompt": "a", "completion": "b"}, "record 0", config=text, tokenizer=None
        )
