"""Conversion of train states for checkpoints, and checks that a checkpoint belongs to this run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import make_single_device_sharding

from nalora_jax.common import trees
from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.method.rules import make

# Settings that may change on resume: they affect location, length, speed and output of the run, but
# not the result of a step (except for summation order). The model's name is included because the
# fingerprint identifies the base.
FREE_SETTINGS = (
    r"^(model|adapter|output|resume|steps|epochs|callbacks)$",
    r"^train\.(log_every|eval_every|save_every|keep|patience)$",
    r"^mesh\.",
    r"^data\.workers$",
    r"^compute\.(implementation|remat|experts|loss_chunk|compilation_cache)$",
    r"^debug\.",
)


def plain(value: Any) -> Any:
    """Returns ``value`` after a JSON round trip: tuples become lists, numpy scalars numbers."""
    return json.loads(json.dumps(value, default=lambda other: other.item()))


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def to_arrays(state: Any) -> dict[str, Any]:
    """Returns ``state`` as nested dicts of plain arrays, with typed random keys as their key data.

    Empty arrays are left out, because Orbax rejects them.
    """
    flat = {
        path: leaf
        for path, leaf in trees.flatten(state).items()
        if math.prod(leaf.shape)
    }
    return trees.unflatten(
        {
            path: jax.random.key_data(leaf) if _is_key(leaf) else leaf
            for path, leaf in flat.items()
        }
    )


def abstract(like: Any) -> dict[str, Any]:
    """Returns shapes, dtypes and shardings of `to_arrays` of ``like``."""

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        """Returns the abstract value of a stored leaf; on the first device by default."""
        sharding = getattr(leaf, "sharding", None) or make_single_device_sharding(
            jax.local_devices()[0]
        )
        if _is_key(leaf):
            words = jax.eval_shape(jax.random.key_data, leaf)
        else:
            words = leaf
        return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)

    return trees.unflatten(
        {
            path: describe(leaf)
            for path, leaf in trees.flatten(like).items()
            if math.prod(leaf.shape)
        }
    )


def from_arrays(arrays: Mapping[str, Any], like: Any) -> Any:
    """Converts the result of `to_arrays` back to the structure of ``like``, with empty arrays."""
    flat = trees.flatten(arrays)

    def back(path: str, leaf: Any) -> Any:
        """Returns a leaf of ``like``: empty arrays were not stored, keys were stored as data."""
        if not math.prod(leaf.shape):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if _is_key(leaf):
            return jax.random.wrap_key_data(flat[path], impl=_key_impl(leaf))
        return flat[path]

    return trees.map_named(back, like)


def _key_impl(leaf: Any) -> str:
    """Returns the name of a random key's generator, for an array or its abstract value."""
    # `key_impl` needs a key; `eval_shape` traces one, also for an abstract value.
    names: list[str] = []
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), leaf)
    return names[0]


def _settings(config: Any) -> dict[str, Any]:
    """Returns the settings that must not change on resume, by dotted name; None is a value."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        config, is_leaf=lambda value: value is None
    )
    named = {trees.path_name(path).replace("/", "."): value for path, value in leaves}
    free = re.compile("|".join(FREE_SETTINGS))
    return {name: value for name, value in named.items() if not free.search(name)}


def check_saved_config(
    where: str, saved: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raises an error for a checkpoint of another base model or of incompatible settings."""
    if saved["base"] != now["base"]:
        model = saved["config"].get("model")
        raise NaloraError(
            where,
            expected=f"the base model that it was trained on, {model} ({saved['base']})",
            found=f"{now['config'].get('model')} ({now['base']})",
            remedy="name that model with --model, or start a new run in another --output; the "
            "first line of metrics.jsonl has its full name as base: the same model in another "
            "dtype or quantization is another base",
        )
    check_settings(where, saved["config"], now["config"])


def check_settings(
    where: str, saved: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raises a NaloraError for settings that change the result of a run; the message lists them.

    A setting that is newer than the saved run counts as its default there, which is how the run was
    computed.
    """
    # Equal in effect though written differently: compared as equal below.
    if _equal_rules(saved.get("mechanisms"), now.get("mechanisms")):
        saved = {**saved, "mechanisms": now["mechanisms"]}
    if _equal_imports(saved.get("imports"), now.get("imports")):
        saved = {**saved, "imports": now["imports"]}
    before = _settings(saved)
    after = _settings(now)
    defaults = _settings(RunConfig().to_dict())
    absent = "(absent)"
    # Settings that the saved run does not have yet, at their defaults.
    before = {name: defaults[name] for name in after.keys() & defaults.keys()} | before
    recorded = []
    changed = []
    for name in sorted(before.keys() | after.keys()):
        old = before.get(name, absent)
        new = after.get(name, absent)
        if old != new:
            recorded.append(f"{name} = {old!r}")
            changed.append(f"{name} = {new!r}")
    if changed:
        raise NaloraError(
            where,
            expected=f"the settings that it was made with: {', '.join(recorded)}",
            found=", ".join(changed),
            remedy="restore these settings, or start a new run in another --output",
        )


def _equal_rules(before: Any, after: Any) -> bool:
    """Returns True if both lists name equal rules, perhaps one of them with settings at their
    default."""
    if not isinstance(before, list | tuple) or not isinstance(after, list | tuple):
        return False
    return list(map(make, before)) == list(map(make, after))


def _equal_imports(before: Any, after: Any) -> bool:
    """Returns True if both lists name files of equal digests, perhaps by other paths."""
    if not isinstance(before, list | tuple) or not isinstance(after, list | tuple):
        return False
    digests = [name.rpartition("@")[2] for name in before]
    return digests == [name.rpartition("@")[2] for name in after]


def check_arrays(
    where: str, saved: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Raises an error for arrays with other names, shapes or dtypes, naming the first five."""

    def show(tree: Mapping[str, Any], name: str) -> str:
        """Returns dtype and shape of an array, as ``float32[2, 8]``."""
        if name not in tree:
            return "absent"
        return f"{np.dtype(tree[name].dtype)}{list(tree[name].shape)}"

    differing = [
        name
        for name in sorted(saved.keys() | expected.keys())
        if show(saved, name) != show(expected, name)
    ]
    if differing:
        listed = differing[:5]
        raise NaloraError(
            where,
            expected=", ".join(f"{name} {show(expected, name)}" for name in listed),
            found=", ".join(f"{name} {show(saved, name)}" for name in listed),
            remedy=f"{len(differing)} array(s) differ: it was written by another version or for "
            "another model",
        )
