"""An `nalora_jax.kinds.rl.engine.Engine` of several servers: loads, proves, asks, repeats, drops.

Requests wait in one queue, from which the threads of each server take them, so a fast server
answers more. A request belongs to the version of the adapter that was newest when it was made; each
server loads and proves a version before its first request of that version. What happens to a
request and its server:

- No connection, a broken answer, a status of 500 or above, or an answer too late: asked again, by
  any server. The server is used again if it answers within ``rl.server_wait`` seconds, and dropped
  after several failures in a row.
- The adapter is unknown, as after a restart: the server loads and proves it again.
- The proof shows another version: it is repeated a few times, then the server is dropped.
- An answer that was not asked for: asked elsewhere, and the server is dropped.

Without a server left the run ends with one message of all reasons.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from nalora_jax.config import RLConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.rl.engine import DrawnCompletion, Request
from nalora_jax.kinds.rl.servers.client import (
    TOP,
    Client,
    Forgotten,
    Listed,
    Question,
    Reply,
    Unreachable,
    Unsound,
)
from nalora_jax.kinds.rl.servers.proof import (
    BASE,
    HALF,
    THIS,
    Anchor,
    Probes,
    Proof,
    Tops,
    prove,
    scaled,
)
from nalora_jax.kinds.rl.servers.received import Received, key_of
from nalora_jax.kinds.rl.servers.versions import Exports, Version
from nalora_jax.mesh.processes import fetch, run_on_first_process

log = logging.getLogger(__name__)

PROOFS = "proofs.jsonl"
_PARALLEL = 32  # requests of a server at a time
_PROOFS = 3  # attempts to prove a version
_FAILURES = (
    3  # of a server in a row, with an answer to none of its requests between them
)
_PAUSE = 1.0  # seconds between two attempts to reach a server


@dataclass(eq=False)
class _Task:
    """A request that waits for its answer."""

    request: Request
    key: str
    version: Version
    future: Future[DrawnCompletion] = field(default_factory=Future)


class _Server:
    """The state of one server; its lock orders loads, proofs and waits."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.lock = threading.Lock()
        self.listed: Listed | None = None
        self.base: Tops | None = None  # answers to the probes without an adapter
        self.proved: dict[str, Proof] = {}  # by name of a loaded version
        self.anchor: Anchor | None = None  # an earlier version that it served
        self.failures = 0  # in a row
        self.reached = 0.0  # time at which it was last found to answer
        self.dropped = ""  # the reason


class ServerPool:
    """The servers of a run. Threads ask; `load` and `sample` are called by the main thread.

    Args:
      rl: addresses, temperature and time limits.
      exports: folder of the versions.
      probes: for the proofs.
      expect: the training program's log-probabilities ``[probes, vocab]`` for an adapter.
      received: samples of earlier processes.
      stops: ids of tokens that end a sample.
      vocab: number of tokens.
      folder: of the run, for the log of proofs; None: none is written.
    """

    def __init__(
        self,
        rl: RLConfig,
        exports: Exports,
        probes: Probes,
        expect: Callable[[Any], np.ndarray],
        received: Received,
        *,
        stops: Sequence[int],
        vocab: int,
        folder: Path | None = None,
    ) -> None:
        self._rl = rl
        self._exports = exports
        self._probes = probes
        self._expect = expect
        self._received = received
        self._stops = sorted(stops)
        self._proof_file = folder and folder / PROOFS
        self._servers = [
            _Server(
                Client(url.rstrip("/").removesuffix("/v1"), rl.server_seconds, vocab)
            )
            for url in rl.servers
        ]
        self._queue: queue.Queue[_Task] = queue.Queue()
        self._lock = threading.Lock()
        self._pending: dict[str, _Task] = {}
        self._error: NaloraError | None = None
        self._closed = False
        self._current: Version | None = None
        self._versions: dict[str, Version] = {}
        self._base: np.ndarray | None = None  # log-probabilities of the probes
        # The same by name of a version, of `THIS`, `HALF` and `BASE`.
        self._expected: dict[str, dict[str, np.ndarray]] = {}
        self._loads: list[dict[str, Any]] = []  # since the last figures
        self._waited = 0.0  # seconds of `sample` since the last figures
        self._idle = 0.0  # seconds without a request at any server
        self._idle_since: float | None = time.monotonic()
        if jax.process_index() == 0:
            for server in self._servers:
                for _ in range(_PARALLEL):
                    work = threading.Thread(
                        target=self._work, args=(server,), daemon=True
                    )
                    work.start()

    # ------------------------------------------------------------ called by the run

    def load(self, lora: Any, step: int) -> None:
        """Makes an adapter the version of later requests; servers load it with their first one.

        All processes of the run call it. Versions that no request needs are unloaded.

        Raises:
          NaloraError: vLLM cannot serve the adapter, or its folder cannot be written.
        """
        if self._current is not None and self._current.step == step:
            return
        if self._base is None:
            self._base = self._expect(scaled(lora, 0.0))
        expected = {
            THIS: self._expect(lora),
            HALF: self._expect(scaled(lora, 0.5)),
            BASE: self._base,
        }
        host = jax.tree.map(fetch, lora)
        version = Version(step, f"step {step}", "", 0)
        if jax.process_index() == 0:
            version = self._exports.write(host, step)
        self._expected[version.name] = expected
        self._versions[version.name] = version
        self._current = version
        self._release()

    def ahead(self, requests: Sequence[Request]) -> None:
        """Asks for samples of the current version, without waiting for them."""
        if jax.process_index() == 0:
            for request in requests:
                self._begin(request)

    def sample(self, requests: Sequence[Request]) -> list[DrawnCompletion]:
        """Returns a sample for each request: stored ones, those asked for `ahead`, and new ones.

        Raises:
          NaloraError: all servers were dropped.
        """
        started = time.monotonic()
        samples: list[DrawnCompletion] = []

        def ask() -> None:
            """Asks for all samples, then waits for them."""
            futures = [self._begin(request) for request in requests]
            samples.extend(future.result() for future in futures)

        run_on_first_process(ask)
        if jax.process_count() > 1:
            samples = _on_all_processes(samples, requests)
        self._waited += time.monotonic() - started
        return samples

    def forget_before(self, step: int) -> None:
        """Forgets samples of versions before ``step``, which no checkpoint needs."""
        if jax.process_index() == 0:
            self._received.forget_before(step)

    def figures(self) -> dict[str, float]:
        """Returns log metrics since the last call.

        ``wait_seconds`` is the time that the trainer waited for samples, ``idle_seconds`` the time
        that servers had no request. Of the loads of versions: ``adapter_seconds`` (with the proof),
        ``adapter_bytes`` and ``proof_distance`` (nats, the largest).
        """
        with self._lock:
            loads = self._loads
            self._loads = []
            if self._idle_since is not None:
                now = time.monotonic()
                self._idle += now - self._idle_since
                self._idle_since = now
            figures = {"wait_seconds": self._waited, "idle_seconds": self._idle}
            self._waited = 0.0
            self._idle = 0.0
        if loads:
            figures["adapter_seconds"] = max(load["seconds"] for load in loads)
            figures["adapter_bytes"] = float(loads[-1]["bytes"])
            figures["proof_distance"] = max(load["distance"] for load in loads)
        return figures

    def close(self) -> None:
        """Ends the threads and unloads the versions of this run."""
        self._closed = True
        for server in self._servers:
            for name in list(server.proved):
                self._unload(server, name)
        if jax.process_index() == 0:
            for version in self._versions.values():
                self._exports.remove(version)

    # ------------------------------------------------------------ requests

    def _begin(self, request: Request) -> Future[DrawnCompletion]:
        """Returns the future sample of a request, which is asked for if it is new."""
        key = key_of(request)
        with self._lock:
            if key in self._pending:
                return self._pending[key].future
            stored = self._received.get(key)
            assert self._current is not None
            task = _Task(request, key, self._current)
            if stored is not None:
                task.future.set_result(stored)
                return task.future
            if self._error is not None:
                raise self._error
            self._pending[key] = task
            if self._idle_since is not None:
                self._idle += time.monotonic() - self._idle_since
                self._idle_since = None
            self._queue.put(task)
        return task.future

    def _work(self, server: _Server) -> None:
        """Answers tasks by one server until it is dropped; the body of a thread."""
        while not self._closed and not server.dropped:
            try:
                task = self._queue.get(timeout=0.2)
            except queue.Empty:
                continue
            started = time.monotonic()
            try:
                sample = self._ask(server, task)
            except Forgotten as error:
                server.proved.pop(task.version.name, None)
                self._count_failure(server, started, error)
            except Unreachable as error:
                self._wait_for(server, started, error)
            except Unsound as error:
                self._drop(server, str(error))
            except (
                Exception
            ) as error:  # a bug, or a full disk: the main thread raises it
                self._finish(task)
                task.future.set_exception(error)
                continue
            else:
                server.failures = 0
                self._finish(task)
                task.future.set_result(sample)
                continue
            self._repeat(task)

    def _ask(self, server: _Server, task: _Task) -> DrawnCompletion:
        """Returns the stored answer of a server to a task."""
        self._prove(server, task.version)
        question = Question(
            task.version.name,
            [task.request.ids],
            task.request.limit,
            self._rl.temperature,
            task.request.seed,
            self._stops,
            0,
        )
        (answer,) = self._answers(server, question)
        tokens = np.array(answer.tokens, np.int32)
        log_probs = np.array(answer.log_probs, np.float32)
        sample = DrawnCompletion(tokens, log_probs, task.version.step)
        return self._received.add(task.key, sample)

    def _answers(self, server: _Server, question: Question) -> list[Reply]:
        """Returns a server's answers, in its dialect."""
        assert server.listed is not None
        return server.client.ask(server.listed.dialect, question)

    def _finish(self, task: _Task) -> None:
        """Removes a task that has its answer."""
        with self._lock:
            del self._pending[task.key]
            if not self._pending:
                self._idle_since = time.monotonic()

    def _repeat(self, task: _Task) -> None:
        """Returns a task to the queue, or ends it with the error of the run."""
        with self._lock:
            if self._error is None:
                self._queue.put(task)
                return
        task.future.set_exception(self._error)

    # ------------------------------------------------------------ servers

    def _prove(self, server: _Server, version: Version) -> None:
        """Loads a version and proves it, unless that was done.

        Raises:
          Unsound: the server serves something else.
          Unreachable, Forgotten: see `Client.ask`.
        """
        with server.lock:
            if version.name in server.proved:
                return
            started = time.monotonic()
            client = server.client
            if server.listed is None:
                server.listed = client.models()
            listed = server.listed
            if server.base is None:
                server.base = self._probed(server, listed.base)
            client.load(listed.dialect, version.name, version.path)
            expected = self._expected[version.name]
            for attempt in range(_PROOFS):
                served = self._probed(server, version.name)
                proof = prove(expected, server.base, served, server.anchor)
                if not proof.verdict:
                    break
                # A server may load in the background.
                time.sleep(_PAUSE * attempt)
            self._record(server, version, proof, time.monotonic() - started)
            if proof.verdict:
                raise Unsound(
                    f"asked for {version.name} (step {version.step}), it served "
                    f"{proof.verdict}: {proof.line}"
                )
            server.proved[version.name] = proof
            if server.anchor is None or server.anchor.name not in proof.untold:
                label = f"an earlier version (step {version.step})"
                server.anchor = Anchor(label, expected[THIS], served)

    def _probed(self, server: _Server, model: str) -> Tops:
        """Returns a server's log-probabilities of the likeliest tokens after each probe."""
        question = Question(model, self._probes.prompts, 1, 1.0, 0, (), TOP)
        tops = []
        for answer in self._answers(server, question):
            if not answer.tops:
                raise Unsound("no log-probabilities of likely tokens")
            tops.append(answer.tops[0])
        return tops

    def _record(
        self, server: _Server, version: Version, proof: Proof, seconds: float
    ) -> None:
        """Logs a proof, and appends it to the run's log of proofs."""
        outcome = proof.verdict or "served"
        url = server.client.url
        log.info("%s: %s: %s, %s", url, version.name, outcome, proof.line)
        line = {
            "step": version.step,
            "server": url,
            "name": version.name,
            "outcome": outcome,
            "distance": proof.distance,
            "effect": proof.effect,
            "noise": proof.noise,
            "untold": list(proof.untold),
            "seconds": round(seconds, 4),
            "bytes": version.size,
        }
        with self._lock:
            self._loads.append(line)
            if self._proof_file is not None:
                with self._proof_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

    def _count_failure(self, server: _Server, started: float, error: Exception) -> bool:
        """Counts a failure of a request that began at ``started``; drops the server after several.

        Requests that failed together count as one failure. Returns True for the first of them.
        """
        with server.lock:
            if started < server.reached:
                return False
            server.reached = time.monotonic()
            server.failures += 1
            failures = server.failures
        if failures > _FAILURES:
            self._drop(server, f"{failures} failures in a row, the last one: {error}")
        return True

    def _wait_for(self, server: _Server, started: float, error: Exception) -> None:
        """Waits until a server answers again, and forgets what it has forgotten; drops it after
        ``rl.server_wait`` seconds."""
        with server.lock:
            if started < server.reached:
                return
            limit = time.monotonic() + self._rl.server_wait
            listed = self._reached(server.client)
            if listed is None:
                log.warning("%s does not answer: %s", server.client.url, error)
            while listed is None and time.monotonic() < limit and not self._closed:
                time.sleep(_PAUSE)
                listed = self._reached(server.client)
            if listed is not None:
                server.listed = listed
                for name in set(server.proved) - set(listed.adapters):
                    del server.proved[name]
                    server.base = None  # another server may have taken the address
                    server.anchor = None
        if listed is None:
            self._drop(
                server,
                f"no answer for {self._rl.server_wait:g} s, the last error: {error}",
            )
        else:
            self._count_failure(server, started, error)

    def _reached(self, client: Client) -> Listed | None:
        """Returns what a server lists; None if it does not answer."""
        try:
            return client.models()
        except (Unreachable, Unsound):
            return None

    def _drop(self, server: _Server, reason: str) -> None:
        """Stops using a server; without another one, ends all requests with the reasons."""
        with self._lock:
            if server.dropped:
                return
            server.dropped = reason
            url = server.client.url
            log.warning("%s is not used any more: %s", url, reason)
            if not all(other.dropped for other in self._servers):
                return
            reasons = [
                f"{other.client.url}: {other.dropped}" for other in self._servers
            ]
            remedy = "resume the run when a server serves again: stored samples are not repeated"
            self._error = NaloraError(
                "--rl.servers",
                expected="a server that serves each version of the adapter",
                found="; ".join(reasons),
                remedy=remedy,
            )
        while True:
            try:
                task = self._queue.get_nowait()
            except queue.Empty:
                return
            task.future.set_exception(self._error)

    def _release(self) -> None:
        """Unloads the versions that no request needs, and removes their folders."""
        with self._lock:
            needed = Counter(task.version.name for task in self._pending.values())
        assert self._current is not None
        for name, version in list(self._versions.items()):
            if name == self._current.name or needed[name]:
                continue
            for server in self._servers:
                if server.proved.pop(name, None) is not None:
                    self._unload(server, name)
            del self._versions[name]
            del self._expected[name]
            if jax.process_index() == 0:
                self._exports.remove(version)

    def _unload(self, server: _Server, name: str) -> None:
        """Unloads a version from a server; a server that does not answer has it no more."""
        if server.dropped or server.listed is None:
            return
        try:
            server.client.unload(server.listed.dialect, name)
        except Unreachable as error:
            log.info("%s: %s was not unloaded: %s", server.client.url, name, error)


def _on_all_processes(
    samples: Sequence[DrawnCompletion], requests: Sequence[Request]
) -> list[DrawnCompletion]:
    """Returns the first process's samples in every process."""
    limit = max(request.limit for request in requests)
    tokens = np.zeros((len(requests), limit), np.int32)
    log_probs = np.zeros((len(requests), limit), np.float32)
    about = np.zeros((len(requests), 2), np.int32)  # length, version
    for row, sample in enumerate(samples):
        count = len(sample.tokens)
        tokens[row, :count] = sample.tokens
        log_probs[row, :count] = sample.log_probs
        about[row] = (count, sample.version)
    shared = multihost_utils.broadcast_one_to_all((tokens, log_probs, about))
    tokens, log_probs, about = map(np.asarray, shared)
    result = []
    for row, (count, version) in enumerate(about.tolist()):
        result.append(
            DrawnCompletion(tokens[row, :count], log_probs[row, :count], version)
        )
    return result
