"""Rows of embedding and head that are trained alone (PEFT's trainable_token_indices): against PEFT both ways."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.__main__ import main
from nalora_jax.cli.training import run
from nalora_jax.common import trees
from nalora_jax.config import (
    ComputeConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    PreferenceConfig,
    RunConfig,
    check,
)
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.programs import view_weights
from nalora_jax.layout import distributed
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import Head, HeadRows, trained_cross_entropy
from nalora_jax.train import snapshot
from nalora_jax.train.adapted import load, put_on
from nalora_jax.train.program import assemble
from nalora_jax.weights.adapter_forms import AdapterSlot
from nalora_jax.weights.merge import merge
from nalora_jax.weights.peft import export_adapter, import_adapter, verify_export
from nalora_jax.weights.peft_tables import fold_saved
from tests import tiny
from tests.weights.test_saved_modules import TOKENS, load_in_peft, our_logits, save, torch_logits
from tests.weights.test_saved_modules import wrap as wrap_plain

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = [9, 3, 40]  # 9, 3 and 40 are in TOKENS, not in order


def wrap(model: Any, trainable_token_indices: Any, **config: Any) -> Any:
    """The model in PEFT, adapters and rows random."""
    wrapped = wrap_plain(model, trainable_token_indices=trainable_token_indices, **config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return wrapped


# Settings of PEFT, and the rows that are in the tree.
MODES: dict[str, tuple[bool, Any, dict[str, Any], set[str]]] = {
    "list, tied": (True, IDS, {}, {"embed/rows"}),
    "both, untied": (
        False,
        {"model.embed_tokens": IDS, "lm_head": [7, 9]},
        {},
        {"embed/rows", "lm_head/rows"},
    ),
    "both, tied, parted": (
        True,
        {"embed_tokens": IDS, "lm_head": [7, 9]},
        {},
        {"embed/rows", "lm_head/rows"},
    ),
    "both, tied, one": (
        True,
        {"embed_tokens": IDS, "lm_head": IDS},
        {"ensure_weight_tying": True},
        {"embed/rows"},
    ),
    "head, tied": (True, {"lm_head": IDS}, {}, {"lm_head/rows"}),
    "beside a whole head": (False, IDS, {"modules_to_save": ["lm_head"]}, {"embed/rows", "lm_head/kernel"}),
}


@pytest.mark.parametrize("mode", MODES)
def test_peft_s_files_mean_the_same_here_and_ours_the_same_there(tiny_model, params_of, tmp_path, mode):
    tied, indices, settings, held = MODES[mode]
    model, config = tiny_model("llama", tie_word_embeddings=tied)
    params = params_of(model, config)
    wrapped = wrap(model, indices, **settings)
    expected = torch_logits(wrapped)
    with wrapped.disable_adapter():
        assert np.abs(torch_logits(wrapped) - expected).max() > 0.1
    lora, spec = import_adapter(save(wrapped, tmp_path / "theirs"), config)
    assert {path for path in trees.flatten(lora) if not path.startswith("layers")} == held
    np.testing.assert_allclose(our_logits(config, params, lora, spec), expected, rtol=1e-4, atol=1e-4)
    # What generation makes logits of has the rows too.
    module, variables = Decoder(config, spec), {"params": params, "lora": lora}

    @jax.jit
    def logits_of_head(variables):
        head = view_weights(module, variables).head
        return module.apply(head, module.apply(variables, TOKENS), method="unembed")

    logits = logits_of_head(variables)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)

    export_adapter(lora, spec, config, tmp_path / "ours", base_model_name="base")
    assert verify_export(tmp_path / "ours", lora, spec, config) == 0.0
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert set(theirs) == set(ours)
    again, _ = tiny_model("llama", tie_word_embeddings=tied)
    np.testing.assert_allclose(
        torch_logits(load_in_peft(again, tmp_path / "ours")), expected, rtol=1e-4, atol=1e-4
    )

    merged_config, merged, rest = fold_saved(config, params, lora, spec)
    assert merged_config.tie_embeddings == (tied and held == {"embed/rows"})
    merged = merge(merged, lora, rest)
    np.testing.assert_allclose(
        our_logits(merged_config, merged, {}, rest.linear), expected, rtol=1e-4, atol=1e-4
    )
    slot = AdapterSlot.on(config, rank=4)
    filled = slot.fill(lora, spec, params)
    np.testing.assert_allclose(
        our_logits(config, params, filled, slot.spec), expected, rtol=1e-4, atol=1e-4
    )


def test_changed_rows_or_missing_ones_are_found_and_vllm_gets_none(tiny_model, params_of, tmp_path):
    model, config = tiny_model("llama", tie_word_embeddings=True)
    folder = save(wrap(model, {"embed_tokens": IDS, "lm_head": [7]}), tmp_path / "a")
    lora, spec = import_adapter(folder, config)
    leaves = trees.flatten(lora)
    leaves["lm_head/rows"] = leaves["lm_head/rows"] + 1e-3
    export_adapter(trees.unflatten(leaves), spec, config, tmp_path / "b", base_model_name="base")
    with pytest.raises(NaloraError, match="lm_head: expected the adapter that was exported"):
        verify_export(tmp_path / "b", lora, spec, config)
    settings = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    settings["trainable_token_indices"]["lm_head"] = [8]  # which would put the row elsewhere
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        NaloraError, match="trainable_token_indices: expected the adapter that was exported"
    ):
        verify_export(tmp_path / "b", trees.unflatten(leaves), spec, config)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {key: value[:-1] for key, value in tensors.items() if "embed_tokens" in key}, file)
    with pytest.raises(
        NaloraError, match=r"expected shape \(3, 16\), a row for each of trainable_token_indices"
    ):
        import_adapter(folder, config)

    with pytest.raises(
        NaloraError, match="--for vllm: .* found trained rows of embed_tokens and rows of lm_head"
    ):
        export_adapter(lora, spec, config, tmp_path / "v", base_model_name="base", target="vllm")
    with pytest.raises(NaloraError, match="expected the base's weights beside it"):
        AdapterSlot.on(config, rank=4).fill(lora, spec)


def test_settings_of_trained_rows_are_judged(tiny_model):
    _, config = tiny_model("llama", tie_word_embeddings=True)
    rows = LoRAConfig(trainable_token_indices=(5, 6))
    for changes, said in (
        (
            {"lora": replace(rows, trainable_token_indices=(5, 5))},
            "trainable-token-indices: expected token ids",
        ),
        (
            {"lora": replace(rows, trainable_token_indices=(-1,))},
            "trainable-token-indices: expected token ids",
        ),
        (
            {"lora": replace(rows, trainable_token_modules=())},
            "trainable-token-modules: expected embed_tokens, lm_head",
        ),
        (
            {"lora": replace(rows, modules_to_save=("embed_tokens",))},
            "tables that --lora.modules-to-save does not",
        ),
        (
            {"lora": replace(rows, init="pissa")},
            "--lora.init: expected default or zero_a with --lora.train",
        ),
        (
            {"lora": rows, "preference": PreferenceConfig("dpo")},
            "--preference.loss: expected none with --lora.trainable",
        ),
    ):
        with pytest.raises(NaloraError, match=said):
            check(replace(RunConfig(), **changes))
    for lora, said in (
        (
            replace(rows, trainable_token_indices=(47, 48)),
            "token ids of the 48 rows of embed_tokens, from 0, found 48",
        ),
        (
            replace(rows, modules_to_save=("lm_head",)),
            "a tied head has the embedding's rows.*found rows of lm_head",
        ),
    ):
        spec = resolve(lora, projection_shapes(config), config.n_layers)
        with pytest.raises(NaloraError, match=f"--lora.trainable-token-indices: .*{said}"):
            init_lora(config, spec, jax.random.key(0), {})


# ---------------------------------------------------------------- trained


def test_the_rows_gradient_is_autodiff_s():
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, rows = jax.random.normal(keys[0], (3, 10, 16)), jax.random.normal(keys[1], (3, 16))
    kernel = jax.random.normal(keys[2], (16, 40))
    targets = jax.random.randint(keys[3], (3, 10), 0, 40).at[:, :3].set(jnp.array([30, 2, 7]))
    weights = jax.random.uniform(keys[4], (3, 10)) * (jax.random.uniform(keys[4], (3, 10)) > 0.3)
    head, ids = Head(softcap=4.0, scale=0.7), (30, 2, 7)

    def plain(hidden, rows):
        logits = 4.0 * jnp.tanh(0.7 * hidden @ kernel.at[:, jnp.array(ids)].set(rows.T) / 4.0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -2 * jnp.sum(weights * picked)

    expected, gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, rows)

    def ours(hidden, rows):
        trained = HeadRows(rows, kernel.T, ids, transposed=True)
        return 2 * trained_cross_entropy(
            hidden, trained, targets, weights, head, Numerics(), chunk=3, shards=3
        )

    found, back = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), back, gradients)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_trains_the_rows_by_their_gradient(tiny_model, params_of, tied):
    """Of an untied model rows of both tables, on a mesh; of a tied one the rows that both share."""
    model, config = tiny_model("llama", tie_word_embeddings=tied)
    params = jax.tree.map(jnp.asarray, params_of(model, config))
    modules = ("embed_tokens",) if tied else ("embed_tokens", "lm_head")
    lora = LoRAConfig(
        rules=(LoRARule("up_proj", 2),), trainable_token_indices=tuple(IDS), trainable_token_modules=modules
    )
    mesh = MeshConfig(1, 1, 1) if tied else MeshConfig(1, 2, 2)
    settings = RunConfig(steps=4, lora=lora, compute=ComputeConfig(dtype="float32"), mesh=mesh)
    devices = distributed.make_mesh(mesh, jax.devices()[: mesh.fsdp * mesh.tensor])
    placed = jax.device_put(params, distributed.shardings(params, devices, distributed.PARAM_RULES))
    assembly = assemble(settings, config, placed, devices)
    start = jax.device_get(assembly.state.lora)
    np.testing.assert_array_equal(start["embed"]["rows"], params["embed"]["embedding"][np.array(IDS)])

    def plain(lora):
        hidden = Decoder(config, assembly.spec).apply({"params": params, "lora": lora}, TOKENS[:, :-1])
        head = params["embed"]["embedding"].T if tied else params["lm_head"]["kernel"]
        rows = lora["embed" if tied else "lm_head"]["rows"]
        logits = hidden @ head.at[:, np.array(IDS)].set(rows.T)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1))

    value, gradients = jax.jit(jax.value_and_grad(plain))(start)
    batch = {
        "tokens": TOKENS[None, :, :-1],
        "targets": TOKENS[None, :, 1:],
        "loss_weights": np.ones((1, 2, 7), np.float32),
        "segment_ids": np.ones((1, 2, 7), np.int32),
        "positions": np.tile(np.arange(7, dtype=np.int32), (1, 2, 1)),
    }
    state, metrics = assembly.step(
        assembly.view(placed), assembly.state, distributed.make_global_batch(batch, devices, rows_axis=1)
    )
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    ours, theirs = trees.flatten(jax.device_get(state.lora)), trees.flatten(jax.device_get(start))
    assert {"embed/rows"} == {path for path in ours if "rows" in path} - (
        {"lm_head/rows"} if not tied else set()
    )
    for path in ours:
        if path.endswith("rows"):  # Adam's first step follows the sign of the gradient
            moved = ours[path] - theirs[path]
            np.testing.assert_array_equal(np.sign(moved), -np.sign(trees.flatten(gradients)[path]))


# ---------------------------------------------------------------- a run


def make_run(folder: Path) -> RunConfig:
    """Prompts with a token that the base does not know, answered by another one; both embeddings are one table."""
    lora = LoRAConfig(rules=(LoRARule("ffn", 4),), trainable_token_indices=(29, 28, 3))
    config = tiny.make_config(folder, lora=lora, steps=12)
    lines = (folder / "questions.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"].replace(" ", "<go>") for line in lines]
    records = [json.dumps({"prompt": prompt, "completion": " <out> <out> <out>"}) for prompt in prompts]
    (folder / "questions.jsonl").write_text("\n".join(records) + "\n")
    return replace(config, data=replace(config.data, add_tokens=("<out>",), add_special_tokens=("<go>",)))


@pytest.mark.usefixtures("one_device")
def test_a_run_trains_the_rows_of_new_tokens_alone_and_peft_has_them(tmp_path):
    config = make_run(tmp_path)
    for ids, said in (
        ((29,), "expected 28 29 among them.*no row of embed_tokens for '<go>'"),
        ((28, 29, 30), "expected token ids of the 30 rows of embed_tokens.* found 30"),
    ):
        with pytest.raises(NaloraError, match=f"--lora.trainable-token-indices: {said}"):
            run(replace(config, lora=replace(config.lora, trainable_token_indices=ids)))
    result = run(config)
    assert result.after["loss"] < result.before["loss"]
    tensors = load_file(result.adapter / "adapter_model.safetensors")
    (key,) = (key for key in tensors if "lora" not in key)
    assert (key.rpartition(".")[2], tensors[key].shape) == ("trainable_tokens_delta", (3, 16))
    written = json.loads((result.adapter / "adapter_config.json").read_text())
    assert written["trainable_token_indices"] == [29, 28, 3]
    card = (result.adapter / "README.md").read_text()
    assert "Trained rows beside them, one a token, and part of its files: 3 of embed_tokens." in card

    model = load(result.folder, dtype="float32")
    base = np.asarray(model.base.params["embed"]["embedding"])
    np.testing.assert_allclose(base[28:], np.tile(base[:28].mean(0), (2, 1)), atol=1e-6)
    assert np.abs(model.lora["embed"]["rows"] - base[[29, 28, 3]]).max(axis=1).min() > 1e-3
    tokens = np.array([[2, 28, 3, 29, 9]])
    expected = np.asarray(tiny.logits_of(model.module, model.variables, tokens))
    assert expected[0, 2].argmax() == 29  # after a prompt with the one it writes the other

    def logits_of(theirs: Any) -> np.ndarray:
        with torch.no_grad():
            return theirs.eval()(torch.tensor(tokens)).logits.numpy()

    (copy := shutil.copytree(result.adapter, tmp_path / "copy")).joinpath("tokenizer.json").unlink()
    with pytest.raises(
        NaloraError, match="trainable_token_indices: expected ids below 28.* found 29; save the token"
    ):
        load(config.model, adapter=copy)
    with pytest.raises(
        NaloraError, match="an adapter of the tokens and the 28 rows .* found one with '<go>' .28."
    ):
        put_on(load(config.model, dtype="float32"), result.adapter)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' resizing
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(result.adapter)
    np.testing.assert_allclose(logits_of(theirs), expected, rtol=1e-4, atol=1e-4)
    assert (
        main(["merge", str(result.folder), "--output", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (merged.config.vocab_size, merged.config.tie_word_embeddings) == (30, True)
    np.testing.assert_allclose(logits_of(merged), expected, rtol=1e-4, atol=1e-4)

    other = replace(config, lora=replace(config.lora, trainable_token_indices=(28, 29, 3)))
    settings = [{"base": "all:0", "config": snapshot.plain(one.to_dict())} for one in (config, other)]
    with pytest.raises(
        NaloraError, match=r"token_indices\.0 = 29, .* found lora\.trainable_token_indices\.0 = 28"
    ):
        snapshot.check_run("checkpoint", *settings)
