from __future__ import annotations

import dataclasses

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from nalora_jax.data import tokenize as module
from nalora_jax.data.chat import Rendered
from nalora_jax.data.seams import Seams, seams_of
from nalora_jax.data.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FRAGMENTS = [*SPECIAL, " ", "  ", "\n", "\n\n", "a", " the way", "Paris is", "é ", "’s", "42", ", and", "▁"]
PRE_TOKENIZERS = {
    "byte-level": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "byte-level with a space in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "metaspace": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "metaspace always": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "words": pre_tokenizers.Whitespace(),
    "none": None,
}


def trained(name: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    if PRE_TOKENIZERS[name] is None:
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        backend.pre_tokenizer = PRE_TOKENIZERS[name]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["Paris is the way, and the way is Paris a\n\nb  c\n d 42 's"] * 4, trainer)
    return Tokenizer(backend, bos_id=None, eos_id=3, pad_id=1, eos_ids=(3,))


TRAINED = {name: trained(name) for name in PRE_TOKENIZERS}


@st.composite
def rendered(draw) -> Rendered:
    text = "".join(draw(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=14)))
    ends = sorted(draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=4)) | {0, len(text)})
    return Rendered(text, tuple(zip(ends[::2], ends[1::2], strict=False)), special=False)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@settings(max_examples=50, deadline=None)
@given(st.lists(rendered(), min_size=1, max_size=3))
def test_division_at_seams_keeps_every_token_and_boundary(name, texts):
    tokenizer = TRAINED[name]
    for text, example in zip(texts, module.tokenize(texts, tokenizer, end=False), strict=True):
        cuts = module._cuts(text)
        ids, positions = module._encode_pieces(text.text, cuts, tokenizer)
        expected = module._example(text, cuts, ids, positions, tokenizer, None)
        assert example.ids.tolist() == expected.ids.tolist()
        assert example.answer.tolist() == expected.answer.tolist()


def test_only_the_word_at_a_boundary_is_encoded_twice():
    prompt, answer = "Question: which way is up and which is down?\nAnswer:", " that way is up, of course"
    division = Seams(("<|im_end|>",), words=True).divide(prompt + answer, [len(prompt)])
    assert division.texts == [prompt[:38], prompt[38:] + " that", prompt[38:], " way is up, of course"]
    assert division.heads == [False, False, True, False]


def test_special_tokens_that_take_their_surroundings_are_no_seams():
    tokenizer = TRAINED["byte-level"]
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(
        [AddedToken("<mask>", lstrip=True), AddedToken("<|im_start|>x", special=True)]
    )
    with_more = dataclasses.replace(tokenizer, backend=backend)
    text = ["<|im_start|>user<mask><|im_end|>"]
    assert seams_of(tokenizer, text) == Seams(("<|im_start|>", "<|im_end|>"), words=True)
    assert seams_of(with_more, text) == Seams(("<|im_end|>",), words=True)
    assert not seams_of(TRAINED["none"], text).words
