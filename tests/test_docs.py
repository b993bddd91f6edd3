"""The documentation: pages that exist are listed, and the reference has what packages export."""

from __future__ import annotations

import importlib
import re
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
EXPORTING = ("nalora_jax", "nalora_jax.evaluate.generate")


def test_every_page_is_in_the_index_and_in_the_navigation() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\w+\.md)\)", index)) == sorted(set(PAGES) - {"index.md"})
    navigation = (
        (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\nvalidation:")[0]
    )
    assert sorted(re.findall(r"(\w+\.md)$", navigation, re.MULTILINE)) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_of_a_page_lead_somewhere(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([\w./-]+\.md)(?:#[\w-]+)?\)", text):
        assert (DOCS / target).exists(), target
    for path in re.findall(r"`((?:nalora_jax|configs|benchmarks|studies|tests|deploy)/[\w./-]*\w)`", text):
        if path.startswith(("nalora_jax/cpu", "tests/cpu")) and not (ROOT / "nalora_jax" / "cpu").exists():
            continue  # it may be deleted
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path


def test_the_reference_has_all_that_packages_export() -> None:
    listed = re.findall(
        r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    sources = {name: importlib.import_module(name) for name in listed}
    for package in EXPORTING:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                assert value.__name__ in listed, f"{package}.{name}"
            else:
                assert any(getattr(source, name, None) is value for source in sources.values()), (
                    f"{package}.{name}"
                )


def test_errors_of_the_troubleshooting_page_are_errors_of_this_library() -> None:
    """Each heading is a part of a message that some module really raises."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "nalora_jax").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    headings = re.findall(
        r"^## `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(headings) > 8
    for heading in headings:
        assert heading in source, heading
