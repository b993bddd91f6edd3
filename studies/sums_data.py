"""Registers ``sums``, additions with checked answers: ``sums:60`` has all pairs of numbers from 1 to 60, shuffled.

    nalora train --import studies/sums_data.py --data.dataset sums:60 --rl.rewards number

The only split is "train", of which a study takes slices.
"""

from __future__ import annotations

import json
import random

from nalora_jax.common.downloads import cache_dir
from nalora_jax.common.files import write_atomically
from nalora_jax.data.source import Source
from nalora_jax.data.sources import FileSource, register_source
from nalora_jax.errors import NaloraError


def records(largest: int) -> list[dict[str, str]]:
    """Returns a prompt with two solved examples and its completion for each pair of numbers."""
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1)]
    random.Random(0).shuffle(pairs)
    return [
        {"prompt": f"4 + 3 = 7\n15 + 12 = 27\n{a} + {b} =", "completion": f" {a + b}"} for a, b in pairs
    ]


@register_source("sums")
def open_sums(argument: str, split: str) -> Source:
    """Returns a slice of the sums of numbers up to ``argument``."""
    if not argument.isdecimal() or not int(argument):
        raise NaloraError(f"sums:{argument}", expected="the largest number, e.g. sums:60", found=argument)
    path = cache_dir() / f"sums-{int(argument)}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records(int(argument))))
    return FileSource(path, split)
