import dataclasses
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from nalora_jax.config import DataConfig
from nalora_jax.data import chat_templates
from nalora_jax.data import tokenize as module
from nalora_jax.data.chat_templates import ImageTokens
from nalora_jax.data.chat_text import Rendered
from nalora_jax.data.sources import FileSource
from nalora_jax.data.store import text_examples
from nalora_jax.data.tokenize import tokenize
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FRAGMENTS = [
    *SPECIAL,
    " ",
    "  ",
    "\n",
    "\n\n",
    "a",
    " the way",
    "Paris is",
    "é ",
    "’s",
    "42",
    ", and",
    "▁",
]
PRE_TOKENIZERS = {
    "byte-level": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "byte-level with a space in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "metaspace": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "words": pre_tokenizers.Whitespace(),
    "none": None,
}


def trained(name):
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    if PRE_TOKENIZERS[name] is None:
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        backend.pre_tokenizer = PRE_TOKENIZERS[name]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", *SPECIAL],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(
        ["Paris is the way, and the way is Paris a\n\nb  c\n d 42 's"] * 4, trainer
    )
    if "space" in name:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return Tokenizer(backend, bos_id=None, eos_id=3, pad_id=1, eos_ids=(3,))


TRAINED = {name: trained(name) for name in PRE_TOKENIZERS}


def prefixes(text, cuts, tokenizer):
    """The ids of a text and the tokens before each cut, by encoding every prefix."""

    def encode(part):
        return tokenizer.backend.encode(part, add_special_tokens=False).ids

    ids, positions, start, rest = [], [], 0, encode(text)
    for cut in cuts:
        head = encode(text[start:cut])
        if rest[: len(head)] != head:  # a token crosses the cut
            ids, start, rest = ids + head, cut, encode(text[cut:])
            head = []
        positions.append(len(ids) + len(head))
    return ids + rest, positions


@st.composite
def rendered(draw):
    """A completion that starts anywhere after each of several prompts, up to a special token."""
    text, answers = "", []
    for _ in range(draw(st.integers(1, 3))):
        turn = "".join(draw(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8)))
        start = len(text) + draw(st.integers(0, len(turn)))
        text += turn + "<|im_end|>"
        answers.append((start, len(text)))
    return Rendered(text, tuple(answers), special=False)


@pytest.mark.parametrize("name", TRAINED)
@settings(max_examples=30, deadline=None)
@given(st.lists(rendered(), min_size=1, max_size=3))
def test_tokens_before_a_completion_are_those_of_the_preceding_text(name, texts):
    tokenizer = TRAINED[name]
    for text, example in zip(texts, module.tokenize(texts, tokenizer, end=False), strict=True):
        cuts = sorted({cut for answer in text.answers for cut in answer} - {0, len(text.text)})
        ids, positions = prefixes(text.text, cuts, tokenizer)
        assert example.ids.tolist() == ids
        place = dict(zip([0, *cuts, len(text.text)], [0, *positions, len(ids)], strict=True))
        expected = np.zeros(len(ids), bool)
        for start, stop in text.answers:
            expected[place[start] : place[stop]] = True
        assert example.answer.tolist() == expected.tolist()
    assert (tokenizer.backend.post_processor is None) == (
        "space" not in name
    )  # files are written with it


GOOD = {
    "messages": [{"role": "user", "content": "up"}, {"role": "assistant", "content": "the sky"}]
}
EMPTY = {"messages": [{"role": "user", "content": "up"}, {"role": "assistant", "content": ""}]}
ODD = {"question": "up", "answer": "the sky"}


@pytest.mark.parametrize("loss_on", ["all", "answer"])
def test_tokens_of_images_are_not_learned(tokenizer, loss_on):
    token = tokenizer.backend.token_to_id("<|im_start|>")
    images = ImageTokens("<|im_start|>", token, 3, "<|im_start|>")
    with_images = dataclasses.replace(tokenizer, images=images)
    text = f"up {images.expansion} the {images.expansion}sky"
    start = 0 if loss_on == "all" else text.index("the")
    (example,) = tokenize([Rendered(text, ((start, len(text)),), special=True)], with_images)
    assert (example.ids == token).sum() == 6
    assert not example.answer[example.ids == token].any()
    learned = example.answer[example.ids != token]
    assert learned[-1]
    assert learned.all() == (loss_on == "all")


def error_of(path, tokenizer, **options):
    source = FileSource(path)
    with pytest.raises(NaloraError) as error:
        list(text_examples(source, np.arange(len(source)), DataConfig(**options), tokenizer))
    return str(error.value)


def test_a_message_names_up_to_ten_broken_records(write_jsonl, tokenizer):
    message = error_of(
        write_jsonl(*[GOOD] * 30, EMPTY, *[GOOD] * 200, "{oops", GOOD, ODD), tokenizer
    )
    lines = message.splitlines()
    assert lines[0].endswith("expected records without errors, found 3 broken ones:")
    assert [re.match(r"  data.jsonl:(\d+)", line)[1] for line in lines[1:]] == ["31", "232", "234"]
    assert lines[1].endswith(
        "found an empty text; the model would learn to end at once: write the answer, or remove the record"
    )
    assert lines[3].endswith("; fix or remove this record")
    many = error_of(write_jsonl(GOOD, *[EMPTY] * 40, name="many.jsonl"), tokenizer)
    assert "found 10 or more broken ones:" in many
    assert len(many.splitlines()) == 11
    assert many.endswith(
        "; the model would learn to end at once: write the answer, or remove the record"
    )


def test_a_remedy_of_several_broken_records_is_shown_once(write_jsonl, tokenizer):
    records = [GOOD, EMPTY, {"messages": []}, EMPTY]
    lines = error_of(write_jsonl(*records), tokenizer).splitlines()
    assert ["write the answer" in line for line in lines] == [False, True, False, False]
    assert lines[2].endswith("found none")
    assert lines[3].endswith("found an empty text")


@pytest.mark.parametrize("place", [0, 299])
def test_one_odd_record_is_told_the_form_of_the_others(write_jsonl, tokenizer, place):
    records = [GOOD] * 300
    records[place] = ODD
    message = error_of(write_jsonl(*records), tokenizer)
    expected = "expected chat messages (messages), as in the other records, found fields 'question', 'answer'"
    assert message.endswith(f"data.jsonl:{place + 1}: {expected}; fix or remove this record")
    # A wrong setting is one error.
    message = error_of(write_jsonl(*[GOOD] * 30), tokenizer, messages_field="turns")
    assert "data.jsonl:1: expected a field 'prompt' (or 'turns'), found 'messages'; name" in message


def test_a_template_without_end_is_reported_once_for_all_records(
    write_jsonl, tokenizer, monkeypatch
):
    monkeypatch.setattr(chat_templates, "_MAX_SECONDS", 0.02)
    loop = "{% for i in range(9999) %}{% for j in range(300) %}{% endfor %}{% endfor %}"
    endless = dataclasses.replace(tokenizer, chat_template=loop)
    message = error_of(write_jsonl(GOOD, EMPTY), endless)
    assert message.startswith("chat template: expected a text within 0.02 seconds of CPU time")
