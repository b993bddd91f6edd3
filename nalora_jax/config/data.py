"""Settings of the training and evaluation data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nalora_jax.config.documented import documented
from nalora_jax.config.ranges import check_path, require


@documented
@dataclass(frozen=True)
class DataConfig:
    """The training and evaluation data, and the conversion of text to packed sequences."""

    # A task of this library ("socialiqa", ...), "tfds:<name>", "hf:<org>/<name>", the path or gs:// or s3:// URL of a
    # file (JSONL, JSON, CSV, TSV, Parquet, Arrow, ArrayRecord) or folder; or several: "a.jsonl*3,b.parquet".
    dataset: str = "socialiqa"
    # TFDS folder that contains (or receives) a "tfds:" data set; empty means TFDS's default.
    data_dir: str = ""
    # Split to train on, e.g. "train[:10%]" (a TFDS expression); a file has one split, "train".
    train_split: str = "train"
    # Split held out for evaluation, another file's path, or "auto": the split "validation" if
    # there is one, else 5% of the training records (at least 20, or a fifth of fewer than 100
    # records; at most 500), drawn once by a fixed seed.
    eval_split: str = "auto"
    # Held-out examples for the evaluation before and after training (0: all that are left), drawn
    # once by a fixed seed.
    eval_limit: int = 400
    # Other held-out examples, evaluated during training, which select the checkpoint that is
    # exported.
    select_limit: int = 200
    # Tokens per packed sequence; 0, "auto" on the command line: a multiple of 8 that fits 99% of
    # the examples without truncation, at least 128 with packing and up to four times as long where
    # shorter rows are less than 90% full, at most the model's context.
    max_length: int = 0
    # Pack several examples into one sequence (they never attend to each other); off: one example
    # per sequence.
    pack: bool = True
    # Examples longer than max_length: "error", "drop", "truncate" (from the left of the prompt) or
    # "split" (into rows, each with positions from 0; every token stays a target once).
    too_long: Literal["error", "drop", "truncate", "split"] = "drop"
    # Loss tokens: the "answer" (completion or last assistant turn), every "assistant" turn, "all".
    loss_on: Literal["answer", "assistant", "all"] = "answer"
    # Only loss tokens among the last tokens of an example count: a number of tokens, or below 1 a
    # share of the example; 0: all. Of an example that was split, the last tokens of every row.
    loss_last: float = 0.0
    # Wrap prompts in the model's chat template.
    chat: bool = False
    # Tokens to add to the tokenizer, each encoded as one id; needs --lora.modules-to-save
    # embed_tokens lm_head, or the ids in --lora.trainable-token-indices: new rows start as the
    # mean of the others and are trained.
    add_tokens: tuple[str, ...] = ()
    # The same for special tokens, such as the marks of a tool call: generated text is shown
    # without them.
    add_special_tokens: tuple[str, ...] = ()
    # Field of a record that holds the prompt.
    prompt_field: str = "prompt"
    # Field of a record that holds the completion.
    completion_field: str = "completion"
    # Field of a record that holds chat turns, in place of prompt and completion.
    messages_field: str = "messages"
    # Largest number of training examples (0: all): the first after the shuffle.
    train_limit: int = 0
    # Threads that assemble batches ahead of the step; 0 assembles them in the step's thread.
    workers: int = 1


def check_data(data: DataConfig, *, compares: bool) -> None:
    """Checks the settings of the data.

    Args:
      data: the settings.
      compares: True for losses that compare two answers.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    for dataset in filter(str.strip, data.dataset.split(",")):
        check_path("--data.dataset", dataset)
    last = data.loss_last
    require("--data.loss-last", last < 1 or last == int(last), "whole tokens, or a share below 1", last)
    if compares:
        require(
            "--data.loss-last", not last, "0 with --preference.loss, which compares entire answers", last
        )
        drops = data.too_long != "split"
        require("--data.too-long", drops, "drop, truncate or error with --preference.loss", "split")
