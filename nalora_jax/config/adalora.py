"""Settings of AdaLoRA: how many ranks the adapters keep, and when they lose the others."""

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
    """AdaLoRA (arXiv 2303.10512): adapters begin with the ranks of their rules and keep those that matter most."""

    # Mean rank of the adapters at the end; 0: plain LoRA.
    target_rank: int = 0
    # Share of the steps before the first rank is taken.
    warmup_share: float = 0.1
    # Share of the steps, at the end, in which the ranks stay as they are.
    final_share: float = 0.3
    # Steps between two allocations.
    interval: int = 10
    # Decay of the average sensitivity of a weight, |weight x gradient|.
    sensitivity_decay: float = 0.85
    # Decay of the average distance of the sensitivity from that average.
    uncertainty_decay: float = 0.85
    # Weight of the penalty that holds A's columns, and B's rows, orthonormal.
    orthogonality: float = 0.5

    def steps(self, total: int) -> tuple[int, int]:
        """The last step with all ranks, and the step of the last allocation, of ``total`` steps from 1."""
        return int(self.warmup_share * total), total - int(self.final_share * total)

    def settled_at(self, total: int) -> int:
        """The step from which the ranks are the final ones, 0 without AdaLoRA: no earlier state is exported."""
        return self.steps(total)[1] if self.target_rank else 0


def check_adalora(config: RunConfig) -> None:
    """Refuses settings that do not go with AdaLoRA, whose ranks are known to be above the target by the rules alone.

    Raises:
      NaloraError: names the flag, what was expected and what was found.
    """
    adalora, lora = config.adalora, config.lora
    if not adalora.target_rank:
        return
    highest = max(rule.rank for rule in lora.rules)
    below = f"less than the ranks that the adapters begin with (--lora.rules, at most {highest})"
    require("--adalora.target-rank", adalora.target_rank < highest, below, adalora.target_rank)
    for flag, found, fits in (
        ("--lora.init", lora.init, "default"),
        ("--lora.dora", lora.dora, False),
        ("--vision.task", config.vision.task if config.vision.task != "chat" else "", ""),
        ("--train.patience", config.train.patience, 0),
    ):
        require(flag, found == fits, f"{fits or 'a language model'} with --adalora.target-rank", found)
    taken = adalora.warmup_share + adalora.final_share
    expected = "shares that leave steps between them, in which ranks are taken"
    require("--adalora.warmup-share, --adalora.final-share", taken < 1, expected, f"a sum of {taken:g}")
