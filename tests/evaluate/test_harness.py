"""The harness's requests: against transformers always, against the harness's own model where it is
installed."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.harness import Requests, harness_model

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


def test_log_likelihoods_equal_transformers(requests, tokenizer, torch_log_probs):
    scores = requests.loglikelihood([request(*pair) for pair in PAIRS])
    ids = tokenizer.encode
    up, whole = ids("Which way is up?"), ids(LONG + " end")[-65:]
    texts = [(up, ids(" up")), (up, ids(" down")), (ids("spaces move to what follows"), ids("  x"))]
    texts += [([END], ids(text)) for text in ("without a context", "begins with the start token")]
    expected = [torch_log_probs(*pair) for pair in (*texts, (whole[:-4], whole[-4:]))]
    np.testing.assert_allclose(
        [s for s, _ in scores], [table.sum() for table, _ in expected], rtol=1e-5
    )
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]


def test_rolling_windows_cover_every_token_once_with_the_longest_context_that_fits(
    requests, tokenizer, torch_log_probs
):
    scores = requests.loglikelihood_rolling([request("a short text"), request(LONG)])
    ids = tokenizer.encode(LONG)
    texts = [
        ([END], tokenizer.encode("a short text")),
        ([END], ids[:64]),
        (ids[len(ids) - 65 : 64], ids[64:]),
    ]
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
    assert Requests(generator).generate_until(wanted) == [
        special.decode(ids),
        special.decode(ids[:place]),
    ]
    stopped = generator.complete(["one"], max_new_tokens=12, stop=[token])[0]
    assert (stopped.ids, stopped.reason) == (ids[:place], "stop")


def test_texts_are_generated_with_the_settings_of_each_request_up_to_its_end(requests, tokenizer):
    generator = requests._generator
    whole = generator.generate(["one"], max_new_tokens=12)[0]
    stop = whole[4]
    greedy = {"do_sample": False, "temperature": 0.0}
    likeliest = {"do_sample": True, "top_k": 1, "min_p": None}
    wanted = [
        request("one", {"until": [stop], "max_gen_toks": 12}),
        request("two", {"until": [], "max_gen_toks": 5}),
        request("one", {"until": [], "max_gen_toks": 12, **greedy}),
        request("one", {"max_gen_toks": 12, **likeliest}),
        request(LONG, {"max_gen_toks": 8}),
        request("one", {"max_gen_toks": 12, "repetition_penalty": 1.3}),
    ]
    two = generator.generate(["two"], max_new_tokens=5)[0]
    long = generator.generate([tokenizer.encode(LONG)[-56:]], max_new_tokens=8)[0]
    penalised = generator.generate(["one"], max_new_tokens=12, repetition_penalty=1.3)[0]
    expected = [whole[: whole.index(stop)], two, whole, whole, long, penalised]
    assert requests.generate_until(wanted) == expected


def test_a_missing_harness_says_what_to_install(monkeypatch, model, variables, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(NaloraError, match=r"pip install 'nalora_jax\[eval\]'"):
        harness_model(model, variables, tokenizer)


@pytest.mark.lm_eval
def test_the_harness_gets_the_same_from_this_model_as_from_its_own(
    llama, model, variables, tokenizer
):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, eos_token="<end>", pad_token="<end>"
    )
    theirs = HFLM(pretrained=llama, tokenizer=fast, batch_size=2, device="cpu")
    ours = harness_model(model, variables, tokenizer)

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
