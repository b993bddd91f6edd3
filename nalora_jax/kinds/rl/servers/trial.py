"""The trial of servers before a run loads weights: can they do what rollouts need?

Each server loads an adapter of the run's rank that is the identity, answers a prompt with it at two
temperatures, and unloads it. So a missing flag is an error of the first seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from nalora_jax.config import RLConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.rl.servers.client import (
    TOP,
    Client,
    Forgotten,
    Listed,
    Question,
    Unreachable,
    Unsound,
)
from nalora_jax.kinds.rl.servers.versions import Exports, Version
from nalora_jax.models.adapters import init_lora

_COLD = 0.5  # the second temperature


def try_servers(
    rl: RLConfig, exports: Exports, prompt: Sequence[int], longest: int, vocab: int
) -> None:
    """Checks all servers of a run, and unloads the versions of an earlier process of it.

    Args:
      rl: the addresses and the temperature.
      exports: folder of the versions.
      prompt: token ids of a prompt.
      longest: tokens of the longest prompt and its sample.
      vocab: number of tokens.

    Raises:
      NaloraError: a server cannot be reached, lacks a flag, or does not see the folder.
    """
    key = jax.random.key(0)
    identity = jax.device_get(init_lora(exports.config, exports.spec, key))
    version = exports.write(identity, 0)
    try:
        for url in rl.servers:
            address = url.rstrip("/").removesuffix("/v1")
            client = Client(address, rl.server_seconds, vocab)
            try:
                _try(client, rl, exports, version, prompt, longest)
            except (Unreachable, Forgotten, Unsound) as error:
                raise _refusal(url, "an OpenAI-compatible server", error) from error
    finally:
        exports.remove(version)


def _try(
    client: Client,
    rl: RLConfig,
    exports: Exports,
    version: Version,
    prompt: Sequence[int],
    longest: int,
) -> None:
    """Checks one server; raises a NaloraError, or an error of the client."""
    listed = client.models()
    if listed.longest is not None and listed.longest < longest:
        raise NaloraError(
            f"--rl.servers {client.url}",
            expected=f"a limit of at least {longest} tokens, prompt and sample",
            found=listed.longest,
            remedy="vLLM: --max-model-len; or lower --rl.max-new-tokens",
        )
    for name in listed.adapters:
        if name.startswith(exports.prefix):
            client.unload(listed.dialect, name)
    try:
        client.load(listed.dialect, version.name, version.path)
    except (Forgotten, Unsound, Unreachable) as error:
        expected = (
            f"a server that loads an adapter of rank {exports.rank} from {version.path}"
        )
        remedy = (
            "vLLM: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and "
            f"--max-lora-rank {exports.rank}; SGLang: --enable-lora and --max-lora-rank; "
            "--rl.server-path is the folder as the server sees it"
        )
        raise _refusal(client.url, expected, error, remedy) from error
    try:
        _check_temperature(client, listed, version, prompt, rl.temperature)
    finally:
        client.unload(listed.dialect, version.name)


def _check_temperature(
    client: Client,
    listed: Listed,
    version: Version,
    prompt: Sequence[int],
    temperature: float,
) -> None:
    """Checks that a server returns log-probabilities at the temperature that it samples at.

    A prompt is answered at the temperatures 1 and `_COLD`: differences of log-probabilities must
    then grow by ``1 / _COLD``. A run at temperature 1 needs no check, as both forms are equal.

    Raises:
      Unsound: the server returned no log-probabilities.
      NaloraError: its log-probabilities are at temperature 1 whatever was asked.
    """
    spreads = []
    for asked in (1.0, _COLD):
        question = Question(
            model=version.name,
            prompts=[prompt],
            limit=1,
            temperature=asked,
            seed=0,
            stops=(),
            top=TOP,
        )
        (answer,) = client.ask(listed.dialect, question)
        if not answer.tops or len(answer.tops[0]) < 2:
            raise Unsound("no log-probabilities of likely tokens")
        values = answer.tops[0].values()
        spreads.append(max(values) - min(values))
    processed = math.isclose(spreads[1], spreads[0] / _COLD, rel_tol=0.05)
    if temperature != 1 and not processed:
        raise NaloraError(
            f"--rl.servers {client.url}",
            expected=f"log-probabilities at the temperature {temperature:g}",
            found="those of temperature 1",
            remedy="vLLM: --logprobs-mode processed_logprobs; or --rl.temperature 1",
        )


def _refusal(
    url: str, expected: str, error: Exception, remedy: str = ""
) -> NaloraError:
    """Returns the refusal of a server that failed in its trial."""
    return NaloraError(
        f"--rl.servers {url}", expected=expected, found=error, remedy=remedy
    )
