"""`nalora verify`: verdicts on log probabilities of servers in float32 and bfloat16, and the models
that servers list."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import numpy as np
import pytest

from nalora_jax.__main__ import main
from nalora_jax.cli.verify import Server, judge
from nalora_jax.common.trees import map_named
from nalora_jax.config import LoRAConfig, LoRARule
from nalora_jax.errors import NaloraError
from nalora_jax.loading.adapted import load
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from nalora_jax.weights.peft_export import export_adapter
from tests import tiny

PROMPTS = np.array([[3, 4, 5, 6], [20, 9, 11, 2], [7, 7, 19, 23], [12, 5, 25, 8], [16, 2, 21, 4]])
TEXTS = ["b c d e", "s h j a", "f f r v", "k d x g", "o a t c"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base and an adapter of all its projections."""
    folder = tmp_path_factory.mktemp("verify")
    base = load(tiny.make_model(folder / "base"), dtype="float32").base
    spec = resolve(LoRAConfig(rules=(LoRARule("", 4),)), projection_shapes(base.config), 2)
    rng = np.random.default_rng(0)
    lora = map_named(
        lambda path, leaf: leaf + rng.normal(0, 0.05, leaf.shape).astype("float32"),
        jax.device_get(init_lora(base.config, spec, jax.random.key(0))),
    )
    named = {"base_model_name": str(folder / "base"), "fingerprint": base.fingerprint}
    export_adapter(lora, spec, base.config, folder / "adapter", **named)
    return folder


@pytest.fixture(scope="module")
def model(place):
    return load(place / "adapter", dtype="float32")


def log_probs(model, lora=None, dtype="float32"):
    """The 20 likeliest tokens after each prompt, as a server computes them in a dtype."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.base.params)
    module = model.module
    if lora is None:
        lora = jax.tree.map(np.zeros_like, model.lora)
    lora = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), lora)
    logits = tiny.logits_of(module, {"params": params, "lora": lora}, PROMPTS)[:, -1]
    values = np.asarray(jax.nn.log_softmax(logits.astype("float32")))
    return [{int(token): float(row[token]) for token in np.argsort(-row)[:20]} for row in values]


def changed(model, change):
    """The adapter after a change of every up-projection."""
    return map_named(lambda path, leaf: change(path, leaf) if path[-1] == "b" else leaf, model.lora)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_that_is_served_passes_in_each_precision(model, dtype, with_base):
    base = log_probs(model, dtype=dtype) if with_base else None
    verdict, served = judge(model, PROMPTS, base, log_probs(model, model.lora, dtype))
    assert verdict.startswith("served: ")
    assert served
    assert ("the server lists no base" in verdict) != with_base


@pytest.mark.parametrize("scale", [0.8, 0.9, 1.1, 1.2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_scale_is_named(model, scale, dtype):
    scaled = changed(model, lambda path, leaf: leaf * scale)
    served_as = log_probs(model, scaled, dtype)
    for base in (log_probs(model, dtype=dtype), None):
        verdict = judge(model, PROMPTS, base, served_as)
        assert verdict == (f"served wrongly: with about {scale} times its scale", False)


@pytest.mark.parametrize("spread", [0.005, 0.05])
def test_a_neighbouring_checkpoint_and_a_noisy_copy_are_another_adapter(model, spread):
    rng = np.random.default_rng(0)
    copy = changed(model, lambda _, leaf: leaf + rng.normal(0, spread * np.std(leaf), leaf.shape))
    verdict, served = judge(model, PROMPTS, log_probs(model), log_probs(model, copy))
    expected = "another adapter: its change of log probabilities differs by "
    assert verdict.startswith(expected)
    assert 0.2 * spread < float(verdict.removeprefix(expected).partition("%")[0]) / 100 < 5 * spread
    assert "more than 0.25% (2.5 times the noise of the base)" in verdict
    assert not served


@pytest.mark.parametrize("served", ["adapter", "base", "half", "other"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.15, 0.25])
def test_noise_of_the_server_never_changes_a_verdict(model, served, share):
    """Independent noise with and without the adapter, as of quantized activations."""
    rng = np.random.default_rng(0)
    models = {
        "adapter": log_probs(model, model.lora),
        "base": log_probs(model),
        "half": log_probs(model, changed(model, lambda _, leaf: 0.5 * leaf)),
        "other": log_probs(
            model, changed(model, lambda _, leaf: leaf + rng.normal(0, leaf.std(), leaf.shape))
        ),
    }
    spread = share * 0.0978  # of the adapter's effect, in nats

    def noisy(tops):
        return [{i: value + rng.normal(0, spread) for i, value in top.items()} for top in tops]

    base = noisy(models["base"])
    if served != "adapter" or share < 0.2:
        _, passed = judge(model, PROMPTS, base, noisy(models[served]))
        assert passed == (served == "adapter")
        return
    expected = "a change of .* nats by the adapter, 10 times the difference of the bases"
    with pytest.raises(NaloraError, match=expected):
        judge(model, PROMPTS, base, noisy(models[served]))


def test_outputs_without_a_common_token_are_of_another_adapter():
    verdict, served = judge(None, np.zeros((1, 4)), [{1: -0.5, 2: -1.0}], [{3: -0.5, 4: -1.0}])
    assert verdict.startswith("another adapter")
    assert not served


@contextlib.contextmanager
def serving(names, outputs):
    """The address of a server that lists models, with their parents, and has outputs by model."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content, status=200):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            listed = [{"id": name, "parent": parent} for name, parent in names.items()]
            self.answer({"data": listed}, 200 if self.path == "/v1/models" else 404)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            top = outputs[body["model"]][PROMPTS.tolist().index(body["prompt"])]
            named = {f"token_id:{token}": value for token, value in top.items()}
            self.answer({"choices": [{"logprobs": {"top_logprobs": [named]}}]})

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:  # or a test that fails would wait for the thread for ever
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("names", "flags", "noise"),
    [
        ({"base": None, "mine": "base"}, [], "2.5 times the noise of the base"),
        ({"mine": "base"}, [], "assumed, because the server lists no base"),
        ({"mine": None}, ["--name", "mine"], "assumed, because the server lists no base"),
    ],
    ids=["with its base", "without its base", "merged"],
)
def test_an_adapter_is_compared_with_the_base_that_a_server_lists(
    place, model, capsys, names, flags, noise
):
    outputs = {"base": log_probs(model), "mine": log_probs(model, model.lora)}
    with serving(names, outputs) as url:
        command = ["verify", url, "--adapter", str(place / "adapter"), *flags]
        assert main([*command, "--texts", *TEXTS]) == 0
        assert noise in capsys.readouterr().out
        outputs["mine"] = outputs["base"]
        with pytest.raises(SystemExit, match="1"):
            main([*command, "--texts", *TEXTS])
        assert "ignored: " in capsys.readouterr().out
        assert main([*command, "--texts", ""]) == 2
        assert "--texts: expected texts of at least one token" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "name", "found"),
    [
        ({"base": None}, None, "found none; it lists no adapter"),
        ({"base": None, "one": "base", "two": "base"}, None, "found none; it lists one, two"),
        ({"base": None, "one": "base"}, "base", "found base; it lists one"),
    ],
)
def test_a_name_that_the_server_does_not_list_is_refused(names, name, found):
    with serving(names, {}) as url, pytest.raises(NaloraError, match=found):
        Server(url, name)
