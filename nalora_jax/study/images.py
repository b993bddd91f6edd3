"""Dual encoders in a study: images with class prompts, or images with captions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import optax

from nalora_jax.common.digests import json_digest
from nalora_jax.config import DataConfig, MeshConfig, RunConfig, VisionConfig
from nalora_jax.data.images.opened import ImageData, ImageSource, open_images
from nalora_jax.data.sources import check_disjoint
from nalora_jax.evaluate.images import ClassEvaluator, Encoders, Images, RetrievalEvaluator
from nalora_jax.layout import distributed
from nalora_jax.models.vision.dual import init_lora
from nalora_jax.study.plan import MEASURES
from nalora_jax.study.subject import Items, Subject
from nalora_jax.train.kinds import dual
from nalora_jax.train.program import Assembly
from nalora_jax.weights.dual import JOIN, LoadedDual, LoadedEncoder, join, load_dual, load_encoder


@dataclass(frozen=True, eq=False)
class ImageItems(Items):
    """Held-out images with their classes or captions; their digest is also of templates and image size."""

    images: Images
    classes: tuple[str, ...]
    vision: VisionConfig
    loaded: LoadedDual  # its processor and tokenizer read the images and captions


class DualEncoders(Subject):
    """`nalora_jax.study.subject.Subject` of dual encoders.

    The run's seed draws the projections between separate towers.
    """

    def __init__(self) -> None:
        self._tower, self._loaded = cache(_tower), cache(self._load)
        self._sources: dict[Any, ImageSource] = {}
        self._params: dict[Any, Any] = {}
        self._rows: dict[Any, ImageData] = {}
        self._evaluators: dict[Any, ClassEvaluator | RetrievalEvaluator] = {}

    def model(self, config: RunConfig) -> LoadedDual:
        """Returns the run's base model; projections that join separate towers are drawn by its seed."""
        vision, seed = config.vision, config.seed if _is_joined(config.model) else 0
        base = config.model, config.compute.dtype, config.mesh
        return self._loaded(*base, seed, vision.features, vision.loss, vision.image_size)

    def _load(
        self,
        model: str,
        dtype: str,
        mesh_config: MeshConfig,
        seed: int,
        features: int,
        loss: Any,
        size: int,
    ) -> LoadedDual:
        options: dict[str, Any] = {"d_out": features, "loss": loss, "image_size": size}
        options["mesh"] = distributed.smallest_mesh(mesh_config)
        if _is_joined(model):
            return join(*self._towers(model, dtype, mesh_config), seed=seed, **options)
        return load_dual(model, dtype=dtype, **options)

    def _towers(self, model: str, dtype: str, mesh: MeshConfig) -> tuple[LoadedEncoder, LoadedEncoder]:
        """Returns the separate towers of a joined model."""
        image, _, text = model.partition(JOIN)
        return self._tower(image.strip(), "image/", dtype, mesh), self._tower(
            text.strip(), "text/", dtype, mesh
        )

    def program(self, config: RunConfig) -> tuple[RunConfig, Any]:
        """Returns ``config`` without its data, and the shapes of class prompts and captions.

        Of ``vision``, settings of the task and of image processing remain.
        """
        v = config.vision
        vision = VisionConfig(v.task, features=v.features, loss=v.loss, image_size=v.image_size)
        params, rows = self.params(config), self.data(config)
        shapes = [(name, value.shape) for name, value in params.get(dual.CLASSES, {}).items()]
        shapes += [(name, value.shape[1:]) for name, value in (rows.tokens or {}).items()]
        return replace(config, data=DataConfig(), vision=vision), tuple(sorted(shapes))

    def assemble(
        self, general: RunConfig, config: RunConfig, last: optax.GradientTransformation
    ) -> Assembly:
        """Assembles the run as ``nalora train`` does."""
        loaded = self.model(config)
        params, mesh = self.params(config), distributed.smallest_mesh(config.mesh)
        return dual.assemble_dual(general, loaded.config, params, mesh, loaded.processor, last=last)

    def params(self, config: RunConfig, assembly: Assembly | None = None) -> Any:
        """Returns both towers and the prompts of the task's classes."""
        loaded, classes = self.model(config), self._classes(config, config.data)
        # The rules decide whether prompts are encoded once or in every step.
        key = loaded.fingerprint, classes, config.vision.templates, config.lora.rules
        if key not in self._params:
            self._params[key] = dual.with_classes(
                config, loaded, classes, distributed.smallest_mesh(config.mesh)
            )
        return self._params[key]

    def base(self, config: RunConfig) -> tuple[str, Any]:
        """Returns both towers with the projections of the seed."""
        loaded = self.model(config)
        return loaded.fingerprint, loaded.params

    def base_digest(self, config: RunConfig) -> str:
        """Returns the digests of the towers' files, without projections that a seed draws."""
        if _is_joined(config.model):
            towers = self._towers(config.model, config.compute.dtype, config.mesh)
            return JOIN.join(tower.fingerprint for tower in towers)
        return self.model(config).fingerprint

    def source_digest(self, data: ImageData) -> str:
        """Returns the digest of the training split."""
        return data.source.fingerprint

    def data(self, config: RunConfig) -> ImageData:
        """Returns images in the order of the seed; few-shot images are drawn by the seed."""
        key = config.seed, config.data, config.vision, config.train
        if key not in self._rows:
            source = self._source(config, config.data, config.data.train_split)
            classes = self._classes(config, config.data)
            records = dual.trained_on(config, source, classes)
            self._rows[key] = dual.image_data(
                config, self.model(config), records, distributed.smallest_mesh(config.mesh)
            )
        return self._rows[key]

    def adapters(self, config: RunConfig, assembly: Assembly, data: Any, seed: int) -> Any:
        """Returns adapters with A drawn by ``seed``, and projections drawn by the run's seed."""
        loaded = self.model(config)
        return init_lora(loaded.config, assembly.spec, jax.random.key(seed), loaded.params)

    def items(self, config: RunConfig, data: DataConfig) -> ImageItems:
        """Returns images, which are opened when they are measured."""
        train, held = (self._source(config, data, split) for split in (data.train_split, data.eval_split))
        if data.train_split != data.eval_split:  # equal: a probe, whose data is not trained on
            check_disjoint(train, held)
        indices = dual.drawn_images(held, data.eval_limit)
        images = Images(held, indices[indices.argsort()])
        classes, loaded = self._classes(config, data), self.model(config)
        asked = [images.digest, classes, config.vision.templates, loaded.processor.output]
        return ImageItems(json_digest(asked)[:16], len(images), images, classes, config.vision, loaded)

    def check_apart(self, config: RunConfig, tuned: str, tested: str) -> None:
        """Compares the spans of both splits."""
        check_disjoint(*(self._source(config, config.data, split) for split in (tuned, tested)))

    def measure(
        self, items: Any, assembly: Assembly, params: Any, lora: Any = None, *, whole: bool = False
    ) -> dict[str, float]:
        """Returns ``loss`` and ``accuracy`` or recall; one pass computes all of them."""
        evaluator = self._evaluator(assembly, items)
        measured = evaluator.measure(params, lora)
        return {name: float(measured[name]) for name in MEASURES if name in measured}

    def _evaluator(self, assembly: Assembly, items: ImageItems) -> ClassEvaluator | RetrievalEvaluator:
        """Returns an evaluator, compiled once for all methods with adapters of the same shapes."""
        model, loaded = assembly.eval_model.clone(stats=None), items.loaded
        key = (model, loaded.processor, items.digest)  # one model has one tokenizer
        if key not in self._evaluators:
            encoders = Encoders(model, loaded.processor, loaded.tokenizer)
            self._evaluators[key] = dual.image_evaluator(
                encoders, items.images, items.classes, items.vision
            )
        return self._evaluators[key]

    def _classes(self, config: RunConfig, data: DataConfig) -> tuple[str, ...]:
        if config.vision.task != "classify":
            return ()
        return self._source(config, data, data.train_split).classes()

    def _source(self, config: RunConfig, data: DataConfig, split: str) -> ImageSource:
        """Returns a source, opened once: reading the classes of a large set takes time."""
        v = config.vision
        fields = v.image_field, v.label_field, v.caption_field, v.classes, v.max_pixels
        key = data.dataset, data.data_dir, split, *fields
        if key not in self._sources:
            self._sources[key] = open_images(data, v, split)
        return self._sources[key]


def _is_joined(model: str) -> bool:
    """Returns True if a model's name is of two separate towers."""
    return JOIN in model and not Path(model).exists()


def _tower(name: str, prefix: str, dtype: str, mesh: MeshConfig) -> LoadedEncoder:
    return load_encoder(name, dtype=dtype, mesh=distributed.smallest_mesh(mesh), prefix=prefix)
