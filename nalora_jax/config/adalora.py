"""Settings of AdaLoRA: the number of remaining ranks, and the schedule of removals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nalora_jax.config.documented import documented
from nalora_jax.config.ranges import require

if TYPE_CHECKING:
    from nalora_jax.config import RunConfig


@documented
@dataclass(frozen=True)
class AdaLoRAConfig:
    """AdaLoRA (arXiv 2303.10512): adapters start with their rules' ranks and keep the best ones."""

    # Mean rank of the adapters at the end; 0: plain LoRA.
    target_rank: int = 0
    # Share of the steps before the first rank is removed.
    warmup_share: float = 0.1
    # Share of the steps, at the end, in which the ranks do not change.
    final_share: float = 0.3
    # Steps between two allocations.
    interval: int = 10
    # Decay of the EMA of a weight's sensitivity, |weight x gradient|.
    sensitivity_decay: float = 0.85
    # Decay of the EMA of the distance between the sensitivity and its EMA.
    uncertainty_decay: float = 0.85
    # Weight of the penalty that keeps A's columns, and B's rows, orthonormal.
    orthogonality: float = 0.5

    def steps(self, total: int) -> tuple[int, int]:
        """Returns the last step with all ranks and the step of the last allocation.

        Steps are counted from 1 to ``total``.
        """
        return int(self.warmup_share * total), total - int(self.final_share * total)

    def settled_at(self, total: int) -> int:
        """Returns the first step with the final ranks; no earlier state is exported.

        Without AdaLoRA it is 0.
        """
        if not self.target_rank:
            return 0
        return self.steps(total)[1]


def check_adalora(config: RunConfig) -> None:
    """Raises an error for settings that are incompatible with AdaLoRA, judging by the rules.

    Raises:
      NaloraError: names the flag, the expected value and the actual one.
    """
    adalora, lora = config.adalora, config.lora
    if not adalora.target_rank:
        return
    highest = max(rule.rank for rule in lora.rules)
    below = f"less than the ranks that the adapters begin with (--lora.rules, at most {highest})"
    require("--adalora.target-rank", adalora.target_rank < highest, below, adalora.target_rank)
    for flag, value, fits in (
        ("--lora.init", lora.init, "default"),
        ("--lora.dora", lora.dora, False),
        ("--vision.task", config.vision.task if config.vision.task != "chat" else "", ""),
        ("--train.patience", config.train.patience, 0),
    ):
        require(flag, value == fits, f"{fits or 'a language model'} with --adalora.target-rank", value)
    share = adalora.warmup_share + adalora.final_share
    expected = "shares that leave steps between them, in which ranks are taken"
    require("--adalora.warmup-share, --adalora.final-share", share < 1, expected, f"a sum of {share:g}")
