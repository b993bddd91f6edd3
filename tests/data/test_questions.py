"""Held-out examples: what is trained is what is scored."""

from dataclasses import replace

import pytest

from nalora_jax.config import DataConfig
from nalora_jax.data.items import CompletionItem
from nalora_jax.data.pipeline import train_data
from nalora_jax.data.questions import eval_examples, split_questions
from nalora_jax.data.source import RecordsSource
from nalora_jax.errors import NaloraError


def choice(n):
    answers = {"completion": " down" if n % 2 else " up", "choices": ["up", "down"], "gold": n % 2}
    return {"prompt": f"Question: which way is {n}?\nAnswer:", **answers}


@pytest.fixture
def ask(write_jsonl, tokenizer):
    def ask(*records, tokenizer=tokenizer, **options):
        path = write_jsonl(*records, name="eval.jsonl")
        return eval_examples(DataConfig(dataset="unused.jsonl", **options), tokenizer, split=path)

    return ask


@pytest.fixture
def trained(tokenizer, cache):
    def trained(*records, **options):
        source = {"train": RecordsSource("trained", records)}
        config = DataConfig(eval_split="unread", **options)
        return train_data(config, tokenizer, batch_size=1, source=source)

    return trained


def test_choices_that_change_the_prompt(ask, tokenizer):
    prompts = ["the sea because Yes", "the sea because No"]
    record = {"prompt": prompts[1], "completion": " is green.", "choices": ["Yes", "No"], "gold": 1}
    (item,) = ask(record | {"choice_prompts": prompts})
    assert item.choice_ids == [tokenizer.encode(" is green.")] * 2
    assert list(item.contexts) == [tokenizer.encode(prompt) for prompt in prompts]
    assert item.prompt_ids == item.contexts[1]


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_trained_is_what_is_scored(ask, trained, tokenizer, chat):
    """The tokens of a training example are the item's prompt, its gold choice, and the end."""
    (item,) = ask(choice(1), chat=chat)
    assert item.choice_ids == [
        tokenizer.encode(text if chat else f" {text}") for text in ("up", "down")
    ]
    assert (item.gold, item.choices, list(item.contexts)) == (
        1,
        ["up", "down"],
        [item.prompt_ids] * 2,
    )
    store, first = trained(choice(1), chat=chat).store, len(item.prompt_ids)
    assert store.tokens.tolist() == [*item.prompt_ids, *item.choice_ids[1], tokenizer.eos_id]
    assert store.answer.tolist() == [index >= first for index in range(len(store.tokens))]
    assert item.prompt.endswith("<|im_start|>assistant\n" if chat else "Answer:")


TEXT = {"text": "up and down " * 30}


def test_split_and_last_part_are_evaluated_as_they_are_trained(ask, trained):
    settings = {"too_long": "split", "loss_on": "all", "loss_last": 5, "max_length": 24}
    data, items = trained(TEXT, **settings), ask(TEXT, **settings)
    batches = [data.batch_at(row) for row in range(data.rows_per_epoch)]
    assert all((batch["loss_weights"] > 0).sum() <= 5 for batch in batches)
    assert len(items) == data.store.counts.examples > 3
    assert all(len(item.completion_ids) <= 5 for item in items)
    assert all(len(item.prompt_ids) + len(item.completion_ids) <= 25 for item in items)
    assert all(item.completion and item.prompt for item in items)


def test_plain_text_is_learned_and_evaluated_without_a_prompt(ask, trained, tokenizer):
    batch, (item,) = trained(TEXT, max_length=400).batch_at(0), ask(TEXT)
    ids = [*tokenizer.encode(TEXT["text"]), tokenizer.eos_id]
    assert batch["targets"][batch["loss_weights"] > 0].tolist() == ids[1:]
    assert item.prompt_ids + item.completion_ids == ids[:-1]
    assert len(item.prompt_ids) == 1


def test_draw_depends_on_nothing_but_the_data(ask):
    records = [choice(n) for n in range(50)]
    few, again = (ask(*records, eval_limit=10, max_length=length) for length in (128, 9))
    assert [item.prompt for item in few] == [item.prompt for item in again]
    assert [item.prompt for item in few] != [record["prompt"] for record in records[:10]]
    assert len(ask(*records, eval_limit=0)) == len(ask(*records, eval_limit=400)) == 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": 2}, "eval.jsonl:1: gold: expected the index of one of 2 choices, found 2"),
        ({"choices": ["up", ""]}, "choices: expected a list of texts, none empty"),
        ({"choices": [], "completion": " "}, "completion: expected an answer, found an empty text"),
        ({"choice_prompts": ["a"]}, "choice_prompts: expected 2, one a choice, found 1"),
    ],
)
def test_bad_questions_name_the_field(ask, change, message):
    with pytest.raises(NaloraError, match=message):
        ask({**choice(0), **change})


def test_template_that_changes_answers(ask, tokenizer):
    template = tokenizer.chat_template.replace("['content']", "['content'] | upper")
    with pytest.raises(NaloraError, match="an answer that the chat template writes as it is"):
        ask(choice(0), chat=True, tokenizer=replace(tokenizer, chat_template=template))


@pytest.mark.parametrize(("total", "sizes"), [(900, (400, 200)), (30, (20, 10))])
def test_questions_that_choose_are_never_reported_on(total, sizes):
    items = [CompletionItem([i], [i], str(i), str(i)) for i in range(total)]
    first, second = split_questions(items, 400, 200)
    assert (len(first), len(second)) == sizes
    assert not {item.prompt for item in first} & {item.prompt for item in second}
    assert (first, second) == split_questions(items, 400, 200)
