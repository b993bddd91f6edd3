"""Prompts of reinforcement learning."""

import pytest

from nalora_jax.config import DataConfig, RLConfig
from nalora_jax.data.prompts import prompt_data
from nalora_jax.data.source import RecordsSource


@pytest.fixture
def prompts(tokenizer):
    def make(seed=0):
        records = [{"prompt": f"Question {i}", "completion": " sky"} for i in range(40)]
        records[0] = {"prompt": "sky " * 80, "completion": " sky"}  # too long
        options = {"rl": RLConfig(samples=2, max_new_tokens=4), "context": 64, "seed": seed}
        source = RecordsSource("prompts", records)
        return prompt_data(source, DataConfig(), tokenizer, batch_size=4, accumulate=1, **options)

    return make


def test_prompts_that_replace_groups_differ_by_seed_step_and_attempt(prompts):
    data = prompts()
    draws = [data.others(step, attempt, 8).tolist() for step in (1, 2) for attempt in (0, 1)]
    draws.append(prompts(seed=1).others(1, 0, 8).tolist())
    assert all(len(set(draw)) == 8 for draw in draws)
    assert len(set(map(tuple, draws))) == len(draws)
    assert data.others(1, 0, 8).tolist() == draws[0]  # a resumed run draws the same


def test_replacing_prompts_are_read_with_their_records(prompts):
    data = prompts()
    places = data.others(3, 0, 5).tolist()
    for prompt, place in zip(data.prompts(places), places, strict=True):
        assert prompt.text == f"Question {data.indices[place]}"
        assert prompt.where == f"prompts, record {data.indices[place]}"
        assert prompt.record["completion"] == " sky"
        assert list(prompt.ids) == data.items[place].prompt_ids
