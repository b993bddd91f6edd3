"""Texts of records and the parts that the loss is on."""

import dataclasses
from pathlib import Path

import pytest
import transformers

from nalora_jax.config import DataConfig
from nalora_jax.data import chat_text
from nalora_jax.data.chat_text import render_record
from nalora_jax.data.tokenize import tokenize
from nalora_jax.data.tokenizer import AddedTokens
from nalora_jax.errors import NaloraError
from tests.data.loss_tokens import learned, runs

CONFIG = DataConfig()
FOLDER = Path(__file__).parent / "templates"
TALK = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Which way is up?"},
    {"role": "assistant", "content": "the sky"},
    {"role": "user", "content": "Tell me more"},
    {"role": "assistant", "content": "\n\nYes, the green hills"},
]


def test_completion_counts_with_its_end(tokenizer):
    record = {"prompt": "Question: Which way is up?\nAnswer:", "completion": " the sky"}
    assert learned(record, tokenizer) == [" the sky<|im_end|>"]
    assert learned(record, tokenizer, loss_on="all") == [record["prompt"] + " the sky<|im_end|>"]


def test_begin_of_sequence_goes_in_front(tokenizer):
    wanting = dataclasses.replace(tokenizer, add_bos=True)
    records = {"prompt": "up", "completion": " is"}, {"messages": TALK}
    text, chat = tokenize(
        [render_record(record, CONFIG, wanting, "") for record in records], wanting
    )
    expected = [*wanting.encode("up"), *wanting.encode(" is", special=False), wanting.eos_id]
    assert text.ids.tolist() == expected
    assert chat.ids[:2].tolist() == wanting.encode("<|im_start|>system", special=False)[:2]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("answer", ["\n\nYes, the green hills<|im_end|>"]),
        ("assistant", ["the sky<|im_end|>", "\n\nYes, the green hills<|im_end|>"]),
        (
            "all",
            [
                "".join(
                    f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK
                ).rstrip()
            ],
        ),
    ],
)
def test_chat_masks_are_exact(tokenizer, loss_on, expected):
    assert learned({"messages": TALK}, tokenizer, loss_on=loss_on) == expected


def test_turn_without_special_end_gets_one(tokenizer):
    plain = dataclasses.replace(
        tokenizer,
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    assert learned({"messages": TALK[1:3]}, plain) == ["the sky<|im_end|>"]
    assert learned({"messages": TALK[1:]}, plain, loss_on="assistant")[0] == "the sky"


def calling(function):
    return {"messages": [*TALK[:3], {"role": "assistant", "tool_calls": [{"function": function}]}]}


def said(role, content):
    return {"messages": [{"role": role, "content": content}, *TALK[2:]]}


REFUSED = [
    ({"body": "x"}, r"here: expected a field 'prompt' \(or 'messages'\), found 'body'; .*--data.prompt-field"),
    ({"text": 3}, "here: completion: expected a text, found a int"),
    ({"prompt": "x"}, "expected a field 'completion', found 'prompt'; .*--data.completion-field"),
    ({"prompt": "x", "completion": ""}, "here: completion: expected an answer, found an empty text"),
    ({"prompt": "\udfff", "completion": "x"}, "prompt: expected Unicode text, found half a character"),
    ({"messages": []}, "here: messages: expected a list of chat messages, found none"),
    ({"messages": ["hi"]}, r"here: messages\[0\]: expected \{\"role\""),
    ({"messages": [{"role": "user"}]}, r"messages\[0\]: expected a field 'content', found 'role'"),
    (said("user", [{"type": "image", "url": "x"}]), "content: expected a text, or"),
    (said("gpt", "x"), r"here: messages\[0\]: role: .*found 'gpt'; write 'assistant'"),
    ({"messages": TALK[:2]}, "expected an assistant's turn"),
    ({"messages": TALK[2:3]}, "expected a user's or system's message first"),
    ({"messages": [*TALK[:2], {"role": "assistant", "content": " \n"}]}, "message 3 of 3: .*empty text; the model"),
    ({"messages": TALK, "tools": "[" * 100_000}, "tools: expected a JSON list of tools"),
    (calling({"name": 1}), r"messages\[3\]: tool_calls\[0\]: expected"),
    (calling({"name": "f", "arguments": "{"}), "arguments: expected a JSON object"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, r"messages\[0\]: from: expected one of human, "),
]  # fmt: skip


@pytest.mark.parametrize(("record", "message"), REFUSED)
def test_bad_records_name_the_field(tokenizer, record, message):
    with pytest.raises(NaloraError, match=message):
        render_record(record, CONFIG, tokenizer, "here")


def test_an_end_of_sequence_token_that_ends_every_turn_is_part_of_the_answer(tokenizer):
    end = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    special = {"eos_token": "<|im_end|>"}
    mistral = dataclasses.replace(tokenizer, chat_template=template, special_tokens=special)
    expected = ["the sky<|im_end|>", "\n\nYes, the green hills<|im_end|>"]
    assert learned({"messages": TALK}, mistral, loss_on="assistant") == expected
    assert learned({"messages": TALK}, mistral) == expected[-1:]


# ---------------------------------------------------------------- released templates


# Of each released model: special tokens, then those at which its generation_config.json stops, the
# first is eos_token.
MODELS = {
    "deepseek_r1_distill": (
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"), ("<｜end▁of▁sentence｜>",)),
    "glm_4_5": (
        ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>"), ("<|endoftext|>", "<|user|>", "<|observation|>")),
    "gpt_oss": (
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>"), ("<|return|>", "<|endoftext|>", "<|call|>")),
    "phi_3": (("<s>", "<|user|>"), ("<|endoftext|>", "<|assistant|>", "<|end|>")),
    "qwen3_5": (("<|im_start|>",), ("<|im_end|>", "<|endoftext|>")),
}  # fmt: skip
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}


@pytest.fixture
def released(tokenizer):
    """Builds the tokenizer of a released template's model, over a small vocabulary."""

    def build(name):
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


def user(content):
    return {"role": "user", "content": content}


def turn(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def thought(words, content):
    return turn(f"<think>\n{words}\n</think>\n\n{content}")


def called(**fields):
    return [user("Up?"), turn("", tool_calls=[CALL], **fields), {"role": "tool", "content": "21"}]


EOS, PLAIN = "<｜end▁of▁sentence｜>", [user("Up?"), turn("the sky"), user("more"), turn("<b>hills")]
THOUGHTS = [user("Up?"), thought("hm", "the sky"), user("more"), thought("ho", "hills")]
BARE = "\n<think></think>\n"
WEATHER = ' to=functions.sky<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
QWEN_CALL = "<tool_call>\n<function=sky>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call><|im_end|>"
GLM_CALL = "<tool_call>sky\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call><|observation|>"
MASKS = {
    "R1 without thoughts": ("deepseek_r1_distill", PLAIN, [f"the sky{EOS}", f"<b>hills{EOS}"]),
    "R1 with thoughts": (
        "deepseek_r1_distill", THOUGHTS, [f"hm\n</think>\n\nthe sky{EOS}", f"ho\n</think>\n\nhills{EOS}"]),
    "R1 with thoughts of another form": (
        "deepseek_r1_distill", [user("Up?"), turn("<think>hm</think>up")], [f"hm</think>up{EOS}"]),
    "GLM": ("glm_4_5", PLAIN, [f"{BARE}the sky<|user|>", f"{BARE}<b>hills<|user|>"]),
    "GLM after a call": (
        "glm_4_5", [*called(reasoning_content="ask"), turn("warm")],
        [f"\n<think>ask</think>\n{GLM_CALL}", f"{BARE}warm<|user|>"]),
    "GLM's last thoughts": ("glm_4_5", [PLAIN[0], THOUGHTS[1]], ["\n<think>hm</think>\nthe sky<|user|>"]),
    "gpt-oss": (
        "gpt_oss", [user("Up?"), turn("the sky"), user("more"), turn("hills", thinking="ho")],
        ["<|channel|>final<|message|>the sky",  # <|end|> follows, which is no stop
         "<|channel|>analysis<|message|>ho<|end|><|start|>assistant<|channel|>final<|message|>hills<|return|>"]),
    "gpt-oss after a call": (
        "gpt_oss", [*called(), turn("warm")], [WEATHER, "<|channel|>final<|message|>warm<|return|>"]),
    "Phi-3, whose end of text is that of the conversation": ("phi_3", PLAIN, ["the sky<|end|>", "<b>hills<|end|>"]),
    "Qwen3.5 with calls in two rounds": (
        "qwen3_5", [*called(), turn("warm"), user("more"), turn("hills")],
        [QWEN_CALL, "warm<|im_end|>", "hills<|im_end|>"]),
    "Qwen3.5's last thoughts": (
        "qwen3_5", [*PLAIN[:3], THOUGHTS[3]], ["the sky<|im_end|>", "ho\n</think>\n\nhills<|im_end|>"]),
}  # fmt: skip


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
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours.backend, **ours.special_tokens
    )
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


@pytest.mark.parametrize("loss_on", ["answer", "assistant"])
@pytest.mark.parametrize(
    ("messages", "end"),
    [
        (PLAIN[:2], "<|channel|>final<|message|>the sky<|return|>"),
        (PLAIN, "<|channel|>final<|message|><b>hills<|return|>"),
        ([*called(), turn("warm")], "<|channel|>final<|message|>warm<|return|>"),
        (called()[:2], WEATHER),
        (called(thinking="ask")[:2], WEATHER),
    ],
)
def test_text_of_gpt_oss_ends_with_the_stop_token_of_its_completion(
    released, loss_on, messages, end
):
    """`tokenize` would add the token to the ids, but neither to the text nor to its ranges."""
    rendered = render_record(
        {"messages": messages}, DataConfig(loss_on=loss_on), released("gpt_oss"), "here"
    )
    start, stop = rendered.answers[-1]
    assert rendered.text[start:stop].endswith(end)
    assert stop == len(rendered.text)


REASONED_CALL = [*called(thinking="ask"), turn("warm", thinking="so")]


@pytest.mark.parametrize(
    ("name", "messages", "last"),
    [
        ("gpt_oss", REASONED_CALL, "<|start|>assistant<|channel|>final<|message|>warm<|return|>"),
        ("glm_4_5", THOUGHTS, "\n<think>ho</think>\nhills<|user|>"),
        ("qwen3_5", THOUGHTS, "ho\n</think>\n\nhills<|im_end|>"),
    ],
)
def test_turns_that_lose_their_reasoning_are_refused_with_a_way_that_works(
    released, name, messages, last
):
    ours = released(name)
    message = r"found one that rewrites messages\[1\].*use --data.loss-on answer"
    with pytest.raises(NaloraError, match=message):
        learned({"messages": messages}, ours, loss_on="assistant")
    (found,) = learned({"messages": messages}, ours, loss_on="answer")
    assert found.endswith(last)
    (alone,) = learned(
        {"messages": messages[:2]}, ours, loss_on="answer"
    )  # one record for each turn
    assert "ask" in alone or "hm" in alone


def test_a_turn_without_its_generation_prompt_is_refused_with_a_way_that_works(tokenizer):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[reply]{% endif %}"
    other = dataclasses.replace(tokenizer, chat_template=template)
    for loss_on in ("answer", "assistant"):
        with pytest.raises(
            NaloraError, match=r"another beginning of messages\[3\].*or --data.loss-on all"
        ):
            learned({"messages": PLAIN}, other, loss_on=loss_on)
    expected = "[user]Up?[assistant]the sky[user]more[assistant]<b>hills<|im_end|>"
    assert learned({"messages": PLAIN}, other, loss_on="all") == [expected]


def long_talk(thought):
    for i in range(4):
        yield user(f"  Question {i}: which way is up, and which is down?  " * 3)
        yield turn(f"{thought}Answer {i}: the sky. " * 5)


@pytest.mark.parametrize("thought", ["", "<think>\nhm\n</think>\n\n"])
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jinja")), ids=lambda path: path.stem)
def test_masks_of_long_chats_do_not_depend_on_short_contents(tokenizer, monkeypatch, path, thought):
    """Released templates: those that rewrite contents are rendered in full, or refused as
    always."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = dataclasses.replace(tokenizer, chat_template=path.read_text(), special_tokens=special)
    results = []
    for most in (10**9, 0):
        monkeypatch.setattr(chat_text, "_MOST", most)
        try:
            record = {"messages": list(long_talk(thought))}
            results.append(render_record(record, DataConfig(loss_on="assistant"), ours, "here"))
        except NaloraError as error:
            results.append(str(error))
    assert results[0] == results[1]
