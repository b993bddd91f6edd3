"""Vectors of texts: whole runs, sentence-transformers' losses and vectors, devices, resumption."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import stats
from sklearn import metrics

from nalora_jax.__main__ import main
from nalora_jax.cli.training import run
from nalora_jax.config import (
    DataConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from nalora_jax.data.pooled_texts import PooledItem, pooled_data
from nalora_jax.data.source import RecordsSource
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.embedding_evaluation import (
    PairSimilarityEvaluator,
    TextRetrievalEvaluator,
)
from nalora_jax.evaluate.pooled_evaluation import text_vectors
from nalora_jax.kinds import embed
from nalora_jax.kinds.record import check_run_config
from nalora_jax.loading.adapted import load
from nalora_jax.mesh import distributed
from nalora_jax.models.config import ModelConfig
from nalora_jax.ops.pooled_losses import unit_vectors
from nalora_jax.weights.peft_config import TENSORS_NAME
from tests import tiny

BASE = ModelConfig.from_hf(tiny.HF)
RNG = np.random.default_rng(0)


LETTERS = list("abcdefgh")
# The letter that belongs to each, which the base does not know.
PARTNERS = dict(zip(LETTERS, "stuvwxyz", strict=True))


def triplet():
    first, second, third, fourth = RNG.choice(LETTERS, 4, replace=False).tolist()
    return {
        "anchor": f"{first} {second}",
        "positive": f"{PARTNERS[second]} {PARTNERS[first]}",
        "negative_1": f"{PARTNERS[third]} {PARTNERS[fourth]}",
    }


def scored_pair():
    first, second, third, fourth = RNG.choice(LETTERS, 4, replace=False).tolist()
    score = RNG.choice([0.0, 0.5, 1.0])
    other = {0.0: (third, fourth), 0.5: (first, third), 1.0: (first, second)}[score]
    partners = " ".join(PARTNERS[letter] for letter in other)
    return {"sentence1": f"{first} {second}", "sentence2": partners, "score": score}


TRIPLETS = [triplet() for _ in range(480)]
PAIRS = [scored_pair() for _ in range(480)]
KINDS = {"triplets": "embed:pooling=mean,sizes=16/8", "scores": "embed:loss=auto,scale=10"}


def config_of(folder, name, **changes):
    records = TRIPLETS if name == "triplets" else PAIRS
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    splits = {"train_split": "train[:80%]", "eval_split": "train[80%:]"}
    splits |= {"eval_limit": 30, "select_limit": 10}
    settings = {
        "steps": 120,
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "lora": LoRAConfig(rules=(LoRARule("ffn", 4), LoRARule("attn", 4))),
        "kind": KINDS[name],
        "data": DataConfig(str(path), max_length=24, **splits),
        "train": TrainConfig(batch_size=8, log_every=10, eval_every=60, save_every=60),
    }
    return tiny.make_config(folder, **settings | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run on triplets, with two sizes, and one on scored pairs."""
    folder = tmp_path_factory.mktemp("runs")
    finished = {}
    with tiny.on_named_devices(folder / "cache"):
        for name in KINDS:
            config = config_of(folder, name, output=str(folder / name))
            finished[name] = config, run(config)
    return finished


@pytest.mark.parametrize("name", list(KINDS))
def test_a_run_learns_which_texts_belong_together(runs, name):
    _, result = runs[name]
    first, *_, last = (line for line in tiny.lines(result.folder) if "loss" in line)
    assert last["loss"] < 0.9 * first["loss"]
    metric = "spearman_cosine" if name == "scores" else "ndcg"
    assert result.after[metric] > result.before[metric] + 0.05
    recorded = tiny.lines(result.folder)[0]["run"]["kind"]
    assert (
        recorded
        == {
            "triplets": "embed:loss=infonce,pooling=mean,sizes=16/8,fields=anchor/positive/negative_1",
            "scores": "embed:loss=cosent,scale=10.0,fields=sentence1/sentence2",
        }[name]
    )
    card = (result.adapter / "README.md").read_text()
    assert 'SentenceTransformer("path/to/this/folder")' in card
    assert "pipeline_tag: sentence-similarity" in card


def test_eval_repeats_the_run_s_metrics(runs, tmp_path, capsys):
    for name, metric in (("triplets", "ndcg"), ("scores", "spearman_cosine")):
        _, result = runs[name]
        out = tmp_path / f"{name}.json"
        assert main(["eval", str(result.folder), "--output", str(out)]) == 0
        values = json.loads(out.read_text())
        assert values[metric] == pytest.approx(result.after[metric], rel=1e-6)
        assert values["loss"] == pytest.approx(result.after["loss"], rel=1e-6)
    said = capsys.readouterr().out
    assert "held-out recall at 1" in said
    assert "held-out Spearman correlation" in said


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", list(KINDS))
def test_a_stopped_run_resumes_to_the_bit(runs, name, tmp_path):
    config, whole = runs[name]
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "120")
    resumed = run(replace(config, output=str(folder), resume="auto"))
    ours = load_file(resumed.adapter / TENSORS_NAME)
    for key, value in load_file(whole.adapter / TENSORS_NAME).items():
        np.testing.assert_array_equal(ours[key], value)


def our_vectors(config, adapter, texts, pooling):
    ours = load(config.model, adapter=adapter, dtype="float32")
    ids = [np.array(ours.base.tokenizer.encode(text), np.int32) for text in texts]
    vectors = text_vectors(ours.module, ours.variables, ids, pooling)
    return np.asarray(unit_vectors(jnp.asarray(vectors)))


@pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT
@pytest.mark.parametrize(("name", "pooling"), [("triplets", "mean"), ("scores", "last")])
def test_vectors_are_those_of_sentence_transformers(runs, name, pooling, tmp_path):
    from sentence_transformers import SentenceTransformer

    config, result = runs[name]
    texts = [record["anchor"] for record in TRIPLETS[:8]]
    expected = our_vectors(config, result.adapter, texts, pooling)
    # Also the files of `nalora export`.
    again = tmp_path / "again"
    assert main(["export", str(result.folder), "--output", str(again)]) == 0
    for folder in (result.adapter, again):
        theirs = SentenceTransformer(str(folder), device="cpu")
        assert [type(module).__name__ for module in theirs] == [
            "Transformer", "Pooling", "Normalize"
        ]  # fmt: skip
        vectors = theirs.encode(texts)
        np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-5)
        # The adapter has an effect.
        plain = our_vectors(config, None, texts, pooling)
        assert np.abs(plain - vectors).max() > 1e-2


@pytest.mark.filterwarnings("default")  # of torch, transformers and PEFT
def test_vectors_are_those_of_peft_s_feature_extraction(runs):
    import peft
    import transformers

    config, result = runs["scores"]
    base = transformers.AutoModel.from_pretrained(config.model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    assert isinstance(model, peft.PeftModelForFeatureExtraction)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.adapter)
    texts = [record["anchor"] for record in TRIPLETS[:5]]
    expected = our_vectors(config, result.adapter, texts, "last")
    for text, vector in zip(texts, expected, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        theirs = torch.nn.functional.normalize(hidden, dim=-1)
        np.testing.assert_allclose(vector, theirs, rtol=1e-5, atol=1e-5)


class GivenVectors(torch.nn.Module):
    """A model of sentence-transformers' losses whose vectors are its inputs, cut to a size."""

    def forward(self, features):
        return features

    def _get_untruncated_embedding_dimension(self):
        return 16

    def get_embedding_dimension(self):
        return 16


def their_loss(name, scale, sizes, vectors, scores):
    """A loss of sentence-transformers and its gradient by the vectors ``[groups, texts, d]``."""
    from sentence_transformers.sentence_transformer import losses

    model = GivenVectors()
    loss = {
        "infonce": lambda: losses.MultipleNegativesRankingLoss(model, scale=scale),
        "cosent": lambda: losses.CoSENTLoss(model, scale=scale),
        "cosine": lambda: losses.CosineSimilarityLoss(model),
    }[name]()
    if sizes:
        loss = losses.MatryoshkaLoss(model, loss, matryoshka_dims=list(sizes))
    theirs = torch.tensor(vectors, requires_grad=True)
    features = [{"sentence_embedding": text} for text in theirs.unbind(1)]
    value = loss(features, torch.tensor(scores))
    value.backward()
    return value.item(), theirs.grad.numpy()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "texts", "sizes"),
    [
        ("infonce", 2, ()),
        ("infonce", 4, ()),
        ("infonce", 3, (16, 8, 4)),
        ("cosent", 2, ()),
        ("cosent", 2, (16, 4)),
        ("cosine", 2, ()),
        ("cosine", 2, (16, 4)),
    ],
)
def test_losses_and_gradients_are_those_of_sentence_transformers(name, texts, sizes):
    """In float64, on rows with padding between the groups."""
    rng = np.random.default_rng(1)
    real = np.array([[1.0, 1, 0], [1, 0, 0], [1, 1, 1]])
    with jax.enable_x64(True):
        vectors = rng.normal(size=(3, 3, texts, 16))
        # Two scores are equal, whose pairs CoSENT does not compare.
        scores = rng.choice([0.0, 0.25, 0.5, 1.0], size=(3, 3, 1))
        text = f"embed:loss={name},scale=7"
        if sizes:
            text += f",sizes={'/'.join(map(str, sizes))}"
        losses = embed.TextVectors().losses(RunConfig(kind=text), None)
        batch = {"records": jnp.asarray(real), "labels": jnp.asarray(scores)}

        def mean(vectors):
            return (losses(vectors, batch)[0] * real).sum() / real.sum()

        value, slope = jax.value_and_grad(mean)(jnp.asarray(vectors))
    chosen = real > 0
    expected, grad = their_loss(name, 7.0, sizes, vectors[chosen], scores[chosen][:, 0])
    assert float(value) == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(slope[chosen], grad, rtol=1e-8, atol=1e-12)
    assert not np.any(slope[~chosen])


def first_step(config, mesh):
    """The metrics of the first step on packed rows, the adapters after it, and the rows."""
    kind = check_run_config(replace(config, kind="embed:fields=anchor/positive/negative_1"))
    form = embed.TextGroups(("anchor", "positive", "negative_1"), "")
    source = RecordsSource("texts", TRIPLETS[:60])
    tokenizer = tiny.word_tokenizer()
    data = pooled_data(source, DataConfig(max_length=40), tokenizer, form, batch_size=8)
    spec = embed.KIND.adapters(kind, BASE)
    made, _ = tiny.assembled(kind, BASE, mesh, spec=spec, **embed.KIND.parts(kind))
    lora = jax.device_get(made.state.lora)
    batch = next(iter(distributed.global_batches(iter([data.batch_at(0)]), made.mesh)))
    state, values = made.step({"params": made.params}, made.state, batch)
    return values, jax.device_get(state.lora), (made, lora), data


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2)])
def test_negatives_are_of_all_devices(tmp_path, mesh):
    config = config_of(tmp_path, "triplets")
    one, lora, *_ = first_step(config, MeshConfig(1, 1, 1))
    many, lora_of_many, *_ = first_step(config, mesh)
    assert float(many["loss"]) == pytest.approx(float(one["loss"]), rel=1e-5)
    assert float(many["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), lora, lora_of_many)


@pytest.mark.filterwarnings("default")
def test_the_loss_of_packed_rows_is_that_of_each_text_alone(tmp_path):
    values, _, (made, lora), data = first_step(config_of(tmp_path, "triplets"), MeshConfig(1, 1, 1))
    assert data.records_per_row > 1
    numbers = np.concatenate([data.records_of(row) for row in range(8)])
    fields = ("anchor", "positive", "negative_1")
    tokenizer = tiny.word_tokenizer()
    texts = [tokenizer.encode(TRIPLETS[number][name]) for number in numbers for name in fields]
    variables = {"params": made.params, "lora": lora}
    ids = [np.array(text, np.int32) for text in texts]
    vectors = text_vectors(made.eval_model, variables, ids, "last").reshape(len(numbers), 3, -1)
    expected, _ = their_loss("infonce", 20.0, (), vectors, np.zeros(len(numbers)))
    assert float(values["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(values["target_tokens"]) == len(numbers)


def item(*texts, score=None):
    labels = np.array([] if score is None else [score], np.float32)
    return PooledItem(texts, tuple(np.zeros(1, np.int32) for _ in texts), labels)


def test_retrieval_is_scikit_learn_s(monkeypatch):
    """Each anchor's positive among all candidates; other positives of an anchor are left out."""
    items = [item(f"a{i}", f"p{i}", f"n{i % 7}") for i in range(29)] + [item("a0", "p29", "n1")]
    rng = np.random.default_rng(2)
    table = {text: rng.normal(size=6) for each in items for text in each.texts}
    vectors = np.array([[table[text] for text in each.texts] for each in items])
    evaluator = TextRetrievalEvaluator(None, items, "last", 20.0)
    monkeypatch.setattr(evaluator, "outputs", lambda params, lora: vectors)
    records = evaluator.records(None, None)
    values = evaluator.summary(records)
    names = list(dict.fromkeys(text for each in items for text in each.texts[1:]))
    assert len(names) == 37
    candidates = np.array([table[name] for name in names])
    unit = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
    anchors = vectors[:, 0] / np.linalg.norm(vectors[:, 0], axis=1, keepdims=True)
    cosines = anchors @ unit.T
    cosines[0, names.index("p29")] = cosines[29, names.index("p0")] = -2
    right = np.array([names.index(each.texts[1]) for each in items])
    relevant = np.eye(len(names))[right]
    assert values["ndcg"] == pytest.approx(metrics.ndcg_score(relevant, cosines, k=10))
    every = range(len(names))
    for name, most in (("recall", 1), ("text_recall_5", 5), ("text_recall_10", 10)):
        assert values[name] == metrics.top_k_accuracy_score(right, cosines, k=most, labels=every)
    losses = torch.nn.functional.cross_entropy(
        torch.tensor(np.where(cosines > -2, 20 * cosines, -np.inf)), torch.tensor(right)
    )
    assert values["loss"] == pytest.approx(losses.item(), rel=1e-5)
    assert records[0]["expected"] == "p0"
    single = TextRetrievalEvaluator(None, items[:1], "last", 20.0)
    monkeypatch.setattr(single, "outputs", lambda params, lora: vectors[:1, :2])
    single.items = [item("a0", "p0")]
    assert single.summary(single.records(None, None))["ndcg"] == 1.0


def test_correlations_of_pairs_are_scipy_s(monkeypatch):
    rng = np.random.default_rng(3)
    items = [item(f"a{i}", f"b{i}", score=score) for i, score in enumerate(rng.uniform(size=40))]
    vectors = rng.normal(size=(40, 2, 6))
    evaluator = PairSimilarityEvaluator(None, items, "last")
    monkeypatch.setattr(evaluator, "outputs", lambda params, lora: vectors)
    values = evaluator.summary(evaluator.records(None, None))
    cosines = torch.cosine_similarity(*torch.tensor(vectors).unbind(1)).numpy()
    scores = np.array([each.labels[0] for each in items])
    assert values["spearman_cosine"] == pytest.approx(stats.spearmanr(cosines, scores).statistic)
    assert values["pearson"] == pytest.approx(stats.pearsonr(cosines, scores).statistic)
    assert values["low"] < values["spearman_cosine"] < values["high"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "embed:loss=triplet"}, "a loss of auto, infonce, cosent, cosine"),
        ({"kind": "embed:pooling=max"}, "a pooling of last, mean, first"),
        ({"kind": "embed:scale=0"}, "a scale above 0"),
        ({"kind": "embed:sizes=16/0"}, "sizes of 1 or more"),
        ({"train": TrainConfig(batch_size=8, accumulate=2)}, "--train.accumulate.*micro-batch"),
    ],
)
def test_settings_that_vectors_cannot_have_are_refused(changes, said):
    with pytest.raises(NaloraError, match=said):
        check_run_config(RunConfig(**{"kind": "embed"} | changes))


@pytest.mark.parametrize(
    ("kind", "records", "said"),
    [
        ("embed", [{"text": "a"}], "record 0: expected two fields with texts.*embed:fields"),
        ("embed:loss=cosent", [TRIPLETS[0]], "expected 2 fields with texts, found 3"),
        ("embed:fields=anchor", [TRIPLETS[0]], "expected 2 fields with texts, found 1"),
        ("embed:sizes=32", [TRIPLETS[0]], "embed:sizes: expected at most 16"),
        ("embed", [PAIRS[0], PAIRS[1] | {"score": "high"}], "record 1: score: expected a number"),
        ("embed:loss=cosine", [{"anchor": "a", "positive": "b"}], "record 0: score.*embed:score"),
        ("embed", [TRIPLETS[0], {"anchor": "a", "positive": "b"}], "record 1.*'negative_1'"),
    ],
)  # fmt: skip
def test_broken_records_name_their_field(kind, records, said):
    source = RecordsSource("texts", records)

    def read():
        _, form = embed.TextVectors().open_form(RunConfig(kind=kind), source, BASE)
        tokenizer = tiny.word_tokenizer()
        pooled_data(source, DataConfig(max_length=40), tokenizer, form, batch_size=1)

    with pytest.raises(NaloraError, match=said):
        read()


def test_an_adapter_without_fields_is_not_evaluated(runs):
    config, _ = runs["scores"]
    model = load(config.model, dtype="float32")
    with pytest.raises(NaloraError, match="a run with --kind embed"):
        embed.KIND.evaluate(model, RunConfig(kind="embed"), None, False)
