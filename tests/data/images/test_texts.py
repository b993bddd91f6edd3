"""The text of an image in tiles, against transformers' functions for Idefics 3 and SmolVLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nalora_jax.data.chat_templates import ImageLayout, image_parts
from nalora_jax.evaluate.generate.conversation import Conversation
from nalora_jax.weights.base import load_model
from tests import vision

pytest.importorskip("transformers")
smolvlm = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")


@pytest.mark.parametrize("grid", [(0, 0), (1, 2), (3, 1), (4, 4)], ids=str)
def test_tiles_are_written_as_by_smolvlm(tmp_path_factory, grid) -> None:
    folder = vision.make_tile_model(tmp_path_factory.mktemp("model"), "smolvlm")
    tokens: Any = load_model(str(folder), dtype="float32", images=True).tokenizer.images
    layout = ImageLayout(4, *grid, 4 if grid[0] else 0)
    names = ("<fake_token_around_image>", "<image>", "<global-img>")
    assert tokens.text_of(layout) == smolvlm.get_image_prompt_string(*grid, 4, *names)
    assert tokens.text_of(layout).count("<image>") == layout.tokens


def test_rows_end_as_by_pixtral(tmp_path) -> None:
    """`PixtralProcessor` of transformers 5.25, which needs torchvision, made the texts of images with
    these heights and widths, at most 40 pixels, in squares of 8."""
    folder = vision.make_tile_model(tmp_path, "mistral3")
    tokens: Any = load_model(str(folder), dtype="float32", images=True).tokenizer.images
    texts = json.loads((Path(__file__).parent / "pixtral_texts.json").read_text())
    for size, text in texts:
        (layout,) = tokens.layouts([tuple(size)])
        assert tokens.text_of(layout) == text, size


def test_a_second_picture_changes_the_tokens_of_the_first(tmp_path) -> None:
    """LLaVA-OneVision splits the picture of a text with one into tiles, and several not."""
    folder = vision.make_tile_model(tmp_path, "llava_onevision")
    loaded = load_model(str(folder), dtype="float32", images=True)
    processor: Any = loaded.processor
    asked = []

    def stream(prompt: list[int], images: Any, **settings: Any) -> Any:
        asked.append((prompt.count(loaded.tokenizer.images.token_id), len(images)))
        return iter(["red"])

    generator: Any = SimpleNamespace(tokenizer=loaded.tokenizer, processor=processor, stream=stream)
    talk = Conversation()
    pictures = [processor.prepare(vision.draw_noise(*size)) for size in ((20, 31), (40, 18))]
    for picture in pictures:
        list(talk.ask("What is this?", generator, images=[picture]))
    (alone,) = processor.layouts([(20, 31)])
    assert asked == [(alone.tokens, 1), (2 * 17, 2)]
    assert [part["layout"].tokens for part in image_parts(talk.turns)] == [17, 17]
