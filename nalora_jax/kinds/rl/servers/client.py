"""One server: completions by token ids with log-probabilities, and adapters by name.

vLLM and SGLang differ in paths and forms, which a `Dialect` holds. A failed request raises one of
three errors: `Unreachable` (repeat it later), `Forgotten` (load the adapter again) or `Unsound`
(do not use this server).
"""

from __future__ import annotations

import http.client
import json
import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nalora_jax.common.http import request

TOP = 20  # log-probabilities of a probe's token; vLLM's largest number
_QUICK = 30.0  # seconds for the list of models


class Unreachable(Exception):
    """The server does not answer, answers too late or breaks off."""


class Forgotten(Exception):
    """The server has no adapter of the name, as after a restart."""


class Unsound(Exception):
    """The server refuses, or its answer is not what was asked for."""


class Question(NamedTuple):
    """What a server is asked."""

    model: str  # name of the adapter or the base
    prompts: Sequence[Sequence[int]]  # token ids
    limit: int  # most new tokens
    temperature: float
    seed: int
    stops: Sequence[int]  # ids of tokens that end a sample
    top: int  # alternatives of each token


class Reply(NamedTuple):
    """A server's completion of one prompt."""

    tokens: list[int]
    log_probs: list[float]  # of the tokens
    tops: list[dict[int, float]]  # log-probabilities of the likeliest tokens, by id


class Dialect(NamedTuple):
    """Paths and forms of one kind of server."""

    load: str
    unload: str
    generate: str
    body: Callable[[Question], dict[str, Any]]
    read: Callable[[Question, Any], list[Reply]]


def _vllm_body(question: Question) -> dict[str, Any]:
    """Returns the body of a request to vLLM's ``/v1/completions``."""
    prompts: list[Any] = [list(ids) for ids in question.prompts]
    if len(prompts) == 1:
        prompts = prompts[0]
    return {
        "model": question.model,
        "prompt": prompts,
        "max_tokens": question.limit,
        "temperature": question.temperature,
        "seed": question.seed,
        "logprobs": question.top,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stop_token_ids": list(question.stops),
        # Otherwise the defaults of the model's generation_config.json apply.
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def _read_vllm(question: Question, content: Any) -> list[Reply]:
    """Returns the answers in vLLM's form, ordered by prompt."""
    choices = content["choices"]
    indices = sorted(choice["index"] for choice in choices)
    if indices != list(range(len(question.prompts))):
        raise Unsound(f"choices {indices} for {len(question.prompts)} prompts")
    answers = []
    for choice in sorted(choices, key=lambda choice: choice["index"]):
        ids = choice.get("token_ids")
        if ids is None:
            raise Unsound("no token ids (vLLM: return_token_ids, from 0.10.2)")
        prompt = list(question.prompts[choice["index"]])
        if choice.get("prompt_token_ids", prompt) != prompt:
            raise Unsound("an answer to another prompt")
        found = choice.get("logprobs")
        if not found:
            raise Unsound("no log-probabilities")
        tops = []
        for likeliest in found.get("top_logprobs") or []:
            tops.append(_by_id(likeliest))
        answers.append(Reply(ids, found["token_logprobs"], tops))
    return answers


def _by_id(likeliest: dict[str, float] | None) -> dict[int, float]:
    """Returns log-probabilities by token id, from names such as "token_id:42"."""
    values = {}
    for name, value in (likeliest or {}).items():
        values[int(name.removeprefix("token_id:"))] = value
    return values


def _sglang_body(question: Question) -> dict[str, Any]:
    """Returns the body of a request to SGLang's ``/generate``."""
    sampling = {
        "max_new_tokens": question.limit,
        "temperature": question.temperature,
        "sampling_seed": question.seed,
        "stop_token_ids": list(question.stops),
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
    }
    body = {
        "input_ids": [list(ids) for ids in question.prompts],
        "sampling_params": sampling,
        "return_logprob": True,
        "top_logprobs_num": question.top,
    }
    if question.model:
        body["lora_path"] = question.model
    return body


def _read_sglang(question: Question, content: Any) -> list[Reply]:
    """Returns the answers in SGLang's form: tokens are ``[log-probability, id, text]``."""
    if len(content) != len(question.prompts):
        raise Unsound(f"{len(content)} answers for {len(question.prompts)} prompts")
    answers = []
    for one in content:
        about = one["meta_info"]
        drawn = about.get("output_token_logprobs")
        if not drawn:
            raise Unsound("no log-probabilities")
        tops = []
        for likeliest in about.get("output_top_logprobs") or []:
            tops.append({token[1]: token[0] for token in likeliest or []})
        ids = [token[1] for token in drawn]
        answers.append(Reply(ids, [token[0] for token in drawn], tops))
    return answers


VLLM = Dialect(
    load="/v1/load_lora_adapter",
    unload="/v1/unload_lora_adapter",
    generate="/v1/completions",
    body=_vllm_body,
    read=_read_vllm,
)
SGLANG = Dialect(
    load="/load_lora_adapter",
    unload="/unload_lora_adapter",
    generate="/generate",
    body=_sglang_body,
    read=_read_sglang,
)


class Listed(NamedTuple):
    """What a server says about its models."""

    base: str
    adapters: list[str]
    longest: int | None  # limit of prompt plus completion, if it is listed
    dialect: Dialect


@dataclass(frozen=True)
class Client:
    """A server at an address; each call is one request, from any thread.

    Attributes:
      url: such as ``http://localhost:8000``.
      seconds: time limit of a request.
      vocab: number of tokens of the model.
    """

    url: str
    seconds: float
    vocab: int

    def models(self) -> Listed:
        """Returns the base and the adapters of the server; raises as `ask`."""
        content = self._call("/v1/models", timeout=min(_QUICK, self.seconds))
        try:
            listed = content["data"]
            bases = [model for model in listed if not model.get("parent")]
            adapters = [model["id"] for model in listed if model.get("parent")]
            base = bases[0]
            dialect = VLLM
            name = base["id"]
            if base.get("owned_by") == "sglang":
                dialect = SGLANG
                name = ""
            return Listed(name, adapters, base.get("max_model_len"), dialect)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise Unsound("no list of models at /v1/models") from error

    def ask(self, dialect: Dialect, question: Question) -> list[Reply]:
        """Returns an answer to each prompt.

        Raises:
          Unreachable: no answer, or a broken one.
          Forgotten: the server has no such adapter.
          Unsound: answers that were not asked for, or without log-probabilities.
        """
        content = self._call(dialect.generate, dialect.body(question))
        try:
            answers = dialect.read(question, content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unsound(
                f"an answer of another form ({type(error).__name__})"
            ) from error
        for answer in answers:
            self._check(question, answer)
        return answers

    def _check(self, question: Question, answer: Reply) -> None:
        """Raises `Unsound` for tokens that cannot have been sampled."""
        ids = answer.tokens
        if not 1 <= len(ids) <= question.limit:
            raise Unsound(f"{len(ids)} tokens, of at most {question.limit}")
        for token in ids:
            if type(token) is not int or not 0 <= token < self.vocab:
                raise Unsound(f"the token id {token} of {self.vocab}")
        ends = [place for place, token in enumerate(ids) if token in question.stops]
        if ends and ends[0] < len(ids) - 1:
            raise Unsound("tokens after a stop token")
        values = answer.log_probs
        if len(values) != len(ids) or None in values:
            raise Unsound(f"{len(values)} log-probabilities of {len(ids)} tokens")
        if max(values) > 1e-3:
            raise Unsound(f"the log-probability {max(values):.3g}")

    def load(self, dialect: Dialect, name: str, path: str) -> None:
        """Loads the adapter in a folder of the server's machine under a name; raises as `ask`.

        An adapter of this name that is loaded counts: the proof decides about it.
        """
        try:
            self._call(dialect.load, {"lora_name": name, "lora_path": path})
        except Unsound as error:
            if "already" not in str(error):
                raise

    def unload(self, dialect: Dialect, name: str) -> None:
        """Unloads an adapter; one that is unknown counts as unloaded. Raises as `ask`."""
        try:
            self._call(dialect.unload, {"lora_name": name})
        except (Forgotten, Unsound):
            return

    def _call(
        self, path: str, body: Any = None, *, timeout: float | None = None
    ) -> Any:
        """Returns the parsed answer, or its text if it is no JSON; raises as `ask`."""
        try:
            content = request(self.url + path, body, timeout=timeout or self.seconds)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(300).decode(errors="replace")
            found = f"status {error.code} at {path}: {text}"
            if error.code == 404 and body is not None:
                raise Forgotten(found) from error
            if error.code in (408, 429) or error.code >= 500:
                raise Unreachable(found) from error
            raise Unsound(found) from error
        except TimeoutError as error:
            raise Unreachable(f"no answer within {self.seconds:g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        try:
            return json.loads(content)
        except ValueError:
            return content.decode(errors="replace")
