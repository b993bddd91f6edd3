"""``nalora verify``: asks a server whether it applies an adapter, and with the right scale and
modules."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etils import epy
from tyro.conf import Positional

from nalora_jax.errors import NaloraError

with epy.lazy_imports():  # on first use: help needs no JAX
    import jax
    import numpy as np

    from nalora_jax.common import trees
    from nalora_jax.models import targets
    from nalora_jax.report import inspect
    from nalora_jax.train import adapted

_TOP = 20  # log probabilities that a server is asked for; vLLM's largest number
_TOKENS = 24  # length of a prompt, at most
_TIMEOUT = 120  # seconds for a request
_SCALES = [2.0 ** (step / 2) for step in range(-8, 9) if step]
# Shares of the adapter's own effect: at most this far from a candidate, or from ours where no
# candidate is nearer; at most this much of an effect.
_EQUAL = 0.25
_EXACT = 0.02
_NONE = 0.1
_SAME_BASE = 0.5  # nats of a quantized or rounded base; another model is off by several

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
    names = (args.model, args.adapter) if args.model else (args.adapter, None)
    model = adapted.load(names[0], adapter=names[1], dtype=args.dtype)
    encoded = [
        model.base.tokenizer.encode(text) for text in args.texts or inspect.TEXTS
    ]
    # [prompts, tokens]
    prompts = np.array([ids[: min(_TOKENS, *map(len, encoded))] for ids in encoded])
    base, changed = (
        server.log_probs(prompts, adapted=adapted) for adapted in (False, True)
    )
    verdict, good = judge(model, prompts, base, changed)
    print(f"{args.url}: {verdict}")
    if not good:
        raise SystemExit(1)


class Server:
    """An OpenAI-compatible server with a base model and one adapter."""

    def __init__(self, url: str, name: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        listed = self._call("/v1/models")["data"]
        # llama.cpp has no names of adapters, but a list of files, which a request scales.
        self.files: list[dict[str, Any]] | None = None
        with suppress(NaloraError):
            self.files = self._call("/lora-adapters")
        parents = [model["id"] for model in listed if not model.get("parent")]
        adapters = [
            model["id"] for model in listed if model["id"] not in parents
        ] or parents[1:]
        self.base = parents[0]
        self.name = self.base
        if self.files is not None:
            return
        if name is None and len(adapters) == 1:
            name = adapters[0]
        if name not in adapters:
            expected = "the name of an adapter that the server lists"
            found = f"{name or 'none'}; it lists {', '.join(adapters) or 'no adapter'}"
            remedy = "start it with the adapter (vLLM: --enable-lora --lora-modules NAME=FOLDER)"
            raise NaloraError("--name", expected=expected, found=found, remedy=remedy)
        self.name = name

    def log_probs(self, prompts: np.ndarray, *, adapted: bool) -> LogProbs:
        """Returns the log probabilities of the likeliest tokens after each prompt."""
        body = {
            "model": self.name if adapted else self.base,
            "max_tokens": 1,
            "temperature": 1.0,
        }
        body |= {
            "logprobs": _TOP,
            "return_tokens_as_token_ids": True,
            "cache_prompt": False,
            "seed": 0,
        }
        if self.files is not None and not adapted:
            body["lora"] = [{"id": file["id"], "scale": 0.0} for file in self.files]
        return [
            self._top(self._call("/v1/completions", body | {"prompt": ids}))
            for ids in prompts.tolist()
        ]

    def _top(self, answer: Mapping[str, Any]) -> dict[int, float]:
        found = answer["choices"][0].get("logprobs") or {}
        if found.get("content"):  # llama.cpp
            return {
                top["id"]: top["logprob"] for top in found["content"][0]["top_logprobs"]
            }
        if found.get("top_logprobs"):  # vLLM, SGLang
            (tops,) = found["top_logprobs"]
            return {
                int(name[9:]): p
                for name, p in tops.items()
                if name.startswith("token_id:")
            }
        raise NaloraError(
            self.url,
            expected="log probabilities by token id",
            found=sorted(found) or "none",
        )

    def _call(self, path: str, body: Any = None) -> Any:
        url = self.url + path
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            found = f"status {error.code}: {error.read(300).decode(errors='replace')}"
            raise NaloraError(url, expected="an answer", found=found) from error
        except (OSError, ValueError) as error:
            raise NaloraError(
                url, expected="an OpenAI-compatible server", found=error
            ) from error


def judge(
    model: adapted.AdaptedModel, prompts: np.ndarray, base: LogProbs, adapted: LogProbs
) -> tuple[str, bool]:
    """Returns the verdict on a server's log probabilities, and whether the adapter is served.

    Compared is the change by the adapter, which hardly depends on the precision of the server's
    base.
    """
    places = [
        (row, token)
        for row, top in enumerate(base)
        for token in top
        if token in adapted[row]
    ]
    if not places:
        return (
            "another adapter: with it none of the base's likely tokens is likely",
            False,
        )
    rows, tokens = np.array(places).T
    before, after = (
        np.array([top[row][token] for row, token in places]) for top in (base, adapted)
    )
    ours = {name: values[rows, tokens] for name, values in _candidates(model, prompts)}
    off = _size(ours["base"] - before)
    if off > _SAME_BASE:
        return f"other base: its log probabilities are {off:.2f} nats off ours", False
    effect = _size(ours["adapter"] - ours["base"])
    if effect < max(3 * off, 1e-4):
        expected = f"a change of {3 * off:.2g} nats by the adapter, three times the difference of the bases"
        remedy = "give texts like those that it was trained on, or serve the base in a higher precision"
        raise NaloraError(
            "--texts", expected=expected, found=f"{effect:.2g}", remedy=remedy
        )
    if _size(after - before) < _NONE * effect:
        return "ignored: with the adapter it answers as without", False
    base_of_ours = ours.pop("base")
    distance = {
        n: _size(after - before - (x - base_of_ours)) / effect for n, x in ours.items()
    }
    name = min(distance, key=distance.__getitem__)
    # no candidate is clearly nearer
    if distance["adapter"] < min(_EQUAL, max(_EXACT, 2 * distance[name])):
        return (
            f"served: the adapter's change is as here, to {distance['adapter']:.0%}",
            True,
        )
    if distance[name] < _EQUAL:
        return f"served wrongly: {name}", False
    return (
        f"another adapter: its change is {distance['adapter']:.0%} of ours away from ours",
        False,
    )


def _candidates(
    model: adapted.AdaptedModel, prompts: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields our log probabilities ``[prompts, vocab]`` of base, adapter, other scales and parts of
    the modules."""
    assert model.lora is not None
    params = {"params": model.base.params}
    leaves = trees.flatten(model.lora)
    part_of = {path: path.split("/")[-2] for path in leaves if path.endswith("/b")}
    bare = model.module.clone(adapters=targets.AdapterSpec())
    yield "base", np.asarray(_log_probs(bare, params, prompts))
    applied = jax.jit(
        lambda lora: _log_probs(model.module, params | {"lora": lora}, prompts)
    )
    parts = set(part_of.values())
    kept = {"adapter": (1.0, parts)}
    kept |= {
        f"with about {scale:g} times its scale": (scale, parts) for scale in _SCALES
    }
    if not model.spec.dora:
        kept |= {f"without {part}": (1.0, parts - {part}) for part in sorted(parts)}
        for block in ("attn", "ffn"):
            inside = {part for path, part in part_of.items() if f"{block}/" in path}
            kept[f"the modules of {block} alone"] = (1.0, inside)
    for name, (scale, names) in kept.items():
        scaled = {
            path: leaves[path] * (scale if part in names else 0.0)
            for path, part in part_of.items()
        }
        yield name, np.asarray(applied(trees.unflatten(leaves | scaled)))


def _log_probs(module: Any, variables: Mapping[str, Any], prompts: np.ndarray) -> Any:
    hidden = module.apply(variables, prompts)  # [prompts, tokens, d_model]
    # [prompts, 1, vocab]
    logits = module.apply(variables, hidden[:, -1:], method="unembed")
    return jax.nn.log_softmax(logits[:, 0].astype("float32"))


def _size(difference: np.ndarray) -> float:
    """Returns the root mean square."""
    return float((difference**2).mean() ** 0.5)
