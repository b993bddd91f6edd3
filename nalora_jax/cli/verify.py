"""``nalora verify``: asks a server whether it applies an adapter, and with the right scale and
modules."""

from __future__ import annotations

import http.client
import json
import urllib.error
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etils import epy
from tyro.conf import Positional

from nalora_jax.common.http import request
from nalora_jax.errors import NaloraError

with epy.lazy_imports():  # on first use: help needs no JAX
    import jax
    import numpy as np

    from nalora_jax.common import trees
    from nalora_jax.loading import adapted
    from nalora_jax.models import targets
    from nalora_jax.report import inspect

_TOP = 20  # log probabilities that a server is asked for; vLLM's largest number
_TOKENS = 24  # length of a prompt, at most
_TIMEOUT = 120  # seconds for a request
# Scales with which the adapter may be served.
_SCALES = [2.0 ** (step / 2) for step in range(-8, 9) if step] + [0.8, 0.9, 1.1, 1.2]
_SAME_BASE = 0.5  # nats of a quantized or rounded base; another model is off by several
# Shares of the adapter's own effect.
_EXPLAINED = 0.25  # a nearer candidate explains the server's change
_NONE = 0.1  # a smaller change is none
_ASSUMED = 0.04  # noise of a server without a base, as of bfloat16
_ROUNDING = 0.001  # noise of float32, at least
# Limit of a served adapter over the noise of the base. Independent errors with and without the
# adapter give sqrt(2), and llama.cpp with a base in Q4_1 gives 1.6.
_NOISES = 2.5
# Effects smaller than this multiple of the difference of the bases tell nothing.
_HIDDEN = 3

LogProbs = list[dict[int, float]]  # by token id, for each prompt


@dataclass(frozen=True)
class VerifyArgs:
    """Ask an OpenAI-compatible server (vLLM, SGLang, llama.cpp) whether it serves an adapter as it
    was trained."""

    # Address of the server, such as http://localhost:8000.
    url: Positional[str]
    # Folder of a run, or of a PEFT adapter.
    adapter: Path
    # Name of the adapter at the server. By default the only served model that has a parent, or that
    # is not the base.
    name: str | None = None
    # Base model. By default the base that the adapter names.
    model: str | None = None
    # Texts after which log probabilities are compared. By default five texts of this library.
    texts: tuple[str, ...] = ()
    # Dtype of the base weights here.
    dtype: Literal["bfloat16", "float32"] = "float32"


def verify(args: VerifyArgs) -> None:
    """Prints the verdict; exits with status 1 unless the adapter is served.

    Raises:
      NaloraError: the server cannot be reached, has no log probabilities or no model of that name,
        or the adapter changes too little to tell.
    """
    server = Server(args.url, args.name)  # fails before a model is loaded
    if args.model:
        model = adapted.load(args.model, adapter=args.adapter, dtype=args.dtype)
    else:
        model = adapted.load(args.adapter, dtype=args.dtype)
    tokenizer = model.base.tokenizer
    encoded = [tokenizer.encode(text) for text in args.texts or inspect.TEXTS]
    length = min(_TOKENS, *map(len, encoded))
    if length == 0:
        raise NaloraError(
            "--texts", expected="texts of at least one token", found="an empty text"
        )
    prompts = np.array([ids[:length] for ids in encoded])  # [prompts, tokens]
    base = None
    if server.base is not None:
        base = server.log_probs(prompts, adapted=False)
    changed = server.log_probs(prompts, adapted=True)
    verdict, served = judge(model, prompts, base, changed)
    print(f"{args.url}: {verdict}")
    if not served:
        raise SystemExit(1)


class Server:
    """An OpenAI-compatible server with one adapter, and its base unless the two are merged.

    Attributes:
      base: name of the base model; None if the server lists none.
      name: name of the model with the adapter.
    """

    def __init__(self, url: str, name: str | None) -> None:
        """Asks the server for its models; ``name`` is the adapter's, or None for the only one.

        Raises:
          NaloraError: the server cannot be reached, or has no adapter of that name.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        listed = self._call("/v1/models")["data"]
        # llama.cpp has no names of adapters, but a list of files, which a request scales.
        self.files: list[dict[str, Any]] | None = None
        with suppress(NaloraError):
            self.files = self._call("/lora-adapters")
        bases = [model["id"] for model in listed if not model.get("parent")]
        adapters = [model["id"] for model in listed if model.get("parent")]
        adapters = adapters or bases[1:]
        self.base: str | None = next(iter(bases), None)
        self.name = self.base
        # A request to llama.cpp scales the files, so that an adapter needs no name.
        if self.files or (self.files is not None and name is None):
            return
        if name is None and len(adapters) == 1:
            name = adapters[0]
        if name is not None and name == self.base and not adapters:
            self.base = None  # the only model: a merged one
        elif name not in adapters:
            remedy = (
                "start it with the adapter (vLLM: --enable-lora --lora-modules NAME=FOLDER); "
                "of a server of a merged model give the model's name"
            )
            raise NaloraError(
                "--name",
                expected="the name of an adapter that the server lists",
                found=f"{name or 'none'}; it lists {', '.join(adapters) or 'no adapter'}",
                remedy=remedy,
            )
        self.name = name

    def log_probs(self, prompts: np.ndarray, *, adapted: bool) -> LogProbs:
        """Returns the log probabilities of the likeliest tokens after each prompt.

        Args:
          prompts: token ids ``[prompts, tokens]``.
          adapted: of the model with the adapter; otherwise of the base.
        """
        model = self.base
        if adapted:
            model = self.name
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": 1,
            "temperature": 1.0,
            "logprobs": _TOP,
            "return_tokens_as_token_ids": True,
            "cache_prompt": False,
            "seed": 0,
        }
        if self.files and not adapted:
            body["lora"] = [{"id": file["id"], "scale": 0.0} for file in self.files]
        tops = []
        for ids in prompts.tolist():
            answer = self._call("/v1/completions", body | {"prompt": ids})
            tops.append(self._top(answer))
        return tops

    def _top(self, answer: Mapping[str, Any]) -> dict[int, float]:
        """Returns the log probabilities in an answer by token id."""
        found = answer["choices"][0].get("logprobs") or {}
        if found.get("content"):  # llama.cpp
            likeliest = found["content"][0]["top_logprobs"]
            return {token["id"]: token["logprob"] for token in likeliest}
        if found.get("top_logprobs"):  # vLLM, SGLang
            (likeliest,) = found["top_logprobs"]
            prefix = "token_id:"
            return {
                int(name.removeprefix(prefix)): value
                for name, value in likeliest.items()
                if name.startswith(prefix)
            }
        raise NaloraError(
            self.url,
            expected="log probabilities by token id",
            found=sorted(found) or "none",
        )

    def _call(self, path: str, body: Any = None) -> Any:
        """Returns the JSON answer to a request: GET without a body, otherwise POST of JSON.

        Raises:
          NaloraError: the server cannot be reached, or answers with an error or no JSON.
        """
        url = self.url + path
        try:
            return json.loads(request(url, body, timeout=_TIMEOUT))
        except urllib.error.HTTPError as error:
            raise NaloraError(
                url,
                expected="an answer",
                found=f"status {error.code}: {error.read(300).decode(errors='replace')}",
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NaloraError(
                url, expected="an OpenAI-compatible server", found=error
            ) from error


def judge(
    model: adapted.AdaptedModel,
    prompts: np.ndarray,
    base: LogProbs | None,
    adapted: LogProbs,
) -> tuple[str, bool]:
    """Returns the verdict on a server's log probabilities, and True if the adapter is served.

    Compares changes by the adapter, which hardly depend on the precision of the server's base. The
    difference between the server's base and ours on the same tokens bounds the distance of a served
    adapter; without a server's base (None) it is assumed.
    """
    places = []  # (row, token) whose log probabilities are all known
    for row, top in enumerate(adapted):
        for token in top:
            if base is None or token in base[row]:
                places.append((row, token))
    if not places:
        verdict = "another adapter: with it none of the base's likely tokens is likely"
        return verdict, False
    rows, tokens = np.array(places).T
    # [places] by candidate
    ours = {name: values[rows, tokens] for name, values in _candidates(model, prompts)}
    base_of_ours = ours.pop("base")
    if base is None:
        before = base_of_ours
    else:
        before = np.array([base[row][token] for row, token in places])
    off = _size(base_of_ours - before)
    if off > _SAME_BASE:
        return f"other base: its log probabilities are {off:.2f} nats off ours", False
    effect = _size(ours["adapter"] - base_of_ours)
    # An effect that the difference of the bases could hide, or of rounding, tells nothing.
    if effect < max(_HIDDEN * off, 1e-4):
        raise _hidden(_HIDDEN, off, effect)
    after = np.array([adapted[row][token] for row, token in places])
    change = after - before
    if _size(change) < _NONE * effect:
        return "ignored: with the adapter it answers as without", False
    distance = {
        name: _size(change - (values - base_of_ours)) / effect
        for name, values in ours.items()
    }
    name = min(distance, key=distance.__getitem__)
    nearest = distance[name]
    away = distance["adapter"]
    if base is None:
        noise = _ASSUMED
        source = "assumed, because the server lists no base"
    else:
        noise = max(off / effect, _ROUNDING)
        source = f"{_NOISES:g} times the noise of the base"
    # A candidate that is nearer by less than the noise cannot be told from the adapter.
    if away**2 - nearest**2 > noise**2 and nearest < _EXPLAINED:
        return f"served wrongly: {name}", False
    # A server that quantizes activations is far from ours, both with and without the adapter.
    if _EXPLAINED < away <= _NOISES * noise:
        raise _hidden(_NOISES / _EXPLAINED, off, effect)
    limit = min(_NOISES * noise, _EXPLAINED)
    change_differs = f"its change of log probabilities differs by {away:.2%} from ours"
    if away > limit:
        verdict = f"another adapter: {change_differs}, more than {limit:.2%} ({source})"
        return verdict, False
    return f"served: {change_differs}, at most {limit:.2%} ({source})", True


def _hidden(times: float, off: float, effect: float) -> NaloraError:
    """Returns the error of an effect that is too small for a verdict."""
    expected = f"a change of {times * off:.2g} nats by the adapter, "
    expected += f"{times:g} times the difference of the bases"
    remedy = "give texts like those that it was trained on, "
    remedy += "or serve the base in a higher precision"
    return NaloraError(
        "--texts", expected=expected, found=f"{effect:.2g}", remedy=remedy
    )


def _candidates(
    model: adapted.AdaptedModel, prompts: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and our log probabilities ``[prompts, vocab]`` of models that may be served.

    They are the base, the adapter, the adapter with other scales, and parts of its modules.
    """
    assert model.lora is not None
    params = {"params": model.base.params}
    leaves = trees.flatten(model.lora)
    module_of = {path: path.split("/")[-2] for path in leaves if path.endswith("/b")}
    bare = model.module.clone(adapters=targets.AdapterSpec())
    yield "base", np.asarray(_log_probs(bare, params, prompts))
    applied = jax.jit(
        lambda lora: _log_probs(model.module, params | {"lora": lora}, prompts)
    )
    modules = set(module_of.values())
    # scale of B, and the modules with an adapter
    candidates = {"adapter": (1.0, modules)}
    for scale in _SCALES:
        candidates[f"with about {scale:.2g} times its scale"] = (scale, modules)
    if not model.spec.dora:
        for module in sorted(modules):
            candidates[f"without {module}"] = (1.0, modules - {module})
        for block in ("attn", "ffn"):
            inside = {
                module for path, module in module_of.items() if f"{block}/" in path
            }
            candidates[f"the modules of {block} alone"] = (1.0, inside)
    for name, (scale, scaled) in candidates.items():
        changed = dict(leaves)
        for path, module in module_of.items():
            if module in scaled:
                changed[path] = leaves[path] * scale
            else:
                changed[path] = leaves[path] * 0.0
        yield name, np.asarray(applied(trees.unflatten(changed)))


def _log_probs(module: Any, variables: Mapping[str, Any], prompts: np.ndarray) -> Any:
    """Returns the log probabilities ``[prompts, vocab]`` of the token after each prompt."""
    hidden = module.apply(variables, prompts)  # [prompts, tokens, d_model]
    # [prompts, 1, vocab]
    logits = module.apply(variables, hidden[:, -1:], method="unembed")
    return jax.nn.log_softmax(logits[:, 0].astype("float32"))


def _size(difference: np.ndarray) -> float:
    """Returns the root mean square of differences of log probabilities, in nats."""
    return float((difference**2).mean() ** 0.5)
