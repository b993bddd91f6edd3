"""Distillation: the objective against its plain formula, rows of a teacher with a prompt, shared
weights, and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax.__main__ import main
from nalora_jax.assembly.program import assemble
from nalora_jax.cli.training import run
from nalora_jax.common import trees
from nalora_jax.config import (
    DataConfig,
    DistillConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    PreferenceConfig,
    RunConfig,
    TrainConfig,
)
from nalora_jax.data.source import RecordsSource
from nalora_jax.data.taught_text import held_out_batches, held_out_taught, taught_data
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.kinds import distill, teachers
from nalora_jax.kinds.record import Inputs, check_kind, check_run_config
from nalora_jax.mesh import distributed
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.ops.divergences import divergence
from nalora_jax.planner.abstract_step import step_and_arguments
from nalora_jax.planner.figures import measure_compiled
from nalora_jax.report.history import read_history
from nalora_jax.train.callbacks import Callback
from nalora_jax.weights.peft_config import TENSORS_NAME
from nalora_jax.weights.peft_export import export_adapter
from tests import tiny

CHAT = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}a {% endif %}"
SYSTEM = "q r s t"
# Another model: wider, its head is separate and its table longer.
OTHER = tiny.HF | {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a base, another model, an adapter of the base and chats."""
    folder = tmp_path_factory.mktemp("distill")
    tokenizer = tiny.word_tokenizer(chat_template=CHAT)
    tiny.make_model(folder / "model", tokenizer=tokenizer)
    tiny.make_model(folder / "other", OTHER, tokenizer)
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(60):
        prompt = " ".join(rng.choice(list("abcdefgh"), rng.integers(1, 3)))
        completion = " ".join(rng.choice(list("uvwxyz"), rng.integers(1, 4)))
        lines.append(json.dumps({"prompt": prompt, "completion": completion}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    write_adapter(folder, folder / "adapter")
    return folder


def write_adapter(folder: Path, target: Path) -> None:
    """Writes an adapter of the base whose values are drawn."""
    files = teachers.open_files(teachers.resolve_source(str(folder / "model")))
    rules = LoRAConfig((LoRARule("ffn", 4), LoRARule("q_proj", 2)))
    spec = tiny.resolve(rules, projection_shapes(files.config), files.config.n_layers)
    lora = init_lora(files.config, spec, jax.random.key(5))
    drawn = {
        path: np.asarray(0.3 * jax.random.normal(jax.random.key(i), leaf.shape))
        for i, (path, leaf) in enumerate(trees.flatten(lora).items())
    }
    export_adapter(
        trees.unflatten(drawn), spec, files.config, target, base_model_name=str(folder / "model")
    )


def settings(folder: Path, output: Path, **changes: Any) -> RunConfig:
    """Settings of a short distillation."""
    data = {"chat": True, "train_split": "train[:80%]", "eval_split": "train[80%:]"}
    data |= {"max_length": 24, "eval_limit": 4, "select_limit": 2}
    data |= changes.pop("data", {})
    options: dict[str, Any] = {
        "model": str(folder / "model"),
        "output": str(output),
        "data": DataConfig(str(folder / "chats.jsonl"), **data),
        "train": TrainConfig(batch_size=8, log_every=1, eval_every=2, save_every=2),
    }
    return tiny.make_config(folder, **(options | changes))


def teacher_settings(folder: Path, name: str, **more: Any) -> DistillConfig:
    """The settings of one of four teachers."""
    settings: dict[str, dict[str, str]] = {
        "adapter": {"teacher": str(folder / "adapter")},
        "model": {"teacher": str(folder / "other")},
        "prompt": {"system": SYSTEM},
        "model and prompt": {"teacher": str(folder / "other"), "system": SYSTEM},
    }
    return DistillConfig(**settings[name], **more)


TEACHERS = ("adapter", "model", "prompt", "model and prompt")


class Built:
    """The step of a distillation, with adapters that have moved from their start."""

    def __init__(self, config: RunConfig, tmp_path: Path) -> None:
        self.inputs: Inputs = distill.open_inputs(check_kind(config), None)
        mesh = distributed.make_mesh(config.mesh)
        output: Any = SimpleNamespace(folder=tmp_path, resumes=False)
        self.built = distill.build_step(self.inputs, self.inputs.config, mesh, output, None)
        self.assembly = self.built.assembly
        leaves = trees.flatten(self.assembly.state.lora)
        moved = {
            path: leaf + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
            for i, (path, leaf) in enumerate(leaves.items())
        }
        self.state = self.assembly.begin(trees.unflatten(moved), 0)

    def batch(self) -> Any:
        """The first batch on the run's mesh."""
        batch = self.built.data.batch_at(0)
        return distributed.make_global_batch(batch, self.assembly.mesh, rows_axis=1)

    def step(self) -> dict[str, Any]:
        """The metrics of a step."""
        params = self.assembly.view(self.assembly.params)
        return self.assembly.step(params, self.state, self.batch())[1]


def plain_texts(built: Built, system: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids of each example of the first batch for the student and for the teacher, and its number of
    targets, by rendering and tokenizing the records one by one."""
    config = built.inputs.config
    tokenizer = built.inputs.files.tokenizer
    data = built.built.data
    lines = Path(config.data.dataset).read_text().splitlines()
    texts = []
    for row in range(config.train.batch_size):
        for example in data.records_of(row):
            record = json.loads(lines[data.store.records[example]])
            prompt, completion = record["prompt"], record["completion"]
            own, longer = (
                tokenizer.encode(f"{start}u {prompt} a {completion}", special=False)
                for start in ("", f"s {system} ")
            )
            texts.append((own, longer if system else own, len(completion.split())))
    return texts


def plain_loss(lora: Any, built: Built, distillation: DistillConfig) -> jax.Array:
    """The mean divergence per target, each text in a row of its own."""
    assembly = built.assembly
    opened = built.inputs.teacher
    weights = assembly.params
    tables = assembly.frozen["teacher"]
    if "weights" in tables:
        weights = tables["weights"]["params"]
    teacher = Decoder(opened.program.base, opened.program.adapters)
    of_teacher = {"params": weights}
    if "lora" in tables:
        of_teacher["lora"] = tables["lora"]

    def log_probs(model, variables, ids, count):
        ids = np.array(ids)[None]
        hidden = model.apply(variables, ids)
        logits = model.apply(variables, hidden, method="unembed")[0, :, : tiny.HF["vocab_size"]]
        # The last target is the end, which follows the text.
        return jax.nn.log_softmax(logits[-count - 1 :] / distillation.temperature)

    total, tokens = 0.0, 0
    student = {"params": assembly.params, "lora": lora}
    for own, longer, count in plain_texts(built, distillation.system):
        p = log_probs(assembly.eval_model, student, own, count)
        q = log_probs(teacher, of_teacher, longer, count)
        total += divergence(p, jax.lax.stop_gradient(q), distillation.beta)[0].sum()
        tokens += count + 1
    return total / tokens


# The divergence's gradient in JAX is that of its value, which tests/ops compares with TRL's.
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.usefixtures("one_device")
def test_loss_and_gradient_of_packed_rows_are_those_of_the_plain_formula(folder, tmp_path, name):
    distillation = teacher_settings(folder, name, beta=0.3, temperature=1.5)
    train = TrainConfig(batch_size=4, accumulate=2)
    built = Built(settings(folder, tmp_path, distill=distillation, train=train), tmp_path)
    assert len(plain_texts(built, "")) > 4  # rows are packed
    measure = jax.value_and_grad(partial(plain_loss, built=built, distillation=distillation))
    value, grads = measure(built.state.lora)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    metrics = built.step()
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert float(value) > 1e-3


MESHES = [(name, mesh) for mesh in (MeshConfig(2, 2, 2), MeshConfig(8, 1, 1)) for name in TEACHERS]
# A row that is split has one place for both, so the teacher has no further prompt.
SPLIT = [(name, MeshConfig(1, 4, 1, context=2)) for name in TEACHERS if "prompt" not in name]


@pytest.mark.parametrize(("name", "mesh"), MESHES + SPLIT, ids=str)
def test_a_step_is_the_same_on_eight_devices(folder, tmp_path, monkeypatch, name, mesh):
    distillation = teacher_settings(folder, name, beta=0.3)
    found = []
    make = distributed.make_mesh
    for devices, count in ((mesh, 8), (MeshConfig(1, 1, 1), 1)):
        with monkeypatch.context() as patch:
            few = partial(make, devices=jax.devices()[:count])
            patch.setattr(distributed, "make_mesh", few)
            built = Built(settings(folder, tmp_path, distill=distillation, mesh=devices), tmp_path)
            kind = built.inputs
            evaluator = distill.evaluator(
                kind, built.built.loaded, built.assembly, kind.held_out[0]
            )
            held_out = evaluator.measure(built.assembly.params, built.state.lora)
            metrics = built.step()  # donates the state
        found.append([metrics["loss"], metrics["grad_norm"], metrics["measured"]["agreement"]])
        found[-1] += [held_out["loss"], held_out["agreement"]]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.usefixtures("one_device")
def test_a_teacher_shares_the_weights_of_the_base(folder, tmp_path):
    """Read from the compiled programs: beside the batch, the teacher's own arrays are the only
    further arguments."""

    def further_bytes(assembly: Any, batch: Any) -> int:
        """The bytes of a step's arguments besides its batch and the teacher's own arrays."""
        params = assembly.view(assembly.params)
        compiled = assembly.step.lower(params, assembly.state, batch).compile()
        own = sum(x.nbytes for x in jax.tree.leaves((assembly.frozen, batch)))
        return compiled.memory_analysis().argument_size_in_bytes - own

    sizes = []
    for name in ("adapter", "prompt", "model"):
        config = settings(folder, tmp_path, distill=teacher_settings(folder, name))
        built = Built(config, tmp_path)
        sizes.append(further_bytes(built.assembly, built.batch()))
        if name == "prompt":
            assert jax.tree.leaves(built.assembly.frozen) == []
    made = built.assembly
    plain = assemble(made.config, built.inputs.base, made.params, made.mesh, spec=made.spec)
    assert plain.frozen == {}
    unread = built.batch()["targets"].nbytes  # by a divergence
    text = further_bytes(plain, built.batch())
    assert sizes == [text - unread] * 3


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", TEACHERS)
def test_a_plan_has_the_arguments_of_the_run(folder, tmp_path, name):
    config = settings(folder, tmp_path, distill=teacher_settings(folder, name))
    built = Built(config, tmp_path)
    planned, arguments = step_and_arguments(
        built.assembly.config, built.inputs.base, built.assembly.mesh
    )
    params = built.assembly.view(built.assembly.params)
    real = (params, built.state, built.batch())
    shapes = jax.tree.map(lambda x: x.shape[2:] if x.ndim == 3 else x.shape, real[0])
    of_plan = arguments[0] if "params" in arguments[0] else {"params": arguments[0]}
    of_plan = {"teacher": {}} | of_plan
    assert jax.tree.map(lambda x: x.shape[2:] if x.ndim == 3 else x.shape, of_plan) == shapes
    assert arguments[2].keys() == real[2].keys()
    assert measure_compiled(planned.lower(*arguments).compile()).memory > 0


# ---------------------------------------------------------------- rows of a teacher


def held_out_of(folder: Path, records: list[Any], tokenizer: Tokenizer, system: str, **data: Any):
    """The held-out examples of records, those that are reported."""
    config = DataConfig(chat=True, eval_limit=0, select_limit=1, **data)
    source = RecordsSource("chats", records)
    return held_out_taught(source, config, tokenizer, system, 24, 64)[0]


def taught(folder: Path, records: list[Any], *, context: int = 64, **data: Any):
    """The training rows of records, with a prompt of the teacher, and their tokenizer."""
    tokenizer = Tokenizer.from_folder(folder / "model")
    config = DataConfig(**{"max_length": 16, "chat": True} | data)
    source = RecordsSource("chats", records)
    options = {"context": 64, "teacher_context": context, "batch_size": 2, "seed": 0}
    return taught_data(source, config, tokenizer, SYSTEM, **options), tokenizer


RECORDS = [
    {"prompt": "a b", "completion": "x y"},
    {"prompt": "c", "completion": "z"},
    {"messages": [{"role": "system", "content": "d e"}, {"role": "user", "content": "f"},
                  {"role": "assistant", "content": "u v w"}]},
]  # fmt: skip


def test_rows_of_a_teacher_predict_the_same_targets_after_its_prompt(folder):
    data, tokenizer = taught(folder, RECORDS)
    batch = data.batch_at(0)
    flat = {name: value.reshape(-1, value.shape[-1]) for name, value in batch.items()}
    texts = []
    for row, weights in enumerate(flat["loss_weights"]):
        places = flat["teacher_places"][row][weights > 0]
        for place, target in zip(places, flat["targets"][row][weights > 0], strict=True):
            if place + 1 < flat["teacher_tokens"].shape[1]:
                following = flat["teacher_tokens"][row, place + 1]
                segment = flat["teacher_segment_ids"][row, place]
                if flat["teacher_segment_ids"][row, place + 1] == segment:
                    assert following == target
        for segment in range(1, flat["teacher_segment_ids"][row].max() + 1):
            ids = flat["teacher_tokens"][row][flat["teacher_segment_ids"][row] == segment]
            texts.append(tokenizer.decode(ids.tolist()))
    assert sorted(set(texts)) == [
        "s q r s t d e u f a u v w",
        "s q r s t u a b a x y",
        "s q r s t u c a z",
    ]


def test_a_completion_that_is_cut_has_fewer_targets_in_both(folder):
    long = {"prompt": "a", "completion": "u v w x y z u v w x"}
    data, _ = taught(folder, [*RECORDS, long, long], max_length=8, too_long="truncate")
    batch = data.batch_at(0)
    for row in range(2):
        weights = batch["loss_weights"][0, row]
        places = batch["teacher_places"][0, row]
        targets = batch["targets"][0, row]
        tokens = batch["teacher_tokens"][0, row]
        assert len(set(places[weights > 0])) == (weights > 0).sum()
        inside = weights * (places + 1 < len(tokens)) > 0
        matches = tokens[places[inside] + 1] == targets[inside]
        assert matches.sum() >= len(matches) - 3  # the last of each example is not an input
    items = held_out_of(folder, [long, long, long], Tokenizer.from_folder(folder / "model"),
                        SYSTEM)  # fmt: skip
    assert [item.example.answer.sum() for item in items] == [11, 11]


def test_held_out_rows_hold_every_example_once(folder):
    tokenizer = Tokenizer.from_folder(folder / "model")
    items = held_out_of(folder, RECORDS * 4, tokenizer, SYSTEM)
    count = np.zeros(len(items), int)
    for batch, examples in held_out_batches(items, 24, 2, taught=True):
        for row, of_row in enumerate(examples):
            count[of_row] += 1
            for segment, example in enumerate(of_row, start=1):
                ids = batch["tokens"][row][batch["segment_ids"][row] == segment]
                np.testing.assert_array_equal(ids, items[example].example.ids[:-1])
        for row in range(len(examples), 2):
            assert not batch["loss_weights"][row].any()
    assert count.tolist() == [1] * len(items)


# ---------------------------------------------------------------- whole runs


class EndsAfterStep(Callback):
    """Ends the process after the first step."""

    def on_log(self, step: int, record: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", TEACHERS)
def test_a_run_learns_from_its_teacher_resumes_and_evaluates(folder, tmp_path, capsys, name):
    config = settings(
        folder, tmp_path / "whole", steps=12, distill=teacher_settings(folder, name, beta=0.0)
    )
    whole = run(config)
    assert whole.after["loss"] < 0.97 * whole.before["loss"]
    assert whole.before.keys() >= {"loss", "low", "high", "agreement", "samples"}
    records = [record for record in tiny.lines(whole.folder) if "agreement" in record]
    assert all(0 <= record["agreement"] <= 1 for record in records if "loss" in record)
    assert read_history(whole.folder).loss_kind == "divergence"
    config = replace(config, output=str(tmp_path / "run"), resume="auto")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[EndsAfterStep()])
    resumed = run(config)
    for tensor, value in load_file(whole.adapter / TENSORS_NAME).items():
        np.testing.assert_array_equal(load_file(resumed.adapter / TENSORS_NAME)[tensor], value)
    assert resumed.after == whole.after
    capsys.readouterr()
    out = tmp_path / "eval.json"
    assert main(["eval", str(whole.folder), "--output", str(out)]) == 0
    assert "held-out divergence" in capsys.readouterr().out
    found = json.loads(out.read_text())
    for metric in ("loss", "agreement", "n"):
        assert found[metric] == pytest.approx(whole.after[metric], rel=1e-5)


@pytest.mark.usefixtures("one_device")
def test_a_student_that_starts_as_the_teacher_has_no_divergence(folder, tmp_path):
    distillation = DistillConfig(str(folder / "adapter"), beta=0.5)
    config = settings(
        folder, tmp_path / "run", steps=2, distill=distillation, adapter=str(folder / "adapter"),
        lora=LoRAConfig(),
    )  # fmt: skip
    result = run(config)
    assert result.before["loss"] == pytest.approx(0, abs=1e-6)
    assert result.before["agreement"] == 1


@pytest.mark.usefixtures("one_device")
def test_a_dry_run_describes_a_distillation(folder, tmp_path, capsys):
    output = ["--output", str(tmp_path / "run"), "--distill.system", SYSTEM, "--data.chat"]
    flags = ["--model", str(folder / "model"), "--data.dataset", str(folder / "chats.jsonl")]
    assert main(["train", "--dry-run", *flags, *output, "--mesh.data", "1"]) == 0
    assert "system: q r s t" in capsys.readouterr().out


# ---------------------------------------------------------------- refusals


def test_a_teacher_with_another_vocabulary_is_refused(folder, tmp_path):
    words = [*tiny.WORDS[:-2], "z", "y"]
    tiny.make_model(tmp_path / "swapped", tokenizer=tiny.word_tokenizer(words))
    more = [*tiny.WORDS, "longer"]
    tiny.make_model(tmp_path / "more", tiny.HF | {"vocab_size": 40}, tiny.word_tokenizer(more))
    for name, said in {
        "swapped": "swapped with 28 tokens, 2 of them other ones: 'y' is 27 there, 'z' is 26 there",
        "more": "more with 29 tokens, 1 more",
    }.items():
        distillation = DistillConfig(str(tmp_path / name))
        with pytest.raises(NaloraError) as error:
            distill.open_inputs(settings(folder, tmp_path, distill=distillation), None)
        assert f"--distill.teacher: expected a model with the 28 tokens of {folder}" in str(
            error.value
        )
        assert said in str(error.value)
        assert "train on texts that this one has written" in str(error.value)


def test_the_base_is_no_teacher_of_itself(folder, tmp_path):
    distillation = DistillConfig(str(folder / "model"))
    with pytest.raises(NaloraError, match="expected a teacher that differs from the model"):
        distill.open_inputs(settings(folder, tmp_path, distill=distillation), None)


@pytest.mark.usefixtures("one_device")
def test_an_adapter_with_tables_is_no_teacher(folder, tmp_path):
    lora = LoRAConfig((LoRARule("ffn", 4),), modules_to_save=("embed_tokens", "lm_head"))
    result = tiny.make_config(tmp_path, steps=1, lora=lora, model=str(folder / "model"))
    adapter = run(result).adapter
    with pytest.raises(NaloraError, match="an adapter that leaves the base's embedding and head"):
        distill.open_inputs(settings(folder, tmp_path, distill=DistillConfig(str(adapter))), None)


def test_texts_that_a_teacher_cannot_read_name_their_record(folder):
    with pytest.raises(NaloraError, match="expected at most 12 tokens with --distill.system"):
        taught(folder, RECORDS, context=12)
    with pytest.raises(NaloraError, match="record 0: expected a chat, since --distill.system"):
        taught(folder, RECORDS[:2], chat=False)


def test_a_template_that_rewrites_completions_is_refused(folder):
    """It writes a completion in another way after a system message."""
    template = CHAT.replace(
        "{{ m['content'] }}",
        "{% if messages[0]['role'] == 'system' and m['role'] == 'assistant' %}w {% endif %}"
        "{{ m['content'] }}",
    )
    tokenizer = replace(Tokenizer.from_folder(folder / "model"), chat_template=template)
    source = RecordsSource("chats", RECORDS[:2])
    config = DataConfig(chat=True, max_length=16)
    options = {"context": 64, "teacher_context": 64, "batch_size": 2, "seed": 0}
    said = "expected a chat template that writes the same completion after --distill.system"
    with pytest.raises(NaloraError, match=said):
        taught_data(source, config, tokenizer, SYSTEM, **options)
    with pytest.raises(NaloraError, match=said):
        held_out_of(folder, RECORDS, tokenizer, SYSTEM)


SYSTEM_ONLY = DistillConfig(system=SYSTEM)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "distill"}, "--distill.teacher: expected a model or an adapter, or --distill.system"),
        ({"distill": SYSTEM_ONLY, "tune": ("norm",)}, "--tune: expected () with --distill.teacher"),
        ({"distill": SYSTEM_ONLY, "lora": LoRAConfig(init="pissa")}, "--lora.init: expected default or"),
        ({"distill": SYSTEM_ONLY, "data": {"loss_on": "all"}}, "--data.loss-on: expected answer or assistant"),
        ({"distill": SYSTEM_ONLY, "data": {"loss_last": 4}}, "--data.loss-last: expected 0.0 with"),
        ({"distill": SYSTEM_ONLY, "data": {"too_long": "split"}}, "--data.too-long: expected drop or truncate"),
        ({"distill": SYSTEM_ONLY, "mesh": MeshConfig(context=2)}, "--mesh.context: expected 0 or 1 with"),
        (
            {"distill": SYSTEM_ONLY, "preference": PreferenceConfig("dpo")},
            "--distill.teacher, --distill.system: expected none in a run of kind preference",
        ),
        (
            {"kind": "distill", "distill": SYSTEM_ONLY, "preference": PreferenceConfig("dpo")},
            "--preference.loss: expected none with --distill.teacher or --distill.system",
        ),
        ({"distill": DistillConfig("x", beta=1.5)}, "--distill.beta: expected"),
        ({"distill": DistillConfig("x", temperature=0)}, "--distill.temperature: expected"),
    ],
)  # fmt: skip
def test_settings_that_a_distillation_does_not_have_are_refused(folder, tmp_path, changes, said):
    config = settings(folder, tmp_path, **changes)
    with pytest.raises(NaloraError) as error:
        check_run_config(config)
    assert said in str(error.value)
