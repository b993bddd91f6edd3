"""Tokenizers of Hugging Face folders, against transformers reading the same folder."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from nalora_jax.data.tokenizer import AddedTokens, Tokenizer, read_json
from nalora_jax.errors import NaloraError
from nalora_jax.weights.tokenizer_files import write_tokenizer

transformers = pytest.importorskip("transformers")

CORPUS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(first, second):\n    return first + second\n",
    "I have 12345 apples; you've got 67.890 pears — naïve café, 東京, Привет 🙂",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "  two  spaces\n\n\tand tabs\r\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|><|im_start|>nested<|im_end",
    "e\u0301 \u00e9 \u200d \ufeff \U0001f468\u200d\U0001f469\u200d\U0001f467",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "What's 2+2?"},
    {"role": "assistant", "content": "4"},
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def save(folder: Path, backend: Backend | None = None, **settings: Any) -> Path:
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend or byte_level(), **(names | settings)
    )
    fast.save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_ids_and_text_equal_transformers(tmp_path: Path) -> None:
    ours, theirs = (
        Tokenizer.from_folder(save(tmp_path)),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert ours.vocab_size == len(theirs) == 320
    assert not ours.add_bos


def test_a_file_larger_than_any_tokenizer_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)  # without blocks on the disk
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(
        NaloraError, match="tokenizer.json: expected a tokenizer of up to 256 MB, found 1024 MB"
    ):
        Tokenizer.from_folder(tmp_path)


def test_begin_of_sequence_comes_from_the_post_processor(tmp_path: Path) -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", backend.token_to_id("<|im_start|>"))]
    )
    ours, theirs = (
        Tokenizer.from_folder(save(tmp_path, backend)),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    assert ours.add_bos
    assert ours.encode("Paris") == theirs.encode("Paris")
    assert ours.encode("Paris", special=False) == theirs.encode("Paris", add_special_tokens=False)
    assert ours.encode("Paris")[1:] == ours.encode("Paris", special=False)


def test_truncation_and_padding_of_the_saver_are_dropped(tmp_path: Path) -> None:
    backend = byte_level()
    save(tmp_path, backend)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_folder(tmp_path).encode(CORPUS[0])) == len(byte_level().encode(CORPUS[0]).ids)


OBJECT = {"content": "<|im_end|>", "lstrip": False}
NESTED = {"text_config": {"eos_token_id": [2, 1]}}


@pytest.mark.parametrize(
    ("settings", "config", "generation", "stops"),
    [
        ({"eos_token": OBJECT, "pad_token": None}, {}, {"eos_token_id": [2, 0]}, (2, 0)),
        ({}, {"eos_token_id": 0}, {}, (2, 0)),
        ({}, NESTED, {}, (2, 1)),
        ({}, NESTED, {"eos_token_id": [0]}, (2, 0, 1)),
        ({"eos_token": None}, {"eos_token_id": [2, 0]}, {}, (2, 0)),
        ({"eos_token": None}, {}, {"eos_token_id": [2, 0]}, (2, 0)),
        *(({}, {"eos_token_id": value}, {}, (2,)) for value in (-1, 10**30, True, "2")),
    ],
)
def test_stop_ids_come_from_all_files(
    tmp_path: Path, settings: dict, config: dict, generation: dict, stops: tuple
) -> None:
    save(tmp_path)
    edit(tmp_path / "tokenizer_config.json", **settings)
    for name, values in {"config.json": config, "generation_config.json": generation}.items():
        (tmp_path / name).write_text(json.dumps(values))
    ours = Tokenizer.from_folder(tmp_path)
    assert (ours.eos_id, ours.eos_ids) == (2, stops)
    assert ours.pad_id == (2 if "pad_token" in settings else 0)


def test_tokens_beyond_the_embedding_are_refused_only_where_they_are_used(tmp_path: Path) -> None:
    save(tmp_path)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 320, "content": "[PAD]"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    edit(tmp_path / "tokenizer_config.json", pad_token="[PAD]")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 320]}))
    free = Tokenizer.from_folder(tmp_path)
    assert (free.pad_id, free.eos_ids, free.encode("[PAD]")) == (320, (2, 320), [320])

    bound = free.for_embedding(320, "here")
    assert (bound.pad_id, bound.eos_id, bound.eos_ids) == (2, 2, (2,))
    assert bound.encode(CORPUS[0]) == free.encode(CORPUS[0])
    for encode in (bound.encode, lambda text: bound.encode_with_offsets([CORPUS[0], text])):
        with pytest.raises(
            NaloraError, match=r"expected tokens below 320, .*found '\[PAD\]', which is token 320"
        ):
            encode("some [PAD]")
    with pytest.raises(NaloraError, match="here: expected an end-of-sequence id below 2"):
        free.for_embedding(2, "here")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_character_is_no_text(tmp_path: Path, text: str) -> None:
    ours = Tokenizer.from_folder(save(tmp_path))
    for encode in (ours.encode, lambda text: ours.encode_with_offsets(["fine", text])):
        with pytest.raises(NaloraError, match="expected Unicode text, found half a character"):
            encode(text)


# ---------------------------------------------------------------- chat templates

TOOL_USE = "tools{{ tools | length }}{{ messages[0].role }}"
PLAIN = "plain{{ messages[0].role }}"


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("default", [False, True])
def test_a_template_for_tools_is_used_as_transformers_uses_it(
    tmp_path: Path, in_files: bool, default: bool
) -> None:
    save(tmp_path)
    templates = {"tool_use": TOOL_USE, **({"default": PLAIN} if default else {})}
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    if in_files:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
        if default:
            (tmp_path / "chat_template.jinja").write_text(PLAIN)
    else:
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        edit(tmp_path / "tokenizer_config.json", chat_template=listed)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for given in (tools, None) if default else (tools,):
        expected = theirs.apply_chat_template(CHAT, tools=given, tokenize=False)
        assert ours.render_chat(CHAT, tools=given) == expected
    if not default:
        with pytest.raises(NaloraError, match="chat template: .*found only one for chats with tools"):
            ours.render_chat(CHAT)
    # Written files are read in the same way.
    (tmp_path / "copy").mkdir()
    write_tokenizer(ours, tmp_path / "copy", max_length=64)
    assert Tokenizer.from_folder(tmp_path / "copy").tool_template == TOOL_USE


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(NaloraError, match="chat template.*prompt/completion"):
        Tokenizer.from_folder(save(tmp_path)).render_chat(CHAT)


# ---------------------------------------------------------------- bad folders

PANIC = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}


@pytest.mark.parametrize("change", [None, "", '{"model": 3}', PANIC])
def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path, change: str | dict | None) -> None:
    path = save(tmp_path) / "tokenizer.json"
    if isinstance(change, dict):  # the library panics
        edit(path, **change)
    else:
        path.unlink()
    if isinstance(change, str):
        path.write_text(change)
    with pytest.raises(NaloraError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("eos", ["<nowhere>", "\ud800"])
def test_an_end_of_sequence_token_is_needed(tmp_path: Path, eos: object) -> None:
    save(tmp_path)
    edit(tmp_path / "tokenizer_config.json", eos_token=eos)
    with pytest.raises(NaloraError, match="eos_token"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"[]", "list"), (b"{", "Expecting"), (b"\xff\xfe", "decode"), (b"[" * 100_000, "recursion")],
)
def test_json_files_that_are_not_objects(tmp_path: Path, content: bytes, found: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(NaloraError, match=r"x\.json") as error:
        read_json(tmp_path / "x.json")
    assert found in str(error.value)


def test_added_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """Ids and splits; a word of the vocabulary is a token of its own, and what is one already stays as it is."""
    folder = save(tmp_path)
    ours = Tokenizer.from_folder(folder).with_tokens(AddedTokens(("<id>", "the"), ("<call>", "<|im_end|>")))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<call>"]})
    theirs.add_tokens(["<id>", "the"])
    assert len(theirs) == ours.vocab_size == ours.rows_for(AddedTokens(("<id>",)), 0)
    assert ours.rows_for(AddedTokens(("the",)), 5000) == 5000
    for text in ("a<call>b<id>c", "<id><id> <call>", "the cathedral of them<|im_end|>", *TEXTS):
        ids = ours.encode(text, special=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    with pytest.raises(NaloraError, match="added tokens: expected texts that are one token each, found ''"):
        ours.with_tokens(AddedTokens(("",)))


# ---------------------------------------------------------------- tokenizers that lengthen texts without end

TABLE = (8).to_bytes(4, "little") + bytes(8) + b"x" * 1100 + b"\0"
DOUBLING = [normalizers.Replace("a", "aa")]
ENDLESS = {
    "doubling": ("normalizer", normalizers.Sequence(DOUBLING * 11)),
    "a match of nothing": ("normalizer", normalizers.Replace(Regex("x*"), "long text" * 120)),
    "a table of SentencePiece": (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(TABLE).decode()},
    ),
    "a decoder": ("decoder", decoders.Sequence([decoders.Replace("a", "aaa")] * 7)),
    "5,000 tokens added": (
        "post_processor",
        processors.TemplateProcessing(single="</s> " * 5000 + "$A", special_tokens=[("</s>", 1)]),
    ),
}
RELEASED = {
    "T5": normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    "the bound": normalizers.Sequence(DOUBLING * 10),
}


def with_part(folder: Path, name: str, part: Any) -> Path:
    backend = Backend(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    if not isinstance(part, dict):
        setattr(backend, name, part)
    raw = json.loads(backend.to_str()) | ({name: part} if isinstance(part, dict) else {})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.mark.parametrize("case", ENDLESS)
def test_rules_that_lengthen_texts_without_bound_are_refused(tmp_path: Path, case: str) -> None:
    name, part = ENDLESS[case]
    with pytest.raises(NaloraError, match=f"{name}: expected .*at most (1024|4096)"):
        Tokenizer.from_folder(with_part(tmp_path, name, part))


@pytest.mark.parametrize("model", RELEASED)
def test_rules_of_released_models_are_accepted(tmp_path: Path, model: str) -> None:
    assert Tokenizer.from_folder(with_part(tmp_path, "normalizer", RELEASED[model])).eos_id == 1
