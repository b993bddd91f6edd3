"""The steps in which a run logs, evaluates and saves."""

from __future__ import annotations

from dataclasses import dataclass

from nalora_jax.config import RunConfig


@dataclass(frozen=True)
class Schedule:
    """Intervals of the loop's actions in steps; with 0, an action runs only after the last step."""

    steps: int
    log_every: int
    eval_every: int
    save_every: int
    # Evaluations without a better metric before stopping; 0: never stop early.
    patience: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Schedule:
        """Returns the schedule of a run."""
        train = config.train
        return cls(
            config.steps,
            train.log_every,
            train.eval_every,
            train.save_every,
            train.patience,
        )

    def evaluates(self, step: int) -> bool:
        """Returns True if the model is evaluated after ``step``."""
        return step == self.steps or _due(step, self.eval_every)

    def saves(self, step: int) -> bool:
        """Returns True if the state is saved after ``step``."""
        return self.evaluates(step) or _due(step, self.save_every)

    def logs(self, step: int) -> bool:
        """Returns True if ``step`` is logged."""
        return self.saves(step) or _due(step, self.log_every)


def _due(step: int, every: int) -> bool:
    """Returns True at multiples of ``every``; never for 0 or less."""
    return every > 0 and step % every == 0
