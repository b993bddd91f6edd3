"""A GRPO step against TRL's GRPOTrainer on torch: same random weights, prompts, samples and
rewards.

    python benchmarks/versus_trl.py --rounds 2 --steps 4          # needs the extra "bench"
    # additional rounds, TRL in float32
    python benchmarks/versus_trl.py --trl-dtype float32 --add

Processes alternate in random order. TRL runs --steps timed steps of 8 prompts x 8 samples x 24 new
tokens, this library ten, one of which is logged (the default), with the divergence from the base.
tokens/s
counts the sampled tokens of a whole step: rollout, rewards and update. CPU seconds are comparable
on a busy machine, wall seconds only by the ratio of alternating processes. Memory is the peak of
the whole process.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    ARCHITECTURES,
    add_rounds,
    compare,
    compared,
    markdown,
    parser_of,
    peak_rss_mb,
    script,
    values,
)
from peft_baseline import load_base
from peft_baseline import parse as parse_peft

LOGGED = 10
WARMUP, PROMPTS, SAMPLES, LIMIT, LENGTH = 1, 8, 8, 24, 40
SIDES = ("nalora_jax", "trl")


def prompts(count: int) -> list[str]:
    """Returns prompts of ``LENGTH`` words, each of which is a token."""
    vocab = ARCHITECTURES["smollm2"]["vocab_size"]
    return [
        " ".join(f"w{7919 * (LENGTH * i + j) % vocab}" for j in range(LENGTH))
        for i in range(count)
    ]


def write_model(folder: Path) -> None:
    """Writes SmolLM2-135M with random weights and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    load_base(parse_peft(["--dtype", "bfloat16"])).save_pretrained(folder)
    vocab = {f"w{i}": i for i in range(ARCHITECTURES["smollm2"]["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"eos_token": "w0", "bos_token": "w0", "pad_token": "w0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(folder)


class Clock:
    """Wall and CPU seconds of each step, from one call of `tick` to the next."""

    def __init__(self) -> None:
        self.wall, self.busy = [time.perf_counter()], [time.process_time()]

    def tick(self) -> None:
        """Ends a step."""
        self.wall.append(time.perf_counter())
        self.busy.append(time.process_time())

    def record(self, steps: int, **more: Any) -> dict[str, Any]:
        """Returns the figures of the last ``steps`` steps."""
        wall, busy = (
            [b - a for a, b in itertools.pairwise(x)][-steps:]
            for x in (self.wall, self.busy)
        )
        tokens = PROMPTS * SAMPLES * LIMIT
        return {
            "seconds": wall,
            "cpu_seconds_per_step": busy,
            "tokens_per_second": [tokens / second for second in wall],
            "peak_rss_mb": peak_rss_mb(),
            **more,
        }


def ours(folder: Path) -> dict[str, Any]:
    """Returns the figures of a run of this library, with each step's share of time outside of its
    two programs."""
    import jax

    from nalora_jax import RunConfig, run
    from nalora_jax import config as c
    from nalora_jax.kinds.rl import rollout
    from nalora_jax.kinds.rl.kind import RolloutStep
    from nalora_jax.kinds.rl.rewards import register_reward

    register_reward("remainder")(
        lambda prompt, completion, record: float(len(completion) % 5)
    )
    clock, sampling, inside = Clock(), [0.0], []
    plain, plain_step = rollout.sample_groups, RolloutStep.__call__

    def sample_groups(*arrays: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = jax.block_until_ready(plain(*arrays, **options))
        sampling[0] = time.perf_counter() - began
        return result

    def step(*arguments: Any) -> Any:
        state, metrics = plain_step(*arguments)
        clock.tick()
        inside.append(sampling[0] + metrics["measured"]["update_seconds"])
        return state, metrics

    rollout.sample_groups, RolloutStep.__call__ = sample_groups, step  # type: ignore[method-assign]
    data = folder / "prompts.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": p, "completion": " w2"}) + "\n" for p in prompts(400)
        )
    )
    config = RunConfig(
        model=str(folder),
        output=str(Path(tempfile.mkdtemp()) / "run"),
        steps=2 * LOGGED,
        mechanisms=(),
        lora=c.LoRAConfig(rules=(c.LoRARule("ffn/(gate|up|down)_proj", 8),)),
        optimizer=c.OptimizerConfig(learning_rate=1e-5),
        data=c.DataConfig(dataset=str(data), eval_limit=2),
        rl=c.RLConfig(rewards=("remainder",), samples=SAMPLES, max_new_tokens=LIMIT),
        train=c.TrainConfig(
            batch_size=PROMPTS * SAMPLES, log_every=LOGGED, eval_every=0, save_every=0
        ),
        compute=c.ComputeConfig(dtype="bfloat16"),
    )
    run(config)
    record = clock.record(LOGGED)
    return {**record, "outside": 1 - sum(inside[-LOGGED:]) / sum(record["seconds"])}


def theirs(folder: Path, steps: int, dtype: str) -> dict[str, Any]:
    """Returns the figures of TRL's GRPOTrainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock()

    class Listener(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            clock.tick()

    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=LIMIT,
        max_steps=WARMUP + steps,
        learning_rate=1e-5,
        beta=0.0,
        loss_type="grpo",
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        model_init_kwargs={"dtype": dtype},
    )
    targets = ["gate_proj", "up_proj", "down_proj"]
    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **_: [
            float(len(text) % 5) for text in completions
        ],
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts(400)}),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"
        ),
        callbacks=[Listener()],
    )
    trainer.train()
    return clock.record(steps)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--side", choices=SIDES, help="run one process on --model")
    parser.add_argument(
        "--model", type=Path, help="folder of random weights; default: a new one"
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of TRL, after one"
    )
    parser.add_argument(
        "--trl-dtype", choices=("bfloat16", "float32"), default="bfloat16"
    )
    add_rounds(parser, 2)
    options = parser.parse_args()
    if options.side:
        both = {"nalora_jax": lambda: ours(options.model)}
        both["trl"] = lambda: theirs(options.model, options.steps, options.trl_dtype)
        print(json.dumps(both[options.side]()))
        return
    folder = options.model or Path(tempfile.mkdtemp()) / "model"
    if not folder.exists():
        write_model(folder)
    more = (
        "--model",
        folder,
        "--steps",
        options.steps,
        "--trl-dtype",
        options.trl_dtype,
    )
    commands = {side: script("versus_trl.py", "--side", side, *more) for side in SIDES}
    case = f"{PROMPTS} prompts x {SAMPLES} samples x {LIMIT} tokens, TRL in {options.trl_dtype}"
    (result,) = compare("versus_trl", case, commands, options)["cases"].values()
    columns = {
        "tokens/s": ("tokens_per_second", 1),
        "CPU s per step": ("cpu_seconds_per_step", 1),
        "memory, MB": ("peak_rss_mb", 0),
    }
    rows = [
        compared(
            what, *(values(result["runs"][side], key) for side in SIDES), digits=digits
        )
        for what, (key, digits) in columns.items()
    ]
    print(markdown((case, *SIDES, "ratio"), rows))
    outside = values(result["runs"]["nalora_jax"], "outside")
    print(f"outside of the two programs: {max(outside):.1%} of ten steps at most")


if __name__ == "__main__":
    main()
