"""Whole runs of models whose tower reads packed patches: training on pictures of mixed shapes, resume
after a kill, PEFT, merging, generation and conversations, against transformers."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from nalora_jax.__main__ import main
from nalora_jax.common.trees import flatten
from nalora_jax.data.images.image_chat import question_tokens
from nalora_jax.loading.adapted import load
from tests import tiny, vision
from tests.vision import QUESTION

torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
AutoModel = transformers.AutoModelForImageTextToText
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
PARTS = {"qwen2_5_vl": {"image", "layers", "projector"}}
PARTS["qwen3_vl_moe"] = PARTS["qwen2_5_vl"] | {"deepstack"}
PARTS["qwen3_5_moe"] = PARTS["qwen2_5_vl"]
PARTS["smolvlm"] = {"image", "layers"}
PARTS["llava_onevision"] = PARTS["qwen2_5_vl"]
PARTS["mistral3"] = PARTS["qwen2_5_vl"]
PARTS["lfm2_vl"] = PARTS["qwen2_5_vl"]
# A run in another process, with the devices and the options of this one.
ALONE = """
import pathlib, sys

from tests import conftest, tiny
from nalora_jax.__main__ import main

with tiny.on_named_devices(pathlib.Path(sys.argv[1])):
    main(sys.argv[2:])
"""
MOST = 512  # pixels of a picture, half of the processor's limit
PICTURES = int(os.environ.get("NALORA_TEST_PICTURES", "48"))  # docs/images.md: 200
GREEDY = ["--max-new-tokens", "6", "--temperature", "0", "--dtype", "float32"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Conversations about pictures of mixed shapes; runs have one device and a new cache."""
    folder = tmp_path_factory.mktemp("data")
    with tiny.on_named_devices(folder / "cache"):
        yield vision.make_chats_of_shapes(folder)


def family_of(model: Path) -> str:
    """The ``model_type`` of a model's folder."""
    raw: dict[str, str] = json.loads((model / "config.json").read_text())
    return raw["model_type"]


def limit_of(model: Path) -> tuple[str, ...]:
    """The flags that lower the pixels of an image: of tiles these tests keep the file's."""
    if family_of(model) in vision.PLACED_FAMILIES:
        return ()
    return "--vision.max-pixels", str(MOST)


def command(model: Path, chats: Path, output: Path, *flags: str) -> list[str]:
    """The command line of a run of 8 steps."""
    return [
        *("train", "--model", str(model), "--output", str(output)),
        *("--data.dataset", str(chats), "--data.max-length", "96", "--data.chat"),
        *("--data.train-split", "train[:75%]", "--data.eval-split", "train[75%:]"),
        *("--data.workers", "1", "--vision.task", "chat", *limit_of(model)),
        *("--steps", "8", "--mesh.data", "1"),
        *("--train.batch-size", "4", "--train.log-every", "2", "--train.eval-every", "0"),
        *("--train.save-every", "2", "--optimizer.learning-rate", "2e-2"),
        *("--mechanisms", "soft:power=2,warmup=2", "--lora.rules", "ffn:4", "attn:2"),
        *("--compute.dtype", "float32", "--compute.stats-stride", "1", *flags),
    ]


# One with a dense decoder, one with DeepStack and experts, one with recurrent layers, two whose images
# are in tiles, one whose text has a token after each row, and one with tiles of any shape; the other
# families of tests/vision.py differ from them by what tests/models compares.
FAMILIES = ("qwen2_5_vl", "qwen3_vl_moe", "qwen3_5_moe")
FAMILIES += ("smolvlm", "llava_onevision", "mistral3", "lfm2_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, chats: Path, tmp_path_factory) -> tuple[Path, Path]:
    """A model's folder, and that of a finished run on it from the command line."""
    model = tmp_path_factory.mktemp(request.param)
    if request.param == "llava_onevision":  # an image of 3 by 3 tiles has 22 tokens
        vision.make_tile_model(model, request.param, patch_size=8)
    elif request.param in vision.PLACED_FAMILIES:
        vision.make_tile_model(model, request.param)
    else:
        vision.make_patch_model(model, request.param)
    folder = tmp_path_factory.mktemp("runs") / request.param
    assert main(command(model, chats, folder)) == 0
    return model, folder


def asked(model: Path, turns: Sequence[tuple[Sequence[Path], str]], answers: Sequence[str]) -> Any:
    """The inputs of transformers for a conversation: its tokenizer's text and its image processor's
    pixels, grids and numbers of tokens."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    messages: list[dict[str, Any]] = []
    images = []
    for number, (paths, text) in enumerate(turns):
        images += [Image.open(path).convert("RGB") for path in paths]
        parts = [{"type": "image"} for _ in paths] + [{"type": "text", "text": text}]
        messages.append({"role": "user", "content": parts})
        if number < len(answers):
            spoken = [{"type": "text", "text": answers[number]}]
            messages.append({"role": "assistant", "content": spoken})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if family_of(model) in vision.PLACED_FAMILIES:
        # The tokenizer begins a text unless the template does.
        return vision.tile_inputs(model, [text], [images], not text.startswith("<s>"))
    processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    size = {"shortest_edge": 64, "longest_edge": MOST}
    pixels = processor(images, return_tensors="pt", size=size)
    first, *others = text.split("<|image_pad|>")
    for grid, piece in zip(pixels["image_grid_thw"], others, strict=True):
        first += "<|image_pad|>" * int(grid.prod() // 4) + piece
    ids = tokenizer(first, return_tensors="pt", add_special_tokens=False)["input_ids"]
    places = ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {"input_ids": ids, "mm_token_type_ids": places.int(), **pixels}


def answer(whole: Any, model: Path, turns: Any, answers: Sequence[str] = ()) -> str:
    """The greedy answer of a model of transformers."""
    inputs = asked(model, turns, answers)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        made = whole.generate(**inputs, max_new_tokens=6, do_sample=False)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
    length = inputs["input_ids"].shape[1]
    return str(tokenizer.decode(made[0, length:], skip_special_tokens=True))


def in_peft(model: Path, folder: Path) -> Any:
    """The base in PEFT with a run's adapter."""
    base = AutoModel.from_pretrained(model)
    return peft.PeftModel.from_pretrained(base, folder / "adapter").eval()


def test_a_run_lowers_the_loss_and_trains_every_part(trained) -> None:
    model, folder = trained
    lines = tiny.lines(folder)
    initial, final = (next(line for line in lines if name in line) for name in ("initial", "final"))
    family = family_of(model)
    if family not in vision.PLACED_FAMILIES:
        assert load(str(folder)).base.processor.max_pixels == MOST
    assert final["eval"]["loss"] < 0.7 * initial["eval"]["loss"]
    layers = [line["layers"] for line in lines if "layers" in line][-1]
    assert min(layers["mask_mean"]) != 1  # the mechanism acts
    adapted = load(str(folder))
    parts = {path.split("/")[0] for path, _ in adapted.spec.targets}
    assert parts == PARTS[family]
    leaves = flatten(adapted.lora)
    assert all(np.abs(leaves[f"{path}/b"]).max() > 0 for path, _ in adapted.spec.targets)


@pytest.mark.parametrize("trained", FAMILIES[:1], indirect=True)
def test_a_run_that_was_killed_resumes_to_the_bit(trained, chats, tmp_path) -> None:
    """SIGKILL after the first checkpoint, in a process without this one's memory."""
    model, whole = trained
    folder = tmp_path / "run"
    flags = command(model, chats, folder)
    with subprocess.Popen(
        [sys.executable, "-c", ALONE, str(tmp_path / "cache"), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        while not (folder / "checkpoints" / "2").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "adapter").exists()
    assert main(["train", "--output", str(folder), "--resume"]) == 0
    files = [path / "adapter" / "adapter_model.safetensors" for path in (folder, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_peft_loads_the_adapter_and_transformers_computes_the_same(trained, chats) -> None:
    model, folder = trained
    adapted = load(str(folder), dtype="float32")
    tokenizer, processor = adapted.base.tokenizer, adapted.base.processor
    paths = [chats.parent / "3_0.png", chats.parent / "3_1.png"]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    sizes = [(picture.height, picture.width) for picture in pictures]
    ids = np.array([question_tokens(QUESTION, sizes, tokenizer, chat=True)], np.int32)
    inputs = asked(model, [(paths, QUESTION)], ())
    np.testing.assert_array_equal(ids, inputs["input_ids"].numpy())
    prepared = [processor.together([processor.prepare(picture) for picture in pictures])]
    batch = processor.arrays(prepared, processor.places(prepared))

    @jax.jit
    def logits(variables, batch):
        features = adapted.module.apply(variables, *processor.inputs(batch), method="encode_images")
        hidden = adapted.module.apply(variables, ids, features=features)
        return adapted.module.apply(variables, hidden, method="unembed")

    ours = np.asarray(logits(adapted.variables, batch))
    with torch.no_grad():
        expected = in_peft(model, folder)(**inputs).logits.numpy()
        base = AutoModel.from_pretrained(model).eval()(**inputs).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(base - expected).max() > 0.1


def test_the_verbs_see_pictures_of_any_shape(trained, chats, tmp_path, capsys) -> None:
    """`generate` answers as PEFT does, with one picture and with two; `merge` writes what
    transformers loads, with PEFT's logits; `eval` measures what the run reported."""
    model, folder = trained
    whole = in_peft(model, folder)
    for names in (["4_0"], ["3_0", "3_1"]):
        paths = [chats.parent / f"{name}.png" for name in names]
        shown = [word for path in paths for word in ("--image", str(path))]
        assert main(["generate", str(folder), "--prompt", QUESTION, *shown, *GREEDY]) == 0
        expected = answer(whole, model, [(paths, QUESTION)])
        assert capsys.readouterr().out == f"{expected}\n" != "\n"
    merged = tmp_path / "merged"
    assert main(["merge", str(folder), "--output", str(merged), "--dtype", "float32"]) == 0
    inputs = asked(merged, [(paths, QUESTION)], ())
    with torch.no_grad():
        found = AutoModel.from_pretrained(merged).eval()(**inputs).logits
        np.testing.assert_allclose(found, whole(**inputs).logits, atol=1e-4)
    capsys.readouterr()
    assert main(["eval", str(folder)]) == 0
    final = next(line["eval"] for line in tiny.lines(folder) if "final" in line)
    assert f"held-out loss {final['loss']:.3f}" in capsys.readouterr().out
    assert main(["export", str(folder), "--output", str(tmp_path / "vllm"), "--for", "vllm"]) == 2
    assert "language model alone" in capsys.readouterr().err


def test_a_conversation_shows_pictures_of_any_shape(trained, chats, monkeypatch, capsys) -> None:
    """Two turns, the second with two pictures more, as transformers answers them."""
    model, folder = trained
    names = [["4_0"], ["3_0", "3_1"]]
    texts = [QUESTION, "Describe this image"]
    typed = ""
    for images, text in zip(names, texts, strict=True):
        typed += "".join(f"/image {chats.parent}/{name}.png\n" for name in images) + f"{text}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert main(["chat", str(folder), *GREEDY]) == 0
    printed = capsys.readouterr().out
    whole = in_peft(model, folder)
    paths = [[chats.parent / f"{name}.png" for name in images] for images in names]
    turns = list(zip(paths, texts, strict=True))
    first = answer(whole, model, turns[:1])
    second = answer(whole, model, turns, [first])
    assert printed == f"{first}\n{second}\n"


def test_few_programs_are_compiled_for_pictures_of_many_shapes(tmp_path, caplog, capsys) -> None:
    """Of an epoch with evaluations and samples: programs that read patches. The log states how full
    the places of patches are."""
    chats = vision.make_chats_of_shapes(tmp_path, count=PICTURES * 3 // 4)
    shapes = set()
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            shapes.add(picture.size)
    assert len(shapes) >= 0.9 * PICTURES
    vision.make_patch_model(tmp_path / "model", "qwen3_vl")
    flags = command(tmp_path / "model", chats, tmp_path / "run")
    place = flags.index("--steps")
    flags[place : place + 2] = ["--epochs", "1"]
    with tiny.on_named_devices(tmp_path / "cache"), jax.log_compiles():
        assert main([*flags, "--train.eval-every", "4"]) == 0
    # "Compiling jit(step) with global shapes and types [..., uint8[rows,patches,48], ...]"
    compiled = set()
    for record in caplog.records:
        text = record.getMessage()
        if text.startswith("Compiling") and re.search(r"uint8\[\d+,\d+,48\]", text):
            compiled.add(text)
    assert 2 <= len(compiled) <= 4, [text[:40] for text in compiled]
    printed = capsys.readouterr().err
    assert re.search(r"places for \d+ image tokens a row, \d+% filled", printed)
