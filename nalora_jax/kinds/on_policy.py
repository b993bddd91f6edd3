"""On-policy distillation: the student draws samples, and learns the teacher's distributions on
them.

A step has two programs, as one with rewards (`nalora_jax.kinds.rl.kind`): samples of the current
adapter, by this library's generator or by servers, and the update. Samples are a pure function of
seed, step, weights and adapter, so that a resumed run draws the same ones.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nalora_jax.assembly.program import Assembly
from nalora_jax.assembly.schedule import Schedule
from nalora_jax.config import RLConfig, RunConfig
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
from nalora_jax.evaluate.distillation_evaluation import DistillationEvaluator
from nalora_jax.evaluate.evaluator import SAMPLES, ItemRecord, variables_of
from nalora_jax.evaluate.generate import Generator
from nalora_jax.evaluate.run_log import ROLLOUTS
from nalora_jax.kinds.rl.engine import Request
from nalora_jax.kinds.rl.kind import forget_samples, prompt_text
from nalora_jax.kinds.rl.rollout import Sampler, Samples, sample_batch
from nalora_jax.kinds.rl.servers.pool import ServerPool
from nalora_jax.kinds.rl.turn_generator import GreedyTurns
from nalora_jax.mesh import distributed, processes
from nalora_jax.method.step import Batch, TrainState
from nalora_jax.weights.model_files import LoadedModel

_SHOWN = 4  # prompts of a step in the run's file of samples


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


class SampledStep:
    """A training step with its samples: ``(params, state, batch of prompts) -> (state, metrics)``.

    Args:
      config: the run's settings.
      loaded: the base model.
      assembly: with the compiled update.
      data: the prompts of a batch.
      folder: receives complete groups and some samples; None: they are not stored.
      servers: that draw the samples; None: the generator of this library does.
    """

    def __init__(
        self,
        config: RunConfig,
        loaded: LoadedModel,
        assembly: Assembly,
        data: StudentPrompts,
        folder: Path | None,
        servers: ServerPool | None = None,
    ) -> None:
        rl = config.rl
        self._update = assembly.step
        self._mesh = assembly.mesh
        self._config = config
        self._data = data
        self._servers = servers
        self._file = folder and folder / ROLLOUTS
        self._checkpoints = folder and folder / "checkpoints"
        self._begun = False
        self._sampler = Sampler(
            rl,
            assembly.eval_model,
            assembly.params,
            loaded.tokenizer,
            assembly.mesh,
            prompts=data.batch_size // rl.samples,
            seed=config.seed,
            longest=data.longest,
            folder=folder and folder / "rollouts",
            servers=servers,
        )

    def __call__(
        self, params: Any, state: TrainState, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state after an update on new samples.

        The metrics under ``measured`` include ``length`` (mean tokens of a sample), ``cut`` (share
        of samples that the limit cut), and the seconds of samples and update.
        """
        rl = self._config.rl
        number = int(state.step)
        if not self._begun:
            # The samples after the checkpoint are drawn again.
            self._begun = True
            if self._file is not None:
                forget_samples(self._file, number)
        started = time.perf_counter()
        # [accumulate, rows] prompt indices, each repeated for its samples -> one index per prompt.
        places = np.asarray(processes.fetch(batch["prompt"])).ravel()[:: rl.samples]
        prompts = self._data.prompts(places.tolist())
        samples = self._sampler(state.lora, number, prompts)
        figures = {
            "length": float(samples.written.mean()),
            "cut": float(samples.cut.mean()),
        }
        if self._servers is not None:
            figures |= self._served(self._servers, number)
        if Schedule.of(self._config).logs(number + 1):
            self._write(number + 1, prompts, samples)
        figures["rollout_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        rows = self._rows(self._arrays(places, prompts, samples))
        arrays = distributed.make_global_batch(rows, self._mesh, rows_axis=1)
        state, metrics = self._update(params, state, arrays)
        # So that the update's time is measured, not its dispatch.
        jax.block_until_ready(metrics["loss"])
        figures["update_seconds"] = time.perf_counter() - started
        measured = dict(metrics["measured"]) | figures
        return state, metrics | {"measured": measured}

    def _served(self, servers: ServerPool, number: int) -> dict[str, float]:
        """Returns metrics of the servers; forgets samples that no checkpoint needs, and ends after
        the last step."""
        if self._checkpoints is not None and self._checkpoints.is_dir():
            saved = [path.name for path in self._checkpoints.iterdir()]
            steps = [int(name) for name in saved if name.isdecimal()]
            servers.forget_before(min(steps, default=0))
        figures = servers.figures()
        if number + 1 >= self._config.steps:
            servers.close()
        return figures

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

    def _rows(self, whole: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns this process's rows ``[accumulate, rows, ...]``."""
        accumulate = self._data.accumulate
        rows = list(self._data.rows)
        return {
            # [rows of all processes, ...] -> [accumulate, rows of all, ...] -> rows of this process
            n: v.reshape(accumulate, -1, *v.shape[1:])[:, rows]
            for n, v in whole.items()
        }

    def _write(
        self, step: int, prompts: Sequence[PromptRecord], samples: Samples
    ) -> None:
        """Appends samples of some prompts to the run's file, a line each."""
        if jax.process_index() or self._file is None:
            return
        size = self._config.rl.samples
        decode = self._sampler.tokenizer.decode
        with self._file.open("a", encoding="utf-8") as file:
            for place, prompt in enumerate(prompts[:_SHOWN]):
                shown = []
                for row in range(place * size, (place + 1) * size):
                    # After the sample's end tokens are negative (`NO_TOKEN`).
                    tokens = samples.tokens[row]
                    text = decode(tokens[tokens >= 0].tolist())
                    version = int(samples.version[row])
                    shown.append(
                        {"completion": text, "rewards": {}, "version": version}
                    )
                line = {"step": step, "prompt": prompt.text, "samples": shown}
                file.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------- evaluation


class OnPolicyEvaluator(DistillationEvaluator):
    """Evaluates adapters by the divergence from a teacher on their own likeliest completions.

    Attributes:
      prompts: held out.
      teacher_prompts: token ids of each, as the teacher reads it.
      rl: limit of a completion.
    """

    prompts: Sequence[PromptRecord]
    teacher_prompts: Sequence[Sequence[int]]
    rl: RLConfig

    @classmethod
    def of(
        cls,
        prompts: Sequence[PromptRecord],
        config: RunConfig,
        *arguments: Any,
        **options: Any,
    ) -> OnPolicyEvaluator:
        """Returns the evaluator of prompts; further arguments are those of `DistillationEvaluator`
        without the examples."""
        model, tokenizer, *others = arguments
        made = cls(model, tokenizer, (), *others, **options)
        made.prompts = prompts
        made.rl = config.rl
        made.teacher_prompts = [prompt.ids for prompt in prompts]
        if config.distill.system:
            made.teacher_prompts = []
            for prompt in prompts:
                text = write_taught_prompt(
                    dict(prompt.record),
                    prompt.where,
                    config=config,
                    tokenizer=tokenizer,
                )
                made.teacher_prompts.append(tokenizer.encode(text, special=False))
        return made

    def examples(self, params: Any, lora: Any | None) -> list[TaughtExample]:
        """Returns the likeliest completion of each prompt, as both models read it."""
        generator = Generator(
            self._model, variables_of(params, lora), self._tokenizer, mesh=self._mesh
        )
        engine = GreedyTurns(generator, self._tokenizer)
        limit = self.rl.max_new_tokens
        requests = [Request(prompt.ids, 0, limit) for prompt in self.prompts]
        items = []
        drawn = engine.sample(requests)
        for prompt, longer, turn in zip(
            self.prompts, self.teacher_prompts, drawn, strict=True
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
        samples = []
        for prompt, record in zip(self.prompts[:SAMPLES], records, strict=False):
            samples.append(
                {
                    "prompt": prompt.text,
                    "answer": str(record["completion"]).strip(),
                    "expected": str(prompt.record["answer"]).strip(),
                }
            )
        return {"samples": samples}


def _joined(prompt: Sequence[int], completion: np.ndarray) -> Example:
    """Returns a prompt with its completion, whose tokens are marked."""
    ids = np.array([*prompt, *completion], np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt))
