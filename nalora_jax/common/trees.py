"""Named leaves and sizes of pytrees of nested dicts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from nalora_jax.errors import NaloraError


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
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def map_named(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Returns ``tree`` with ``function(path, leaf, *leaves_of_others)`` in place of every leaf.

    The path is text, as from `path_name`; ``others`` have the structure of ``tree``.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *others
    )


def size_bytes(tree: Any) -> int:
    """Returns the bytes of all leaves, arrays or ``ShapeDtypeStruct``."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def count_elements(tree: Any) -> int:
    """Returns the number of elements of all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------- rules over paths

T = TypeVar("T")


def first_match(rules: Iterable[tuple[str, T]], path: str) -> tuple[int, T] | None:
    """Returns index and value of the first rule (regex, value) that matches ``path``, or None.

    A rule matches if `re.search` finds it in the path.
    """
    for index, (pattern, value) in enumerate(rules):
        if re.search(pattern, path):
            return index, value
    return None


def match_rules(
    rules: Sequence[tuple[str, T]], paths: Iterable[str], *, where: str
) -> dict[str, T]:
    """Returns the value of each path, of the first rule (regex, value) that matches it.

    Paths that no rule matches are left out.

    Raises:
      NaloraError: a pattern is not a regular expression, or matched no path at all (a rule shadowed
        by earlier ones, but matching, is fine). The message lists what exists.
    """
    names = list(paths)
    matched = dict[str, T]()
    for pattern, value in rules:
        try:
            search = re.compile(pattern).search
        except (re.error, OverflowError, RecursionError) as error:
            raise NaloraError(
                where,
                expected="a regular expression",
                found=f"{pattern!r} ({error})",
            ) from error
        fitting = [name for name in names if search(name)]
        if not fitting:
            kinds = sorted({re.sub(r"/\d+/", "/*/", name) for name in names})
            raise NaloraError(
                where,
                expected="every pattern to match something",
                found=f"{pattern!r}, which matches nothing",
                remedy="these exist: " + ", ".join(kinds),
            )
        for name in fitting:
            matched.setdefault(name, value)  # the first rule decides
    return {name: matched[name] for name in names if name in matched}
