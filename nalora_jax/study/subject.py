"""Interface of a study to the models that a task trains; `language` and `images` implement it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import optax

from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.method.step import Step
from nalora_jax.models.config import ModelConfig
from nalora_jax.train.program import Assembly


class StudyRows(Protocol):
    """Training rows in the order of a seed."""

    @property
    def fingerprint(self) -> str:
        """Returns a digest that changes if the stream of rows changes."""

    def batches(self) -> BatchIterator:
        """Returns endless batches."""


@dataclass(frozen=True, eq=False)
class Items:
    """Fixed items to measure."""

    digest: str  # changes if the items change
    count: int

    @property
    def digests(self) -> dict[str, str]:
        """Returns all digests of the items, by name; `digest` has the name ""."""
        return {"": self.digest}


class Subject(Protocol):
    """A kind of model and its tasks. It caches models and data for the life of the process.

    In every method, ``config`` is the settings of one run.
    """

    def architecture(self, config: RunConfig) -> ModelConfig | None:
        """Returns the base's architecture without reading weights; None: its memory is not estimated."""
        return None

    def program(self, config: RunConfig) -> tuple[RunConfig, Any]:
        """Returns the settings that determine the compiled step, and hashable facts about the data."""

    def assemble(
        self, general: RunConfig, config: RunConfig, last: optax.GradientTransformation
    ) -> Assembly:
        """Returns adapters, optimizer and step for the result of `program` for ``config``."""

    def params(self, config: RunConfig, assembly: Assembly) -> Any:
        """Returns the frozen weights of the run and the other inputs of its step."""

    def base(self, config: RunConfig) -> tuple[str, Any]:
        """Returns a name that is unique to the base, and its weights without an adapter."""

    def base_digest(self, config: RunConfig) -> str:
        """Returns the digest of the base's weights, the same for every seed."""

    def data(self, config: RunConfig) -> Any:
        """Returns the run's training rows (`StudyRows`)."""

    def step(self, config: RunConfig, assembly: Assembly, data: Any) -> Step:
        """Returns the training step of a run on its rows."""
        return assembly.step

    def source_digest(self, data: Any) -> str:
        """Returns the digest of the training data of `data`, the same for every seed."""

    def adapters(self, config: RunConfig, assembly: Assembly, data: Any, seed: int) -> Any:
        """Returns the initial adapters, with A drawn by ``seed``."""

    def items(self, config: RunConfig, data: DataConfig) -> Any:
        """Returns held-out `Items` of ``data.eval_split``, at most ``data.eval_limit``.

        Raises:
          NaloraError: some of them are in ``data.train_split`` too.
        """

    def probe(self, config: RunConfig, data: DataConfig) -> Any:
        """Returns `Items` of other data than the run's, likewise."""
        return self.items(config, data)

    def check_apart(self, config: RunConfig, tuned: str, tested: str) -> None:
        """Checks that two splits of the run's data share no record.

        Raises:
          NaloraError: they do.
        """

    def measure(
        self, items: Any, assembly: Assembly, params: Any, lora: Any = None, *, whole: bool = False
    ) -> dict[str, float]:
        """Returns the measures of an adapter, or of the weights alone, on ``items``.

        With ``whole``, they include measures that need separate programs.
        """
