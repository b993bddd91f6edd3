"""Proof that a server answers as one version of the adapter, by log-probabilities of probes.

Probes are a few prompts of the run. Server and training program give the log-probabilities of the
token after each. As in ``nalora verify``, changes by the adapter are compared, which hardly depend
on the precision of the server's base. The served change must be nearer to this version's than to
those of the base, an earlier version and half of this version, and not far from it.

Versions that differ by less than three times the noise cannot be told apart, as at the first step,
whose adapter is the identity. The earlier version is the previous one, or the last that could be
told from the one before, so that a server that keeps an old version is found after some steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nalora_jax.common import trees
from nalora_jax.kinds.rl.servers.client import Unsound
from nalora_jax.mesh.processes import fetch

# Nats between the bases of server and training program, at most; another model is off by several.
_SAME_BASE = 0.5
_NOISES = 2.5  # distance of a served version, at most, over the difference of the bases
_EXPLAINED = 0.25  # or over the version's own change
_ROUNDING = 1e-3  # nats, of float32 over all layers
_TOLD = 3.0  # a difference over the noise, at which versions are told apart
_PROMPTS = 8  # of the run, each with its first half
_LENGTH = 64  # last tokens of a prompt

Tops = Sequence[Mapping[int, float]]  # log-probabilities by token id, of each probe
THIS = "this version"
BASE = "the base without an adapter"
HALF = "half of this version"


class Probes(NamedTuple):
    """Prompts of the training program, padded on the right."""

    tokens: np.ndarray  # int32 [probes, length]
    lengths: np.ndarray  # int32 [probes]

    @property
    def prompts(self) -> list[list[int]]:
        """Returns the token ids of each probe."""
        rows = zip(self.tokens, self.lengths, strict=True)
        return [row[:count].tolist() for row, count in rows]


def make_probes(prompts: Sequence[Sequence[int]]) -> Probes:
    """Returns probes of some of the prompts of a run: their ends, and the first halves of these."""
    rows: list[list[int]] = []
    for ids in prompts[:_PROMPTS]:
        end = list(ids)[-_LENGTH:]
        rows.append(end)
        if len(end) > 1:
            rows.append(end[: len(end) // 2])
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), int(lengths.max())), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return Probes(tokens, lengths)


def scaled(lora: Any, factor: float) -> Any:
    """Returns an adapter whose update is ``factor`` times as large."""

    def of_leaf(path: str, leaf: Any) -> Any:
        """Returns a leaf; up-projections are scaled."""
        if path.endswith("/b"):
            return leaf * factor
        return leaf

    return trees.map_named(of_leaf, lora)


def expected_log_probs(
    model: Any, params: Any, lora: Any, probes: Probes
) -> np.ndarray:
    """Returns the training program's log-probabilities ``[probes, vocab]`` after each probe."""
    frozen = params if "params" in params else {"params": params}
    variables = {**frozen, "lora": lora}
    return np.asarray(fetch(_log_probs(model, variables, *probes)))


@partial(jax.jit, static_argnames="model")
def _log_probs(
    model: Any, variables: Any, tokens: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Returns log-probabilities ``[probes, vocab]`` of the token after each row."""
    hidden = model.apply(variables, tokens)  # [probes, length, d_model]
    places = (lengths - 1)[:, None, None]
    last = jnp.take_along_axis(hidden, places, axis=1)  # [probes, 1, d_model]
    logits = model.apply(variables, last, method="unembed")  # [probes, 1, vocab]
    return jax.nn.log_softmax(logits[:, 0].astype(jnp.float32))


class Proof(NamedTuple):
    """What a server's answers to the probes show.

    Distances are root mean squares over tokens, in nats.
    """

    verdict: str  # "" if this version is served, otherwise what was served
    distance: float  # from this version
    effect: float  # of this version: its distance from the base
    noise: float  # distance of the server's base from ours
    untold: tuple[str, ...]  # versions that cannot be told from this one

    @property
    def line(self) -> str:
        """Returns the proof in one line."""
        text = f"{self.distance:.2g} nats from this version, "
        text += f"which is {self.effect:.2g} from the base"
        if self.untold and not self.verdict:
            text += f"; not told from {', '.join(self.untold)}"
        return text


class Anchor(NamedTuple):
    """An earlier version that a server was proved to serve."""

    name: str  # for messages
    expected: np.ndarray  # log-probabilities of the training program, [probes, vocab]
    served: Tops  # of the server


class Rival(NamedTuple):
    """What remains of a server's answers if it serves this version, or another one.

    Arrays ``[places]``, nats.
    """

    this: np.ndarray
    other: np.ndarray
    rows: np.ndarray  # the probe of each place

    def at(self, row: int) -> Rival:
        """Returns the places of one probe."""
        here = self.rows == row
        return Rival(self.this[here], self.other[here], self.rows[here])

    @property
    def is_told(self) -> bool:
        """Returns True if the versions differ by more than the noise, the smaller remainder."""
        noise = min(_size(self.this), _size(self.other))
        return _size(self.this - self.other) > max(_TOLD * noise, _ROUNDING / 10)

    @property
    def wins(self) -> bool:
        """Returns True if the other version is served."""
        return self.is_told and _size(self.other) < _size(self.this)

    @property
    def loses(self) -> bool:
        """Returns True if this version is served."""
        return self.is_told and _size(self.this) < _size(self.other)


def prove(
    expected: Mapping[str, np.ndarray], base: Tops, served: Tops, anchor: Anchor | None
) -> Proof:
    """Returns the proof for a server.

    Args:
      expected: log-probabilities ``[probes, vocab]`` of the training program for `THIS`, `BASE` and
        `HALF`.
      base: the server's, without an adapter.
      served: the server's, with this version by its name.
      anchor: an earlier version.

    Raises:
      Unsound: the server has another base, or too few log-probabilities.
    """
    rows, tokens = _common_places(base, served)
    change = _values(served, rows, tokens) - _values(base, rows, tokens)
    of_base = expected[BASE][rows, tokens]
    noise = _size(_values(base, rows, tokens) - of_base)
    if noise > _SAME_BASE:
        raise Unsound(f"another base: it is {noise:.2f} nats from ours")
    ours = expected[THIS][rows, tokens] - of_base
    half = expected[HALF][rows, tokens] - of_base
    rivals = {
        BASE: Rival(change - ours, change, rows),
        HALF: Rival(change - ours, change - half, rows),
    }
    if anchor is not None:
        rivals[anchor.name] = _rival_anchor(anchor, expected[THIS], served)
    distance = _size(change - ours)
    effect = _size(ours)
    verdict = _served_instead(rivals)
    limit = max(_NOISES * noise, _EXPLAINED * effect, _ROUNDING)
    if not verdict and distance > limit:
        verdict = "another adapter"
    untold = tuple(name for name, rival in rivals.items() if not rival.is_told)
    return Proof(verdict, distance, effect, noise, untold)


def _rival_anchor(anchor: Anchor, expected: np.ndarray, served: Tops) -> Rival:
    """Returns the comparison with an earlier version.

    It compares the server's answers with its earlier ones, which cancels most of the noise.
    """
    rows, tokens = _common_places(anchor.served, served)
    change = _values(served, rows, tokens) - _values(anchor.served, rows, tokens)
    ours = expected[rows, tokens] - anchor.expected[rows, tokens]
    return Rival(change - ours, change, rows)


def _served_instead(rivals: Mapping[str, Rival]) -> str:
    """Returns what a server serves instead of this version, or "" if no other version wins."""
    for name, rival in rivals.items():
        of_probes = {row: rival.at(row) for row in np.unique(rival.rows).tolist()}
        won = [row for row, of_probe in of_probes.items() if of_probe.wins]
        if won and any(of_probe.loses for of_probe in of_probes.values()):
            return f"several versions: {name} to probe {won[0]}"
    winners = [name for name, rival in rivals.items() if rival.wins]
    return min(winners, key=lambda name: _size(rivals[name].other), default="")


def _values(tops: Tops, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns a server's log-probabilities of some tokens, ``[places]``."""
    return np.array([tops[row][token] for row, token in zip(rows, tokens, strict=True)])


def _common_places(base: Tops, served: Tops) -> tuple[np.ndarray, np.ndarray]:
    """Returns the probes and tokens whose log-probabilities are in both of a server's answers, int
    ``[places]`` each."""
    rows = []
    tokens = []
    for row, top in enumerate(served):
        common = sorted(set(top) & set(base[row]))
        rows += [row] * len(common)
        tokens += common
    if not rows:
        raise Unsound("none of the tokens that were likely before is likely")
    return np.array(rows), np.array(tokens)


def _size(differences: np.ndarray) -> float:
    """Returns the root mean square of differences of log-probabilities, in nats."""
    return float((differences**2).mean() ** 0.5)
