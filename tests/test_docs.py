"""The documentation: pages that exist are listed, and the reference has what packages export."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def test_every_page_is_in_the_index_and_in_the_navigation() -> None:
    assert {*re.findall(r"\]\((\w+\.md)\)", DOCS["index.md"]), "index.md"} == DOCS.keys()
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r"(\w+\.md)$", navigation.split("\nvalidation:")[0], re.MULTILINE)
    assert sorted(listed) == list(DOCS)


def test_links_and_paths_of_pages_lead_somewhere() -> None:
    text = "\n".join(DOCS.values())
    for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", text):
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"`((?:nalora_jax|configs|benchmarks|studies|tests|deploy)/[\w./-]*\w)`", text):
        if path.startswith(("nalora_jax/cpu", "tests/cpu")) and not (ROOT / "nalora_jax" / "cpu").exists():
            continue  # it may be deleted
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path


def test_the_reference_has_all_that_packages_export() -> None:
    listed = re.findall(r"^::: ([\w.]+)$", DOCS["reference.md"], re.MULTILINE)
    sources = [importlib.import_module(name) for name in listed]
    for package in map(importlib.import_module, ("nalora_jax", "nalora_jax.evaluate.generate")):
        for name in package.__all__:
            value = getattr(package, name)
            assert value in sources or any(getattr(one, name, None) is value for one in sources), name


def test_errors_of_the_troubleshooting_page_are_errors_of_this_library() -> None:
    """Each heading is a part of a message that some module really raises."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "nalora_jax").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    headings = re.findall(r"^## `(.+)`$", DOCS["troubleshooting.md"], re.MULTILINE)
    assert len(headings) > 8
    for heading in headings:
        assert heading in source, heading
