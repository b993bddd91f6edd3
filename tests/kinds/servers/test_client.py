"""Forms of servers: answers that vLLM 0.32 gave (vllm.json), and SGLang's documented form."""

from __future__ import annotations

import io
import json
import urllib.error
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from nalora_jax.kinds.rl.servers import client as clients
from nalora_jax.kinds.rl.servers.client import (
    SGLANG,
    VLLM,
    Client,
    Forgotten,
    Question,
    Unreachable,
    Unsound,
)

RECORDED = json.loads(Path(__file__).with_name("vllm.json").read_text())
CLIENT = Client("http://host:8000", 5.0, 49152)
SAMPLE = Question("mine", [[504, 4052, 282, 4649, 314]], 4, 0.8, 7, (2,), 0)
PROBES = Question("mine", [[504, 4052, 282, 4649, 314], [504, 4052]], 1, 1.0, 0, (), 3)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The answers of the server, in order: content, or an error."""
    left: list[Any] = []

    def request(url: str, body: Any = None, *, timeout: float) -> bytes:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return json.dumps(answer).encode()

    monkeypatch.setattr(clients, "request", request)
    return left


def test_answers_of_vllm_are_read(answers):
    answers += [RECORDED["models"], RECORDED["sample"], RECORDED["probes"]]
    listed = CLIENT.models()
    assert listed == ("base", ["mine"], 256, VLLM)
    (sample,) = CLIENT.ask(VLLM, SAMPLE)
    assert sample.tokens == [216, 33, 32, 40]
    assert sample.log_probs[1] == -1.006415843963623
    first, second = CLIENT.ask(VLLM, PROBES)
    assert first.tops[0][4723] == -1.7964277267456055
    assert second.tops[0][429] == second.log_probs[0]


def test_answers_of_sglang_are_read(answers):
    """https://docs.sglang.io: "return_logprob" and "top_logprobs_num" of ``/generate``."""
    about = {
        "output_token_logprobs": [[-0.5, 216, None], [-1.5, 2, None]],
        "output_top_logprobs": [[[-0.5, 216, None], [-0.9, 5, None]], None],
    }
    answers += [
        {"data": [{"id": "base", "owned_by": "sglang"}]},
        [{"text": "", "meta_info": about}],
    ]
    listed = CLIENT.models()
    assert (listed.base, listed.dialect) == ("", SGLANG)
    (sample,) = CLIENT.ask(SGLANG, SAMPLE)
    assert (sample.tokens, sample.log_probs) == ([216, 2], [-0.5, -1.5])
    assert sample.tops == [{216: -0.5, 5: -0.9}, {}]
    body = SGLANG.body(SAMPLE)
    assert body["lora_path"] == "mine"
    assert body["sampling_params"]["max_new_tokens"] == 4
    assert "lora_path" not in SGLANG.body(SAMPLE._replace(model=""))


def status(code: int, text: str) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("url", code, "", Message(), io.BytesIO(text.encode()))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (status(*RECORDED["errors"]["model"]), Forgotten),
        (status(*RECORDED["errors"]["vocabulary"]), Unsound),
        (status(503, "busy"), Unreachable),
        (TimeoutError(), Unreachable),
        (ConnectionResetError(), Unreachable),
        ({"choices": 3}, Unsound),
        ([], Unsound),
        ({"choices": [RECORDED["probes"]["choices"][1]]}, Unsound),
    ],
)
def test_failures_have_one_of_three_kinds(answers, answer, error):
    answers.append(answer)
    with pytest.raises(error):
        CLIENT.ask(VLLM, SAMPLE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [216, 33, 32, 40, 5]}, "5 tokens, of at most 4"),
        ({"token_ids": [216, 33, -1, 40]}, "the token id -1 of 49152"),
        ({"token_ids": [216, 33, 2.0, 40]}, "the token id 2.0"),
        ({"token_ids": [216, 2, 32, 40]}, "tokens after a stop token"),
        ({"token_ids": [216, 33]}, "4 log-probabilities of 2 tokens"),
        ({"logprobs": {"token_logprobs": [-1.0, None, -1.0, -1.0]}}, "4 log-probabilities"),
        ({"logprobs": {"token_logprobs": [-1.0, 0.5, -1.0, -1.0]}}, "the log-probability 0.5"),
        ({"prompt_token_ids": [504]}, "an answer to another prompt"),
    ],
)
def test_tokens_that_cannot_have_been_sampled_are_refused(answers, changes, message):
    choice = RECORDED["sample"]["choices"][0] | changes
    answers.append({"choices": [choice]})
    with pytest.raises(Unsound, match=message):
        CLIENT.ask(VLLM, SAMPLE)


def test_a_list_of_models_without_a_base_is_refused(answers):
    answers.append({"data": []})
    with pytest.raises(Unsound, match="no list of models"):
        CLIENT.models()
