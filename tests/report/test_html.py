"""report.html: what it says, that it loads nothing, and that it holds for any log."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from nalora_jax.config import LoRAConfig, LoRARule, RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.report.compare import render_comparison
from nalora_jax.report.history import read_history
from nalora_jax.report.html import write_report

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; refuses tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def page_of(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(fake_run):
    """The page of the made-up run."""
    return write_report(fake_run)


@pytest.fixture(scope="module")
def text(written):
    return written.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_says_what_the_run_did(page):
    words = page.words
    assert "smollm2-135m-instruct on socialiqa" in words
    assert "before 0.401 95%: 0.353 to 0.449" in words
    assert "after 0.523 95%: 0.474 to 0.572" in words
    assert "+0.122, better; the intervals do not overlap. Measured on 400 held-out items." in words
    assert "Held-out loss 5.100 → 3.310" in words
    assert "Wall time 5:20 preparing 0:20, training 5:00" in words
    assert "Peak memory 1.2 GB of the process" in words
    assert "200,000 tokens" in words
    assert "expected grateful before angry at Kai ✗ wrong after grateful ✓ right" in words
    assert "jax 0.10.2" in words
    assert "device 2 x cpu" in words


def test_the_page_is_small_and_loads_nothing(written, text, page):
    assert written.stat().st_size < 1_500_000
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "object", "form"}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"url\((?!#)|@import", text)


def test_text_from_the_log_is_escaped(make_run):
    attack = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"
    sample = {"prompt": attack, "answer": attack, "expected": attack, "correct": False}
    records = [{"step": 0, "eval": {"accuracy": 0.5, "samples": [sample]}}, {"done": {"message": attack}}]
    config = RunConfig(model=attack, output=attack, lora=LoRAConfig(rules=(LoRARule(attack),)))
    folder = make_run(records, config)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert "49" not in page.words
    assert page.words.count("<script>alert(1)</script>") >= 7


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0, "eval": {"accuracy": 0.5}}],
        [{"step": 0, "eval": {"loss": 2.0, "n": 5}}, {"step": 5, "eval": {"loss": 2.5, "n": 5}}],
        [
            {
                "step": 1,
                "loss": None,
                "misalignment": None,
                "tokens_per_second": None,
                "layers": {"limit": [None]},
            }
        ],
        [
            {
                "step": 1,
                "histograms": {"$x_{": {"edges": [1, 2], "counts": [[0, 0, 0]]}},
                "adapters": {"$q_{": [None]},
            }
        ],
        [{"step": 1, "ranks": {"q": [None], "v": [[1]], "o": None}}],
        [
            {"step": s, "histograms": {"x": {"edges": [1, s + 2], "counts": [[5, s, 0]] * s}}}
            for s in (1, 2)
        ],
        [
            {
                "step": 1,
                "layers": {name: [0.0] * 3 for name in ("misalignment", "limit", "feature", "mask_mean")},
            }
        ],
    ],
)
def test_logs_that_lack_almost_everything_still_make_a_page(make_run, records):
    assert "nalora_jax" in page_of(make_run(records)).words


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            {"accuracy": 0.5, "low": 0.4, "high": 0.6},
            {"accuracy": 0.45, "low": 0.35, "high": 0.55},
            "-0.050, worse",
        ),
        *(
            (
                {"accuracy": 0.5, "low": 0.4, "high": 0.6},
                {"accuracy": value, "low": value - 0.1, "high": value + 0.1},
                said,
            )
            for value, said in ((0.65, "intervals overlap"), (0.75, "intervals do not overlap"))
        ),
        ({"loss": 3.0}, {"loss": 2.5}, "-0.500, better."),
    ],
)
def test_the_verdict_is_honest(make_run, before, after, said):
    words = page_of(make_run([{"step": 0, "eval": before}, {"step": 9, "eval": after}])).words
    assert said in words


def answered(*corrects):
    return [
        {"prompt": f"q{n}", "answer": "a", "expected": "b", "correct": c} for n, c in enumerate(corrects)
    ]


def test_samples_have_the_proportions_of_all_items_and_bars_have_a_chance_level(make_run):
    paired = {"difference": 0.1, "low": 0.0, "high": 0.2, "p_value": 0.1, "gained": 20, "lost": 10, "n": 80}
    before = {"accuracy": 0.5, "n": 80, "samples": answered(*[False] * 20, *[True] * 20)}
    after = {"accuracy": 0.625, "n": 80, "chance": 0.25, "paired": paired}
    after["samples"] = answered(
        *[True] * 10, *[False] * 15, *[True] * 15
    )  # gained 10, wrong 10, lost 5, right 15
    text = page_of(
        make_run([{"step": 0, "initial": True, "eval": before}, {"step": 9, "final": True, "eval": after}])
    ).words
    assert "Of 80 examples 20 gained, 10 lost, 30 right both times, 20 wrong both times." in text
    pairs = re.findall(r"before a [✗✓] (\w+) after a [✗✓] (\w+)", text)
    counts = {pair: pairs.count(pair) for pair in sorted(set(pairs))}
    assert counts == {
        ("right", "right"): 3,
        ("right", "wrong"): 1,
        ("wrong", "right"): 2,
        ("wrong", "wrong"): 2,
    }
    assert "chance 0.25" in text


def of(step, loss, n=None, **kind):
    return {"step": step, "eval": {"loss": loss} | ({"n": n} if n else {}), **kind}


@pytest.mark.parametrize(
    ("records", "value", "said"),
    [
        (
            [of(0, 5.0, initial=True), of(0, 4.0), of(9, 3.0), of(9, 2.0, final=True)],
            "5.000 → 2.000",
            "Before: the base model, before the first step. After: the adapter of step 9, which was exported. Both on "
            "the same examples, which were not used to select the checkpoint.",
        ),
        (
            [of(0, 5.0, initial=True), of(5, 4.0, n=4), of(9, 3.0, n=4), of(9, 2.0, final=True)],
            "5.000 → 2.000",
            "It was selected on 4 other examples, too few to distinguish checkpoints: the selection is mostly chance.",
        ),
        (  # while the result is not measured, both are of the questions along the way
            [of(0, 5.0, initial=True), of(0, 4.0), of(9, 3.0)],
            "4.000 → 3.000",
            "After: the evaluation at step 9. Both on the examples that select the checkpoint: the result has not",
        ),
        ([of(3, 4.0), of(9, 3.0)], "4.000 → 3.000", "Before: the evaluation at step 3. After"),
        ([of(0, 5.0, initial=True), of(0, 4.0)], "step 0 5.000", "Held-out loss"),
    ],
)
def test_it_is_said_where_before_and_after_come_from(make_run, records, value, said):
    words = page_of(make_run(records)).words
    assert value in words
    assert said in words


def test_an_adapter_exported_before_mechanisms_act_is_called_plain_lora(make_run):
    records = [of(0, 5.0, initial=True), of(9, 3.0), of(9, 2.0, final=True)]
    folder = make_run(records, mechanisms_from=10)
    assert "It is plain LoRA: mechanisms act from step 10." in page_of(folder).words
    comparison = render_comparison([read_history(folder)])
    assert "the adapter of step 9 was exported, and mechanisms act from step 10" in comparison
    assert '<td data-head="exported step">9</td>' in comparison
    (folder / "metrics.jsonl").unlink()
    assert "plain LoRA" not in page_of(make_run(records, mechanisms_from=9)).words


def test_a_folder_without_a_run_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(NaloraError, match=r"metrics\.jsonl: expected the log of a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_is_shown_by_role_and_what_is_cut_is_marked(make_run):
    turns = [{"role": "system", "text": "Be <brief>."}, {"role": "user", "text": "Which way is up?"}]
    sample = {
        "prompt": "<|im_start|>system",
        "turns": turns,
        "answer": "The sky, which",
        "cut": True,
        "expected": "Up.",
    }
    values = {"loss": 5.0, "low": 4.0, "high": 6.0, "n": 4, "samples": [sample]}
    page = write_report(make_run([{"step": 0, "initial": True, "eval": values}])).read_text(
        encoding="utf-8"
    )
    assert '<span class="role">system</span>Be &lt;brief&gt;.' in page
    assert page.index('<span class="role">user</span>Which way is up?') > page.index(
        '<span class="role">system</span>'
    )
    assert 'The sky, which<span class="end">did not stop: cut off at the evaluation' in page
    assert "im_start" not in page
