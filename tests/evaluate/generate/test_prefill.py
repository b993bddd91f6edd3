"""Prompts processed in chunks, and across the length at which LongRoPE changes its factors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nalora_jax.common.trees import unflatten
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate import Generator, generator
from nalora_jax.evaluate.generate.programs import Prompts, Weights, prefill
from nalora_jax.evaluate.generate.sampling import make_sampling
from nalora_jax.evaluate.likelihood import score_groups
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from nalora_jax.models.stacks import param_shapes
from nalora_jax.models.vision.patch_decoder import decoder_for
from nalora_jax.ops import attention
from nalora_jax.weights.base import load_model
from tests.models.family_fields import ORIGINAL
from tests.models.test_families import CASES, LONGROPE, Case, build, by_name, reference
from tests.tiny import byte_tokenizer

CHUNK, NEW_TOKENS = 16, 9
PHI3 = Case(
    "phi3",
    "LongRoPE without a window",
    {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    one_length=True,
)
BY_FAMILY = {case.family: case for case in CASES}
# Keys and values shared between layers; a recurrent state; RoPE by length.
KINDS = [BY_FAMILY["gemma4_text"], BY_FAMILY["qwen3_5_text"], PHI3]


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CACHE_BLOCK", 24)


def complete(case: Case, prompts: list[list[int]], chunk: int, count: int) -> list[tuple[int, ...]]:
    pair = build(case)
    generator = Generator(
        pair.model, {"params": pair.params}, byte_tokenizer(), prefill_chunk=chunk
    )
    return [row.ids for row in generator.complete(prompts, max_new_tokens=count, stop_ids=())]


@pytest.mark.parametrize("case", KINDS, ids=by_name)
def test_greedy_tokens_do_not_depend_on_chunks(case, short_blocks):
    """Rows end in the first, a middle and the last chunk, and at the end of one."""
    longest, count = 60, NEW_TOKENS
    if case is not PHI3:  # whose shortest row would cross the switch
        count = 20  # both caches have 96 slots, and one program decodes
    rng = np.random.default_rng(4)
    prompts = [rng.integers(1, 128, length).tolist() for length in (longest, 7, 32, 33)]
    whole = complete(case, prompts, 2048, count)
    assert complete(case, prompts, CHUNK, count) == whole
    assert len(set(whole[0])) >= 3, "a continuation that proves little"


def test_greedy_tokens_across_the_switch_of_longrope_equal_transformers():
    """Prompts end 0 to 8 tokens before the switch, and two after it."""
    rng, pair = np.random.default_rng(3), build(PHI3)
    prompts = [rng.integers(1, 128, ORIGINAL + more).tolist() for more in range(-8, 3)]
    for prompt, ids in zip(prompts, complete(PHI3, prompts, 2048, NEW_TOKENS), strict=True):
        with torch.no_grad():
            whole = pair.theirs.generate(
                torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        assert list(ids) == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", KINDS[1:], ids=by_name)
def test_choices_with_a_common_context_score_as_transformers_scores_them(case):
    """They continue a recurrent state, and cross the switch of LongRoPE."""
    rng, pair = np.random.default_rng(4), build(case)
    context = rng.integers(1, 128, ORIGINAL - 2).tolist()
    choices = [rng.integers(1, 128, length).tolist() for length in (2, 4, 9)]
    (scores,) = score_groups(
        pair.model, {"params": pair.params}, [[(context, one) for one in choices]]
    )
    for score, choice in zip(scores, choices, strict=True):
        logits = reference(pair, np.array([[*context, *choice[:-1]]]))[0, len(context) - 1 :]
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(choice)), choice].sum()
        np.testing.assert_allclose(score.log_prob, expected, rtol=1e-4)


def test_prompts_with_images_are_processed_in_chunks(vision_folder, short_blocks, monkeypatch):
    """Images of 4 tokens that see each other are moved to the next chunk.

    Cached values of all tokens and greedy tokens are those of undivided prompts.
    """
    loaded = load_model(str(vision_folder("gemma3")), dtype="float32", images=True)
    image, count = loaded.config.vision.image_token, loaded.config.vision.tokens
    rng, caches = np.random.default_rng(4), []
    texts = [
        [3 if token == image else token for token in rng.integers(5, 40, n).tolist()]
        for n in (8, 3, 30)
    ]
    picture = [image] * count
    rows = [texts[0] + picture + texts[1] + picture + texts[2], texts[0] + picture, texts[1]]
    pictures = list(rng.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8))

    def recorded(*arguments, **options):
        state = prefill(*arguments, **options)
        caches.append(jax.device_get(state.cache))
        return state

    monkeypatch.setattr(generator, "prefill", recorded)

    def complete(chunk):
        options = {"processor": loaded.processor, "prefill_chunk": chunk}
        with_images = Generator(
            decoder_for(loaded.config), {"params": loaded.params}, loaded.tokenizer, **options
        )
        options = {"images": [pictures[:2], pictures[2:], ()], "max_new_tokens": 4, "stop_ids": ()}
        return [row.ids for row in with_images.complete(rows, **options)]

    assert complete(2048) == complete(10)
    whole, chunked = (
        [cache.states["layers"].v[:, row, :, cache.segments[row] > 0] for row in range(3)]
        for cache in caches
    )
    for ours, expected in zip(chunked, whole, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    with pytest.raises(NaloraError, match="prefill_chunk: expected at least 4, the image tokens"):
        complete(3)


def temporary_bytes(tokens: int, chunk: int) -> int:
    """Memory of the compiled prefill except arguments and results, which hold the cache."""
    raw = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 8}
    raw |= {
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    model = Decoder(
        ModelConfig.from_hf(raw | {"max_position_embeddings": 2**20, "rms_norm_eps": 1e-5})
    )
    shapes = param_shapes(model.config).items()
    params = unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes})
    weights = Weights(
        {"params": params}, {"params": {name: params[name] for name in ("embed", "lm_head")}}
    )
    shapes = (((1, tokens), "int32"), ((1,), "int32"), ((1,), "bool"), ((8,), "int32"))
    prompts = Prompts(*(jax.ShapeDtypeStruct(*shape) for shape in shapes), make_sampling(1))
    compiled = prefill.lower(model, weights, prompts, slots=tokens + 64, chunk=chunk).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_activations_does_not_grow_with_the_prompt():
    cache_of_a_token = 2 * 8 * 4 * 4  # keys and values of 8 layers, one head of 4, float32
    short, long = (temporary_bytes(tokens, 256) for tokens in (4096, 16384))
    assert long - short < 3 * cache_of_a_token * (16384 - 4096)
