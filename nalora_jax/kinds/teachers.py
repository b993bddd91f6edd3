"""Teachers of distillations: found by name, checked before weights are read, and loaded.

--distill.teacher runs/large/adapter     another adapter of the run's base
--distill.teacher Qwen/Qwen2.5-7B        another model with the same vocabulary
--distill.system "..."                   the base after a longer prompt
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nalora_jax.assembly.program import Teacher, check_decoder
from nalora_jax.common import trees
from nalora_jax.config import RunConfig
from nalora_jax.errors import NaloraError
from nalora_jax.kinds.record import ReadModel
from nalora_jax.loading.adapted import adapter_for
from nalora_jax.loading.located import find_adapter, locate
from nalora_jax.mesh import sharding
from nalora_jax.models.config import ModelConfig
from nalora_jax.ops.dispatch import Numerics
from nalora_jax.ops.storage import prepare
from nalora_jax.weights.hub import resolve_source
from nalora_jax.weights.model_files import (
    LoadedModel,
    ModelFiles,
    load_weights,
    open_files,
)
from nalora_jax.weights.peft_import import import_adapter

log = logging.getLogger(__name__)

_SHOWN = 3  # tokens in an error


@dataclass(frozen=True)
class OpenedTeacher:
    """A teacher whose files are open and whose vocabulary is the run's."""

    program: Teacher
    files: ModelFiles | None = None  # of another model
    adapter: Path | None = None  # of an adapter of the base


def open_teacher(
    config: RunConfig, files: ModelFiles, base: ModelConfig
) -> OpenedTeacher:
    """Opens the teacher that the settings name.

    Args:
      config: the run's settings.
      files: of its base.
      base: its architecture.

    Raises:
      NaloraError: no such teacher, one that cannot be read, another vocabulary, or the base itself
        with the same prompt.
    """
    name = config.distill.teacher
    if not name:
        return OpenedTeacher(Teacher(base))
    adapter = find_adapter(Path(name))
    if adapter is not None:
        _, spec = import_adapter(adapter, base)
        if spec.saved or spec.token_indices:
            raise NaloraError(
                "--distill.teacher",
                expected="an adapter that leaves the base's embedding and head as they are",
                found=f"{adapter}, which has rows of its own",
                remedy="merge it first (nalora merge), and name the merged model",
            )
        return OpenedTeacher(Teacher(base, spec), adapter=adapter)
    resolved = resolve_source(locate(name).base)
    if resolved.path == files.resolved.path:
        if not config.distill.system:
            raise NaloraError(
                "--distill.teacher",
                expected="a teacher that differs from the model before training",
                found=f"{name}, the base of the run",
                remedy="name an adapter or another model, or add --distill.system",
            )
        return OpenedTeacher(Teacher(base))
    of_teacher = open_files(resolved)
    check_vocabulary(name, of_teacher, files)
    return OpenedTeacher(Teacher(of_teacher.config, is_base=False), of_teacher)


def check_vocabulary(name: str, teacher: ModelFiles, student: ModelFiles) -> None:
    """Checks that every token has the same id in both models.

    Tables may have different numbers of rows after the last token.

    Raises:
      NaloraError: names the first tokens that differ.
    """
    of_student = student.tokenizer.backend.get_vocab(with_added_tokens=True)
    of_teacher = teacher.tokenizer.backend.get_vocab(with_added_tokens=True)
    differing = []
    for text, token_id in sorted(of_student.items(), key=lambda entry: entry[1]):
        if of_teacher.get(text) != token_id:
            differing.append(f"{text!r} is {of_teacher.get(text, 'missing')} there")
    further = len(of_teacher.keys() - of_student.keys())
    if not differing and not further:
        return
    found = f"{name} with {len(of_teacher):,} tokens"
    if differing:
        found += f", {len(differing):,} of them other ones: "
        found += ", ".join(differing[:_SHOWN])
    else:
        found += f", {further:,} more"
    raise NaloraError(
        "--distill.teacher",
        expected=f"a model with the {len(of_student):,} tokens of {student.resolved.path}",
        found=found,
        remedy="distributions are compared token by token: name a teacher of the same family, or "
        "train on texts that this one has written (leave --distill.teacher out)",
    )


def describe_teacher(config: RunConfig, base: ModelConfig, read: ReadModel) -> Teacher:
    """Returns the teacher of a plan, whose files may be absent; see `Kind.teacher`."""
    name = config.distill.teacher
    if not name:
        return Teacher(base)
    adapter = find_adapter(Path(name))
    if adapter is not None:
        return Teacher(base, import_adapter(adapter, base)[1])
    return Teacher(read(name), is_base=False)


def load_teacher(
    opened: OpenedTeacher,
    config: RunConfig,
    base: LoadedModel,
    mesh: Mesh | None,
    numerics: Numerics,
) -> dict[str, Any]:
    """Returns the frozen collections of a step with a teacher.

    They have the weights of another model, or the values of an adapter. A teacher that is the base
    adds no array.

    Args:
      opened: the teacher.
      config: the run's settings with a concrete layout.
      base: the run's base model.
      mesh: its devices; None for one.
      numerics: of the step.

    Raises:
      NaloraError: weights that cannot be read or do not fit the mesh, or an adapter of another
        base.
    """
    collections: dict[str, Any] = {}
    if opened.adapter is not None:
        lora, _ = adapter_for(base, opened.adapter)
        if mesh is None:
            collections["lora"] = jax.device_put(lora)
        else:
            places = sharding.shardings(lora, mesh, sharding.STATE_RULES)
            collections["lora"] = jax.device_put(lora, places)
    if opened.files is not None:
        if mesh is not None:
            check_decoder(config, opened.files.config, mesh)
        compute = config.compute
        loaded = load_weights(
            opened.files, dtype=compute.dtype, mesh=mesh, quantized=compute.quantized
        )
        collections["weights"] = prepare({"params": loaded.params}, numerics)
    log.info(
        "teacher: %s, %.0f MB besides the base",
        _describe(opened),
        trees.size_bytes(collections) / 1e6,
    )
    return {"teacher": collections}


def _describe(opened: OpenedTeacher) -> str:
    """Returns the teacher for the log."""
    if opened.adapter is not None:
        return f"the base with {opened.adapter}"
    if opened.files is not None:
        return str(opened.files.resolved.path)
    return "the base"
