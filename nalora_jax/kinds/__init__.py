"""Kinds of runs: each is a module with the functions of `nalora_jax.kinds.job.Kind`, and those on
a decoder with the function of `DecoderKind` as well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, cast

from nalora_jax.config import RunConfig
from nalora_jax.config.settings import DUAL
from nalora_jax.kinds.job import Kind
from nalora_jax.models import families  # noqa: F401  (enters the families that can be trained)
from nalora_jax.models.config import ModelConfig
from nalora_jax.weights import gguf  # noqa: F401  (enters the files that a base can be)


class DecoderKind(Kind, Protocol):
    """A kind of run on a decoder: a module with the functions of `Kind` and this one."""

    def program_parts(self, config: RunConfig, processor: Any, /) -> dict[str, Any]:
        """Returns the arguments of `nalora_jax.assembly.program.assemble` that differ between
        kinds.

        Args:
          config: of the run.
          processor: of the images of a model that sees; None for other models.
        """


def run_kind(config: RunConfig) -> Kind:
    """Returns the kind of a run, imported only now: runs on images need Pillow, an extra."""
    if config.vision.task in DUAL:
        from nalora_jax.kinds import dual

        return dual
    if config.vision.task == "chat":
        from nalora_jax.kinds import images

        return images
    if config.preference.loss != "none":
        from nalora_jax.kinds import preference

        return preference
    if config.rl.rewards:
        from nalora_jax.kinds.rl import kind

        return kind
    from nalora_jax.kinds import text

    return text


def decoder_parts(
    config: RunConfig, base: ModelConfig, processor: Any = None
) -> dict[str, Any]:
    """Returns the objective and the module of a kind on a decoder, for
    `nalora_jax.assembly.program.assemble`.

    Args:
      config: the run's settings.
      base: architecture of the base model; one that sees is trained on conversations.
      processor: image processor of a model that sees.
    """
    if base.sight is not None:
        config = replace(config, vision=replace(config.vision, task="chat"))
    kind = cast(DecoderKind, run_kind(config))
    return kind.program_parts(config, processor)
