"""Models whose tower reads packed patches against transformers: pixels, coordinates and logits of
texts with images of several shapes."""

from __future__ import annotations

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from nalora_jax.common.trees import flatten
from nalora_jax.data.images.patches import PatchProcessor
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.vision.patch_decoder import decoder_for
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.weights.base import load_model
from nalora_jax.weights.peft_import import import_adapter
from tests import vision

in_peft = pytest.importorskip("tests.weights.in_peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE, START, END = map(
    vision.QWEN_SPECIAL.index, ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
)
PROCESSOR = PatchProcessor(4, 2, 64, 1024, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
SHAPES = ((20, 31), (40, 18), (9, 70), (8, 8))  # height and width of the pictures


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)) for size in SHAPES]


@pytest.fixture(params=vision.PATCH_FAMILIES)
def model(request, tmp_path) -> tuple[Any, ModelConfig, Any]:
    """A tiny random model of transformers, and its config and weights here."""
    folder = vision.make_patch_model(tmp_path, request.param)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager"
    )
    ours = load_model(str(folder), dtype="float32", images=True)
    return theirs.eval(), ours.config, ours.params


def rounding_of(config: ModelConfig) -> float:
    """By how much two programs of the model differ, relative to one without recurrent layers:
    transformers computes the delta rule token by token, with other rounding."""
    if config.model_type.startswith("qwen3_5"):
        return 10
    return 1


def texts(prepared: list[Any]) -> list[list[int]]:
    """Token ids of a text with two images, one without images, and one that ends in an image."""

    def image(number: int) -> list[int]:
        (layout,) = PROCESSOR.layouts_of_prepared([prepared[number]])
        return [START, *[IMAGE] * layout.tokens, END]

    return [
        [9, 10, *image(0), 11, *image(1), 12, 13],
        [14, 15, 16],
        [17, *image(2), 18, 19, *image(3)],
    ]


def inputs_of(ids: list[int], prepared: list[Any]) -> dict[str, Any]:
    """The inputs of transformers' model for one text."""
    inputs = {"input_ids": torch.tensor([ids])}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if prepared:
        pixels = [np.asarray(PROCESSOR.normalise(image.pixels)) for image in prepared]
        # [patches, p, p, channels] -> [patches, channels, frames, p, p]
        flat = np.concatenate(pixels).reshape(-1, 4, 4, 3).transpose(0, 3, 1, 2)
        flat = np.repeat(flat[:, :, None], 2, axis=2).reshape(len(flat), -1)
        inputs["pixel_values"] = torch.tensor(flat)
        inputs["image_grid_thw"] = torch.tensor([(1, *image.grids[0]) for image in prepared])
    return inputs


def reference(model: Any, ids: list[int], prepared: list[Any]) -> np.ndarray:
    """The logits of one text by transformers, ``[seq, vocab]``."""
    with torch.no_grad():
        return model(**inputs_of(ids, prepared)).logits[0].numpy()


def test_logits_of_packed_rows_are_transformers_own(model, pictures) -> None:
    """Two rows, one of them with two texts, with four pictures of different shapes."""
    theirs, config, params = model
    prepared = [PROCESSOR.prepare(picture) for picture in pictures]
    first, second, third = texts(prepared)
    rows = [[(first, prepared[:2]), (second, [])], [(second, []), (third, prepared[2:])]]
    length = max(sum(len(ids) for ids, _ in row) for row in rows) + 3
    tokens = np.zeros((2, length), np.int32)
    segments = np.zeros_like(tokens)
    for number, row in enumerate(rows):
        start = 0
        for segment, (ids, _) in enumerate(row):
            tokens[number, start : start + len(ids)] = ids
            segments[number, start : start + len(ids)] = segment + 1
            start += len(ids)
    images = [prepared[:2], prepared[2:]]
    places = PROCESSOR.rounded(PROCESSOR.places(images))
    batch = PROCESSOR.arrays(images, places)
    module = decoder_for(config, numerics=Numerics())

    @jax.jit
    def logits(params: Any) -> jax.Array:
        variables = {"params": params}
        features = module.apply(variables, *PROCESSOR.inputs(batch), method="encode_images")
        hidden = module.apply(variables, tokens, segment_ids=segments, features=features)
        return module.apply(variables, hidden, method="unembed")

    ours = np.asarray(logits(params))
    limit = 2e-5 * rounding_of(config)
    for number, row in enumerate(rows):
        start = 0
        for ids, of_text in row:
            expected = reference(theirs, ids, of_text)
            actual = ours[number, start : start + len(ids)]
            np.testing.assert_allclose(actual, expected, atol=limit)
            start += len(ids)


ADAPTED = (
    r".*\.(blocks\.\d+\.attn\.(qkv|proj)|layers\.\d+\.self_attn\.[qkvo]_proj"
    r"|linear_attn\.(in_proj_(qkv|z|b|a)|out_proj)"
    r"|mlp\.((gate|up|down)_proj|linear_fc[12])|merger\.mlp\.[02]"
    r"|mlp\.shared_expert\.(gate|up|down)_proj"
    r"|(merger|deepstack_merger_list\.\d)\.linear_fc[12])"
)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def test_gradients_of_adapters_are_those_of_peft(model, pictures, tmp_path) -> None:
    """Of the loss of two packed texts with two pictures each, for adapters on tower, projectors and
    decoder."""
    theirs, config, params = model
    stacks = EXPERTS if config.n_experts else None
    wrapped = in_peft.wrap(
        theirs, r=3, lora_alpha=6, target_modules=ADAPTED, target_parameters=stacks
    )
    with torch.no_grad():  # near the base, whose gradients float32 resolves
        for name, leaf in wrapped.named_parameters():
            if "lora_B" in name:
                leaf *= 0.2
    lora, spec = import_adapter(in_peft.save(wrapped, tmp_path / "adapter"), config)
    # Routers are parameters that PEFT adapts in no family.
    adaptable = [path for path in projection_shapes(config) if "router" not in path]
    assert len(spec.targets) == len(adaptable)
    prepared = [PROCESSOR.prepare(picture) for picture in pictures]
    first, _, last = texts(prepared)
    losses = []
    for ids, of_text in ((first, prepared[:2]), (last, prepared[2:])):
        scores = wrapped(**inputs_of(ids, of_text)).logits[0, :-1]
        targets = torch.tensor(ids[1:])
        losses.append(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
    total_loss = sum(losses)
    total_loss.backward()
    expected = in_peft.gradients(wrapped, config, tmp_path)

    tokens = np.array([[*first, *last]], np.int32)
    segments = np.array([[1] * len(first) + [2] * len(last)], np.int32)
    batch = PROCESSOR.arrays([prepared], PROCESSOR.places([prepared]))
    module = decoder_for(config, spec, numerics=Numerics())
    scored = (segments[:, 1:] == segments[:, :-1]).astype(np.float32)

    def loss(lora: Any) -> jax.Array:
        variables = {"params": params, "lora": lora}
        features = module.apply(variables, *PROCESSOR.inputs(batch), method="encode_images")
        hidden = module.apply(variables, tokens, segment_ids=segments, features=features)
        scores = module.apply(variables, hidden[:, :-1], method="unembed")
        nats = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
        return jnp.sum(nats * scored)

    value, gradients = jax.jit(jax.value_and_grad(loss))(lora)
    np.testing.assert_allclose(value, total_loss.item(), rtol=1e-5)
    actual = flatten(gradients)
    # PEFT has one A of the fused projections of queries, keys and values, and of experts' gate and up.
    groups = [[f"image/layers/attn/{name}_proj/a" for name in "qkv"]]
    for path, leaf in actual.items():
        if path.endswith("gate_proj/a") and leaf.ndim == 4:  # [layers, experts, d_in, r]
            groups.append([path, path.replace("gate_proj", "up_proj")])
    for fused in groups:
        total = sum(actual[path] for path in fused)
        actual |= dict.fromkeys(fused, total)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        limit = 1e-4 * rounding_of(config) * float(np.abs(leaf).max())
        np.testing.assert_allclose(actual[path], leaf, atol=limit, rtol=0, err_msg=path)
        assert limit > 0, path


def test_both_layouts_of_stacks_of_experts_are_read(tmp_path) -> None:
    """[experts, d_out, d_in], which transformers 5 writes, and [experts, d_in, d_out] of the
    published files, which it reads."""
    folder = vision.make_patch_model(tmp_path / "written", "qwen3_vl_moe")
    published = shutil.copytree(folder, tmp_path / "published")
    tensors = load_file(folder / "model.safetensors")
    stacks = [name for name in tensors if ".mlp.experts." in name]
    assert len(stacks) == 4
    for name in stacks:
        tensors[name] = np.ascontiguousarray(tensors[name].swapaxes(1, 2))
    save_file(tensors, published / "model.safetensors", {"format": "pt"})
    first, second = (
        load_model(str(path), dtype="float32", images=True).params for path in (folder, published)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    loaded = [
        transformers.AutoModelForImageTextToText.from_pretrained(path).state_dict()
        for path in (folder, published)
    ]
    for name, leaf in loaded[0].items():
        assert torch.equal(leaf, loaded[1][name]), name
