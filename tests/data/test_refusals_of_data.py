"""Refusals of the data room that need no more than a call, and a part of each message."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nalora_jax.config import DataConfig, PreferenceConfig, RLConfig, VisionConfig
from nalora_jax.data import builders, forms
from nalora_jax.data.chat_templates import ImageTokens
from nalora_jax.data.data_files import open_rows
from nalora_jax.data.images import image_files, opened
from nalora_jax.data.images.image_chat import ChatImages, open_chats, question_tokens
from nalora_jax.data.preference_pairs import tokenize_pairs
from nalora_jax.data.prompts import prompt_data
from nalora_jax.data.questions import split_questions
from nalora_jax.data.source import MixedSource, RecordsSource
from nalora_jax.data.store import text_examples
from nalora_jax.data.tfds_source import tfds_errors
from nalora_jax.data.tokenizer import Tokenizer, read_json
from nalora_jax.errors import NaloraError

CONFIG = DataConfig()
TOKENS = ImageTokens("<img>", 7, 2, "<boi>", "[", "]")
TWO_RECORDS = RecordsSource("two", [{"prompt": "up", "completion": " sky"}] * 2)
# Called with a monkeypatch, an empty folder and a tokenizer.
Call = Callable[[pytest.MonkeyPatch, Path, Tokenizer], Any]


def generate_a_short_task(patch: pytest.MonkeyPatch, folder: Path, _: Tokenizer) -> None:
    path = folder / "piqa.jsonl.gz"
    path.write_bytes(gzip.compress(b""))
    patch.setattr(builders, "fetch_file", lambda file: path)
    list(builders.Commonsense._generate_examples(None, "piqa", "train"))  # type: ignore[arg-type]


def read_a_list(_: pytest.MonkeyPatch, folder: Path, __: Tokenizer) -> None:
    (folder / "rows.jsonl").write_text('{"prompt": "up"}\n[1, 2]\n')
    open_rows(folder / "rows.jsonl").read([0, 1])


def open_image_records(dataset: str, **vision: Any) -> opened.ImageSource:
    return opened.open_images(DataConfig(dataset=dataset), VisionConfig(**vision), "train")


def open_images_of_text(_: pytest.MonkeyPatch, folder: Path, __: Tokenizer) -> None:
    (folder / "images.txt").write_text("a.png\n")
    open_image_records(str(folder / "images.txt"))


def name_numbered_classes(_: pytest.MonkeyPatch, folder: Path, __: Tokenizer) -> None:
    rows = [{"file_name": "a.png", "label": label} for label in (0, 1)]
    (folder / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    open_image_records(str(folder / "images.jsonl")).classes()


def import_without_pillow(patch: pytest.MonkeyPatch, _: Path, __: Tokenizer) -> None:
    patch.setitem(sys.modules, "PIL.Image", None)
    image_files.pillow()


def chat_without_a_folder(*_: Any) -> None:
    source = RecordsSource("photos", [{"image": "a.png", "prompt": "What?", "completion": "Sky."}])
    ChatImages(source, CONFIG, VisionConfig("chat"), TOKENS, None)[0]


def pair_without_a_target(_: pytest.MonkeyPatch, __: Path, tokenizer: Tokenizer) -> None:
    source = RecordsSource("pairs", [{"prompt": "", "chosen": " sky", "rejected": "<|im_end|>"}])
    list(tokenize_pairs(source, [0], CONFIG, PreferenceConfig("dpo"), tokenizer))


def refuse_long_prompts(_: pytest.MonkeyPatch, __: Path, tokenizer: Tokenizer) -> None:
    source = RecordsSource("prompts", [{"prompt": "sky " * 80, "completion": " sky"}])
    config = DataConfig(too_long="error")
    rl = RLConfig(samples=2, max_new_tokens=4)
    prompt_data(source, config, tokenizer, rl=rl, context=64, batch_size=2, accumulate=1, seed=0)


def lose_an_image(_: pytest.MonkeyPatch, __: Path, tokenizer: Tokenizer) -> None:
    record = {"prompt": "up", "completion": " sky", forms.IMAGES: (b"an image",)}
    source = RecordsSource("photos", [record])
    with_images = replace(tokenizer, images=TOKENS)
    list(text_examples(source, [0], CONFIG, with_images))  # type: ignore[arg-type]


def prepare_with_tensorflow(*_: Any) -> None:
    with tfds_errors("tfds:photos", "see the catalogue"):
        raise ImportError("No module named 'tensorflow'")


def ask_about_an_image(prompt: str, images: ImageTokens | None, tokenizer: Tokenizer) -> None:
    question_tokens(prompt, [(16, 16)], replace(tokenizer, images=images), chat=False)


def cut_captions(*_: Any) -> None:
    tokenizer: Any = SimpleNamespace(max_length=77)
    nothing: Any = None
    opened.caption_tokens(nothing, nothing, tokenizer, VisionConfig(caption_length=78))


REFUSALS: dict[str, tuple[Call, str]] = {
    "a task with other questions": (
        generate_a_short_task,
        "piqa.jsonl.gz: expected .* questions, found 0; delete it and run again",
    ),
    "a line that is a list": (
        read_a_list,
        "rows.jsonl:2: expected a JSON object, found a list; fix or remove this line",
    ),
    "tools as a number": (
        lambda *_: forms.tools_of({"tools": 3}, "here"),
        "here: tools: expected a list of tools, found 3",
    ),
    "an instruction as a number": (
        lambda *_: forms.canonical({"instruction": 3, "output": "x"}, CONFIG, "here"),
        "here: instruction: expected a text, found a int",
    ),
    "chats of two data sets": (
        lambda *_: open_chats(
            DataConfig(dataset="a.jsonl,b.jsonl"), VisionConfig("chat"), "train", TOKENS
        ),
        '--data.dataset: expected one data set with --vision.task "chat", found a.jsonl,b.jsonl',
    ),
    "an image's path without a folder": (
        chat_without_a_folder,
        "image: expected an image, found the path a.png, of a data set without a folder",
    ),
    "an image for a language model": (
        lambda _, __, tokenizer: ask_about_an_image("What?", None, tokenizer),
        "--image: expected a vision-language model, found a language model",
    ),
    "image tokens in a prompt": (
        lambda _, __, tokenizer: ask_about_an_image("What is <img>?", TOKENS, tokenizer),
        "--prompt: expected no <img> in it: images come first, found 'What is <img>",
    ),
    "no Pillow": (
        import_without_pillow,
        r"images: expected the package Pillow, .*pip install 'nalora_jax\[vision\]'",
    ),
    "captions longer than the text tower": (
        cut_captions,
        "--vision.caption-length: expected at most 77, found 78",
    ),
    "classes that are numbers": (
        name_numbered_classes,
        "classes: expected names, found numbers .*; name them by --vision.classes",
    ),
    "a list of images as text": (
        open_images_of_text,
        "images.txt: expected a .csv or .jsonl file, or a folder, found .txt",
    ),
    "an answer that is no target": (
        pair_without_a_target,
        "pairs, record 0: rejected: expected a token after the first, found none",
    ),
    "a prompt that is too long": (
        refuse_long_prompts,
        "prompts, record 0: expected a prompt of at most 60 tokens, .*; raise --data.max-length",
    ),
    "one example to hold out": (
        lambda *_: split_questions([3], 0, 1),
        "--data.eval-split: expected at least two examples, found 1",
    ),
    "a weight that leaves no record": (
        lambda *_: MixedSource([TWO_RECORDS], [0.1]),
        "two: expected a weight that leaves a record, found 0.1",
    ),
    "a text without its image": (
        lose_an_image,
        "photos, record 0: expected 1 images of 2 tokens '<img>', found 0 such tokens; .*template",
    ),
    "a data set that needs TensorFlow": (
        prepare_with_tensorflow,
        "tfds:photos: expected a data set that TFDS prepares without TensorFlow, .*--data.data-dir",
    ),
    "a missing file of a model": (
        lambda _, folder, __: read_json(folder / "config.json"),
        "config.json: expected the file, found nothing of that name",
    ),
    "a negative token": (
        lambda _, __, tokenizer: tokenizer.decode([-1]),
        "token ids: expected what the model's tokenizer can take, found ",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(NaloraError, match=message):
        call(monkeypatch, tmp_path, tokenizer)
