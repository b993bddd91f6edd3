"""Tokenizers of Hugging Face folders, against transformers reading the same folder."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from nalora_jax.data.tokenizer import AddedTokens, Tokenizer
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
CHAT = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "What's 2+2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture
def backend(tokenizer):
    return Backend.from_str(tokenizer.backend.to_str())


def save(folder, backend):
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, backend):
    return save(tmp_path, backend)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("begins", [False, True])
def test_ids_and_text_equal_transformers(tmp_path, backend, begins):
    if begins:
        special = [("<|im_start|>", backend.token_to_id("<|im_start|>"))]
        single = "<|im_start|> $A"
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
    save(tmp_path, backend)
    backend.enable_truncation(4)  # which the saver used, and no reader shall
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = (
        Tokenizer.from_folder(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False)
    found = ours.bos_id, ours.eos_id, ours.pad_id
    assert found == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs) == backend.get_vocab_size()
    assert ours.add_bos == begins


def test_a_file_larger_than_any_tokenizer_is_refused_unread(tmp_path, monkeypatch):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)  # without blocks on the disk
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(
        NaloraError, match="json: expected a tokenizer of up to 256 MB, found 1024 MB"
    ):
        Tokenizer.from_folder(tmp_path)


OBJECT = {"content": "<|im_end|>", "lstrip": False}
NESTED = {"text_config": {"eos_token_id": [2, 1]}}


@pytest.mark.parametrize(
    ("settings", "config", "generation", "stops"),
    [
        ({"eos_token": OBJECT, "pad_token": None}, {}, {"eos_token_id": [2, 0]}, (2, 0)),
        ({}, NESTED, {"eos_token_id": [0]}, (2, 0, 1)),
        ({"eos_token": None}, {"eos_token_id": [2, 0]}, {}, (2, 0)),
        *(({}, {"eos_token_id": value}, {}, (2,)) for value in (10**30, "2")),
    ],
)
def test_stop_ids_come_from_all_files(folder, settings, config, generation, stops):
    edit(folder / "tokenizer_config.json", **settings)
    for name, values in {"config.json": config, "generation_config.json": generation}.items():
        (folder / name).write_text(json.dumps(values))
    ours = Tokenizer.from_folder(folder)
    assert (ours.eos_id, ours.eos_ids) == (2, stops)
    assert ours.pad_id == (2 if "pad_token" in settings else 0)


def test_tokens_beyond_the_embedding_are_refused_only_where_they_are_used(folder):
    size = Tokenizer.from_folder(folder).vocab_size
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": size, "content": "[PAD]"})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    edit(folder / "tokenizer_config.json", pad_token="[PAD]")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, size]}))
    free = Tokenizer.from_folder(folder)
    assert (free.pad_id, free.eos_ids, free.encode("[PAD]")) == (size, (2, size), [size])

    bound = free.for_embedding(size, "here")
    assert (bound.pad_id, bound.eos_id, bound.eos_ids) == (2, 2, (2,))
    assert bound.encode(CORPUS[0]) == free.encode(CORPUS[0])
    for encode in (bound.encode, lambda text: bound.encode_with_offsets([CORPUS[0], text])):
        message = rf"expected tokens below {size}, .*found '\[PAD\]', which is token {size}"
        with pytest.raises(NaloraError, match=message):
            encode("some [PAD]")
        with pytest.raises(NaloraError, match="expected Unicode text, found half a character"):
            encode("a\udfffb")
    with pytest.raises(NaloraError, match="here: expected an end-of-sequence id below 2"):
        free.for_embedding(2, "here")


TOOL_USE = "tools{{ tools | length }}{{ messages[0].role }}"
PLAIN = "plain{{ messages[0].role }}"


@pytest.mark.parametrize(("in_files", "default"), [(False, False), (False, True), (True, True)])
def test_a_template_for_tools_is_used_as_transformers_uses_it(folder, in_files, default):
    templates = {"tool_use": TOOL_USE, **({"default": PLAIN} if default else {})}
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if in_files:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
        if default:
            (folder / "chat_template.jinja").write_text(PLAIN)
    else:
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        edit(folder / "tokenizer_config.json", chat_template=listed)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for given in (tools, None) if default else (tools,):
        expected = theirs.apply_chat_template(CHAT, tools=given, tokenize=False)
        assert ours.render_chat(CHAT, tools=given) == expected
    if not default:
        with pytest.raises(
            NaloraError, match="chat template: .*found only one for chats with tools"
        ):
            ours.render_chat(CHAT)
    # Written files are read in the same way.
    (folder / "copy").mkdir()
    write_tokenizer(ours, folder / "copy", max_length=64)
    assert Tokenizer.from_folder(folder / "copy").tool_template == TOOL_USE


PANIC = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json"),
        ("tokenizer.json", b'{"model": 3}', r"tokenizer\.json"),
        ("tokenizer.json", PANIC, r"tokenizer\.json"),  # the library panics
        ("tokenizer_config.json", b'{"eos_token": "<nowhere>"}', "eos_token"),
        ("config.json", b"[]", r"config\.json: .*list"),
        ("config.json", b"[" * 100_000, r"config\.json: .*recursion"),
    ],
)
def test_missing_and_damaged_files_are_named(folder, name, content, message):
    if isinstance(content, dict):
        edit(folder / name, **content)
    elif content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(NaloraError, match=message):
        Tokenizer.from_folder(folder)


def test_added_tokens_are_those_of_transformers(folder):
    """Ids and splits; a word of the vocabulary is a token of its own, and what is one already stays
    as it is."""
    ours = Tokenizer.from_folder(folder).with_tokens(
        AddedTokens(("<id>", "way"), ("<call>", "<|im_end|>"))
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ["<call>"]})
    theirs.add_tokens(["<id>", "way"])
    assert len(theirs) == ours.vocab_size == ours.rows_for(AddedTokens(("<id>",)), 0)
    assert ours.rows_for(AddedTokens(("way",)), 5000) == 5000
    for text in ("a<call>b<id>c", "<id><id> <call>", "away on a motorway<|im_end|>", *TEXTS):
        ids = ours.encode(text, special=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    with pytest.raises(
        NaloraError, match="added tokens: expected texts that are one token each, found ''"
    ):
        ours.with_tokens(AddedTokens(("",)))


TABLE = (8).to_bytes(4, "little") + bytes(8) + b"x" * 1100 + b"\0"
MANY = processors.TemplateProcessing(single="</s> " * 5000 + "$A", special_tokens=[("</s>", 1)])
ENDLESS = {
    "a match of nothing": ("normalizer", normalizers.Replace(Regex("x*"), "long text" * 120)),
    "eleven doublings": ("normalizer", normalizers.Sequence([normalizers.Replace("a", "aa")] * 11)),
    "a table of SentencePiece": ("normalizer", normalizers.Precompiled(TABLE)),
    "a decoder": ("decoder", decoders.Sequence([decoders.Replace("a", "aaa")] * 7)),
    "5,000 tokens added": ("post_processor", MANY),
}


def with_part(folder, name, part):
    backend = Backend(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    setattr(backend, name, part)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.mark.parametrize("case", ENDLESS)
def test_rules_that_lengthen_texts_without_bound_are_refused(tmp_path, case):
    name, part = ENDLESS[case]
    with pytest.raises(NaloraError, match=f"{name}: expected .*at most (1024|4096)"):
        Tokenizer.from_folder(with_part(tmp_path, name, part))
    ten = normalizers.Sequence([normalizers.Replace("a", "aa")] * 10)
    assert Tokenizer.from_folder(with_part(tmp_path, "normalizer", ten)).eos_id == 1
