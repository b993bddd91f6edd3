"""Few-shot steps of CLIP ViT-B/16 shapes against transformers + PEFT on torch, with equal work.

    python benchmarks/few_shot.py --dtype bfloat16 --rounds 2
    python benchmarks/few_shot.py --dtype float32 --rounds 2 --add            # additional rounds
    python benchmarks/few_shot.py --dtype bfloat16 --search                   # find PEFT's fastest setting here

Random weights; rank 8 on the image tower's feed-forward blocks, AdamW, cross-entropy among 100
classes whose text features were computed once, as both libraries can with a frozen text tower;
images of 224 pixels, 32 in a step, already decoded. Processes alternate in random order. PEFT runs
at the fastest setting that --search recorded for the dtype, else with scaled-dot-product attention,
compiled for bfloat16. Speed is images/s of all timed steps, memory the peak of the whole process.
This library runs NA-LoRA.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import numpy as np
from common import CLIP_B16, add_rounds, alternate_processes, compare, fastest, peak_rss_mb, script, search
from methods import with_method
from tables import Row, at_least, compared_runs, requirements

TITLE = "Few-shot steps of CLIP ViT-B/16 against transformers + PEFT"
SHORT = "Few-shot, PEFT"

CLASSES, RANK, RATE = 100, 8, 1e-3
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PEFT_SETTINGS = ("sdpa", "sdpa compiled", "eager", "eager compiled")


def rows(record: dict[str, Any]) -> list[Row]:
    """Returns speeds first, then memory."""
    cases = record["cases"].items()
    speeds = [
        compared_runs(f"images/s, {c}", f["runs"], "peft", "images_per_second", at_least(1.0), digits=1)
        for c, f in cases
    ]
    memory = [
        compared_runs(f"peak memory, {c}", f["runs"], "peft", "peak_rss_mb", None, unit="MB")
        for c, f in cases
    ]
    return speeds + memory


def table(record: dict[str, Any]) -> str:
    """Returns the section's Markdown."""
    return requirements(rows(record), other="PEFT")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=32, help="images in a step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument(
        "--layers", type=int, default=CLIP_B16["vision_config"]["num_hidden_layers"], help="of both towers"
    )
    parser.add_argument("--library", choices=("nalora_jax", "peft"), help="measure one, in this process")
    parser.add_argument(
        "--peft", choices=PEFT_SETTINGS, help="PEFT's setting; default: the fastest that is known"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    parser.add_argument("--search", action="store_true", help="compare PEFT's settings instead")
    add_rounds(parser, 2)
    return parser.parse_args(arguments)


def clip_config(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the ``config.json`` of a CLIP ViT-B/16."""
    sizes = {"num_hidden_layers": options.layers}
    vision = {**CLIP_B16["vision_config"], **sizes, "image_size": options.image_size}
    return {**CLIP_B16, "vision_config": vision, "text_config": {**CLIP_B16["text_config"], **sizes}}


def batches(options: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns uint8 pixels ``[batch, height, width, 3]`` and labels of every step.

    Both libraries use the same.
    """
    rng, side = np.random.default_rng(0), options.image_size
    shape = (options.batch, side, side, 3)
    count = options.warmup + options.steps
    return [
        (rng.integers(0, 256, shape, np.uint8), rng.integers(0, CLASSES, options.batch))
        for _ in range(count)
    ]


def class_features() -> np.ndarray:
    """Returns float32 features ``[classes, 512]``, normalised."""
    features = np.random.default_rng(1).standard_normal((CLASSES, 512)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def train_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Returns losses and seconds of all steps of this library."""
    import jax

    from nalora_jax import config as c
    from nalora_jax.config import VisionConfig
    from nalora_jax.data.images.processor import ImageProcessor
    from nalora_jax.layout import distributed
    from nalora_jax.models.vision.config import DualConfig
    from nalora_jax.models.vision.dual import init_params
    from nalora_jax.train.compilation import use_compilation_cache
    from nalora_jax.train.dual import assemble_dual
    from nalora_jax.train.dual_objectives import CLASSES as PROMPTS

    use_compilation_cache()
    mesh = distributed.make_mesh(c.MeshConfig())
    base = DualConfig.from_hf(clip_config(options))
    params = jax.jit(init_params, static_argnums=(0, 2))(base, jax.random.key(0), options.dtype)
    params[PROMPTS] = {"features": jax.numpy.asarray(class_features())}
    config = c.RunConfig(
        steps=10_000,
        lora=c.LoRAConfig(rules=(c.LoRARule("image/.*ffn", RANK),)),
        optimizer=c.OptimizerConfig(
            learning_rate=RATE, schedule="constant", warmup_share=0.0, clip_norm=0.0
        ),
        compute=c.ComputeConfig(dtype=options.dtype),
        vision=VisionConfig("classify"),
    )
    config = with_method(config, "nalora")
    processor = ImageProcessor(resize=(options.image_size,) * 2, mean=MEAN, std=STD)
    assembly = assemble_dual(config, base, params, mesh, processor)
    state, params = assembly.state, assembly.view(params)
    losses, seconds = [], []
    for pixels, labels in batches(options):
        rows = {"pixels": pixels[None], "labels": labels.astype(np.int32)[None]}
        start = time.perf_counter()
        state, metrics = assembly.step(
            params, state, distributed.make_global_batch(rows, mesh, rows_axis=1)
        )
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds}


def train_peft(options: argparse.Namespace) -> dict[str, Any]:
    """Returns losses and seconds of all steps of transformers and PEFT."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    attention, _, compiled = (options.peft or "sdpa").partition(" ")
    half = options.dtype == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    raw = clip_config(options)
    sizes = {name: raw[name] for name in ("vision_config", "text_config", "projection_dim")}
    base = transformers.AutoModel.from_config(
        transformers.CLIPConfig(**sizes), dtype=dtype, attn_implementation=attention
    )
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=r".*vision_model.*mlp\.fc[12]")
    model = get_peft_model(base, lora, autocast_adapter_dtype=not half)
    model.train()
    clip = model.base_model.model
    classes = torch.from_numpy(class_features()).to(dtype)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))

    def loss_of(pixels: Any, labels: Any) -> Any:
        normalised = ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)
        features = clip.visual_projection(clip.vision_model(pixel_values=normalised).pooler_output)
        features = torch.nn.functional.normalize(features, dim=-1)
        logits = clip.logit_scale.exp() * features @ classes.T
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    function = torch.compile(loss_of) if compiled else loss_of
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    losses, seconds = [], []
    for pixels, labels in batches(options):
        start = time.perf_counter()
        loss = function(torch.from_numpy(pixels), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds}


def one(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the record of one process."""
    result = (train_ours if options.library == "nalora_jax" else train_peft)(options)
    timed = result["seconds"][options.warmup :]
    speeds = [options.batch / second for second in timed]
    return {**result, "seconds": timed, "images_per_second": speeds, "peak_rss_mb": peak_rss_mb()}


def main() -> None:
    options = parse()
    if options.library:
        print(json.dumps(one(options)))
        return
    case = f"{options.dtype} {options.batch}x{options.image_size}"
    sizes = ["--dtype", options.dtype, "--batch", options.batch, "--image-size", options.image_size]
    sizes += ["--layers", options.layers, "--threads", options.threads]

    def command(library: str, steps: int, *extra: object) -> list[str]:
        return script("few_shot.py", "--library", library, "--steps", steps, *sizes, *extra)

    if options.search:
        variants = {name: command("peft", options.steps, "--peft", name) for name in PEFT_SETTINGS}
        search("few_shot", case, variants, "images_per_second", options)
        return
    setting = options.peft or fastest(
        "few_shot", case, "sdpa compiled" if options.dtype == "bfloat16" else "sdpa"
    )

    def commands(steps: int) -> dict[str, list[str]]:
        return {
            "nalora_jax": command("nalora_jax", steps),
            "peft": command("peft", steps, "--peft", setting),
        }

    alternate_processes(commands(1), rounds=1)  # fills both libraries' caches of compiled programs
    print(table(compare("few_shot", case, commands(options.steps), options, {"peft": setting})))


if __name__ == "__main__":
    main()
