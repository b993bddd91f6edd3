"""Runs on dual encoders: images with classes or captions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nalora_jax.assembly.optimizers import resolve_learning_rate
from nalora_jax.assembly.program import (
    Assembly,
    build_assembly,
    context_error,
    gate_stats,
    run_program,
)
from nalora_jax.common import trees
from nalora_jax.common.devices import TENSOR
from nalora_jax.common.folders import RunFolder
from nalora_jax.config import RunConfig, VisionConfig
from nalora_jax.config.checks import Limits, require, trained_tables
from nalora_jax.config.rope_scaling import FLAG as ROPE_SCALING
from nalora_jax.data.images.image_files import ImageProcessor
from nalora_jax.data.images.opened import (
    ImageData,
    ImageSource,
    caption_tokens,
    draw_shots,
    open_images,
)
from nalora_jax.data.packing import permutation
from nalora_jax.data.source import Source
from nalora_jax.data.sources import AUTO_SPLIT, check_disjoint
from nalora_jax.errors import NaloraError
from nalora_jax.evaluate.image_evaluation import (
    ClassEvaluator,
    Encoders,
    RecordImages,
    RetrievalEvaluator,
)
from nalora_jax.kinds.inputs import settle_schedule, stream_shape
from nalora_jax.kinds.record import Built, Described, Inputs, Job, Kind, register_kind
from nalora_jax.loading.adapted_dual import AdaptedDual
from nalora_jax.mesh import distributed, processes, sharding
from nalora_jax.mesh.distributed import platform_of
from nalora_jax.method.step import Batch, Evaluated, TrainState
from nalora_jax.models.parts import constrain
from nalora_jax.models.remat import select_remat
from nalora_jax.models.targets import AdapterSpec, resolve
from nalora_jax.models.vision.dual_encoder import (
    DualEncoder,
    init_dual_lora,
    normalised,
)
from nalora_jax.models.vision.vision_config import TOWERS, DualConfig
from nalora_jax.ops.dispatch import numerics_for
from nalora_jax.ops.shardings import RowSharding, mesh_sharding
from nalora_jax.weights.dual_base import JOIN, LoadedDual, describe_dual, load_dual
from nalora_jax.weights.peft_export import export_adapter, verify_export

log = logging.getLogger(__name__)

_SEED = 20260101  # seed of the held-out draw, the same for every run


@dataclass(frozen=True)
class ImageRecords:
    """Training records of a run on images, without unreadable images."""

    source: ImageSource
    indices: np.ndarray  # indices of the training records, ascending
    classes: tuple[str, ...]  # empty if the records have captions
    labels: np.ndarray | None  # int32, by the source's index


def training_images(
    config: RunConfig, source: ImageSource, classes: tuple[str, ...]
) -> ImageRecords:
    """Returns the training images of ``source``: all, or ``vision.shots`` of each class.

    Each image is opened; unreadable images are left out. ``data.train_limit`` keeps that many,
    drawn by the run's seed. ``classes`` is empty for images with captions.
    """
    data = config.data
    vision = config.vision
    labels = None
    # Without classes: all images.
    indices = np.arange(len(source))
    if classes:
        labels = source.labels(classes)
        indices = draw_shots(labels, classes, vision.shots, config.seed)
    if data.train_limit:
        indices = np.sort(
            indices[permutation(len(indices), config.seed)[: data.train_limit]]
        )
    return ImageRecords(source, source.readable(indices), classes, labels)


def open_inputs(config: RunConfig, source: Mapping[str, Source] | None) -> Inputs:
    """Opens the images and settles the settings.

    Raises:
      NaloraError: bad data, or records that are both trained on and held out.
    """
    data = config.data
    vision = config.vision
    train = open_images(data, vision, data.train_split)
    held = open_images(
        data, vision, "validation" if data.eval_split == AUTO_SPLIT else data.eval_split
    )
    check_disjoint(train, held)
    records = training_images(
        config, train, train.classes() if vision.task == "classify" else ()
    )
    config = settle_schedule(config, 0, len(records.indices), "images")
    images = tuple(
        RecordImages(held, indices) for indices in image_indices(config, held)
    )
    questions = {"reported": images[0].digest, "selecting": images[1].digest}
    return Inputs(config, None, None, records, (images[0], images[1]), questions)


def build_step(
    inputs: Inputs, placed: RunConfig, mesh: Mesh, output: RunFolder, like: Job | None
) -> Built:
    """Loads both towers, and builds adapters, step and this process's rows.

    ``like`` is a job with the same program. Its base is shared, unless the seed draws the
    projections between two separate towers.

    Raises:
      NaloraError: bad settings or files.
    """
    records = inputs.data
    vision = placed.vision
    compute = placed.compute
    if like is None or JOIN in placed.model:
        loaded = load_dual(
            placed.model,
            dtype=compute.dtype,
            mesh=mesh,
            d_out=vision.features,
            loss=vision.loss,
            seed=placed.seed,
            image_size=vision.image_size,
        )
        params = add_class_weights(placed, loaded, records.classes, mesh)
    else:
        loaded = cast(LoadedDual, like.loaded)
        params = like.assembly.params
    assembly = assemble_dual(placed, loaded.config, params, mesh, loaded.processor)
    return Built(loaded, assembly, image_data(placed, loaded, records, mesh))


def evaluator(
    inputs: Inputs, loaded: LoadedDual, assembly: Assembly, images: RecordImages
) -> ClassEvaluator | RetrievalEvaluator:
    """Returns the evaluator of some held-out images."""
    encoders = Encoders(assembly.eval_model, loaded.processor, loaded.tokenizer)
    return image_evaluator(encoders, images, inputs.data.classes, inputs.config.vision)


def adapter_evaluator(
    model: AdaptedDual, config: RunConfig, mesh: Mesh | None, named: bool
) -> ClassEvaluator | RetrievalEvaluator:
    """Returns the evaluator of a trained adapter on held-out images, see
    `nalora_jax.kinds.text.adapter_evaluator`."""
    data = config.data
    vision = config.vision
    classes: tuple[str, ...] = ()
    if vision.task == "classify":
        classes = open_images(data, vision, data.train_split).classes()
    held = open_images(data, vision, data.eval_split)
    shown = RecordImages(held, image_indices(config, held)[0])
    return image_evaluator(model.encoders, shown, classes, vision)


def describe_inputs(inputs: Inputs) -> Described:
    """Returns the facts about a run that ``--dry-run`` prints."""
    config = inputs.config
    records = inputs.data
    vision = config.vision
    base = describe_dual(config.model, d_out=vision.features, loss=vision.loss)
    spec = resolve_dual(config, base)
    shapes = base.param_shapes()
    like = {
        path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()
    }
    start = partial(init_dual_lora, base, spec)
    lora = jax.eval_shape(start, jax.random.key(0), trees.unflatten(like))
    of = ""
    if records.classes:
        of = f"{len(records.classes)} classes, "
    count = len(records.indices)
    return Described(
        parameters=sum(map(math.prod, shapes.values())),
        trained=trees.count_elements(lora),
        spec=spec,
        where="of both towers",
        activation=base.towers["image"].activation,
        data=f"{of}{count} images of {len(records.source)}",
        examples=count,
        noun="images",
    )


def limits(config: RunConfig) -> Iterator[Limits]:
    """Yields the values that other settings may have in a run on image and text encoders."""
    vision = config.vision
    expected = '"classify" or "contrast"'
    require("--vision.task", vision.trains_encoders, expected, repr(vision.task))
    decoders = {"vision.task": ("", "chat")}
    if config.adapter:
        yield Limits("--adapter, whose values the run starts from", decoders)
    if config.adalora.target_rank:
        yield Limits("--adalora.target-rank", decoders)
    yield Limits("--vision.task", {"tune": ((),)})
    for flag in trained_tables(config):
        yield Limits(flag, {"vision.task": ("",)})
    if config.rope_scaling:
        yield Limits(ROPE_SCALING, decoders)
    yield Limits(f"--vision.task {vision.task}", {"compute.quantize": ("none",)})
    if vision.task == "contrast":
        remedy = "use a smaller batch, more devices, or --compute.remat full"
        cause = (
            '--vision.task "contrast": pairs are told apart from those of their micro-batch '
            "only"
        )
        yield Limits(cause, {"train.accumulate": (1,)}, remedy)


def export_run(
    job: Job, folder: Path, state: TrainState, share: Callable[[str], None]
) -> AdapterSpec:
    """Writes PEFT files of the trained adapter, verifies that a reload is bitwise equal, and
    returns its adapters."""
    loaded = cast(LoadedDual, job.loaded)
    assembly = job.assembly
    lora = jax.tree.map(processes.fetch, state.lora)
    processes.run_on_first_process(
        lambda: write_dual_adapter(folder, loaded, lora, assembly.spec, overwrite=True)
    )
    log.info("adapter: %s (read back: every number is equal)", folder)
    return assembly.spec


def add_class_weights(
    config: RunConfig, loaded: LoadedDual, classes: tuple[str, ...], mesh: Mesh
) -> dict[str, Any]:
    """Returns the weights with the class prompts under ``CLASSES``, replicated on the mesh.

    If training changes the text features, they are ``tokens`` and ``token_weights`` ``[classes,
    prompts, seq]``, which each step encodes; otherwise ``features [classes, features]``, computed
    here. Without classes the weights are returned unchanged.
    """
    if not classes:
        return loaded.params
    spec = resolve_dual(config, loaded.config)
    # Training changes the text features: by adapters in the tower, or by its projection.
    if "text" in adapted_towers(spec) or "text/projection" in loaded.config.trained:
        # Prompts of a class next to each other.
        prompts = [
            template.format(name)
            for name in classes
            for template in config.vision.templates
        ]
        tokens = loaded.tokenizer(prompts)
        # [classes * prompts, seq] -> [classes, prompts, seq]
        shape = (len(classes), len(config.vision.templates), -1)
        inputs: dict[str, Any] = {
            name: value.reshape(shape) for name, value in tokens.items()
        }
    else:
        numerics = numerics_for(
            config.compute.dtype, platform_of(mesh), config.compute.implementation
        )
        encoders = Encoders(
            DualEncoder(loaded.config, numerics=numerics),
            loaded.processor,
            loaded.tokenizer,
        )
        features = encoders.classes(
            {"params": loaded.params}, classes, config.vision.templates
        )
        inputs = {"features": features}
        log.info(
            "class prompts: %d features made once, since the text tower stays as it is",
            len(features),
        )
    replicated = distributed.replicated_sharding(mesh)
    arrays = {
        name: jax.make_array_from_callback(value.shape, replicated, value.__getitem__)
        for name, value in inputs.items()
    }
    return {**loaded.params, CLASSES: arrays}


def image_data(
    config: RunConfig, loaded: LoadedDual, records: ImageRecords, mesh: Mesh
) -> ImageData:
    """Returns the training rows of a run: images with classes, or with captions.

    Raises:
      NaloraError: the processor cuts images into patches of another size than the image tower.
    """
    vision = config.vision
    source = records.source
    indices = records.indices
    tokens = None
    if not records.classes:
        tokens = caption_tokens(source, indices, loaded.tokenizer, vision)
    image = loaded.config.image
    size = loaded.processor.patch_size
    # Towers of images of any shape get patches from the processor, not pixels.
    if image.any_shape and size != image.patch_size:
        where = "preprocessor_config.json: patch_size"
        raise NaloraError(where, expected=image.patch_size, found=size)
    return ImageData(
        source,
        indices,
        loaded.processor,
        vision,
        labels=records.labels,
        tokens=tokens,
        workers=config.data.workers,
        **stream_shape(config, mesh),
    )


def image_indices(
    config: RunConfig, source: ImageSource
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ascending indices: of the reported images, and of images that select the checkpoint.

    At most a third of the images select, and at least one; ``data.eval_limit`` 0 uses all images.
    """
    data = config.data
    # Both sets are cut from one draw; 0 examines all images.
    indices = draw_images(
        source, data.eval_limit + data.select_limit if data.eval_limit else 0
    )
    cut = max(1, min(data.select_limit, len(indices) // 3))
    return np.sort(indices[cut:]), np.sort(indices[:cut])


def draw_images(source: ImageSource, limit: int) -> np.ndarray:
    """Returns indices of ``limit`` readable held-out images (0: all), drawn by a fixed seed.

    Raises:
      NaloraError: fewer than two are left.
    """
    drawn = permutation(len(source), _SEED)
    if limit:
        drawn = drawn[:limit]
    indices = source.readable(drawn)
    if len(indices) < 2:
        raise NaloraError(
            "--data.eval-split", expected="at least two images", found=len(indices)
        )
    return indices


def image_evaluator(
    encoders: Encoders,
    images: RecordImages,
    classes: tuple[str, ...],
    vision: VisionConfig,
) -> ClassEvaluator | RetrievalEvaluator:
    """Returns the evaluator of ``images``: by classes, or by captions without classes."""
    if not classes:
        return RetrievalEvaluator(
            encoders, images, images.source.captions(images.indices.tolist())
        )
    labels = images.source.labels(classes)[images.indices]
    return ClassEvaluator(encoders, images, labels, classes, vision.templates)


def write_dual_adapter(
    folder: Path,
    loaded: LoadedDual,
    lora: Mapping[str, Any],
    spec: AdapterSpec,
    *,
    overwrite: bool = False,
) -> None:
    """Writes PEFT files of an adapter and verifies that a reload is bitwise equal."""
    config = loaded.config
    mark = loaded.fingerprint
    export_adapter(
        lora,
        spec,
        config,
        folder,
        base_model_name=loaded.source,
        fingerprint=mark,
        overwrite=overwrite,
    )
    verify_export(folder, lora, spec, config, fingerprint=mark)


def assemble_dual(
    config: RunConfig,
    base: DualConfig,
    params: Any,
    mesh: Mesh,
    processor: ImageProcessor,
    *,
    last: optax.GradientTransformation | None = None,
) -> Assembly:
    """Builds adapters, optimizer and step of a run on a dual encoder.

    Args:
      config, base, mesh, last: see `nalora_jax.assembly.program.assemble`; ``config.vision.task``
        chooses the objective.
      params: both towers' weights on ``mesh``, with the class prompts (`Classify`).
      processor: its image processor.

    Raises:
      NaloraError: see `resolve_dual`; or an axis that splits a head or a row, or another start of
        the adapters than the default one.
    """
    if (shards := distributed.context_size(mesh)) > 1:
        raise context_error(shards, "encoders of images and texts")
    for tower in base.towers.values():
        distributed.check_heads(
            mesh.shape[TENSOR], n_heads=tower.n_heads, n_kv_heads=tower.n_heads
        )
    if config.lora.init != "default":
        expected = "default for image and text encoders"
        raise NaloraError("--lora.init", expected=expected, found=config.lora.init)
    spec = resolve_dual(config, base)
    lora = init_dual_lora(base, spec, jax.random.key(config.seed), params)
    compute = config.compute
    numerics = numerics_for(compute.dtype, platform_of(mesh), compute.implementation)
    adapted = {name: base.towers[name] for name in adapted_towers(spec)}
    blocks = {
        f"{name}/layers/ffn": ((t.n_layers, t.d_ff), t.activation)
        for name, t in adapted.items()
    }
    channels = [shape for shape, _ in blocks.values()]
    shardings = sharding.step_shardings(mesh, lora, channels)
    model = DualEncoder(
        base,
        spec,
        numerics,
        remat=select_remat(
            compute.remat, base.image.d_model, numerics, gated=base.image.gated
        ),
        stats=gate_stats(config, shardings),
        shardings=shardings,
    )

    def objective(model: DualEncoder) -> Classify | Contrast:
        towers = Towers(model, processor)
        if config.vision.task == "classify":
            return Classify(towers)
        return Contrast(towers, base.loss)

    # Without adapters no gate is measured, and any activation serves.
    activation = next(iter(adapted.values()), base.image).activation
    config = resolve_learning_rate(config)
    program = run_program(
        config, model, lora, mesh, objective, blocks, activation, last=last
    )
    return build_assembly(program, params, lora)


def resolve_dual(config: RunConfig, base: DualConfig) -> AdapterSpec:
    """Returns both towers' adapters; none if every rule has rank 0 and projections are trained."""
    if base.trained and all(rule.rank == 0 for rule in config.lora.rules):
        return AdapterSpec()
    # Layers of each tower are numbered from 0.
    numbers = {path: range(depth) for path, depth in base.depths().items()}
    return resolve(config.lora, base.projection_shapes(), numbers)


def adapted_towers(spec: AdapterSpec) -> tuple[str, ...]:
    """Returns the towers that have adapters."""
    adapted = {path.partition("/")[0] for path, _ in spec.targets}
    return tuple(tower for tower in TOWERS if tower in adapted)


# Key of the class prompts in ``params``, next to the weights.
CLASSES = "classes"


@dataclass(frozen=True)
class Towers:
    """Both towers of a dual encoder, as the losses call them."""

    model: DualEncoder
    processor: ImageProcessor

    def images(
        self, variables: Mapping[str, Any], batch: Batch, key: jax.Array
    ) -> jax.Array:
        """Returns normalised features ``[rows, features]`` of uint8 ``pixels``."""
        inputs = {name: batch[name] for name in ("shapes", "mask") if name in batch}
        inputs["pixels"] = self.processor.normalise(batch["pixels"])
        return self._encode("image", variables, inputs, key)

    def texts(
        self, variables: Mapping[str, Any], batch: Batch, key: jax.Array
    ) -> jax.Array:
        """Returns normalised features ``[rows, features]`` of ``tokens``."""
        return self._encode(
            "text", variables, {n: batch[n] for n in ("tokens", "token_weights")}, key
        )

    def temperature(self, variables: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """Returns the scale and the offset of the cosine similarities: logits are scale * cos +
        offset."""
        temperature: tuple[jax.Array, jax.Array] = self.model.apply(
            variables, method="temperature"
        )
        return temperature

    def _encode(
        self, tower: str, variables: Mapping[str, Any], inputs: Batch, key: jax.Array
    ) -> jax.Array:
        """Returns a tower's normalised features ``[rows, features]``, with dropout by ``key``."""
        options: dict[str, Any] = {
            "method": f"encode_{tower}",
            "rngs": {"dropout": key},
        }
        return normalised(
            self.model.apply(variables, inputs, deterministic=False, **options)
        )


@dataclass(frozen=True)
class Classify:
    """Cross-entropy of an image's class among the prompts of all classes.

    If training does not change the text tower, ``params["classes"]`` holds ``features [classes,
    features]``, computed once. Otherwise it holds ``tokens`` and ``token_weights`` ``[classes,
    prompts, seq]``, which every step encodes.
    """

    towers: Towers

    def loss(
        self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array
    ) -> Evaluated:
        """Returns the loss, see `nalora_jax.method.step.Objective`.

        The batch has ``pixels`` and ``labels [rows]``.
        """
        first, second = jax.random.split(key)
        images = self.towers.images(variables, batch, first)
        classes = self._classes(variables, params[CLASSES], second)
        scale, _ = self.towers.temperature(variables)
        # [images, classes]
        logits = scale * jnp.einsum("if,cf->ic", images, classes, precision="highest")
        chosen = jnp.take_along_axis(logits, batch["labels"][:, None], axis=1)[:, 0]
        return Evaluated(jnp.sum(jax.nn.logsumexp(logits, axis=1) - chosen))

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the number of images, twice."""
        rows = jnp.float32(batch["labels"].shape[0])
        return rows, rows

    def _classes(
        self,
        variables: Mapping[str, Any],
        classes: Mapping[str, jax.Array],
        key: jax.Array,
    ) -> jax.Array:
        """Returns normalised features ``[classes, features]``: the given ones, or of encoded
        prompts."""
        if "features" in classes:
            return classes["features"]
        # Features of [classes * prompts, seq] are averaged over the prompts of a class.
        count, prompts, _ = classes["tokens"].shape
        flat = {
            name: value.reshape(count * prompts, -1) for name, value in classes.items()
        }
        features = self.towers.texts(variables, flat, key)
        return normalised(jnp.mean(features.reshape(count, prompts, -1), axis=1))


@dataclass(frozen=True)
class Contrast:
    """Contrastive loss of images and captions over all rows of the global batch."""

    towers: Towers
    kind: Literal["softmax", "sigmoid"] = "softmax"

    def loss(
        self, variables: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array
    ) -> Evaluated:
        """Returns the loss, see `nalora_jax.method.step.Objective`.

        The batch has ``pixels``, ``tokens`` and ``token_weights``.
        """
        first, second = jax.random.split(key)
        images = self.towers.images(variables, batch, first)
        texts = self.towers.texts(variables, batch, second)
        scale, bias = self.towers.temperature(variables)
        function = sigmoid_contrastive
        if self.kind == "softmax":
            function = softmax_contrastive
        return Evaluated(
            function(images, texts, scale, bias, self.towers.model.shardings.rows)
        )

    def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns the number of pairs, twice."""
        rows = jnp.float32(batch["tokens"].shape[0])
        return rows, rows


def softmax_contrastive(
    images: jax.Array,
    texts: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    rows: RowSharding = None,
) -> jax.Array:
    """Returns CLIP's loss (arXiv 2103.00020), summed over rows: the mean of both cross-entropies.

    Args:
      images, texts: normalised ``[rows, features]``; row i of one belongs to row i of the other.
      scale: scale of the cosine similarities.
      bias: unused; a softmax does not depend on it.
      rows: sharding of the rows; each device compares its rows with all rows.
    """
    own_images, own_texts = (constrain(x, rows) for x in (images, texts))
    total = jnp.zeros((), jnp.float32)
    # Images among all texts, then texts among all images. The candidates are gathered from all
    # devices; a row's positive pair is on its own device.
    for anchors, candidates, pair in (
        (own_images, texts, own_texts),
        (own_texts, images, own_images),
    ):
        logits = scale * jnp.einsum(
            "if,jf->ij", anchors, _gathered(candidates, rows), precision="highest"
        )
        total += jnp.sum(
            jax.nn.logsumexp(logits, axis=1) - scale * jnp.sum(anchors * pair, axis=1)
        )
    return total / 2


def sigmoid_contrastive(
    images: jax.Array,
    texts: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    rows: RowSharding = None,
) -> jax.Array:
    """Returns SigLIP's loss (arXiv 2303.15343), summed over rows: binary cross-entropy of each
    pair.

    The arguments are as for `softmax_contrastive`; ``bias`` is added to the scaled similarities.
    """
    own_images, own_texts = (constrain(x, rows) for x in (images, texts))
    logits = (
        scale
        * jnp.einsum(
            "if,jf->ij", own_images, _gathered(texts, rows), precision="highest"
        )
        + bias
    )
    # Similarities of the matching pairs, the diagonal of the logits: [rows].
    matching = scale * jnp.sum(own_images * own_texts, axis=1) + bias
    # -log sigmoid(-x) = softplus(x) of all pairs; matching ones: softplus(-x) = softplus(x) - x.
    return jnp.sum(jax.nn.softplus(logits)) - jnp.sum(matching)


def _gathered(x: jax.Array, rows: RowSharding) -> jax.Array:
    """Returns ``x`` with all of its rows on every device."""
    if rows is None:
        return x
    return constrain(x, mesh_sharding(rows))


KIND = register_kind(
    Kind(
        name="dual",
        open_inputs=open_inputs,
        build_step=build_step,
        evaluator=evaluator,
        export_run=export_run,
        evaluate=adapter_evaluator,
        limits=limits,
        describe=describe_inputs,
        subject="nalora_jax.study.image_subject:DualEncoders",
    )
)
