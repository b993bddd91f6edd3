"""Trained reward models as rewards: ``--rl.rewards model:FOLDER``.

The folder is of a run with ``--kind reward``, or a PEFT adapter with a head of one output. The
model reads each sample in the form of its own training: the prompt with the completion, as a chat
if the prompt is one, and the end-of-sequence id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nalora_jax.config import DataConfig, config_from_dict
from nalora_jax.data.chat_text import Message, Rendered, make_turns, messages_of
from nalora_jax.data.forms import canonical
from nalora_jax.data.pooled_texts import whole_text
from nalora_jax.data.tokenize import tokenize
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.generate.programs import padded_length
from nalora_jax.evaluate.pooled_evaluation import text_vectors
from nalora_jax.kinds.reward import check_reward_model
from nalora_jax.loading.adapted import AdaptedModel, load
from nalora_jax.loading.located import adapter_folder

_SHORTEST = 16  # tokens of the shortest program


@lru_cache(maxsize=2)
def _load_reward_model(folder: str) -> AdaptedModel:
    """Loads a reward model once, for samples and both evaluations, on the first device.

    Raises:
      NaloraError: base or adapter cannot be read, or the adapter has no head of one output.
    """
    model = load(folder, quantize="run")
    check_reward_model(model)
    return model


@dataclass(frozen=True)
class ModelReward:
    """The output of a reward model on prompts with completions.

    Attributes:
      folder: of the run or the adapter.
    """

    folder: str

    def check(self) -> None:
        """Raises a NaloraError if there is no adapter in the folder."""
        adapter_folder(Path(self.folder))

    @cached_property
    def _config(self) -> DataConfig:
        """Returns the data settings of the reward model's run, or the defaults."""
        run = config_from_dict(_load_reward_model(self.folder).located.run)
        return run.data

    def score_samples(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        records: Sequence[Mapping[str, Any]],
        where: Sequence[str],
        messages: Sequence[Sequence[Message]] | None = None,
    ) -> np.ndarray:
        """Returns the reward of each sample, float64 ``[samples]``.

        A sample's reward does not depend on the samples that are scored with it: the programs have
        the size of the sample's own length.

        Args:
          prompts: text of each sample's prompt.
          completions: text of each sample.
          records: of the data set, of each sample.
          where: name of each record in errors.
          messages: of samples of several turns.

        Raises:
          NaloraError: the model cannot be loaded, or a sample is longer than its context.
        """
        model = _load_reward_model(self.folder)
        rendered = []
        for row, prompt in enumerate(prompts):
            turns = None if messages is None else list(messages[row])
            text = self._render(
                prompt, completions[row], records[row], where[row], turns
            )
            rendered.append(text)
        examples = tokenize(rendered, model.base.tokenizer, end=True)
        ids = [example.ids for example in examples]
        limit = model.base.config.max_positions
        for row, tokens in enumerate(ids):
            if len(tokens) > limit:
                raise NaloraError(
                    f"--rl.rewards model:{self.folder}: {where[row]}",
                    expected=f"at most {limit} tokens, the context of the reward model",
                    found=len(tokens),
                    remedy="lower --rl.max-new-tokens or --data.max-length",
                )
        widths = np.array([padded_length(len(x), minimum=_SHORTEST) for x in ids])
        values = np.zeros(len(ids))
        for width in sorted(set(widths.tolist())):
            places = np.flatnonzero(widths == width)
            chosen = [ids[place] for place in places]
            outputs = text_vectors(model.module, model.variables, chosen, "last")
            values[places] = outputs[:, 0]
        return values

    def _render(
        self,
        prompt: str,
        completion: str,
        record: Mapping[str, Any],
        where: str,
        turns: list[Message] | None,
    ) -> Rendered:
        """Returns the text that the model reads of a sample."""
        config = self._config
        if turns is None:
            parts = canonical(dict(record), config, where)
            if config.messages_field in parts:
                turns = messages_of(parts, config, where)
                if turns[-1]["role"] == "assistant":
                    turns = turns[:-1]
                turns = [*turns, {"role": "assistant", "content": completion}]
            elif config.chat:
                turns = make_turns(parts.get(config.prompt_field, prompt), completion)
        if turns is None:
            return whole_text(prompt + completion)
        tokenizer = _load_reward_model(self.folder).base.tokenizer
        (text,) = tokenizer.render_chats([(turns, False)])
        return Rendered(text, ((0, len(text)),), special=False)
