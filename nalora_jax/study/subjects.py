"""What a study knows of each kind of run: its subject, the class that the kind's record names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import run_kind

if TYPE_CHECKING:
    from nalora_jax.study.language import Subject


def subject_of(config: RunConfig) -> type[Subject]:
    """Returns the class of the subject of a run.

    Raises:
      NaloraError: there are no studies of such runs.
    """
    kind = run_kind(config)
    if not kind.subject:
        raise NaloraError(
            "kind of run",
            expected="one with a subject in studies",
            found=repr(kind.name),
        )
    module, _, name = kind.subject.partition(":")
    subject: type[Subject] = getattr(importlib.import_module(module), name)
    return subject
