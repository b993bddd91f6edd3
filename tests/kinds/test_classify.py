"""Heads that label texts: whole runs, PEFT's model, packing, devices, resumption, evaluation."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn import metrics

from nalora_jax.__main__ import main
from nalora_jax.cli.training import run
from nalora_jax.config import DataConfig, MeshConfig, RunConfig, TrainConfig
from nalora_jax.data.labels import LabelSet
from nalora_jax.data.pooled_texts import PooledItem, pooled_data
from nalora_jax.data.source import RecordsSource
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.pooled_evaluation import LabelEvaluator, correlations, text_vectors
from nalora_jax.kinds import classify
from nalora_jax.kinds.record import check_run_config
from nalora_jax.loading.adapted import load
from nalora_jax.mesh import distributed
from nalora_jax.models.config import ModelConfig
from nalora_jax.weights.peft_config import TENSORS_NAME
from tests import tiny

BASE = ModelConfig.from_hf(tiny.HF)
RNG = np.random.default_rng(0)
# The label is in the last word alone.
TEXTS = [" ".join(RNG.choice(list("abcd"), RNG.integers(2, 7))) for _ in range(480)]


def label_of(text, form):
    last = "abcd".index(text[-1])
    if form == "one":
        return ["low", "high"][last > 1]
    if form == "several":
        return [name for name, applies in (("low", last < 2), ("odd", last % 2)) if applies]
    return last / 2 - 0.75


def config_of(folder, form="one", **changes):
    lines = [json.dumps({"text": text, "label": label_of(text, form)}) for text in TEXTS]
    path = folder / f"{form}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    splits = {"train_split": "train[:75%]", "eval_split": "train[75%:]"}
    splits |= {"eval_limit": 60, "select_limit": 10}
    settings = {
        "steps": 60,
        "kind": "classify",
        "data": DataConfig(str(path), max_length=16, **splits),
        "train": TrainConfig(batch_size=8, log_every=10, eval_every=30, save_every=30),
    }
    return tiny.make_config(folder, **settings | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each form of labels."""
    folder = tmp_path_factory.mktemp("runs")
    finished = {}
    with tiny.on_named_devices(folder / "cache"):
        for form in ("one", "several", "score"):
            config = config_of(folder, form, output=str(folder / form))
            finished[form] = config, run(config)
    return finished


@pytest.mark.parametrize("form", ["one", "several", "score"])
def test_a_run_learns_labels_of_each_form(runs, form):
    _, result = runs[form]
    first, *_, last = (line for line in tiny.lines(result.folder) if "loss" in line)
    assert last["loss"] < 0.85 * first["loss"]
    assert result.after["loss"] < 0.95 * result.before["loss"]
    if form == "score":
        assert result.after["pearson"] > 0.4
        assert result.after["spearman"] > 0.4
    else:
        assert result.after["accuracy"] > result.before["accuracy"]
        assert result.after["f1"] > result.before["f1"]
    recorded = tiny.lines(result.folder)[0]["run"]["kind"]
    outputs = 1 if form == "score" else 2
    assert recorded == f"classify:labels={outputs},form={form}"


@pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT
@pytest.mark.parametrize("form", ["one", "several", "score"])
def test_logits_are_those_of_peft_s_sequence_classification(runs, form):
    import peft
    import transformers

    config, result = runs[form]
    labels = LabelSet.read(result.adapter)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=len(labels.names), dtype=torch.float32
    )
    base.config.pad_token_id = 0
    model = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    texts = TEXTS[:6]
    encoded = [tokenizer(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        theirs = [model(**inputs).logits[0].numpy() for inputs in encoded]
    items = []
    for text, inputs in zip(texts, encoded, strict=True):
        ids = inputs["input_ids"][0].numpy().astype(np.int32)
        target = np.array(labels.encode(label_of(text, form), "record"), np.float32)
        items.append(PooledItem((text,), (ids,), target))
    ours = load(config.model, adapter=result.adapter, dtype="float32")
    evaluator = LabelEvaluator(ours.module, items, labels)
    records = evaluator.records(ours.base.params, ours.lora)
    outputs = [record["outputs"] for record in records]
    np.testing.assert_allclose(outputs, theirs, rtol=1e-5, atol=1e-5)


def test_eval_repeats_the_run_s_metrics_and_reads_other_data(runs, tmp_path, capsys):
    _, result = runs["one"]
    main(["eval", str(result.folder), "--output", str(tmp_path / "values.json")])
    values = json.loads((tmp_path / "values.json").read_text())
    assert values["accuracy"] == result.after["accuracy"]
    assert values["f1"] == pytest.approx(result.after["f1"], rel=1e-6)
    assert values["loss"] == pytest.approx(result.after["loss"], rel=1e-6)
    assert "held-out accuracy" in capsys.readouterr().out
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a", "label": "medium"}\n' * 3)
    assert main(["eval", str(result.folder), "--dataset", str(other)]) == 2
    assert "one of the labels high, low, found 'medium'" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT
def test_a_head_that_peft_trained_is_read(runs, tmp_path):
    import peft
    import transformers

    config, _ = runs["one"]
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=3, dtype=torch.float32
    )
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["up_proj"])
    model = peft.get_peft_model(base, settings)
    model.save_pretrained(tmp_path)
    ours = load(config.model, adapter=tmp_path, dtype="float32")
    assert ours.spec.score == 3
    theirs = model.base_model.model.score.modules_to_save["default"].weight.detach()
    np.testing.assert_array_equal(ours.lora["score"]["kernel"], theirs.T)


def test_a_head_is_exported_again_and_never_merged(runs, tmp_path, capsys):
    _, result = runs["several"]
    peft = tmp_path / "peft"
    assert main(["export", str(result.folder), "--output", str(peft)]) == 0
    assert LabelSet.read(peft).form == "several"
    assert main(["merge", str(result.folder), "--output", str(tmp_path / "merged")]) == 2
    assert "an adapter of a language model, found one with a head" in capsys.readouterr().err


def test_a_damaged_head_names_its_tensor(runs, tmp_path):
    config, result = runs["one"]
    folder = shutil.copytree(result.adapter, tmp_path / "adapter")
    tensors = load_file(folder / TENSORS_NAME)
    key = "base_model.model.score.weight"
    tensors[key] = tensors[key][:, :-1]
    save_file(tensors, folder / TENSORS_NAME)
    with pytest.raises(NaloraError, match=r"score.weight.*shape \(outputs, 16\)"):
        load(config.model, adapter=folder, dtype="float32")


def test_a_model_without_a_head_is_not_evaluated(runs, tmp_path):
    config, _ = runs["one"]
    with pytest.raises(NaloraError, match="an adapter with a head"):
        classify.labels_of(load(config.model, dtype="float32"))


@pytest.mark.usefixtures("one_device")
def test_a_stopped_run_resumes_to_the_bit(runs, tmp_path):
    config, whole = runs["one"]
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "60")
    resumed = run(replace(config, output=str(folder), resume="auto"))
    ours = load_file(resumed.adapter / TENSORS_NAME)
    theirs = load_file(whole.adapter / TENSORS_NAME)
    assert "base_model.model.score.weight" in ours
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


ONE = MeshConfig(1, 1, 1)


def first_step(config, mesh=ONE, length=24):
    """The metrics of the first step on packed rows, the adapters after it, the assembly before it,
    and the rows."""
    kind = check_run_config(replace(config, kind="classify:labels=2,form=one"))
    records = [{"text": text, "label": label_of(text, "one")} for text in TEXTS[:60]]
    form = classify.LabeledTexts("label", LabelSet("one", ("high", "low")))
    source = RecordsSource("texts", records)
    data_config = DataConfig(max_length=length)
    data = pooled_data(source, data_config, tiny.word_tokenizer(), form, batch_size=8)
    parts = classify.KIND.parts(kind)
    spec = classify.KIND.adapters(kind, BASE)
    made, _ = tiny.assembled(kind, BASE, mesh, spec=spec, **parts)
    lora = jax.device_get(made.state.lora)
    batch = next(iter(distributed.global_batches(iter([data.batch_at(0)]), made.mesh)))
    state, values = made.step({"params": made.params}, made.state, batch)
    return values, jax.device_get(state.lora), (made, lora), data


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)])
def test_a_step_is_the_same_on_eight_devices(tmp_path, mesh):
    config = config_of(tmp_path)
    one, lora, *_ = first_step(config)
    many, lora_of_many, *_ = first_step(config, mesh)
    assert float(many["loss"]) == pytest.approx(float(one["loss"]), rel=1e-6)
    assert float(many["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), lora, lora_of_many)


def test_the_loss_is_that_of_each_text_alone(tmp_path):
    """The mean over the texts of a packed batch, each of which is read alone and padded."""
    values, _, (made, lora), data = first_step(config_of(tmp_path))
    assert data.records_per_row > 1
    numbers = np.concatenate([data.records_of(row) for row in range(8)])
    tokenizer = tiny.word_tokenizer()
    texts = [np.array(tokenizer.encode(TEXTS[i]), np.int32) for i in numbers]
    variables = {"params": made.params, "lora": lora}
    logits = text_vectors(made.eval_model, variables, texts, "last")
    names = [label_of(TEXTS[i], "one") for i in numbers]
    classes = torch.tensor([["high", "low"].index(name) for name in names])
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), classes)
    assert float(values["loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert float(values["target_tokens"]) == len(numbers)


def test_metrics_are_scikit_learn_s_and_scipy_s():
    labels = LabelSet("several", ("a", "b", "c"))
    evaluator = LabelEvaluator(None, [None], labels)
    rng = np.random.default_rng(1)
    chosen, targets = rng.integers(0, 2, (2, 30, 3))
    records = [
        {"loss": 1.0, "chosen": c.tolist(), "labels": t.tolist(), "correct": bool((c == t).all())}
        for c, t in zip(chosen, targets, strict=True)
    ]
    values = evaluator.summary(records)
    assert values["accuracy"] == metrics.accuracy_score(targets, chosen)
    assert values["f1"] == metrics.f1_score(targets, chosen, average="micro")
    assert np.isnan(correlations(np.ones(4), np.arange(4.0))["pearson"])
    assert correlations(np.arange(4.0), np.arange(4.0) ** 3)["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "classify:form=both"}, "a form of auto, one, several, score, binary"),
        ({"kind": "classify:labels=-1"}, "labels of 0 or more"),
        ({"kind": "classify:names=2"}, "a setting of labels, form, field, texts"),
        ({"tune": ("norm",)}, "--tune.*classify"),
        ({"adapter": "old"}, "--adapter.*classify"),
        ({"data": DataConfig(too_long="split")}, "--data.too-long.*whole texts"),
        ({"mesh": MeshConfig(context=2)}, "--mesh.context.*whole texts"),
    ],
)
def test_settings_that_no_head_can_have_are_refused(changes, said):
    with pytest.raises(NaloraError, match=said):
        check_run_config(RunConfig(**{"kind": "classify"} | changes))


def test_an_empty_text_names_its_record(tmp_path):
    form = classify.LabeledTexts("label", LabelSet("one", ("a", "b")))
    records = [{"text": "a", "label": "a"}, {"text": " ", "label": "b"}]
    with pytest.raises(NaloraError, match="texts, record 1: expected a text, found an empty one"):
        pooled_data(
            RecordsSource("texts", records), DataConfig(max_length=8), tiny.word_tokenizer(), form,
            batch_size=1,
        )  # fmt: skip


def test_metrics_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(NaloraError, match=r"pip install 'nalora_jax\[metrics\]'"):
        LabelEvaluator(None, [], LabelSet("one", ("a", "b")))


@pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT
def test_a_reranker_is_a_head_of_one_output_on_query_and_document(tmp_path):
    """A document answers a query if it begins with its letter. Loss and average precision are
    torch's and scikit-learn's of the logits of PEFT's model."""
    import peft
    import transformers

    rng = np.random.default_rng(4)
    records = []
    for _ in range(480):
        query, document = rng.choice(list("abcd"), 2).tolist()
        record = {"query": f"x {query}", "document": f"{document} y"}
        records.append(record | {"label": int(query == document)})
    config = config_of(tmp_path, kind="classify:form=binary,texts=query/document", steps=60)
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = replace(config, data=replace(config.data, dataset=str(path)))
    with tiny.on_named_devices(tmp_path / "cache"):
        result = run(config)
    assert result.after["loss"] < result.before["loss"]
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        config.model, num_labels=1, dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    held_out = tmp_path / "held_out.jsonl"
    rows = records[:40]
    held_out.write_text("".join(json.dumps(record) + "\n" for record in rows))
    out = tmp_path / "values.json"
    command = ["eval", str(result.folder), "--dataset", str(held_out), "--output", str(out)]
    assert main([*command, "--split", "train", "--limit", "0"]) == 0
    values = json.loads(out.read_text())
    texts = [f"{record['query']}\n{record['document']}" for record in rows]
    with torch.no_grad():
        logits = torch.cat(
            [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
        )
    labels = torch.tensor([float(record["label"]) for record in rows])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-4)
    precision = metrics.average_precision_score(labels, logits)
    assert values["average_precision"] == pytest.approx(precision)


def test_a_binary_label_is_a_number_from_0_to_1():
    labels = LabelSet("binary", ("0",))
    assert labels.encode(True, "record") == [1.0]
    assert labels.encode(0.25, "record") == [0.25]
    with pytest.raises(NaloraError, match="record: expected a number from 0 to 1, found 2"):
        labels.encode(2, "record")
