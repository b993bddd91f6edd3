"""Named leaves and sizes of pytrees of nested dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves by slash-joined path; ``is_leaf`` as in ``jax.tree.flatten``.

    Example:
      >>> flatten({"ffn": {"gate_proj": {"a": 1, "b": 2}}})
      {'ffn/gate_proj/a': 1, 'ffn/gate_proj/b': 2}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return {path_name(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict whose `flatten` is ``flat``."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def path_name(path: Sequence[Any]) -> str:
    """Returns a key path as text: dict keys, indices and attribute names joined by slashes."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def map_named(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Returns ``tree_map`` of a function with the path: ``function(path, leaf, *others)``."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *others
    )


def size_bytes(tree: Any) -> int:
    """Returns the bytes of all leaves, arrays or ``ShapeDtypeStruct``."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count(tree: Any) -> int:
    """Returns the number of elements of all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
