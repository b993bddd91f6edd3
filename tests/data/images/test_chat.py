"""Conversations about images: every form of record, and what is refused."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from nalora_jax.config import DataConfig, VisionConfig
from nalora_jax.data.chat_templates import ImageTokens, split_contents
from nalora_jax.data.forms import IMAGES
from nalora_jax.data.images.image_chat import most_of_rows, open_chats
from nalora_jax.data.packing import pack, plan_rows
from nalora_jax.errors import NaloraError

TOKENS = ImageTokens("<img>", 7, 2, "<boi>", "[", "]")
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (3, 4), (200, 10, 10)).save(buffer, "PNG")
    return buffer.getvalue()


def opened(folder, *records, chat=True, **vision):
    (folder / "a.png").write_bytes(png())
    (folder / "b.png").write_bytes(png())
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_chats(
        DataConfig(str(path), chat=chat), VisionConfig("chat", **vision), "train", TOKENS
    )


def openai(*parts):
    answer = {"role": "assistant", "content": "A cat."}
    return {"messages": [{"role": "user", "content": list(parts)}, answer]}


def test_every_form_is_the_same_conversation(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    records = [
        openai({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT),
        openai({"type": "image_url", "image_url": "a.png"}, TEXT),
        openai({"type": "image", "path": "a.png"}, TEXT),
        {"image": "a.png", **openai(IMAGE, TEXT)},
        {"image": "a.png", "conversations": turns},
        {"images": ["a.png"], "conversations": turns},
        {"image": "a.png", "prompt": "What?", "completion": " A cat."},
        openai({"type": "image_url", "image_url": {"url": url}}, TEXT),
    ]
    source = opened(tmp_path, *records)
    found = source.read(range(len(records)))
    for record in found:
        user, assistant = record["messages"]
        assert list(user["content"]) == [IMAGE, TEXT]
        assert assistant["content"] == "A cat."
    path = (tmp_path / "a.png").resolve()
    assert [record[IMAGES] for record in found] == [(path,)] * (len(records) - 1) + [(png(),)]


def test_images_stand_where_the_text_says(tmp_path):
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": "human", "value": "<image> or <image>?"},
    ]
    turns.append({"from": "gpt", "value": "The first."})
    record = opened(tmp_path, {"image": ["b.png", "a.png"], "conversations": turns})[0]
    short, between, end = ({"type": "text", "text": text} for text in ("Be short.", " or ", "?"))
    contents = [list(message["content"]) for message in record["messages"][:2]]
    assert contents == [[short], [IMAGE, between, IMAGE, end]]
    assert [path.name for path in record[IMAGES]] == ["b.png", "a.png"]


def test_a_caption_answers_the_prompt_of_the_settings(tmp_path):
    source = opened(tmp_path, {"image": "a.png", "caption": "a cat"}, chat=False, prompt="Say:")
    record = source[0]
    assert (record["prompt"], record["completion"]) == ("[<img><img>]\nSay:", " a cat")
    assert TOKENS.expanded("x<boi>y", []) == "x[<img><img>]y"
    assert split_contents([{"role": "user", "content": "Hi"}])[0]["content"] == [
        {"type": "text", "text": "Hi"}
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (openai({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}), "download it"),
        (openai({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "a file below"),
        (openai({"type": "image_url", "image_url": {"url": "data:image/png,xx"}}), "base64"),
        (openai(IMAGE, TEXT), "fewer images"),
        ({"image": ["a.png", "b.png"], **openai(IMAGE, TEXT)}, "more than places"),
        (openai({"type": "text", "text": "a <img> b"}), "no <img>"),
        (
            {"messages": [{"role": "assistant", "content": [IMAGE]}], "image": "a.png"},
            "texts from the",
        ),
        ({"image": "a.png", "text": "x"}, "--vision.caption-field"),
        ({"messages": "What?"}, "messages: expected a list of messages, found 'What"),
        ({"image": 3, **openai(IMAGE, TEXT)}, "image: expected an image's path, found 3"),
        (openai({"type": "video"}), r"messages\[0\]: content: expected parts of the type \"text\""),
    ],
)
def test_what_no_model_could_read_is_refused_by_line(tmp_path, record, message):
    source = opened(tmp_path, record)
    with pytest.raises(NaloraError, match=message) as error:
        source[0]
    assert "chats.jsonl:1" in error.value.where


def test_prompt_without_a_chat_has_a_place_for_each_image(tmp_path):
    record = {"image": ["a.png", "b.png"], "prompt": "<image> What?", "completion": "A cat."}
    message = "chats.jsonl:1: prompt: expected <image> once for each of 2 images"
    with pytest.raises(NaloraError, match=message):
        opened(tmp_path, record, chat=False)[0]


def test_no_epoch_has_a_row_with_more_images_than_places():
    rng = np.random.default_rng(0)
    lengths, images = rng.integers(3, 20, 200), rng.integers(0, 3, 200)
    pattern = pack(lengths, 40)
    places, _ = most_of_rows(pattern, lengths, images)
    plans = [plan_rows(pattern, lengths, 0, epoch) for epoch in range(20)]
    most = max(images[plan.row(row)].sum() for plan in plans for row in range(pattern.rows))
    assert most <= places <= 2 * np.diff(pattern.starts).max()
    assert most_of_rows(pack(lengths, 40, several=False), lengths, images)[0] == 2
