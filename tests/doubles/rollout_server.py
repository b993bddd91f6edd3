"""A stand-in for a server of rollouts, in vLLM's form, that can fail in planned ways.

It loads adapters in PEFT's files by name, and samples with NumPy from the logits of the whole text,
without a cache. Its forms are those of vLLM 0.32, of which tests/kinds/servers/vllm.json has
recorded answers.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.common.trees import map_named
from nalora_jax.loading.adapted import load
from nalora_jax.models.decoder import Decoder
from nalora_jax.weights.peft_import import import_adapter
from tests import tiny

LENGTH = 64  # positions of the stand-in's program


class RolloutServer(ThreadingHTTPServer):
    """The server; ``fault`` names what it does wrong.

    | fault | |
    |---|---|
    | ignores, previous, half | serves the base, the adapter that was loaded before, half of it |
    | mixes | serves every other prompt with the adapter that was loaded before |
    | delays | serves the adapter that was loaded before to the first probes of a version |
    | dies, late, twice, wrong_ids, other_ids, no_log_probs, no_ids, after_stop | a bad answer to a
    sample |
    | no_loading, no_lora, low_rank, raw | lacks a flag |
    """

    daemon_threads = True

    def __init__(self, base: Path, fault: str = "", port: int = 0, times: int = 10**9) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.fault, self.times = fault, times
        self.base = load(base, dtype="float32").base
        self.adapters: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        self.last: Any = None
        self.probed: dict[str, int] = {}
        self.lock = threading.Lock()
        self.samples: list[tuple[Any, ...]] = []  # requests of samples
        self.loads: list[str] = []
        self.log: Path | None = None
        self.replay: Callable[[dict[str, Any]], Any] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fails(self) -> str:
        """Returns the fault, unless it happened often enough."""
        with self.lock:
            if self.times <= 0:
                return ""
            self.times -= 1
            return self.fault

    def load_adapter(self, name: str, path: str) -> None:
        lora, spec = import_adapter(Path(path), self.base.config)
        self.before[name] = self.last
        self.last = self.adapters[name] = (lora, spec)
        self.loads.append(name)

    def log_probs(self, name: str, prompt: list[int], temperature: float, row: int) -> np.ndarray:
        """Returns log-probabilities ``[vocab]`` after a prompt, of what the fault serves."""
        adapter = None
        if name != "base":
            adapter = self.adapters[name]  # a KeyError if the server forgot it within a sample
            stale = self.fault == "previous" or (self.fault == "mixes" and row % 2)
            stale = stale or (self.fault == "delays" and self.probed.get(name, 0) < 2)
            if stale:
                adapter = self.before[name]
            if self.fault == "ignores":
                adapter = None
            if self.fault == "half" and adapter:
                lora, spec = adapter
                adapter = map_named(lambda p, x: x * 0.5 if p.endswith("/b") else x, lora), spec
        module, variables = Decoder(self.base.config), {"params": self.base.params}
        if adapter:
            module = Decoder(self.base.config, adapter[1])
            variables["lora"] = adapter[0]
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(prompt)] = prompt
        logits = np.asarray(tiny.logits_of(module, variables, tokens), np.float64)
        logits = logits[0, len(prompt) - 1] / temperature
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

    def complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the choices of an answer."""
        prompts, limit = body["prompt"], body["max_tokens"]
        prompts = prompts if isinstance(prompts[0], list) else [prompts]
        is_probe = len(prompts) > 1 or limit == 1
        if not is_probe:
            with self.lock:
                asked = (tuple(prompts[0]), body["seed"], body["model"])
                self.samples.append(asked)
                if self.log is not None:
                    with self.log.open("a") as file:
                        file.write(json.dumps(asked) + "\n")
        choices = []
        for index, prompt in enumerate(prompts):
            rng, new, values, tops = np.random.default_rng(body["seed"]), [], [], []
            while len(new) < limit:
                of_next = self.log_probs(body["model"], prompt + new, body["temperature"], index)
                token = int(rng.choice(len(of_next), p=np.exp(of_next) / np.exp(of_next).sum()))
                if self.fault == "raw":
                    of_next = self.log_probs(body["model"], prompt + new, 1.0, index)
                likeliest = np.argsort(-of_next)[: body["logprobs"]]
                tops.append({f"token_id:{i}": float(of_next[i]) for i in likeliest})
                new.append(token)
                values.append(float(of_next[token]))
                if token in body["stop_token_ids"]:
                    break
            found = {"token_logprobs": values, "top_logprobs": tops}
            choice = {"index": index, "token_ids": new, "prompt_token_ids": prompt}
            choices.append(choice | {"logprobs": found})
        if is_probe and len(prompts) > 1:
            self.probed[body["model"]] = self.probed.get(body["model"], 0) + 1
        if self.replay is not None and not is_probe:
            choices[0] |= self.replay(body)
        return choices

    def spoil(self, choices: list[dict[str, Any]], fault: str) -> list[dict[str, Any]]:
        """Returns the choices of a bad answer."""
        (choice,) = choices
        if fault == "twice":
            return [choice, choice]
        if fault == "wrong_ids":
            choice["token_ids"] = [token + 10**6 for token in choice["token_ids"]]
        if fault == "no_ids":
            choice["token_ids"] = None
        if fault == "other_ids":
            choice["prompt_token_ids"] = [*choice["prompt_token_ids"][1:], 5]
        if fault == "no_log_probs":
            choice["logprobs"] = None
        if fault == "after_stop":
            choice["token_ids"] = [0, 0]
            choice["logprobs"]["token_logprobs"] = [-1.0, -1.0]
        return [choice]


class _Handler(BaseHTTPRequestHandler):
    server: RolloutServer

    def answer(self, content: Any, status: int = 200, cut: bool = False) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + 10 * cut))
        self.end_headers()
        self.wfile.write(body)

    def error(self, status: int, message: str) -> None:
        self.answer({"error": {"message": message, "code": status}}, status)

    def do_GET(self) -> None:
        base = {"id": "base", "parent": None, "owned_by": "vllm", "max_model_len": LENGTH}
        adapters = [{"id": name, "parent": "base"} for name in self.server.adapters]
        self.answer({"data": [base, *adapters]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # The client has given up, or a restart ends the answer.
        with contextlib.suppress(OSError, KeyError):
            {
                "/v1/load_lora_adapter": self.load,
                "/v1/unload_lora_adapter": self.unload,
                "/v1/completions": self.complete,
            }[self.path](body)

    def load(self, body: dict[str, Any]) -> None:
        server, name, path = self.server, body["lora_name"], Path(body["lora_path"])
        if server.fault == "no_loading":
            self.answer({"detail": "Not Found"}, 404)
        elif server.fault == "no_lora":
            self.error(500, "LoRA is not enabled")
        elif server.fault == "low_rank":
            self.error(500, "LoRA rank 4 is greater than max_lora_rank 2")
        elif name in server.adapters:
            self.error(400, f"The lora adapter '{name}' has already been loaded.")
        elif not path.is_dir():
            self.error(404, f"Loading lora {name} failed: No adapter found for {path}")
        else:
            server.load_adapter(name, str(path))
            self.answer(f"Success: LoRA adapter '{name}' added successfully.")

    def unload(self, body: dict[str, Any]) -> None:
        if self.server.adapters.pop(body["lora_name"], None) is None:
            self.error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        else:
            self.answer("Success")

    def complete(self, body: dict[str, Any]) -> None:
        server = self.server
        if body["model"] not in {"base", *server.adapters}:
            self.error(404, f"The model `{body['model']}` does not exist.")
            return
        choices = server.complete(body)
        if len(choices) > 1 or body["max_tokens"] == 1:
            self.answer({"choices": choices})
            return
        fault = server.fails()
        if fault == "late":
            time.sleep(1.5)
        self.answer({"choices": server.spoil(choices, fault)}, cut=fault == "dies")

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(base: Path, fault: str = "", **options: Any) -> Iterator[RolloutServer]:
    """A stand-in in a thread."""
    with RolloutServer(base, fault, **options) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def main() -> None:
    """Serves a base folder at a port, and appends each request of a sample to a file."""
    base, port, log = sys.argv[1:]
    with RolloutServer(Path(base), port=int(port)) as server:
        server.log = Path(log)
        server.serve_forever(0.02)


if __name__ == "__main__":
    main()
