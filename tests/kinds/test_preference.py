"""Preference tuning: the objective against its plain formula, the data, and a whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from nalora_jax.__main__ import main
from nalora_jax.assembly.objectives import NextToken
from nalora_jax.assembly.program import assemble
from nalora_jax.cli.training import run
from nalora_jax.common import trees
from nalora_jax.config import (
    ComputeConfig,
    DataConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    OptimizerConfig,
    PreferenceConfig,
    RunConfig,
    TrainConfig,
)
from nalora_jax.data.preference_pairs import pair_data, tokenize_pairs
from nalora_jax.data.source import RecordsSource
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.preference_evaluation import PreferenceEvaluator
from nalora_jax.kinds.preference import Preference, program_parts
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import Head
from nalora_jax.ops.preference_losses import AnswerScores, pair_losses
from nalora_jax.train.callbacks import Callback
from nalora_jax.weights.peft_config import TENSORS_NAME
from tests import tiny
from tests.param_trees import init_params

BASE = ModelConfig.from_hf(tiny.HF)
DATA = DataConfig(max_length=24)
RECORDS = [
    {"prompt": "a b", "chosen": " c", "rejected": " d e f"},
    {"prompt": "g", "chosen": " h i j k", "rejected": " l"},
    {"prompt": "m n o p", "chosen": " q", "rejected": " r"},
    {"prompt": "s", "chosen": " t u", "rejected": " v w"},
    {"prompt": "x y", "chosen": " z z", "rejected": " z a b"},
]
CHAT = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}a {% endif %}"
DPO = PreferenceConfig("dpo")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tiny.make_model(tmp_path_factory.mktemp("model") / "base")
    return replace(Tokenizer.from_folder(folder), chat_template=CHAT)


def pairs(tokenizer, config=DATA, preference=DPO, records=RECORDS, **options):
    options = {"batch_size": 2, "seed": 3} | options
    return pair_data(RecordsSource("pairs", records), config, preference, tokenizer, **options)


def settings(preference):
    return RunConfig(
        steps=8,
        lora=LoRAConfig(rules=(LoRARule("ffn", 4), LoRARule("q_proj", 2))),
        mechanisms=("soft:power=2,warmup=1", "homogeneity:warmup=1"),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        compute=ComputeConfig(dtype="float32", stats_stride=1),
        preference=preference,
        mesh=MeshConfig(1, 1, 1),
    )


def assembled(preference):
    """A run's assembly on a fixed base, its adapters moved away from the start."""
    params = jax.tree.map(lambda leaf: 2 * leaf, init_params(BASE, jax.random.key(0)))
    parts = program_parts(settings(preference), None)
    made = assemble(settings(preference), BASE, params, tiny.one_device(), **parts)
    moved = {
        path: leaf + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape)
        for i, (path, leaf) in enumerate(trees.flatten(made.state.lora).items())
    }
    return made, made.begin(trees.unflatten(moved), 0)


def sides(data):
    """Ids and number of answer tokens of every chosen and rejected text."""
    store = data.store
    rows = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    texts = [(store.tokens[a:b], int(store.answer[a + 1 : b].sum())) for a, b in rows]
    return list(zip(texts[::2], texts[1::2], strict=True))


def plain_answers(lora, model, params, texts):
    """Log-probabilities and log-ratios of texts, ``[pairs, 2]``, each in a row of its own, padded
    at its end: chosen and rejected in turn; and their numbers of answer tokens."""
    longest = max(len(ids) for ids, _ in texts)
    ids = np.stack([np.pad(ids, (0, longest - len(ids))) for ids, _ in texts])
    ends, counts = np.array([[len(ids) - 1, count] for ids, count in texts]).T[:, :, None]
    place = np.arange(longest - 1)
    answer = ((place >= ends - counts) & (place < ends)).astype(np.float32)

    def log_probs(decoder, **adapters):
        """Log-probabilities of the texts, and log sum p^2, summed over the answers."""
        variables = {"params": params, **adapters}
        hidden = decoder.apply(variables, ids[:, :-1])
        table = jax.nn.log_softmax(decoder.apply(variables, hidden, method="unembed"))
        picked = jnp.take_along_axis(table, ids[:, 1:, None], axis=2)[..., 0] * answer
        squares = jnp.log(jnp.sum(jnp.exp(table) ** 2, axis=2)) * answer
        return [jnp.sum(values, axis=1).reshape(-1, 2) for values in (picked, squares)]

    policy, squares = log_probs(model, lora=lora)
    base, _ = log_probs(Decoder(BASE))
    counts = counts.reshape(-1, 2)
    weights = jnp.exp(jnp.sum((policy - squares) / counts, axis=1))
    weights = jax.lax.stop_gradient(weights)
    return AnswerScores(policy, policy - base, counts, weights=weights)


def unweighted(answers, preference):
    """The losses of the table, which tests/ops/test_preference_losses.py compares with TRL's."""
    return pair_losses(answers._replace(weights=None), preference).loss


def plain_dpo(answers, preference):
    """The formula of the paper, with labels that are smoothed, per token."""
    ratios = answers.ratios / answers.tokens
    margin, s = preference.beta * (ratios[:, 0] - ratios[:, 1]), preference.label_smoothing
    losses = -(1 - s) * jax.nn.log_sigmoid(margin) - s * jax.nn.log_sigmoid(-margin)
    if preference.weighted:
        losses = losses * answers.weights
    return losses


@pytest.mark.parametrize(
    ("preference", "formula"),
    [
        (PreferenceConfig("dpo", beta=2.0, label_smoothing=0.1, per_token=True), plain_dpo),
        (PreferenceConfig("dpo", beta=2.0, per_token=True, weighted=True), plain_dpo),
        *(
            (PreferenceConfig(name, beta=2.0, nll_weight=weight), unweighted)
            for name, weight in (("robust", 0.0), ("ipo", 0.5), ("simpo", 0.5), ("orpo", 0.0))
        ),
    ],
    ids=["dpo", "weighted", "robust", "ipo", "simpo", "orpo"],
)  # fmt: skip
def test_loss_and_gradient_of_a_packed_batch_are_those_of_the_plain_formula(
    tokenizer, preference, formula
):
    data = pairs(tokenizer, preference=preference)
    made, state = assembled(preference)
    batch = data.batch_at(0)
    which = np.concatenate([data.records_of(i) for i in range(2)])
    assert batch["pairs"].sum() == len(which) > 2
    texts = [text for index in which for text in sides(data)[index]]

    def mean(lora):
        answers = plain_answers(lora, made.eval_model, made.params, texts)
        return jnp.mean(formula(answers, preference)), jnp.mean(answers.weights)

    measure = jax.jit(jax.value_and_grad(mean, has_aux=True))
    (value, weight), grads = measure(state.lora)
    expected_norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    _, metrics = made.step(made.view(made.params), state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_norm, rtol=1e-4)
    assert float(metrics["target_tokens"]) == len(which)
    if preference.loss == "dpo":
        assert abs(float(value) - np.log(2)) > 0.005
    if preference.weighted:
        np.testing.assert_allclose(metrics["measured"]["pair_weight"], weight, rtol=1e-5)


@pytest.mark.parametrize(("name", "passes"), [("dpo", 2), ("simpo", 1), ("orpo", 1)])
def test_forward_passes_of_a_step(tokenizer, monkeypatch, name, passes):
    """A loss without a reference does not run the base."""
    calls = []
    apply = Decoder.__call__

    def counted(self, *args, **kwargs):
        calls.append(self.adapters)
        return apply(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "__call__", counted)
    preference = PreferenceConfig(name)
    batch = {key: value[0] for key, value in pairs(tokenizer).batch_at(0).items()}
    made, state = assembled(preference)
    head = Head(transposed=BASE.tie_embeddings)
    objective = Preference(NextToken(made.eval_model, head, Numerics()), preference)
    variables = {"params": made.params, "lora": state.lora}
    calls.clear()
    jax.eval_shape(objective.loss, variables, made.params, batch, jax.random.key(0))
    assert len(calls) == passes


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_the_evaluation_scores_the_base_only_as_a_reference(tokenizer, monkeypatch, name):
    preference = PreferenceConfig(name, beta=1.5)
    made, state = assembled(preference)
    held_out = list(
        tokenize_pairs(RecordsSource("pairs", RECORDS), [0, 1], DATA, preference, tokenizer)
    )
    evaluator = PreferenceEvaluator(made.eval_model, tokenizer, held_out, preference)
    calls = []
    scores = PreferenceEvaluator._base_scores

    def counted(self, params):
        calls.append(params)
        return scores(self, params)

    monkeypatch.setattr(PreferenceEvaluator, "_base_scores", counted)
    records = evaluator.records(made.params, state.lora)
    assert len(calls) == (name == "dpo")
    for record in records:
        rewards = record["rewards_chosen"], record["rewards_rejected"]
        if name == "simpo":
            assert rewards[0] == pytest.approx(-1.5 * record["chosen_nll"])
        margin = rewards[0] - rewards[1] - (0.5 if name == "simpo" else 0.0)
        assert record["loss"] == pytest.approx(np.log1p(np.exp(-margin)))


LABELED = [
    {"prompt": "a b", "completion": " c", "label": True},
    {"prompt": "g", "completion": " h i j k", "label": False},
    {"prompt": "m n o p", "completion": " q", "label": True},
    {"prompt": "s", "completion": " t u", "label": 0},
]
KTO = PreferenceConfig("kto", beta=2.0, desirable_weight=0.7, undesirable_weight=1.3)


def test_loss_and_gradient_of_packed_records_are_those_of_the_plain_formula(tokenizer):
    """Of KTO: each record has the completion of the one before it as second segment."""
    data = pairs(tokenizer, preference=KTO, records=LABELED)
    made, state = assembled(KTO)
    batch = data.batch_at(0)
    which = np.concatenate([data.records_of(i) for i in range(2)])
    assert batch["pairs"].sum() == len(which) > 2
    texts = []
    labels = []
    for index in which:
        own, other = sides(data)[index]
        texts += [own, other]
        labels.append(float(LABELED[index]["label"]))
        before = LABELED[index - 1]["completion"]
        assert tokenizer.decode(other[0]) == LABELED[index]["prompt"] + before
    signs = 2 * np.array(labels) - 1
    weights = np.where(signs > 0, 0.7, 1.3)
    assert len(set(labels)) == 2

    def mean(lora):
        ratios = plain_answers(lora, made.eval_model, made.params, texts).ratios
        divergence = jax.lax.stop_gradient(jnp.maximum(jnp.mean(ratios[:, 1]), 0.0))
        values = jax.nn.sigmoid(2.0 * signs * (ratios[:, 0] - divergence))
        return jnp.mean(weights * (1 - values)), 2.0 * ratios[:, 0]

    (value, rewards), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(state.lora)
    expected_norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    _, metrics = made.step(made.view(made.params), state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_norm, rtol=1e-4)
    measured = metrics["measured"]
    np.testing.assert_allclose(measured["rewards_chosen"], rewards[signs > 0].mean(), rtol=1e-4)
    np.testing.assert_allclose(measured["rewards_rejected"], rewards[signs < 0].mean(), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": "yes"}, "record 1: label: expected true for a desirable completion or false"),
        ({"label": True}, "label: expected records with true and others with false, found true in"),
        ({"completion": " "}, "record 1: completion: expected an answer, found an empty text"),
    ],
)
def test_records_without_labels_name_their_field(tokenizer, changes, said):
    records = [LABELED[0], LABELED[1] | changes]
    with pytest.raises(NaloraError, match=said):
        pairs(tokenizer, preference=KTO, records=records)


def test_pairs_are_refused_where_labels_are_needed(tokenizer):
    with pytest.raises(NaloraError, match="record 0: expected a field 'completion', found"):
        pairs(tokenizer, preference=KTO)


USER = [{"role": "user", "content": "x"}]
CHOSEN, REJECTED = ([{"role": "assistant", "content": text}] for text in "yz")


@pytest.mark.parametrize(
    ("record", "texts"),
    [
        ({"prompt": USER, "chosen": CHOSEN, "rejected": "z"}, ("u x a y", "u x a z")),
        ({"chosen": USER + CHOSEN, "rejected": USER + REJECTED}, ("u x a y", "u x a z")),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, ("u x a y", "u x a z")),
        ({"prompt": "x", "chosen": " y", "rejected": " z"}, ("x y", "x z")),
    ],
    ids=["messages", "whole conversations", "text through the template", "text"],
)
def test_the_tokens_of_a_pair(tokenizer, record, texts):
    (pair,) = sides(pairs(tokenizer, replace(DATA, chat=len(texts[0]) > 3), records=[record]))
    assert tuple(tokenizer.decode(ids) for ids, _ in pair) == texts
    assert [count for _, count in pair] == [2, 2]  # the answer and the end


@pytest.mark.parametrize(("choices", "gold"), [("wyyz", 1), ("zwy", 2)])
def test_the_wrong_choice_after_the_right_one_is_rejected(tokenizer, choices, gold):
    source = RecordsSource("choices", [{"prompt": "x", "choices": list(choices), "gold": gold}])
    (pair,) = tokenize_pairs(source, [0], DATA, DPO, tokenizer)
    answers = [tokenizer.decode(side.ids.tolist()) for side in (pair.chosen, pair.rejected)]
    assert answers == ["x y", "x z"]


def test_long_pairs_are_dropped_cut_or_refused(tokenizer, caplog):
    long = {"prompt": "a b c d e f g h i j k l m", "chosen": " n", "rejected": " o p"}
    assert pairs(tokenizer, records=[*RECORDS, long]).describe()["dropped"] == 1
    assert "left out 1 of 6 records" in caplog.text
    cut = pairs(tokenizer, replace(DATA, too_long="truncate"), records=[*RECORDS, long])
    (chosen, _), (rejected, _) = sides(cut)[-1]
    assert tokenizer.decode(chosen).endswith("l m n")
    assert max(len(chosen), len(rejected)) == DATA.max_length // 2 + 1
    with pytest.raises(
        NaloraError, match="pairs, record 5: expected at most --data.max-length 24 tokens"
    ):
        pairs(tokenizer, replace(DATA, too_long="error"), records=[*RECORDS, long])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a", "chosen": " b"}, "a field 'rejected'"),
        ({"prompt": "a", "chosen": " b", "rejected": " "}, "rejected: expected an answer, found an empty text"),
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "expected two answers that differ"),
        ({"prompt": "a", "choices": ["b", "b"], "gold": 0}, "choices: expected two that differ, found 'b'"),
    ],
)  # fmt: skip
def test_records_that_are_no_pairs_name_themselves(tokenizer, record, said):
    with pytest.raises(NaloraError, match=f"pairs, record 1.*{said}"):
        pairs(tokenizer, records=[RECORDS[0], record])


@pytest.mark.usefixtures("one_device")
def test_a_run_on_pairs_prefers_what_it_was_shown(tmp_path, capsys):
    """AnswerScores z over y, whatever the prompt: rewards rise, are logged, and the exported adapter has
    them."""
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(list("abcdefgh"), 2)) for _ in range(60)]
    lines = [
        json.dumps({"prompt": prompt, "chosen": " z", "rejected": " y x"}) for prompt in prompts
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    splits = {"train_split": "train[:80%]", "eval_split": "train[80%:]"}
    splits |= {"eval_limit": 4, "select_limit": 2}  # with so few, one program measures both
    config = tiny.make_config(
        tmp_path,
        steps=12,
        preference=PreferenceConfig("dpo", beta=0.5),
        data=DataConfig(str(tmp_path / "pairs.jsonl"), max_length=16, **splits),
        train=TrainConfig(batch_size=8, log_every=1, eval_every=6, save_every=6),
    )
    result = run(config)
    first, *_, last = (record for record in tiny.lines(result.folder) if "loss" in record)
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert first["rewards_margin"] == pytest.approx(0.0, abs=1e-5)
    assert last["rewards_accuracy"] > 0.9
    assert last["layers"]["mask_mean"]  # mechanisms act as in any run
    assert result.before["loss"] == pytest.approx(np.log(2))
    for values in (last, result.after):
        assert values["rewards_margin"] > 0.5
        assert values["loss"] < 0.6
    out = tmp_path / "eval.json"
    assert main(["eval", str(result.folder), "--output", str(out)]) == 0
    assert "held-out preference loss" in capsys.readouterr().out
    found = json.loads(out.read_text())
    for name in ("loss", "rewards_margin", "rewards_accuracy", "n"):
        assert found[name] == pytest.approx(result.after[name], rel=1e-6)
    assert main(["eval", str(result.folder), "--against", "base"]) == 2
    assert "--against: expected --tasks or --dataset with it" in capsys.readouterr().err


def pairs_config(folder, **changes):
    """A run of 2 steps on pairs whose chosen answer is z."""
    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(list("abcdefgh"), 2)) for _ in range(40)]
    records = [{"prompt": prompt, "chosen": " z", "rejected": " y x"} for prompt in prompts]
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, records)) + "\n")
    splits = {"train_split": "train[:80%]", "eval_split": "train[80%:]"}
    splits |= {"eval_limit": 4, "select_limit": 2}
    settings = {
        "steps": 2,
        "data": DataConfig(str(file), max_length=16, **splits),
        "train": TrainConfig(batch_size=8, log_every=1, eval_every=1, save_every=1),
        "preference": PreferenceConfig("simpo", beta=2.0, gamma=0.3, nll_weight=0.1),
    }
    return tiny.make_config(folder, **(settings | changes))


class EndsAfterStep(Callback):
    """Ends the process after the first step."""

    def on_log(self, step: int, record: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.usefixtures("one_device")
def test_a_run_without_a_reference_resumes_reports_and_evaluates(tmp_path, capsys):
    config = pairs_config(tmp_path)
    whole = run(replace(config, output=str(tmp_path / "whole")))
    config = replace(config, resume="auto")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[EndsAfterStep()])
    resumed = run(config)
    assert (
        load_file(resumed.adapter / TENSORS_NAME).keys()
        == load_file(whole.adapter / TENSORS_NAME).keys()
    )
    for name, value in load_file(whole.adapter / TENSORS_NAME).items():
        np.testing.assert_array_equal(load_file(resumed.adapter / TENSORS_NAME)[name], value)
    assert resumed.after == whole.after
    assert whole.after["loss"] < whole.before["loss"]
    assert whole.after["rewards_chosen"] < 0  # beta times a log-probability
    assert whole.before["chosen_nll"] == pytest.approx(-whole.before["rewards_chosen"] / 2)
    report = (whole.folder / "report.html").read_text()
    assert "simpo" in report
    assert "reward" in report
    capsys.readouterr()
    out = tmp_path / "eval.json"
    assert main(["eval", str(whole.folder), "--output", str(out)]) == 0
    assert f"held-out preference loss {whole.after['loss']:.4f}" in capsys.readouterr().out
    assert json.loads(out.read_text())["loss"] == pytest.approx(whole.after["loss"], rel=1e-6)
    # A second run continues the adapter of the first one.
    continued = pairs_config(tmp_path, output=str(tmp_path / "next"), adapter=str(whole.folder))
    result = run(continued)
    assert result.before["loss"] == pytest.approx(whole.after["loss"], rel=1e-5)
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("init", ["pissa", "gradient", "lora_ga"])
def test_a_loss_without_a_reference_takes_every_initialization(tmp_path, init):
    lora = LoRAConfig(rules=(LoRARule("ffn", 4),), init=init)
    mechanisms = () if init == "lora_ga" else ("soft:warmup=1",)
    preference = PreferenceConfig("orpo")
    result = run(pairs_config(tmp_path, lora=lora, mechanisms=mechanisms, preference=preference))
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.usefixtures("one_device")
def test_a_run_on_labeled_records_resumes_and_prefers_what_is_desirable(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for place in range(60):
        prompt = " ".join(rng.choice(list("abcdefgh"), 2))
        completion = (" z", " y x")[place % 2]
        records.append({"prompt": prompt, "completion": completion, "label": place % 2 == 0})
    file = tmp_path / "labeled.jsonl"
    file.write_text("\n".join(map(json.dumps, records)) + "\n")
    preference = PreferenceConfig("kto", beta=0.5)
    train = TrainConfig(batch_size=8, log_every=1, eval_every=4, save_every=1)
    config = pairs_config(tmp_path, steps=8, preference=preference, train=train)
    config = replace(config, data=replace(config.data, dataset=str(file), select_limit=4))
    whole = run(replace(config, output=str(tmp_path / "whole")))
    config = replace(config, resume="auto")
    with pytest.raises(KeyboardInterrupt):
        run(config, callbacks=[EndsAfterStep()])
    resumed = run(config)
    assert resumed.after == whole.after
    assert whole.before["loss"] == pytest.approx(0.5)
    assert whole.after["loss"] < 0.48
    assert whole.after["rewards_margin"] > 0.1
    assert whole.after["rewards_accuracy"] > 0.7
