"""The harness's requests: against transformers always, against the harness's own model where it is installed."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.harness import Requests, generation_settings, harness_model

END = 256  # the tokenizer's end-of-text token, which begins texts here


def request(*args):
    return SimpleNamespace(args=args)


LONG = "A text that is far longer than the context of this tiny model, "
LONG += "which holds only sixty-four tokens, so it is cut."
PAIRS = [
    ("Which way is up?", " up"),
    ("Which way is up?", " down"),
    ("spaces move to what follows  ", "x"),
    ("", "without a context"),
    ("", "<end>begins with the start token"),
    (LONG, " end"),
]


@pytest.fixture(scope="module")
def requests(model, variables, tokenizer) -> Requests:
    return Requests(Generator(model, variables, tokenizer))


def test_log_likelihoods_equal_transformers(requests, torch_log_probs):
    scores = requests.loglikelihood([request(*pair) for pair in PAIRS])
    up = byte_ids(b"Which way is up?")
    whole = byte_ids(LONG.encode() + b" end")[-65:]
    texts = [(up, byte_ids(b" up")), (up, byte_ids(b" down"))]
    texts += [(byte_ids(b"spaces move to what follows"), byte_ids(b"  x"))]
    texts += [([END], byte_ids(text)) for text in (b"without a context", b"begins with the start token")]
    expected = [torch_log_probs(*pair) for pair in (*texts, (whole[:-4], whole[-4:]))]
    np.testing.assert_allclose([s for s, _ in scores], [table.sum() for table, _ in expected], rtol=1e-5)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]


def byte_ids(text: bytes) -> list[int]:
    """Ids of printable ASCII in the byte-level alphabet, sorted by character: "!" is the first, " " among the last."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index("Ġ" if byte == 32 else chr(byte)) for byte in text]


def test_rolling_windows_cover_every_token_once_with_the_longest_context_that_fits(
    requests, torch_log_probs
):
    scores = requests.loglikelihood_rolling([request("a short text"), request(LONG)])
    ids = byte_ids(LONG.encode())
    texts = [([END], byte_ids(b"a short text")), ([END], ids[:64]), (ids[len(ids) - 65 : 64], ids[64:])]
    short, first, second = (torch_log_probs(*text)[0].sum() for text in texts)
    np.testing.assert_allclose(scores, [short, first + second], rtol=1e-5)


def test_special_tokens_in_until_end_a_text(model, variables, tokenizer):
    """Decoded text never holds special tokens, so only their ids can end a text."""
    ids = Generator(model, variables, tokenizer).complete(["one"], max_new_tokens=12)[0].ids
    place = next(i for i in range(1, 12) if ids[i] not in ids[:i])
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    token = backend.id_to_token(ids[place])
    backend.add_special_tokens([token])
    special = replace(tokenizer, backend=backend)
    generator = Generator(model, variables, special)
    wanted = [request("one", {"until": until, "max_gen_toks": 12}) for until in ([], [token])]
    assert Requests(generator).generate_until(wanted) == [special.decode(ids), special.decode(ids[:place])]
    stopped = generator.complete(["one"], max_new_tokens=12, stop=[token])[0]
    assert (stopped.ids, stopped.reason) == (ids[:place], "stop")


def test_texts_are_generated_up_to_each_requests_own_end(requests):
    generator = requests._generator
    whole = generator.generate(["one"], max_new_tokens=12)[0]
    stop = whole[4]
    greedy, likeliest = (
        {"do_sample": False, "temperature": 0.0},
        {"do_sample": True, "temperature": 0.7, "top_k": 1},
    )
    wanted = [
        request("one", {"until": [stop], "max_gen_toks": 12}),
        request("two", {"until": [], "max_gen_toks": 5}),
        request("one", {"until": [], "max_gen_toks": 12, **greedy}),
        request("one", {"max_gen_toks": 12, **likeliest}),
        request(LONG, {"max_gen_toks": 8}),
    ]
    two = generator.generate(["two"], max_new_tokens=5)[0]
    long = generator.generate([byte_ids(LONG.encode())[-56:]], max_new_tokens=8)[0]
    assert requests.generate_until(wanted) == [whole[: whole.index(stop)], two, whole, whole, long]


def test_settings_of_generation_reach_the_model(requests):
    options = {"max_gen_toks": 12, "repetition_penalty": 1.3}
    expected = requests._generator.generate(["one"], max_new_tokens=12, repetition_penalty=1.3)
    assert requests.generate_until([request("one", options)]) == expected
    sampled = generation_settings({"do_sample": True, "min_p": 0.1, "top_k": None})
    assert sampled == {"max_new_tokens": 256, "stop": (), "temperature": 1.0, "min_p": 0.1}


def test_a_missing_harness_says_what_to_install(monkeypatch, model, variables, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(NaloraError, match=r"pip install 'nalora_jax\[eval\]'"):
        harness_model(model, variables, tokenizer)


@pytest.mark.lm_eval
def test_the_harness_gets_the_same_from_this_model_as_from_its_own(llama, model, variables, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token="<end>", pad_token="<end>")
    theirs = HFLM(pretrained=llama, tokenizer=fast, batch_size=2, device="cpu")
    ours = harness_model(model, variables, tokenizer)
    assert isinstance(ours, LM)

    def instances(kind, arguments):
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    pairs = instances("loglikelihood", PAIRS)
    for mine, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        np.testing.assert_allclose(mine[0], other[0], rtol=1e-4)
        assert mine[1] == other[1]
    texts = instances("loglikelihood_rolling", [("a short text",), (LONG,)])
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), rtol=1e-4
    )
    options = {"until": ["e"], "max_gen_toks": 10, "do_sample": False}
    prompts = instances("generate_until", [("one", options), ("two", options)])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)
