"""On-policy distillation: the student draws samples, and learns the teacher's distributions on
them; its steps are those of `nalora_jax.kinds.rl.sampling_step`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from nalora_jax.assembly.schedule import Schedule
from nalora_jax.config import RunConfig
from nalora_jax.data.prompts import (
    PromptData,
    PromptRecord,
    PromptText,
    chat_prompts,
    opening_messages,
    prompt_data,
)
from nalora_jax.data.source import Record, Source
from nalora_jax.data.taught_text import TaughtExample, add_system, match_places
from nalora_jax.data.tokenize import Example
from nalora_jax.data.tokenizer import Tokenizer
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.distillation_evaluation import (
    DistillationEvaluator,
    ScoreTokens,
    TaughtRows,
)
from nalora_jax.evaluate.evaluator import (
    SAMPLES,
    ItemRecord,
    sample_records,
    variables_of,
)
from nalora_jax.evaluate.generate import Generator
from nalora_jax.kinds.rl.engine import Request
from nalora_jax.kinds.rl.kind import prompt_text
from nalora_jax.kinds.rl.rollout import Samples, sample_batch
from nalora_jax.kinds.rl.sampling_step import SamplingStep
from nalora_jax.kinds.rl.turn_generator import GreedyTurns
from nalora_jax.method.step import Batch, TrainState
from nalora_jax.models.decoder import Decoder

# ---------------------------------------------------------------- prompts


def write_prompts(
    config: RunConfig, tokenizer: Tokenizer, first: Record
) -> PromptText | None:
    """Returns the function that writes the student's prompts, see
    `nalora_jax.kinds.rl.kind.prompt_text`.

    A teacher with a system prompt needs messages of all records.
    """
    if config.distill.system:
        return chat_prompts(config.data, tokenizer, config.rl.system_prompt)
    return prompt_text(config.rl, config.data, tokenizer, first)


def write_taught_prompt(
    record: Record, where: str, *, config: RunConfig, tokenizer: Tokenizer
) -> str:
    """Returns the text of a record's prompt after the system prompt of the teacher.

    Raises:
      NaloraError: the record is no chat.
    """
    messages, tools = opening_messages(record, config.data, where, "--distill.system")
    own = config.rl.system_prompt
    if own and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": own})
    messages = add_system(messages, config.distill.system)
    return tokenizer.render_chat(messages, add_generation_prompt=True, tools=tools)


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentPrompts(PromptData):
    """Prompts of a run whose samples a teacher reads.

    Attributes:
      teacher_prompts: token ids of each prompt as the teacher reads it; None if it reads the
        student's.
      teacher_length: positions of a row of the teacher.
    """

    teacher_prompts: Sequence[Sequence[int]] | None = None
    teacher_length: int = 0

    @property
    def fingerprint(self) -> str:
        """Returns the identity of the stream, which does not depend on hosts."""
        content = hashlib.sha256()
        for ids in self.teacher_prompts or ():
            content.update(np.array([len(ids), *ids], np.int32).tobytes())
        return f"{super().fingerprint}:{content.hexdigest()[:16]}"


def student_prompts(
    records: Source,
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    teacher_context: int,
    written: PromptText | None,
    **shape: Any,
) -> StudentPrompts:
    """Tokenizes the prompts of student and teacher.

    Args:
      records: with prompts.
      config: the run's settings.
      tokenizer: of the model.
      teacher_context: maximum tokens of the teacher.
      written: see `write_prompts`.
      shape: see `prompt_data`.

    Raises:
      NaloraError: bad records, or prompts that leave no room for a sample in a context.
    """
    data = prompt_data(
        records, config.data, tokenizer, rl=config.rl, written=written, **shape
    )
    taught = None
    longest = data.longest
    if config.distill.system:
        write = partial(write_taught_prompt, config=config, tokenizer=tokenizer)
        taught = []
        for index in data.indices.tolist():
            text = write(records[index], records.where(index))
            taught.append(tokenizer.encode(text, special=False))
        longest = max(map(len, taught))
    limit = teacher_context - config.rl.max_new_tokens
    if longest > limit:
        raise NaloraError(
            "--rl.max-new-tokens",
            expected=f"at most {max(teacher_context - longest, 0)} with prompts of up to {longest} "
            f"tokens and the teacher's context of {teacher_context}",
            found=config.rl.max_new_tokens,
            remedy="lower it, shorten --distill.system, or leave long prompts out with "
            "--data.max-length",
        )
    length = -(-(longest + config.rl.max_new_tokens) // 8) * 8
    return StudentPrompts(**vars(data), teacher_prompts=taught, teacher_length=length)


# ---------------------------------------------------------------- the step


class SampledStep(SamplingStep):
    """A `SamplingStep` on samples that a teacher reads, one update each."""

    _data: StudentPrompts

    def __call__(
        self, params: Any, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state after an update on new samples.

        The metrics under ``measured`` include ``length`` (mean tokens of a sample), ``cut`` (share
        of samples that the limit cut), and the seconds of samples and update.
        """
        number = int(state.step)
        self._resume(number)
        started = time.perf_counter()
        places, prompts = self._prompts(batch)
        samples = self._sampler(state.lora, number, prompts)
        figures = {
            "length": float(samples.written.mean()),
            "cut": float(samples.cut.mean()),
        }
        if self._servers is not None:
            self._forget_served(self._servers, 0)
            figures |= self._servers.figures()
            if number + 1 >= self._config.steps:
                self._servers.close()  # the last samples
        if Schedule.of(self._config).logs(number + 1):
            self._write(number + 1, prompts, partial(self._shown_sample, samples))
        rows = self._rows(self._arrays(places, prompts, samples))
        figures["rollout_seconds"] = time.perf_counter() - started
        state, metrics, seconds = self._updated(params, state, rows)
        figures["update_seconds"] = seconds
        measured = dict(metrics["measured"]) | figures
        return state, metrics | {"measured": measured}

    def _arrays(
        self, places: np.ndarray, prompts: Sequence[PromptRecord], samples: Samples
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of the update of all rows of the global batch, ``[rows, ...]``."""
        count = self._config.rl.samples
        masks_cut = self._config.rl.mask_cut
        data = self._data
        ids = [prompt.ids for prompt in prompts for _ in range(count)]
        arrays = sample_batch(ids, samples, data.length, masks_cut=masks_cut)
        del arrays["sampled"], arrays["real"]
        if data.teacher_prompts is not None:
            longer = np.repeat(places, count)
            read = sample_batch(
                [data.teacher_prompts[place] for place in longer],
                samples,
                data.teacher_length,
                masks_cut=masks_cut,
            )
            for name in ("tokens", "positions", "segment_ids"):
                arrays[f"teacher_{name}"] = read[name]
            arrays["teacher_places"] = match_places(
                arrays["loss_weights"], read["loss_weights"]
            )
        return arrays

    def _shown_sample(self, samples: Samples, row: int) -> dict[str, Any]:
        """Returns a sample's completion, for JSON."""
        completion = self._sampler.tokenizer.decode(self._ids(samples, row))
        version = int(samples.version[row])
        return {"completion": completion, "rewards": {}, "version": version}


# ---------------------------------------------------------------- evaluation


class OnPolicyEvaluator(DistillationEvaluator):
    """Evaluates adapters by the divergence from a teacher on their own likeliest completions.

    Args:
      model: the decoder, with the adapters' spec.
      tokenizer: tokenizer of the base model.
      prompts: held out.
      rows: shapes of the rows.
      score: of a batch.
      config: the run's settings.
      mesh: mesh of the weights, if they are sharded.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[PromptRecord],
        rows: TaughtRows,
        score: ScoreTokens,
        config: RunConfig,
        *,
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__(model, tokenizer, (), rows, score, mesh=mesh)
        self._prompts = prompts
        self._limit = config.rl.max_new_tokens
        # Token ids of each prompt, as the teacher reads it.
        self._teacher_prompts = [prompt.ids for prompt in prompts]
        if config.distill.system:
            write = partial(write_taught_prompt, config=config, tokenizer=tokenizer)
            self._teacher_prompts = []
            for prompt in prompts:
                text = write(dict(prompt.record), prompt.where)
                self._teacher_prompts.append(tokenizer.encode(text, special=False))

    def examples(self, params: Any, lora: Any | None) -> list[TaughtExample]:
        """Returns the likeliest completion of each prompt, as both models read it."""
        generator = Generator(
            self._model, variables_of(params, lora), self._tokenizer, mesh=self._mesh
        )
        engine = GreedyTurns(generator, self._tokenizer)
        requests = [Request(prompt.ids, 0, self._limit) for prompt in self._prompts]
        items = []
        drawn = engine.sample(requests)
        for prompt, longer, turn in zip(
            self._prompts, self._teacher_prompts, drawn, strict=True
        ):
            items.append(
                TaughtExample(
                    _joined(prompt.ids, turn.tokens),
                    _joined(longer, turn.tokens),
                    prompt.text,
                    self._tokenizer.decode(turn.tokens.tolist()),
                )
            )
        return items

    def samples(
        self, params: Any, lora: Any | None, records: Sequence[ItemRecord]
    ) -> dict[str, Any]:
        """Returns a few prompts with their completions and the reference completions."""
        shown = self._prompts[:SAMPLES]
        answers = [str(record["completion"]) for record in records[:SAMPLES]]
        references = [str(prompt.record["answer"]) for prompt in shown]
        return sample_records([prompt.text for prompt in shown], answers, references)


def _joined(prompt: Sequence[int], completion: np.ndarray) -> Example:
    """Returns a prompt with its completion, whose tokens are marked."""
    ids = np.array([*prompt, *completion], np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt))
