"""What a study asks of the kind of model that a task trains; `language` and `images` answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import optax

from nalora_jax import distributed
from nalora_jax.config import DataConfig, RunConfig
from nalora_jax.data.pipeline import BatchIterator
from nalora_jax.train.assembly import Assembly


class StudyRows(Protocol):
    """Training rows in a seed's order."""

    @property
    def fingerprint(self) -> str:
        """Identity of the stream of rows."""

    def batches(self) -> BatchIterator:
        """Batches without end."""


class Items(Protocol):
    """Fixed items to measure on."""

    @property
    def digest(self) -> str:
        """Changes whenever the items do."""

    def __len__(self) -> int: ...


class Subject(Protocol):
    """One kind of model and its tasks. It keeps what is expensive for the life of the process.

    ``config`` is everywhere the settings of one run.
    """

    def program(self, config: RunConfig) -> tuple[RunConfig, Any]:
        """What the compiled step depends on: ``config`` without the rest, and facts about the data as JSON values."""

    def assemble(self, general: RunConfig, config: RunConfig, last: optax.GradientTransformation) -> Assembly:
        """Adapters, optimizer and step of the settings that `program` gave for ``config``."""

    def params(self, config: RunConfig, assembly: Assembly) -> Any:
        """Frozen weights of the run, and what else its step takes beside the adapters."""

    def base(self, config: RunConfig) -> tuple[str, Any]:
        """The weights before any adapter, with what tells them from others."""

    def data(self, config: RunConfig) -> Any:
        """The run's training rows (`StudyRows`)."""

    def adapters(self, config: RunConfig, assembly: Assembly, data: Any, seed: int) -> Any:
        """What training starts from; ``seed`` is that of A."""

    def items(self, config: RunConfig, data: DataConfig) -> Any:
        """Held-out `Items` of ``data.eval_split``, at most ``data.eval_limit``.

        Raises:
          NaloraError: some of them are in ``data.train_split`` too.
        """

    def check_apart(self, config: RunConfig, tuned: str, tested: str) -> None:
        """Refuses splits of the run's data that share records.

        Raises:
          NaloraError: they do.
        """

    def measure(self, items: Any, assembly: Assembly, variables: Mapping[str, Any], *, whole: bool) -> dict[str, float]:
        """``loss`` of ``variables`` on `items`; with ``whole`` also the measures that take programs of their own."""


def on_mesh(batches: BatchIterator, assembly: Assembly) -> Iterator[dict[str, jax.Array]]:
    """The batches as the step takes them."""
    for batch in batches:
        yield distributed.make_global_batch(batch, assembly.mesh, rows_axis=1)
