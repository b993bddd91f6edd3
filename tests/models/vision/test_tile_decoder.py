"""Models whose images are in tiles against transformers: tokens, logits and gradients of packed texts
with images of several shapes, through the models' own processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nalora_jax.common.trees import flatten
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.vision.patch_decoder import decoder_for
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.weights.base import load_model
from nalora_jax.weights.model_files import LoadedModel
from nalora_jax.weights.peft_import import import_adapter
from tests import vision

in_peft = pytest.importorskip("tests.weights.in_peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Texts with one image, none, two and one of 3 by 3 tiles, and the shapes of the images.
TEXTS = (
    ("What is this <image> square", [(20, 31)]),
    ("the red circle", []),
    ("<image> and <image> is this", [(40, 18), (9, 70)]),
    ("Describe <image>", [(50, 47)]),
)
ROWS = ((0, 1), (1, 2), (3,))


# Tiles of 18 pixels in patches of 4, as of 384 in patches of 14: the rest is cut off.
CASES = (*vision.PLACED_FAMILIES, "smolvlm 18", "llava_onevision 18")


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory) -> Path:
    family, _, side = request.param.partition(" ")
    return vision.make_tile_model(tmp_path_factory.mktemp("model"), family, side=int(side or 16))


@pytest.fixture(scope="module")
def loaded(folder) -> LoadedModel:
    return load_model(str(folder), dtype="float32", images=True)


def theirs_of(folder: Path) -> Any:
    """transformers' model."""
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()


def inputs_of(folder: Path, number: int) -> Any:
    """transformers' inputs of one of `TEXTS`."""
    text, shapes = TEXTS[number]
    if shapes:
        text = text.replace("<image>", vision.placeholder_of(folder))
        pictures = [vision.draw_noise(*shape) for shape in shapes]
        return vision.tile_inputs(folder, [text], [pictures])
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")


def ids_of(loaded: LoadedModel, number: int) -> list[int]:
    """Token ids of one of `TEXTS`."""
    text, shapes = TEXTS[number]
    tokens: Any = loaded.tokenizer.images
    first, *others = text.split("<image>")
    for layout, piece in zip(tokens.layouts(shapes), others, strict=True):
        first += tokens.text_of(layout) + piece
    return loaded.tokenizer.encode(first, special=False)


def pack(loaded: LoadedModel, rows: Any) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Token ids and segments of packed rows of `TEXTS`, and the arrays of their images."""
    processor: Any = loaded.processor
    ids = [[ids_of(loaded, number) for number in row] for row in rows]
    length = max(sum(map(len, row)) for row in ids) + 3
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros_like(tokens)
    images = []
    for number, row in enumerate(rows):
        start = 0
        of_row = []
        for segment, (text, of_text) in enumerate(zip(row, ids[number], strict=True)):
            tokens[number, start : start + len(of_text)] = of_text
            segments[number, start : start + len(of_text)] = segment + 1
            start += len(of_text)
            pictures = [vision.draw_noise(*shape) for shape in TEXTS[text][1]]
            of_row += processor.together([processor.prepare(picture) for picture in pictures])
        images.append(of_row)
    return tokens, segments, processor.arrays(images, processor.rounded(processor.places(images)))


def test_logits_of_packed_rows_are_transformers_own(folder, loaded) -> None:
    """Three rows, two of them with two texts, and one with two images."""
    theirs = theirs_of(folder)
    tokens, segments, batch = pack(loaded, ROWS)
    module = decoder_for(loaded.config, numerics=Numerics())
    processor: Any = loaded.processor

    @jax.jit
    def logits(params: Any) -> jax.Array:
        variables = {"params": params}
        features = module.apply(variables, *processor.inputs(batch), method="encode_images")
        hidden = module.apply(variables, tokens, segment_ids=segments, features=features)
        return module.apply(variables, hidden, method="unembed")

    ours = np.asarray(logits(loaded.params))
    for number, row in enumerate(ROWS):
        start = 0
        for text in row:
            inputs = inputs_of(folder, text)
            expected_ids = inputs["input_ids"][0].numpy()
            end = start + len(expected_ids)
            np.testing.assert_array_equal(tokens[number, start:end], expected_ids)
            with torch.no_grad():
                expected = theirs(**inputs).logits[0].numpy()
            np.testing.assert_allclose(ours[number, start:end], expected, atol=2e-5)
            start = end


ADAPTED = (
    r".*\.([qkvo]_proj|in_proj|out_proj|w[123]|fc[12]|(gate|up|down)_proj|linear_[12]"
    r"|merging_layer|modality_projection\.proj)"
)


def test_gradients_of_adapters_are_those_of_peft(folder, loaded, tmp_path) -> None:
    """Of the loss of three packed texts, for adapters on tower, projector and decoder."""
    used = getattr(loaded.config.vision, "used_layers", -1)
    wrapped = in_peft.wrap(
        theirs_of(folder),
        r=3,
        lora_alpha=6,
        target_modules=ADAPTED,
        # layers after the one whose features are read
        exclude_modules=rf".*vision_(tower|model)\..*layers\.{used}\..*",
    )
    with torch.no_grad():  # near the base, whose gradients float32 resolves
        for name, leaf in wrapped.named_parameters():
            if "lora_B" in name:
                leaf *= 0.2
    config = loaded.config
    lora, spec = import_adapter(in_peft.save(wrapped, tmp_path / "adapter"), config)
    assert {path for path, _ in spec.targets} == set(projection_shapes(config))
    row = (0, 2, 1)
    losses = []
    for text in row:
        inputs = inputs_of(folder, text)
        scores = wrapped(**inputs).logits[0, :-1]
        targets = inputs["input_ids"][0, 1:]
        losses.append(torch.nn.functional.cross_entropy(scores, targets, reduction="sum"))
    total_loss = sum(losses)
    total_loss.backward()
    expected = in_peft.gradients(wrapped, config, tmp_path)

    tokens, segments, batch = pack(loaded, (row,))
    module = decoder_for(config, spec, numerics=Numerics())
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    processor: Any = loaded.processor

    def loss(lora: Any) -> jax.Array:
        variables = {"params": loaded.params, "lora": lora}
        features = module.apply(variables, *processor.inputs(batch), method="encode_images")
        hidden = module.apply(variables, tokens, segment_ids=segments, features=features)
        scores = module.apply(variables, hidden[:, :-1], method="unembed")
        nats = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
        return jnp.sum(nats * same)

    value, gradients = jax.jit(jax.value_and_grad(loss))(lora)
    np.testing.assert_allclose(value, total_loss.item(), rtol=1e-5)
    actual = flatten(gradients)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        limit = 1e-4 * float(np.abs(leaf).max())
        np.testing.assert_allclose(actual[path], leaf, atol=limit, rtol=0, err_msg=path)
        assert limit > 0, path
