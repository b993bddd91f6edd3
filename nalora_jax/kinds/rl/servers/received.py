"""The samples that servers sent, stored line by line, so that a resumed run asks for none twice.

    <output>/received/<settings>/<version>.jsonl     {"key", "tokens", "log_probs", "version"}

A sample's key is the digest of its request (prompt, seed, limit), which seed, step and attempt of
the run determine. A run that was killed at any time finds what it had received, and trains on the
same samples with the same versions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from pathlib import Path

import numpy as np

from nalora_jax.kinds.rl.engine import DrawnCompletion, Request

log = logging.getLogger(__name__)


def key_of(request: Request) -> str:
    """Returns the digest of a request."""
    asked = [list(map(int, request.ids)), int(request.seed), int(request.limit)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


class Received:
    """Samples by key, in memory and in a folder; used from several threads.

    Args:
      folder: of the files; None: samples are only in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._samples: dict[str, DrawnCompletion] = {}
        if folder is None or not folder.is_dir():
            return
        for file in sorted(folder.glob("*.jsonl")):
            self._read(file)

    def get(self, key: str) -> DrawnCompletion | None:
        """Returns the sample of a request, if it was received."""
        with self._lock:
            return self._samples.get(key)

    def add(self, key: str, sample: DrawnCompletion) -> DrawnCompletion:
        """Stores a sample and returns it; a second answer to a request is ignored, and the first
        one returned."""
        line = {
            "key": key,
            "tokens": sample.tokens.tolist(),
            "log_probs": sample.log_probs.tolist(),
            "version": sample.version,
        }
        with self._lock:
            if key in self._samples:
                return self._samples[key]
            self._samples[key] = sample
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                file = self._folder / f"{sample.version}.jsonl"
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
        return sample

    def forget_before(self, version: int) -> None:
        """Removes the samples of versions before ``version``, which no checkpoint needs."""
        with self._lock:
            for key, sample in list(self._samples.items()):
                if sample.version < version:
                    del self._samples[key]
            if self._folder is None:
                return
            for file in self._folder.glob("*.jsonl"):
                if int(file.stem) < version:
                    file.unlink()

    def _read(self, file: Path) -> None:
        """Reads a file; drops lines that a kill cut off, and ends the last one.

        Damaged samples are asked for again.
        """
        content = file.read_bytes()
        damaged = 0
        for line in content.splitlines():
            try:
                stored = json.loads(line)
                tokens = np.array(stored["tokens"], np.int32)
                log_probs = np.array(stored["log_probs"], np.float32)
                sample = DrawnCompletion(tokens, log_probs, int(stored["version"]))
                key = stored["key"]
            except (ValueError, TypeError, KeyError, OverflowError):
                damaged += 1
                continue
            self._samples[key] = sample
        if damaged:
            log.warning("%s: dropped %d lines that cannot be read", file, damaged)
        if content and not content.endswith(b"\n"):
            with file.open("ab") as stream:
                stream.write(b"\n")
