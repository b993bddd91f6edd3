"""Dual encoders in a study: images with class prompts, or images with captions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from nalora_jax.common.digests import digest_of
from nalora_jax.config import DataConfig, RunConfig, VisionConfig
from nalora_jax.data.images.opened import ImageData, ImageSource, open_images
from nalora_jax.data.sources import check_disjoint
from nalora_jax.evaluate.images import ClassEvaluator, Encoders, Images, RetrievalEvaluator
from nalora_jax.layout import distributed
from nalora_jax.models.vision.dual import init_lora
from nalora_jax.study.plan import MEASURES
from nalora_jax.study.subject import Subject
from nalora_jax.train.kinds import dual
from nalora_jax.train.program import Assembly
from nalora_jax.weights.dual import JOIN, LoadedDual, LoadedEncoder, join, load_dual, load_encoder


@dataclass(frozen=True, eq=False)
class ImageItems:
    """Held-out images with their classes or captions."""

    images: Images
    classes: tuple[str, ...]
    vision: VisionConfig
    loaded: LoadedDual  # its processor and tokenizer read the images and captions
    digest: str

    @property
    def digests(self) -> dict[str, str]:
        """Returns the digest of images, classes, templates and image size."""
        return {"": self.digest}

    def __len__(self) -> int:
        return len(self.images)


class DualEncoders(Subject):
    """`nalora_jax.study.subject.Subject` of dual encoders.

    The run's seed draws the projections between separate towers.
    """

    def __init__(self) -> None:
        self._towers: dict[str, LoadedEncoder] = {}
        self._models: dict[str, LoadedDual] = {}
        self._joined: dict[str, str] = {}  # fingerprints of both towers, by the joined model's
        self._sources: dict[str, ImageSource] = {}
        self._params: dict[str, Any] = {}
        self._rows: dict[str, ImageData] = {}
        self._evaluators: dict[Any, ClassEvaluator | RetrievalEvaluator] = {}

    def model(self, config: RunConfig) -> LoadedDual:
        """Returns the run's base model; projections that join separate towers are drawn by its seed."""
        image, plus, text = config.model.partition(JOIN)
        joined = bool(plus) and not Path(config.model).exists()
        vision, mesh = config.vision, _mesh(config)
        dtype, seed = config.compute.dtype, config.seed if joined else 0
        options: dict[str, Any] = {"d_out": vision.features, "loss": vision.loss}
        options["image_size"] = vision.image_size
        key = json.dumps([config.model, seed, options, dtype, config.to_dict()["mesh"]])
        if key in self._models:
            return self._models[key]
        if joined:
            towers = (
                self._tower(image.strip(), "image/", config),
                self._tower(text.strip(), "text/", config),
            )
            loaded = join(*towers, mesh=mesh, seed=config.seed, **options)
            self._joined[loaded.fingerprint] = JOIN.join(tower.fingerprint for tower in towers)
            self._models[key] = loaded
        else:
            self._models[key] = load_dual(config.model, dtype=dtype, mesh=mesh, **options)
        return self._models[key]

    def _tower(self, name: str, prefix: str, config: RunConfig) -> LoadedEncoder:
        key = json.dumps([name, prefix, config.compute.dtype, config.to_dict()["mesh"]])
        if key not in self._towers:
            loaded = load_encoder(name, dtype=config.compute.dtype, mesh=_mesh(config), prefix=prefix)
            self._towers[key] = loaded
        return self._towers[key]

    def program(self, config: RunConfig) -> tuple[RunConfig, Any]:
        """Returns ``config`` without its data, and the shapes of class prompts and captions.

        Of ``vision``, settings of the task and of image processing remain.
        """
        v = config.vision
        vision = VisionConfig(v.task, features=v.features, loss=v.loss, image_size=v.image_size)
        params, rows = self.params(config), self.data(config)
        shapes = {name: value.shape for name, value in params.get(dual.CLASSES, {}).items()}
        shapes |= {name: value.shape[1:] for name, value in (rows.tokens or {}).items()}
        return replace(config, data=DataConfig(), vision=vision), shapes

    def assemble(
        self, general: RunConfig, config: RunConfig, last: optax.GradientTransformation
    ) -> Assembly:
        """Assembles the run as ``nalora train`` does."""
        loaded = self.model(config)
        params, mesh = self.params(config), _mesh(config)
        return dual.assemble_dual(general, loaded.config, params, mesh, loaded.processor, last=last)

    def params(self, config: RunConfig, assembly: Assembly | None = None) -> Any:
        """Returns both towers and the prompts of the task's classes."""
        loaded, classes = self.model(config), self._classes(config, config.data)
        # The rules decide whether prompts are encoded once or in every step.
        key = json.dumps(
            [loaded.fingerprint, classes, config.vision.templates, config.to_dict()["lora"]["rules"]]
        )
        if key not in self._params:
            self._params[key] = dual.with_classes(config, loaded, classes, _mesh(config))
        return self._params[key]

    def base(self, config: RunConfig) -> tuple[str, Any]:
        """Returns both towers with the projections of the seed."""
        loaded = self.model(config)
        return loaded.fingerprint, loaded.params

    def base_digest(self, config: RunConfig) -> str:
        """Returns the digests of the towers' files, without projections that a seed draws."""
        loaded = self.model(config)
        return self._joined.get(loaded.fingerprint, loaded.fingerprint)

    def source_digest(self, data: ImageData) -> str:
        """Returns the digest of the training split."""
        return data.source.fingerprint

    def data(self, config: RunConfig) -> ImageData:
        """Returns images in the order of the seed; few-shot images are drawn by the seed."""
        key = json.dumps(
            [config.seed, *(vars(group) for group in (config.data, config.vision, config.train))]
        )
        if key not in self._rows:
            source = self._source(config, config.data, config.data.train_split)
            classes = self._classes(config, config.data)
            records = dual.trained_on(config, source, classes)
            self._rows[key] = dual.image_data(config, self.model(config), records, _mesh(config))
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
        asked = json.dumps([images.digest, classes, config.vision.templates, loaded.processor.output])
        digest = digest_of(asked)[:16]
        return ImageItems(images, classes, config.vision, loaded, digest)

    def check_apart(self, config: RunConfig, tuned: str, tested: str) -> None:
        """Compares the spans of both splits."""
        check_disjoint(*(self._source(config, config.data, split) for split in (tuned, tested)))

    def measure(
        self, items: ImageItems, assembly: Assembly, variables: Mapping[str, Any], *, whole: bool
    ) -> dict[str, float]:
        """Returns ``loss`` and ``accuracy`` or recall; one pass computes all of them."""
        evaluator = self._evaluator(assembly, items)
        measured = evaluator.measure(variables["params"], variables.get("lora"))
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
        fields = [v.image_field, v.label_field, v.caption_field, v.classes, v.max_pixels]
        key = json.dumps([data.dataset, data.data_dir, split, fields])
        if key not in self._sources:
            self._sources[key] = open_images(data, v, split)
        return self._sources[key]


def _mesh(config: RunConfig) -> Mesh:
    return distributed.smallest_mesh(config.mesh)
