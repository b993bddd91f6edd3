"""Tokens that are added to a model: trained and exported by a run, and those of adapters that PEFT
made."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import tokenizers
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import models, pre_tokenizers

from nalora_jax.__main__ import main
from nalora_jax.cli.training import run
from nalora_jax.config import LoRAConfig, LoRARule, MeshConfig, RunConfig
from nalora_jax.data.tokenizer import AddedTokens
from nalora_jax.errors import NaloraError
from nalora_jax.loading.adapted import attach_adapter, load
from nalora_jax.mesh import distributed
from nalora_jax.weights.base import load_model
from nalora_jax.weights.new_tokens import add_tokens
from tests import tiny
from tests.weights.in_peft import logits as torch_logits_of
from tests.weights.in_peft import save, wrap

BOTH = ("embed_tokens", "lm_head")
NEW = AddedTokens(plain=("<out>",), special=("<go>",))
TEMPLATE = "{% for m in messages %}<go>{{ m['content'] }}<out>{% endfor %}"


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(tiny.logits_of(model.module, model.variables, tokens))


# ---------------------------------------------------------------- a run


def make_run(folder: Path) -> RunConfig:
    """Prompts with a token that the base does not know, answered by another one; its embeddings are
    one table."""
    trained = LoRAConfig(rules=(LoRARule("ffn", 4),), trainable_token_indices=(29, 28, 3))
    config = tiny.make_config(folder, lora=trained, steps=12)
    lines = (folder / "questions.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"].replace(" ", "<go>") for line in lines]
    records = [
        json.dumps({"prompt": prompt, "completion": " <out> <out> <out>"}) for prompt in prompts
    ]
    (folder / "questions.jsonl").write_text("\n".join(records) + "\n")
    added = {"add_tokens": NEW.plain, "add_special_tokens": NEW.special}
    return replace(config, data=replace(config.data, **added))


@pytest.mark.usefixtures("one_device")
def test_a_run_trains_new_tokens_and_transformers_and_peft_have_them(tmp_path, caplog):
    """Rows of the tied embedding; whole tables are in test_trained_tables.py."""
    config = make_run(tmp_path)
    for ids, said in (
        ((29,), "expected 28 29 among them.*no row of embed_tokens for '<go>'"),
        ((28, 29, 30), "expected token ids of the 30 rows of embed_tokens.* found 30"),
    ):
        with pytest.raises(NaloraError, match=f"--lora.trainable-token-indices: {said}"):
            run(replace(config, lora=replace(config.lora, trainable_token_indices=ids)))
    with caplog.at_level("INFO", "nalora_jax"):
        result = run(config)
    assert (
        "added tokens: '<go>' (28), '<out>' (29); the embedding grows from 28 to 30 rows"
        in caplog.text
    )
    assert result.after["loss"] < result.before["loss"]
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    (key,) = (key for key in tensors if "lora" not in key)
    assert (key.rpartition(".")[2], tensors[key].shape) == ("trainable_tokens_delta", (3, 16))
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    assert (written["trainable_token_indices"], written["modules_to_save"]) == ([29, 28, 3], None)
    card = (result.adapter / "README.md").read_text()
    assert "Its files also have trained rows of tables, one per token: 3 of embed_tokens." in card
    assert "base.resize_token_embeddings(30)" in card

    model = load(result.folder, dtype="float32")
    tokenizer, base = model.base.tokenizer, np.asarray(model.base.params["embed"]["embedding"])
    assert tokenizer.encode("a<go>b <out>") == [2, 28, 3, 29]
    np.testing.assert_allclose(base[28:], np.tile(base[:28].mean(0), (2, 1)), atol=1e-6)
    assert np.abs(model.lora["embed"]["rows"] - base[[29, 28, 3]]).max(axis=1).min() > 1e-3
    tokens = np.array([[2, 28, 3, 29, 9]])
    expected = logits_of(model, tokens)
    assert expected[0, 2].argmax() == 29  # after a prompt with the one it writes the other
    assert (
        main(["merge", str(result.folder), "--output", str(tmp_path / "m"), "--dtype", "float32"])
        == 0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' resizing
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(result.adapter).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert (merged.config.vocab_size, merged.config.tie_word_embeddings) == (30, True)
    for other in (theirs, merged):
        np.testing.assert_allclose(torch_logits_of(other, tokens), expected, rtol=1e-4, atol=1e-4)
    for of in (result.adapter, tmp_path / "m"):
        fast = transformers.AutoTokenizer.from_pretrained(of)
        assert fast("a<go>b <out>")["input_ids"] == [2, 28, 3, 29]
        assert (
            fast.decode([28, 29], skip_special_tokens=True) == tokenizer.decode([28, 29]) == "<out>"
        )


# ---------------------------------------------------------------- adapters of PEFT


def fast_tokenizer(size: int = 48) -> Any:
    """Of ``size`` words, with a chat template."""
    words = {"<unk>": 0, "<end>": 1, **{f"w{number}": number for number in range(2, size)}}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE
    )


def add(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": list(NEW.special)})
    tokenizer.add_tokens(list(NEW.plain))
    return tokenizer


@pytest.fixture
def theirs(tiny_model, tmp_path):
    """Makes adapters with new tokens as users of PEFT do: ``theirs(tied, **settings)`` -> folder,
    logits."""

    def make(
        *, tied: bool = False, words: int = 48, resize: bool = True, **settings: Any
    ) -> tuple[Path, np.ndarray]:
        model, _ = tiny_model("llama", tie_word_embeddings=tied)
        tokenizer = fast_tokenizer(words)
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / "base")
        model.name_or_path = str(tmp_path / "base")  # as from_pretrained has it
        add(tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if resize:
                model.resize_token_embeddings(len(tokenizer))
            wrapped = wrap(model, r=4, target_modules=["q_proj", "up_proj"], **settings)
        folder = save(wrapped, tmp_path / "theirs")
        tokenizer.save_pretrained(folder)
        return folder, torch_logits_of(wrapped, TOKENS if resize else np.minimum(TOKENS, 47))

    return make


TOKENS = np.array([[1, 5, 48, 30, 7, 49, 2, 40]])


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (False, {}),  # resized and left untrained: PEFT saves both tables all the same
        (True, {"trainable_token_indices": [48, 5]}),
        (False, {"trainable_token_indices": {"embed_tokens": [48], "lm_head": [49, 48]}}),
    ],
)
def test_peft_s_adapters_with_new_tokens_are_loaded(theirs, tied, settings):
    folder, expected = theirs(tied=tied, **settings)
    model = load(folder, dtype="float32")
    assert model.base.config.vocab_size == 50
    assert model.base.added == ("<go>", "<out>")
    np.testing.assert_allclose(logits_of(model, TOKENS), expected, rtol=1e-4, atol=1e-4)
    text = model.base.tokenizer.render_chat([{"role": "user", "content": "w5"}])
    assert model.base.tokenizer.encode(text) == [48, 5, 49]


def test_rows_that_a_base_has_to_spare_are_taken_and_shrunk_tables_are_read(theirs, tmp_path):
    folder, expected = theirs(words=40, resize=False, modules_to_save=list(BOTH))
    model = load(folder, dtype="float32")
    assert (model.base.config.vocab_size, model.base.resized) == (48, 0)
    assert model.base.tokenizer.encode("<go> w5 <out>") == [40, 5, 41]
    with pytest.raises(
        NaloraError, match="tables of at least 42 rows, one for each token, found 41"
    ):
        load(cut(folder, tmp_path / "cut", 41))
    # As by resize_token_embeddings(len(tokenizer)).
    smaller = load(cut(folder, tmp_path / "shrunk", 42), dtype="float32")
    assert smaller.base.params["embed"]["embedding"].shape == (42, 16)
    tokens = np.minimum(TOKENS, 41)
    ours, whole = logits_of(smaller, tokens), logits_of(model, tokens)
    np.testing.assert_allclose(ours, whole[..., :42], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        logits_of(model, np.minimum(TOKENS, 47)), expected, rtol=1e-4, atol=1e-4
    )


def cut(folder: Path, copy: Path, rows: int, head: int | None = None) -> Path:
    """A copy of the adapter with tables of ``rows`` rows, as far as it has them; ``head`` of the
    head."""
    shutil.copytree(folder, copy)
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in BOTH:
        key = next(key for key in tensors if key.endswith(f"{name}.weight"))
        tensors[key] = np.resize(tensors[key], ((head or rows) if name == "lm_head" else rows, 16))
    save_file(tensors, file)
    return copy


def test_tokens_and_rows_that_do_not_fit_are_one_error_each(theirs, tmp_path):
    folder, _ = theirs(modules_to_save=list(BOTH))

    def refused(adapter: Path, said: str, onto: Any = None) -> None:
        with pytest.raises(NaloraError, match=said):
            load(adapter) if onto is None else attach_adapter(onto, adapter)

    uneven = cut(folder, tmp_path / "uneven", 50, head=49)
    refused(uneven, "as many rows of the head as of the embedding, found 50 of .* 49 of")
    (bare := cut(folder, tmp_path / "bare", 50)).joinpath("tokenizer.json").unlink()
    refused(bare, "a tokenizer, since the adapter's tables have 2 rows more than the base")
    renamed = cut(folder, tmp_path / "renamed", 50)
    words = (renamed / "tokenizer.json").read_text().replace("<out>", "<end-of-it>")
    (renamed / "tokenizer.json").write_text(words)
    plain, same = load(tmp_path / "base", dtype="float32"), load(folder, dtype="float32")
    refused(
        folder,
        "of the tokens and the 48 rows .* found one with the further tokens '<go>' .48.",
        onto=plain,
    )
    assert attach_adapter(same, folder).base is same.base
    refused(renamed, "'<end-of-it>' as 49, where the model has '<out>' as 49", onto=same)
    (renamed / "tokenizer.json").write_text(words.replace('"w5"', '"v5"'))
    refused(renamed, "the tokens of the base with the base's ids")


# ---------------------------------------------------------------- rows and settings


def test_new_rows_are_means_on_any_mesh_and_known_tokens_are_left_alone(
    tiny_model, tmp_path, caplog
):
    model, _ = tiny_model("llama", tie_word_embeddings=False)
    tokenizer = fast_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # which has no row
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    rows = {"embed": model.model.embed_tokens.weight, "lm_head": model.lm_head.weight}
    means = {name: weight.detach().double().mean(0).numpy() for name, weight in rows.items()}
    for mesh in (None, distributed.make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])):
        base = load_model(str(tmp_path), dtype="float32", mesh=mesh)
        with caplog.at_level("INFO", "nalora_jax"):
            found = add_tokens(base, AddedTokens(("<out>", "w7"), ("<end>", "<go>")), mesh)
        assert found.added == ("<go>", "<out>", "w7")
        assert "tokens that the tokenizer has already: '<end>' (1)" in caplog.text
        assert found.tokenizer.encode("w5<out>w7w7<go>") == [5, 50, 7, 7, 49]
        # The mesh does not divide 51.
        assert found.config.vocab_size == found.hf_config["vocab_size"] == 51
        embedding, head = found.params["embed"]["embedding"], found.params["lm_head"]["kernel"].T
        np.testing.assert_allclose(embedding[48:], np.tile(means["embed"], (3, 1)), atol=1e-6)
        np.testing.assert_allclose(head[48:], np.tile(means["lm_head"], (3, 1)), atol=1e-6)
        np.testing.assert_array_equal(embedding[:48], base.params["embed"]["embedding"])
    padded = add_tokens(base, AddedTokens(special=("[PAD]",)), mesh)
    assert (padded.added, padded.resized, padded.tokenizer.encode("[PAD]")) == ((), 49, [48])
