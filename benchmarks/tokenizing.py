"""Tokens per second of tokenizing training data, against the tokenizers library.

    python benchmarks/tokenizing.py --records 20000

The comparison is with the library's ``encode_batch``. Records are chats of four turns (loss on the
last completion) and prompts with completions, of words drawn from a list of 5,000. This library
also finds the boundaries of the completions and adds loss mask and end token. Both sides get
rendered texts; rendering, and the path from records to the cache, are measured separately. Figures
are the best of several repetitions, in turns, on all cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nalora_jax.config import DataConfig
from nalora_jax.data.chat import Rendered, render
from nalora_jax.data.source import RecordsSource
from nalora_jax.data.store import open_store
from nalora_jax.data.tokenize import tokenize
from nalora_jax.loading.base import read_config, read_tokenizer_of
from nalora_jax.weights.hub import resolve

CHUNK = 2048


def words(rng: np.random.Generator, count: int) -> str:
    """Returns a text of ``count`` words, every tenth with a comma."""
    drawn = rng.zipf(1.3, count) % 5000
    return " ".join(f"{VOCABULARY[n]}," if i % 10 == 9 else VOCABULARY[n] for i, n in enumerate(drawn))


def chat(rng: np.random.Generator) -> dict:
    """Returns a conversation of four turns."""
    turns = [("user", 30), ("assistant", 60), ("user", 20), ("assistant", 60)]
    return {"messages": [{"role": role, "content": words(rng, size)} for role, size in turns]}


def completion(rng: np.random.Generator) -> dict:
    """Returns a prompt and its completion."""
    return {"prompt": f"{words(rng, 100)}\nAnswer:", "completion": f" {words(rng, 40)}"}


def best(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Returns the minimum seconds of each function, which run in turns."""
    seconds = [[] for _ in functions]
    for _ in range(repeats):
        for function, times in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return [min(times) for times in seconds]


def main() -> None:
    """Prints one JSON line per kind of record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    options = parser.parse_args()
    files = resolve(options.model)
    tokenizer = read_tokenizer_of(files, read_config(files))
    config, rng = DataConfig(max_length=2048), np.random.default_rng(0)
    for kind in (chat, completion):
        records = [kind(rng) for _ in range(options.records)]
        began = time.perf_counter()
        texts: list[Rendered] = [render(record, config, tokenizer, "record") for record in records]
        rendering = time.perf_counter() - began
        chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
        tokens = sum(len(example.ids) for chunk in chunks for example in tokenize(chunk, tokenizer))
        ours, theirs = best(
            options.repeats,
            lambda chunks=chunks: [tokenize(chunk, tokenizer) for chunk in chunks],
            lambda chunks=chunks: [
                [row.ids for row in tokenizer.backend.encode_batch([text.text for text in chunk])]
                for chunk in chunks
            ],
        )
        with tempfile.TemporaryDirectory() as folder:
            source = RecordsSource(kind.__name__, records)
            began = time.perf_counter()
            open_store(source, config, tokenizer, 0, Path(folder))
            seconds = time.perf_counter() - began
        figures = {"kind": kind.__name__, "tokens": tokens, "tokens_per_second": round(tokens / ours)}
        figures |= {"encode_batch": round(tokens / theirs), "ratio": round(theirs / ours, 3)}
        print(json.dumps(figures | {"rendering_s": round(rendering, 2), "with_cache_s": round(seconds, 2)}))


VOCABULARY = [
    "".join(np.random.default_rng(i).choice(list("etaoinshrdlu"), 2 + i % 8)) for i in range(5000)
]

if __name__ == "__main__":
    main()
