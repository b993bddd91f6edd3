"""Refusals of the evaluation that need no more than a call, and a part of each message."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest

from nalora_jax.config import PreferenceConfig
from nalora_jax.data.chat_templates import ImageTokens
from nalora_jax.data.images.image_files import ImageProcessor
from nalora_jax.data.items import ChoiceItem, CompletionItem
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.evaluate import harness
from nalora_jax.evaluate.evaluator import compare_records
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.generate.conversation import read_messages
from nalora_jax.evaluate.generate.slots import AdapterSlot
from nalora_jax.evaluate.likelihood import score_groups
from nalora_jax.evaluate.needle import exact_match
from nalora_jax.evaluate.preference_evaluation import PreferenceEvaluator
from nalora_jax.evaluate.text_evaluation import TextEvaluator
from nalora_jax.models.adapters import init_lora
from nalora_jax.models.config import ModelConfig
from nalora_jax.models.decoder import Decoder
from tests import tiny
from tests.param_trees import init_params
from tests.refused import Call, table_test

SMALL = ModelConfig.from_hf(tiny.GROUPED)
CONTEXT = SMALL.max_positions
TOKENIZER = tiny.byte_tokenizer()
COMPLETION = CompletionItem([5], [6], "a", "b")
CHOICE = ChoiceItem([5], [[6], [7]], 0, "a", ["b", "c"])


def small_generator(tokenizer: Tokenizer = TOKENIZER, **options: Any) -> Generator:
    variables = {"params": init_params(SMALL, jax.random.key(0))}
    return Generator(Decoder(SMALL), variables, tokenizer, **options)


def show_an_unseen_image(*_: Any) -> None:
    with_images = replace(TOKENIZER, images=ImageTokens("<img>", 7, 2, "<img>"))
    generator = small_generator(with_images, processor=ImageProcessor(resize=(12, 12)))
    generator.stream([5, 7, 6], images=["an image"])


def generate_beyond_the_context(*_: Any) -> None:
    request = SimpleNamespace(args=("a", {"max_gen_toks": CONTEXT}))
    harness.Requests(small_generator()).generate_until([request])


def fill_a_small_slot(*_: Any) -> None:
    spec = AdapterSlot.on(SMALL, rank=4).spec
    AdapterSlot.on(SMALL, rank=2).fill(init_lora(SMALL, spec, jax.random.key(0)), spec)


def read_bare_texts(_: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "messages.json").write_text('["Which way is up?"]')
    read_messages(folder / "messages.json")


def run_on_a_double(patch: pytest.MonkeyPatch, task: str) -> None:
    """Runs a task with a double of lm-eval: a `TaskManager`, and a `simple_evaluate` that fails.

    lm-evaluation-harness 0.4.9 has both under these names.
    """

    def simple_evaluate(*_: Any, **__: Any) -> None:
        raise ConnectionError("no hub")

    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": lambda **_: SimpleNamespace(all_tasks=["piqa"])},
        "lm_eval.api": {},
        "lm_eval.api.model": {},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        patch.setitem(sys.modules, name, module)
    harness.run_harness(None, [task])


def compare_items(*ids: Sequence[int]) -> None:
    first, second = ([{"doc_id": number, "metrics": {}} for number in part] for part in ids)
    harness.compare_samples(first, second)


def summarise_no_tokens(*_: Any) -> None:
    evaluator = TextEvaluator(Decoder(SMALL), None, [COMPLETION])
    evaluator.summary([{"loss": 0.0, "tokens": 0}])


REFUSALS: dict[str, tuple[Call, str]] = {
    "answers to other questions": (
        lambda *_: compare_records([{"prompt": "a"}], [{"prompt": "b"}]),
        "--against: expected answers to the same questions, found other ones; .*--no-chat",
    ),
    "messages without a role": (
        read_bare_texts,
        r"messages.json: messages\[0\]: expected {\"role\": ..., \"content\": ...}, found a str",
    ),
    "an image without its tokens": (
        show_an_unseen_image,
        "prompt: expected 2 tokens '<img>' for each of 1 images, found 1",
    ),
    "an adapter larger than its slot": (
        fill_a_small_slot,
        "_proj: rank: expected at most 2, found 4; make the slot with a larger rank",
    ),
    "settings of generation as a text": (
        lambda *_: harness.generation_settings("greedy"),  # type: ignore[arg-type]
        "generation_kwargs: expected settings by name, found 'greedy'",
    ),
    "a completion as long as the context": (
        generate_beyond_the_context,
        f"max_gen_toks: expected below {CONTEXT}, found {CONTEXT}",
    ),
    "a task that the harness lacks": (
        lambda patch, _: run_on_a_double(patch, "abacus"),
        "--harness: expected tasks of lm-evaluation-harness, found abacus; lm-eval ls tasks",
    ),
    "a task that cannot be loaded": (
        lambda patch, _: run_on_a_double(patch, "piqa"),
        "--harness piqa: expected tasks .* load and run, found ConnectionError: no hub; .*YAML",
    ),
    "samples of other items": (
        lambda *_: compare_items([0, 1], [0, 2]),
        "--against: expected answers to the same items, found other items",
    ),
    "samples of no item": (
        lambda *_: compare_items([], []),
        "--against: expected answers to the same items, found no item",
    ),
    "an item longer than the context": (
        lambda *_: score_groups(Decoder(SMALL), {}, [[([5] * CONTEXT, [6, 7])]]),
        f"evaluation item 0: expected at most {CONTEXT} tokens before .*, found {CONTEXT + 1}",
    ),
    "no question to complete": (
        lambda *_: exact_match(small_generator(), [], normalise=str.strip),
        "evaluation data: expected at least one question, found none",
    ),
    "no pair": (
        lambda *_: PreferenceEvaluator(Decoder(SMALL), TOKENIZER, [], PreferenceConfig("dpo")),
        "evaluation data: expected at least one pair, found none",
    ),
    "no questions": (
        lambda *_: TextEvaluator(Decoder(SMALL), None, []),
        "evaluation data: expected questions with choices, or all without, found no questions",
    ),
    "questions of both kinds": (
        lambda *_: TextEvaluator(Decoder(SMALL), None, [CHOICE, COMPLETION]),
        "evaluation data: expected questions with choices, or all without, found both",
    ),
    "no target token": (
        summarise_no_tokens,
        "evaluation data: expected at least one target token, found none",
    ),
}

test_it_is_refused = table_test(REFUSALS)
