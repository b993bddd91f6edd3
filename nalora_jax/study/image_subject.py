"""Dual encoders in a study: images with class prompts, or images with captions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import optax

from nalora_jax.assembly.program import Assembly
from nalora_jax.common.digests import json_digest
from nalora_jax.config import DataConfig, RunConfig, VisionConfig
from nalora_jax.data.images.opened import ImageData, ImageSource, open_images
from nalora_jax.data.sources import check_disjoint
from nalora_jax.evaluate.image_evaluation import (
    ClassEvaluator,
    Encoders,
    RecordImages,
    RetrievalEvaluator,
)
from nalora_jax.kinds import dual
from nalora_jax.mesh import distributed
from nalora_jax.models.vision.dual_encoder import init_dual_lora
from nalora_jax.study.language import Items, Subject
from nalora_jax.study.planned_runs import MEASURES
from nalora_jax.weights.dual_base import (
    JOIN,
    LoadedDual,
    LoadedEncoder,
    join,
    load_dual,
    load_encoder,
)


@dataclass(frozen=True, eq=False)
class ImageItems(Items):
    """Held-out images with their classes or captions.

    Their digest is also of the prompts' templates and the size of images.
    """

    classes: tuple[str, ...] = ()


class DualEncoders(Subject):
    """Dual encoders; the run's seed draws the projections between separate towers.

    The methods are documented at `nalora_jax.study.language.Language`.
    """

    reads_images: ClassVar[bool] = True
    accuracy_items: ClassVar[str] = "none for images: one pass scores all classes"

    @classmethod
    def unit(cls, config: RunConfig) -> str:
        """Returns the unit of the loss, for tables."""
        if config.vision.task == "classify":
            return "nats per image among the prompts of all classes"
        return (
            "nats per image or caption among all held-out pairs (the mean of both ways)"
        )

    @classmethod
    def metric(cls, config: RunConfig) -> str:
        """Returns the metric that is measured during training."""
        if config.vision.task == "classify":
            return "accuracy"
        return "recall"

    def model(self, config: RunConfig) -> LoadedDual:
        """Returns the run's base model.

        The run's seed draws the projections that join separate towers.
        """
        vision = config.vision
        dtype = config.compute.dtype
        joined = _is_joined(config.model)
        options: dict[str, Any] = {"d_out": vision.features, "loss": vision.loss}
        options["image_size"] = vision.image_size

        def load() -> LoadedDual:
            """Reads the weights of the model, or of both towers and joins them."""
            mesh = distributed.smallest_mesh(config.mesh)
            if joined:
                return join(
                    *self._towers(config), seed=config.seed, mesh=mesh, **options
                )
            return load_dual(config.model, dtype=dtype, mesh=mesh, **options)

        seed = 0
        if joined:
            seed = config.seed
        key = ("model", config.model, dtype, config.mesh, seed, *options.values())
        return self.once(key, load)

    def _towers(self, config: RunConfig) -> list[LoadedEncoder]:
        """Returns the separate towers of a joined model."""
        image, text = config.model.split(JOIN, 1)
        return [
            self._tower(config, image.strip(), "image/"),
            self._tower(config, text.strip(), "text/"),
        ]

    def _tower(self, config: RunConfig, name: str, prefix: str) -> LoadedEncoder:
        """Returns an encoder whose parameters have names that start with ``prefix``."""
        dtype = config.compute.dtype

        def load() -> LoadedEncoder:
            mesh = distributed.smallest_mesh(config.mesh)
            return load_encoder(name, mesh=mesh, prefix=prefix, dtype=dtype)

        return self.once((prefix, name, dtype, config.mesh), load)

    def program(self, config: RunConfig) -> tuple[RunConfig, Any]:
        """Returns what determines the compiled step: settings, and the shapes of texts.

        The settings are ``config`` without its data; of ``vision``, settings of the task and of
        image processing remain. The shapes are of the tokens of class prompts and captions.
        """
        full = config.vision
        vision = VisionConfig(
            full.task,
            features=full.features,
            loss=full.loss,
            image_size=full.image_size,
        )
        params = self.params(config)
        rows = self.data(config)
        shapes = []
        for name, value in params.get(dual.CLASSES, {}).items():
            shapes.append((name, value.shape))
        for name, value in (rows.tokens or {}).items():
            shapes.append((name, value.shape[1:]))
        return replace(config, data=DataConfig(), vision=vision), tuple(sorted(shapes))

    def assemble(
        self, general: RunConfig, config: RunConfig, last: optax.GradientTransformation
    ) -> Assembly:
        """Returns adapters, optimizer and step for the result of `program` for ``config``."""
        loaded = self.model(config)
        params = self.params(config)
        mesh = distributed.smallest_mesh(config.mesh)
        return dual.assemble_dual(
            general, loaded.config, params, mesh, loaded.processor, last=last
        )

    def params(self, config: RunConfig, assembly: Assembly | None = None) -> Any:
        """Returns the frozen weights: both towers, and the prompts of the task's classes."""
        loaded = self.model(config)
        classes = self._classes(config, config.data)
        mesh = distributed.smallest_mesh(config.mesh)
        # The rules decide whether prompts are encoded once or in every step.
        key = (
            "params",
            loaded.fingerprint,
            classes,
            config.vision.templates,
            config.lora.rules,
        )
        return self.once(
            key, lambda: dual.add_class_weights(config, loaded, classes, mesh)
        )

    def base(self, config: RunConfig) -> tuple[str, Any]:
        """Returns both towers with the projections of the seed."""
        loaded = self.model(config)
        return loaded.fingerprint, loaded.params

    def base_digest(self, config: RunConfig) -> str:
        """Returns the digests of the towers' files, without projections that a seed draws."""
        if _is_joined(config.model):
            return JOIN.join(tower.fingerprint for tower in self._towers(config))
        return self.model(config).fingerprint

    def source_digest(self, data: ImageData) -> str:
        """Returns the digest of the training split."""
        return data.source.fingerprint

    def data(self, config: RunConfig) -> ImageData:
        """Returns images in the order of the seed; few-shot images are drawn by the seed."""

        def draw() -> ImageData:
            """Opens the training split, and draws its few-shot images."""
            source = self._source(config, config.data, config.data.train_split)
            records = dual.training_images(
                config, source, self._classes(config, config.data)
            )
            mesh = distributed.smallest_mesh(config.mesh)
            return dual.image_data(config, self.model(config), records, mesh)

        return self.once(
            ("rows", config.seed, config.data, config.vision, config.train), draw
        )

    def adapters(
        self, config: RunConfig, assembly: Assembly, data: Any, seed: int
    ) -> Any:
        """Returns adapters with A drawn by ``seed``, and projections drawn by the run's seed."""
        loaded = self.model(config)
        return init_dual_lora(
            loaded.config, assembly.spec, jax.random.key(seed), loaded.params
        )

    def items(self, config: RunConfig, data: DataConfig) -> ImageItems:
        """Returns at most ``data.eval_limit`` held-out images, drawn by a fixed seed.

        They are opened when they are measured.
        """
        train = self._source(config, data, data.train_split)
        held_out = self._source(config, data, data.eval_split)
        # equal: a probe, whose data is not trained on
        if data.train_split != data.eval_split:
            check_disjoint(train, held_out)
        indices = dual.draw_images(held_out, data.eval_limit)
        images = RecordImages(
            held_out, indices[indices.argsort()]
        )  # in the order of the source
        classes = self._classes(config, data)
        loaded = self.model(config)
        asked = [
            images.digest,
            classes,
            config.vision.templates,
            loaded.processor.output,
        ]
        return ImageItems(json_digest(asked)[:16], len(images), config, images, classes)

    probe = items

    def check_apart(self, config: RunConfig, tuned: str, tested: str) -> None:
        """Raises a NaloraError if the two splits of the run's data share an image."""
        tuning_source = self._source(config, config.data, tuned)
        test_source = self._source(config, config.data, tested)
        check_disjoint(tuning_source, test_source)

    def measure(
        self,
        items: ImageItems,
        assembly: Assembly,
        params: Any,
        lora: Any = None,
        *,
        whole: bool = False,
    ) -> dict[str, float]:
        """Returns the measures of an adapter, or of the weights alone if ``lora`` is None.

        They are ``loss``, and ``accuracy`` or the recalls. One pass computes all of them, so
        ``whole`` changes nothing.
        """
        model = assembly.eval_model.clone(stats=None)
        loaded = self.model(items.config)

        def make() -> ClassEvaluator | RetrievalEvaluator:
            """Returns the task's evaluator of these images."""
            encoders = Encoders(model, loaded.processor, loaded.tokenizer)
            return dual.image_evaluator(
                encoders, items.asked, items.classes, items.config.vision
            )

        # Compiled once for all methods with adapters of the same shapes; one model has one
        # tokenizer.
        measured = self.once((model, loaded.processor, items.digest), make).measure(
            params, lora
        )
        return {name: float(measured[name]) for name in MEASURES if name in measured}

    def _classes(self, config: RunConfig, data: DataConfig) -> tuple[str, ...]:
        """Returns the class names of the training split; none for retrieval."""
        if config.vision.task != "classify":
            return ()
        return self._source(config, data, data.train_split).classes()

    def _source(self, config: RunConfig, data: DataConfig, split: str) -> ImageSource:
        """Returns a source, opened once: reading the classes of a large set takes time."""
        vision = config.vision
        fields = vision.image_field, vision.label_field, vision.caption_field
        settings = *fields, vision.classes, vision.max_pixels
        key = "source", data.dataset, data.data_dir, split, *settings
        return self.once(key, lambda: open_images(data, vision, split))


def _is_joined(model: str) -> bool:
    """Returns True if a model's name is of two separate towers."""
    return JOIN in model and not Path(model).exists()
