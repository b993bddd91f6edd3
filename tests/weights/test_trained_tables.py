"""Tables of a model and rows of them that are trained, PEFT's modules_to_save and
trainable_token_indices.

Against PEFT both ways, merged, in slots, and trained.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nalora_jax.assembly.program import assemble
from nalora_jax.common import trees
from nalora_jax.config import (
    ComputeConfig,
    DataConfig,
    LoRAConfig,
    LoRARule,
    MeshConfig,
    PreferenceConfig,
    RunConfig,
    VisionConfig,
)
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.programs import view_weights
from nalora_jax.evaluate.generate.slots import AdapterSlot
from nalora_jax.kinds.record import check_run_config
from nalora_jax.mesh import distributed, sharding
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.losses import Head, HeadRows, WholeHead, trained_cross_entropy
from nalora_jax.weights.peft_config import TENSORS_NAME
from nalora_jax.weights.peft_export import export_adapter, verify_export
from nalora_jax.weights.peft_import import import_adapter
from nalora_jax.weights.peft_tables import fold_saved
from tests.weights.conftest import COMMON
from tests.weights.in_peft import TOKENS, load, logits, merged_params, our_logits, save, wrap

TARGETS = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
BOTH = ["embed_tokens", "lm_head"]
IDS = [9, 3, 40]  # 9, 3 and 40 are in TOKENS, not in order
TABLE, HEAD, ROWS, HEAD_ROWS = "embed/embedding", "lm_head/kernel", "embed/rows", "lm_head/rows"
INDICES = "trainable_token_indices"
# Whether the base's embeddings are tied, settings of PEFT, and the leaves in the tree.
TIED, PARTED = {"ensure_weight_tying": True}, {"embed_tokens": IDS, "lm_head": [7, 9]}
MODES: dict[str, tuple[bool, dict[str, Any], set[str]]] = {
    "tables, tied": (True, {"modules_to_save": BOTH}, {TABLE, HEAD}),
    "embedding, tied": (True, {"modules_to_save": BOTH[:1]}, {TABLE}),
    "embedding, kept tied": (True, {"modules_to_save": BOTH[:1]} | TIED, {TABLE, HEAD}),
    "rows, tied": (True, {INDICES: IDS}, {ROWS}),
    "rows of both, untied": (False, {INDICES: PARTED}, {ROWS, HEAD_ROWS}),
    "rows of both, tied, parted": (True, {INDICES: PARTED}, {ROWS, HEAD_ROWS}),
    "rows of both, tied, one": (True, {INDICES: dict.fromkeys(BOTH, IDS)} | TIED, {ROWS}),
    "rows of the head, tied": (True, {INDICES: {"lm_head": IDS}}, {HEAD_ROWS}),
    "rows beside a whole head": (False, {INDICES: IDS, "modules_to_save": BOTH[1:]}, {ROWS, HEAD}),
}


@pytest.mark.parametrize("mode", MODES)
def test_peft_s_files_mean_the_same_here_and_ours_the_same_there(
    tiny_model, params_of, tmp_path, mode
):
    tied, settings, held = MODES[mode]
    model, config = tiny_model("llama", tie_word_embeddings=tied)
    params = params_of(model, config)
    wrapped = wrap(model, **TARGETS, **settings)
    expected = logits(wrapped)
    lora, spec = import_adapter(save(wrapped, tmp_path / "theirs"), config)
    assert {path for path in trees.flatten(lora) if not path.startswith("layers")} == held
    export_adapter(lora, spec, config, tmp_path / "ours", base_model_name="base")
    assert verify_export(tmp_path / "ours", lora, spec, config) == 0.0
    module, again = Decoder(config, spec), tiny_model("llama", tie_word_embeddings=tied)[0]

    @jax.jit
    def logits_of_heads(variables):
        """With the head of training, and with the head that generation reads."""
        hidden, head = module.apply(variables, TOKENS), view_weights(module, variables).head
        return [module.apply(of, hidden, method="unembed") for of in (variables, head)]

    heads = logits_of_heads({"params": params, "lora": lora})
    found = dict(zip(("decoder", "generation"), heads, strict=True))
    found["PEFT"] = logits(load(again, tmp_path / "ours", tied=True))
    merged_config, folded, rest = fold_saved(config, params, lora, spec)
    assert merged_config.tie_embeddings == (tied and held == {ROWS})
    found["merged"] = our_logits(merged_config, merged_params(merged_config, folded, lora, rest))
    assert AdapterSlot.takes(spec) == (INDICES not in settings)
    if mode == "tables, tied":
        slot = AdapterSlot.on(config, rank=4)
        found["slot"] = our_logits(config, params, slot.fill(lora, spec), slot.spec)
    for name, array in found.items():
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-4, err_msg=name)
    file = tmp_path / "ours" / "adapter_config.json"
    assert json.loads(file.read_text())["modules_to_save"] == (list(spec.saved) or None)
    tensors = {name: load_file(tmp_path / name / TENSORS_NAME) for name in ("theirs", "ours")}
    assert INDICES not in settings or tensors["theirs"].keys() == tensors["ours"].keys()

    leaves = trees.flatten(lora)
    for path in held:
        changed = trees.unflatten(leaves | {path: leaves[path] + 1e-3})
        with pytest.raises(NaloraError, match="expected the adapter that was exported"):
            verify_export(tmp_path / "ours", changed, spec, config)
    with pytest.raises(NaloraError, match="--for vllm: expected an adapter of projections alone"):
        export_adapter(lora, spec, config, tmp_path / "v", base_model_name="base", target="vllm")
    for name in (name for name in tensors["ours"] if "lora_" not in name):
        longer = np.concatenate([tensors["ours"][name], np.zeros((2, 16), np.float32)])
        save_file(tensors["ours"] | {name: longer}, file.parent / TENSORS_NAME)
        with pytest.raises(
            NaloraError, match="needs a base that is resized|a row for each of trainable"
        ):
            import_adapter(file.parent, config)
    save_file(tensors["ours"], file.parent / TENSORS_NAME)
    if INDICES in settings:  # a row would be put elsewhere
        file.write_text(re.sub(r"\b9\b", "8", file.read_text()))
        with pytest.raises(NaloraError, match=f"{INDICES}: expected the adapter that was exported"):
            verify_export(file.parent, lora, spec, config)


TABLES = LoRAConfig(modules_to_save=("lm_head",))
SOME = LoRAConfig(trainable_token_indices=(5, 6))
DPO = PreferenceConfig("dpo")
ADDED = LoRAConfig(modules_to_save=tuple(BOTH))


@pytest.mark.parametrize(
    ("lora", "changes", "said"),
    [
        (replace(TABLES, init="pissa"), {}, "lora.init: expected .* with --lora.modules-to-save"),
        (
            TABLES,
            {"vision": VisionConfig("classify")},
            "vision.task: expected .* --lora.modules-to-save",
        ),
        (TABLES, {"preference": DPO}, "preference.loss: expected .* with --lora.modules-to-save"),
        (replace(SOME, trainable_token_indices=(5, 5)), {}, "token-indices: expected token ids"),
        (
            replace(SOME, trainable_token_modules=()),
            {},
            "token-modules: expected embed_tokens, lm_",
        ),
        (
            replace(SOME, modules_to_save=BOTH[:1]),
            {},
            "tables that --lora.modules-to-save does not",
        ),
        (
            replace(SOME, init="pissa"),
            {},
            "lora.init: expected default or zero_a with --lora.train",
        ),
        (SOME, {"preference": DPO}, "preference.loss: expected none with --lora.trainable"),
        (ADDED, {"add_tokens": ("<a>", "<a>")}, "data.add-tokens: .* none empty or named twice"),
        (
            ADDED,
            {"add_tokens": ("<a>",), "add_special_tokens": ("<a>",)},
            "no token of --data.add-special-tokens",
        ),
        (TABLES, {"add_tokens": ("<a>",)}, "lora.modules-to-save: expected embed_tokens"),
    ],
)
def test_settings_are_judged(lora, changes, said):
    if any(name.startswith("add_") for name in changes):
        changes = {"data": DataConfig(**changes)}
    with pytest.raises(NaloraError, match=said):
        check_run_config(RunConfig(lora=lora, **changes))


def test_a_tied_head_has_no_rows_beside_a_trained_table():
    config = ModelConfig.from_hf(COMMON | {"model_type": "llama", "tie_word_embeddings": True})
    spec = resolve(
        replace(SOME, modules_to_save=("lm_head",)), projection_shapes(config), config.n_layers
    )
    with pytest.raises(
        NaloraError, match="-indices: .*a tied head has the embedding's rows.*found rows of"
    ):
        init_lora(config, spec, jax.random.key(0), {})


# ---------------------------------------------------------------- trained


@pytest.mark.parametrize("ids", [(), (30, 2, 7)], ids=["table", "rows"])
def test_the_head_s_gradient_is_autodiff_s(ids):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, rows = jax.random.normal(keys[0], (3, 10, 16)), jax.random.normal(keys[1], (3, 16))
    kernel = jax.random.normal(keys[2], (16, 40))
    targets = jax.random.randint(keys[3], (3, 10), 0, 40).at[:, :3].set(jnp.array([30, 2, 7]))
    weights = jax.random.uniform(keys[4], (3, 10)) * (jax.random.uniform(keys[4], (3, 10)) > 0.3)
    head, trained = Head(softcap=4.0, scale=0.7), rows if ids else kernel

    def plain(hidden, trained):
        whole = kernel.at[:, jnp.array(ids)].set(trained.T) if ids else trained
        scores = 4.0 * jnp.tanh(0.7 * hidden @ whole / 4.0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(scores), targets[..., None], axis=-1)[
            ..., 0
        ]
        return -2 * jnp.sum(weights * picked)

    expected, gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, trained)

    def ours(hidden, trained):
        of = HeadRows(trained, kernel.T, ids, transposed=True) if ids else WholeHead(trained)
        return 2 * trained_cross_entropy(
            hidden, of, targets, weights, head, Numerics(), chunk=3, shards=3
        )

    found, back = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, trained)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), back, gradients
    )


def test_a_step_on_a_mesh_trains_by_the_gradient(tiny_model, params_of):
    """Rows of the embedding and a whole head."""
    model, config = tiny_model("llama", tie_word_embeddings=False, num_hidden_layers=1)
    params = jax.tree.map(jnp.asarray, params_of(model, config))
    mesh, rules = MeshConfig(1, 2, 2), (LoRARule("up_proj", 2),)
    lora = LoRAConfig(rules=rules, modules_to_save=("lm_head",), trainable_token_indices=tuple(IDS))
    devices = distributed.make_mesh(mesh, jax.devices()[:4])
    placed = jax.device_put(params, sharding.shardings(params, devices, sharding.PARAM_RULES))
    run = RunConfig(steps=4, lora=lora, compute=ComputeConfig(dtype="float32"), mesh=mesh)
    assembly = assemble(run, config, placed, devices)
    start = jax.device_get(assembly.state.lora)
    np.testing.assert_array_equal(
        start["embed"]["rows"], params["embed"]["embedding"][np.array(IDS)]
    )
    np.testing.assert_array_equal(start["lm_head"]["kernel"], params["lm_head"]["kernel"])

    def plain(lora):
        hidden = Decoder(config, assembly.spec).apply(
            {"params": params, "lora": lora}, TOKENS[:, :-1]
        )
        scores = jax.nn.log_softmax(hidden @ lora["lm_head"]["kernel"])
        return -jnp.mean(jnp.take_along_axis(scores, TOKENS[:, 1:, None], axis=-1))

    value, gradients = jax.jit(jax.value_and_grad(plain))(start)
    row = {
        "loss_weights": np.ones((1, 2, 7), np.float32),
        "segment_ids": np.ones((1, 2, 7), np.int32),
    }
    batch = row | {"tokens": TOKENS[None, :, :-1], "targets": TOKENS[None, :, 1:]}
    batch |= {"positions": np.tile(np.arange(7, dtype=np.int32), (1, 2, 1))}
    batch = distributed.make_global_batch(batch, devices, rows_axis=1)
    _, metrics = assembly.step(assembly.view(placed), assembly.state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
