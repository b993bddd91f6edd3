"""Masks of released chat templates whose generation prompt or earlier turns differ from the text that is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers

from nalora_jax.data.tokenizer import AddedTokens, Tokenizer
from nalora_jax.errors import NaloraError
from tests.data.loss_tokens import learned, runs

FOLDER = Path(__file__).parent / "templates"
# Of each released model: special tokens, then those at which its generation_config.json stops, the first is eos_token.
MODELS = {
    "deepseek_r1_distill": (
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        ("<｜end▁of▁sentence｜>",),
    ),
    "glm_4_5": (
        ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "gpt_oss": (
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
        ("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "qwen3_5": (("<|im_start|>",), ("<|im_end|>", "<|endoftext|>")),
}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}


@pytest.fixture
def released(tokenizer: Tokenizer) -> Any:
    """Builds the tokenizer of a released template's model, over a small vocabulary."""

    def build(name: str) -> Tokenizer:
        special, stops = MODELS[name]
        ours = tokenizer.with_tokens(AddedTokens(special=(*special, *stops)))
        ids = tuple(ours.backend.token_to_id(text) for text in stops)
        return dataclasses.replace(
            ours,
            chat_template=(FOLDER / f"{name}.jinja").read_text(),
            special_tokens={"bos_token": special[0], "eos_token": stops[0]},
            eos_id=ids[0],
            eos_ids=ids,
        )

    return build


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def turn(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def thought(words: str, content: str) -> dict[str, Any]:
    return turn(f"<think>\n{words}\n</think>\n\n{content}")


def called(**fields: Any) -> list[dict[str, Any]]:
    return [user("Up?"), turn("", tool_calls=[CALL], **fields), {"role": "tool", "content": "21"}]


EOS, PLAIN = "<｜end▁of▁sentence｜>", [user("Up?"), turn("the sky"), user("more"), turn("<b>hills")]
THOUGHTS = [user("Up?"), thought("hm", "the sky"), user("more"), thought("ho", "hills")]
BARE = "\n<think></think>\n"
WEATHER = ' to=functions.sky<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
QWEN_CALL = (
    "<tool_call>\n<function=sky>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call><|im_end|>"
)
GLM_CALL = (
    "<tool_call>sky\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call><|observation|>"
)
MASKS = {
    "R1 without thoughts": ("deepseek_r1_distill", PLAIN, [f"the sky{EOS}", f"<b>hills{EOS}"]),
    "R1 with thoughts": (
        "deepseek_r1_distill",
        THOUGHTS,
        [f"hm\n</think>\n\nthe sky{EOS}", f"ho\n</think>\n\nhills{EOS}"],
    ),
    "R1 with thoughts of another form": (
        "deepseek_r1_distill",
        [user("Up?"), turn("<think>hm</think>up")],
        [f"hm</think>up{EOS}"],
    ),
    "GLM": ("glm_4_5", PLAIN, [f"{BARE}the sky<|user|>", f"{BARE}<b>hills<|user|>"]),
    "GLM after a call": (
        "glm_4_5",
        [*called(reasoning_content="ask"), turn("warm")],
        [f"\n<think>ask</think>\n{GLM_CALL}", f"{BARE}warm<|user|>"],
    ),
    "GLM's last thoughts": ("glm_4_5", [PLAIN[0], THOUGHTS[1]], ["\n<think>hm</think>\nthe sky<|user|>"]),
    "gpt-oss": (
        "gpt_oss",
        [user("Up?"), turn("the sky"), user("more"), turn("hills", thinking="ho")],
        [
            "<|channel|>final<|message|>the sky",  # <|end|> follows, which is no stop
            "<|channel|>analysis<|message|>ho<|end|><|start|>assistant<|channel|>final<|message|>hills<|return|>",
        ],
    ),
    "gpt-oss after a call": (
        "gpt_oss",
        [*called(), turn("warm")],
        [WEATHER, "<|channel|>final<|message|>warm<|return|>"],
    ),
    "Qwen3.5 with calls in two rounds": (
        "qwen3_5",
        [*called(), turn("warm"), user("more"), turn("hills")],
        [QWEN_CALL, "warm<|im_end|>", "hills<|im_end|>"],
    ),
    "Qwen3.5's last thoughts": (
        "qwen3_5",
        [*PLAIN[:3], THOUGHTS[3]],
        ["the sky<|im_end|>", "ho\n</think>\n\nhills<|im_end|>"],
    ),
}


@pytest.mark.parametrize(("name", "messages", "expected"), MASKS.values(), ids=MASKS)
def test_masks_of_released_templates(released, name, messages, expected):
    ours = released(name)
    assert learned({"messages": messages}, ours, loss_on="assistant") == expected
    assert learned({"messages": messages}, ours, loss_on="answer") == expected[-1:]


@pytest.mark.parametrize("case", [case for case in MASKS if case.startswith(("R1", "GLM"))])
def test_masks_are_those_of_trls_training_templates(released, case):
    """TRL's mask for DeepSeek includes the generation prompt of a turn."""
    name, messages, _ = MASKS[case]
    ours = released(name)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours.backend, **ours.special_tokens)
    output = theirs.apply_chat_template(
        messages,
        chat_template=(FOLDER / "trl" / f"{name}.jinja").read_text(),
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    want = runs(output["input_ids"], output["assistant_masks"], ours)
    prompts = ("<｜Assistant｜><think>\n", "<｜Assistant｜><think>", "<｜Assistant｜>", "")
    found = learned({"messages": messages}, ours, loss_on="assistant")
    for one, other in zip(found, want, strict=True):
        prompt = next(prompt for prompt in prompts if other.startswith(prompt))
        assert one == other.removeprefix(prompt)


REASONED_CALL = [*called(thinking="ask"), turn("warm", thinking="so")]


@pytest.mark.parametrize(
    ("name", "messages", "last"),
    [
        ("gpt_oss", REASONED_CALL, "<|start|>assistant<|channel|>final<|message|>warm<|return|>"),
        ("glm_4_5", THOUGHTS, "\n<think>ho</think>\nhills<|user|>"),
        ("qwen3_5", THOUGHTS, "ho\n</think>\n\nhills<|im_end|>"),
    ],
)
def test_turns_that_lose_their_reasoning_are_refused_with_a_way_that_works(released, name, messages, last):
    ours = released(name)
    with pytest.raises(
        NaloraError, match=r"found one that rewrites messages\[1\].*use --data.loss-on answer"
    ):
        learned({"messages": messages}, ours, loss_on="assistant")
    (found,) = learned({"messages": messages}, ours, loss_on="answer")
    assert found.endswith(last)
    (alone,) = learned({"messages": messages[:2]}, ours, loss_on="answer")  # one record for each turn
    assert "ask" in alone or "hm" in alone


def test_a_turn_without_its_generation_prompt_is_refused_with_a_way_that_works(tokenizer):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[reply]{% endif %}"
    other = dataclasses.replace(tokenizer, chat_template=template)
    for loss_on in ("answer", "assistant"):
        with pytest.raises(NaloraError, match=r"another beginning of messages\[3\].*or --data.loss-on all"):
            learned({"messages": PLAIN}, other, loss_on=loss_on)
    assert learned({"messages": PLAIN}, other, loss_on="all") == [
        "[user]Up?[assistant]the sky[user]more[assistant]<b>hills<|im_end|>"
    ]
