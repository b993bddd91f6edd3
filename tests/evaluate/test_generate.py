"""Generation against full recomputation, one prompt at a time, and against transformers'
filters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from nalora_jax.config import LoRAConfig, LoRARule, MeshConfig
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import GenerationSettings, Generator
from nalora_jax.evaluate.generate.generator import TextStream
from nalora_jax.evaluate.generate.sampling import kept_tokens, make_sampling, next_tokens
from nalora_jax.mesh.distributed import make_mesh
from nalora_jax.mesh.sharding import PARAM_RULES, STEP_RULES, shardings
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import projection_shapes
from nalora_jax.models.targets import resolve
from tests import tiny
from tests.param_trees import init_params


@pytest.fixture(scope="module")
def generator() -> Generator:
    """A model with adapters, whose logits are sharp, so that greedy choices are no coin tosses."""
    sizes = {"vocab_size": 257, "intermediate_size": 48, "max_position_embeddings": 96}
    config = ModelConfig.from_hf(tiny.GROUPED | sizes)
    spec = resolve(
        LoRAConfig(rules=(LoRARule("ffn", rank=2),)), projection_shapes(config), config.n_layers
    )
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    params["embed"]["embedding"] = params["embed"]["embedding"] * 20
    lora = jax.eval_shape(lambda: init_lora(config, spec, jax.random.key(0)))
    rng = np.random.default_rng(1)
    lora = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), lora)
    return Generator(Decoder(config, spec), {"params": params, "lora": lora}, tiny.byte_tokenizer())


def without_cache(
    generator: Generator, prompt: Sequence[int], count: int, penalty: float = 1.0
) -> list[int]:
    """Greedy tokens, every one from a forward pass over the whole text so far, after transformers'
    own penalty."""
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        logits = tiny.logits_of(generator.model, generator.variables, padded)[:, len(ids) - 1]
        scores = torch.tensor(np.asarray(logits))
        ids.append(
            int(RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), scores).argmax())
        )
    return ids[len(prompt) :]


def prompts_of(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 250, n).tolist() for n in lengths]


def test_greedy_equals_recomputation_for_every_prompt_of_a_batch(generator):
    prompts = prompts_of([3, 15, 9])
    made = generator.complete(prompts, max_new_tokens=16, stop_ids=())
    assert [list(c.ids) for c in made] == [without_cache(generator, p, 16) for p in prompts]
    assert {c.reason for c in made} == {"length"}


def test_weights_and_prompts_on_a_mesh_give_the_same_text(generator):
    mesh = make_mesh(MeshConfig(4, 2))
    split = {
        name: jax.device_put(
            generator.variables[name], shardings(generator.variables[name], mesh, rules)
        )
        for name, rules in (("params", PARAM_RULES), ("lora", STEP_RULES))
    }
    prompts = prompts_of([3, 9, 5])
    sharded = Generator(generator.model, split, tiny.byte_tokenizer(), mesh=mesh)
    assert sharded.generate(prompts, max_new_tokens=6) == generator.generate(
        prompts, max_new_tokens=6
    )


def test_every_step_draws_anew_by_the_seed_whatever_the_place_in_the_batch(generator):
    prompts = prompts_of([9, 9, 9])  # of one length, so that batches keep their order
    options = {"max_new_tokens": 10, "temperature": 1e4, "top_p": 0.95, "stop_ids": ()}
    drawn = generator.complete(prompts, seed=[1, 2, 3], **options)
    again = generator.complete(prompts[::-1], seed=[3, 2, 1], **options)[::-1]
    assert drawn == again
    assert len(set(drawn[0].ids)) > 5
    assert generator.complete([prompts[1]], seed=2, **options)[0] == drawn[1]
    assert generator.complete([prompts[1]], seed=4, **options)[0] != drawn[1]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 64]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)
@example(seed=0, top_k=7, top_p=0.5, min_p=0.0, spread=0.01)  # half of seven tokens, not of all
def test_filters_keep_what_transformers_keeps(seed, top_k, top_p, min_p, spread):
    import torch
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = spread * np.random.default_rng(seed).standard_normal((3, 64)).astype(np.float32)
    expected = torch.tensor(logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    shares = np.full(3, top_p, np.float32), np.full(3, min_p, np.float32)
    ours = jax.jit(kept_tokens)(logits, np.full(3, top_k, np.int32), *shares)
    kept = torch.isfinite(expected).numpy()
    # Tokens whose probability float32 rounds to nothing can't be drawn: either way is right.
    p = torch.softmax(torch.tensor(logits), -1).numpy()
    np.testing.assert_array_equal(np.asarray(ours)[p > 1e-9], kept[p > 1e-9])


def test_repetitions_are_penalised_as_in_transformers(generator):
    prompts, options = prompts_of([9, 4]), {"max_new_tokens": 20, "stop_ids": ()}
    drawn = generator.complete(prompts, repetition_penalty=1.3, **options)
    expected = [without_cache(generator, prompt, 20, 1.3) for prompt in prompts]
    assert [list(completion.ids) for completion in drawn] == expected
    assert drawn != generator.complete(prompts, **options)


def test_a_seen_token_becomes_less_likely_whatever_the_sign_of_its_logit():
    logits = np.array([[-1.0, -1.2, -9.0], [1.0, 0.9, -9.0]], np.float32)
    sampling, seen = make_sampling(2, repetition_penalty=1.3), jnp.array([[True, False, False]] * 2)
    drawn = next_tokens(jnp.asarray(logits), sampling, jnp.int32(0), seen)
    assert drawn.tolist() == [1, 1]


def test_tokens_are_drawn_as_often_as_the_tempered_softmax_says():
    logits = np.array([2.0, 1.0, 0.0, -1.0, -30.0], np.float32)
    rows = 4000
    sampling = make_sampling(rows, temperature=2.0, top_k=3, seeds=range(rows))
    drawn = np.asarray(next_tokens(jnp.tile(logits, (rows, 1)), sampling, jnp.int32(0)))
    expected = np.exp(logits[:3] / 2) / np.exp(logits[:3] / 2).sum()
    share = np.bincount(drawn, minlength=5) / rows
    assert share[3:].sum() == 0
    np.testing.assert_allclose(share[:3], expected, atol=4 * 0.5 / np.sqrt(rows))


@settings(max_examples=15, deadline=None)
@given(text=st.text(max_size=12), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_text_streams_hold_back_halves_of_characters(text, cuts):
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    ends = [*sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [stream.push(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids)
    shown = ""
    for piece in pieces:
        shown += piece
        assert text.startswith(shown)


def test_text_streams_stop_before_a_stop_text_that_comes_in_parts():
    tokenizer = tiny.byte_tokenizer()
    stream = TextStream(tokenizer, ["###", "END"])
    pieces = [
        stream.push(tokenizer.encode(text)) for text in ("one #", "# two EN", "D three", "more")
    ]
    assert pieces == ["one ", "## two ", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_a_decoder_that_strips_the_first_space_keeps_the_others():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"▁": 0, "▁a": 1, "▁b": 2, "c": 3}, merges=[]))
    backend.decoder = decoders.Metaspace()
    stream = TextStream(Tokenizer(backend, bos_id=None, eos_id=0, pad_id=0, eos_ids=()))
    pieces = [stream.push([i]) for i in (1, 2, 3, 2, 1)]
    assert "".join([*pieces, stream.finish()]) == "a bc b a"


def test_a_stop_text_ends_generation(generator):
    prompt = prompts_of([7], seed=2)
    options = {"max_new_tokens": 16, "temperature": 1.0, "stop_ids": ()}
    whole = generator.generate(prompt, **options)[0]
    stop = whole[6:8]
    made = generator.complete(prompt, stop=stop, **options)[0]
    assert made.text == whole[: whole.index(stop)]
    assert made.reason == "stop"
    for stops, text in ((stop, made.text), ((), whole)):
        pieces = list(generator.stream(prompt[0], stop=stops, **options))
        assert len(pieces) > (stops == ())
        assert "".join(pieces) == text
    ids = generator.complete(prompt, **options)[0].ids
    assert (
        made.ids == ids[: len(made.ids)]
    )  # nothing of the stop text, nor of what was made after it
    assert len(generator.tokenizer.decode(ids[: len(made.ids) + 1])) > len(made.text)


def test_prompts_and_settings_that_cannot_be_used_are_named(generator):
    for prompt, found in (([], "an empty one"), ([1] * 96, 96), ([1, 257], "1 to 257")):
        with pytest.raises(NaloraError) as caught:
            generator.generate(["fine", prompt])
        assert (caught.value.where, caught.value.found) == ("prompt 1", found)
    wrong = [
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("stop", 5),
    ]
    wrong += [
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("seed", 1.5),
    ]
    for name, value in wrong:
        with pytest.raises(NaloraError) as caught:
            GenerationSettings(**{name: value})
        assert caught.value.where == name
