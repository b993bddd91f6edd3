"""Shared set-up: eight simulated CPU devices, strict numerics, warnings as errors (pyproject)."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from nalora_jax import errors
from tests import refusals, xla_options

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_options.flags(8)}"
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    # Threads of XLA's CPU client. By default one per device: where two collectives of one program
    # do not depend on each other, devices may wait in different ones until no thread is left to
    # finish either.
    "NPROC": "32",
    # A program that one test has compiled is read by the others, in whichever process they run. Not
    # a small one: its compression takes 3 ms, and on average it is read no faster than it is
    # compiled.
    "JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/nalora-tests-{os.getpid()}",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    # Lines of source for each operation of a program would take 6% of the time of a test that
    # compiles.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
} | os.environ

import hypothesis
import jax
import pytest

if TYPE_CHECKING:
    from nalora_jax.ops.dispatch import Numerics

gc.disable()  # until all tests are imported
# Without bytecode each process compiles the package and the asserts of all tests anew: 6 CPU
# seconds.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Before a test replaces the table of implementations; others find it when their first operation
# runs.
HAS_CPU = importlib.util.find_spec("nalora_jax.cpu") is not None
if HAS_CPU:
    importlib.import_module("nalora_jax.cpu")

# By default an example of 200 ms fails, and ten that take a second to draw: on a busy machine any
# does.
BUSY = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("shared machine", **BUSY)
hypothesis.settings.load_profile("shared machine")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # also while tests are collected

# Of the process that started the tests: it owns the record of refusals, and judges it.
OWNS_REFUSALS = pytest.StashKey[bool]()
COMPLAINTS = pytest.StashKey[list[str]]()

# Files and markers about packages that are no part of the extra `test`.
FILES_OF = {"trl": "kinds/test_preference_trl.py"}
MISSING = {
    package
    for package in (*FILES_OF, "lm_eval", "tunix")
    if importlib.util.find_spec(package) is None
}
collect_ignore = [file for package, file in FILES_OF.items() if package in MISSING]
# Files that take longest begin first, the longest of all at once: for whichever comes last, the
# other processes wait.
LONGEST = (
    "test_families.py", "test_mesh.py", "test_run.py", "test_run_rewards.py", "test_context.py", "test_docs_code.py",
    "test_run_images.py", "test_program.py", "test_prefill.py", "test_step.py", "test_decoder.py",
    "test_real_models.py", "test_dual.py", "test_attention.py", "test_elastic.py",
    "test_preemption.py", "test_config_fields.py", "test_preference.py", "test_kinds.py", "test_peft_training.py",
)  # fmt: skip


def pytest_report_header() -> list[str]:
    """Says which files are left out."""
    return [f"left out, for want of a package: tests/{file}" for file in collect_ignore]


def pytest_configure(config: pytest.Config) -> None:
    """Files in the order above: by itself pytest-xdist begins with those of most tests, and the
    longest have few."""
    config.option.loadscopereorder = False
    if refusals.FOLDER not in os.environ:
        os.environ[refusals.FOLDER] = tempfile.mkdtemp(prefix="nalora-refusals-")
        config.stash[OWNS_REFUSALS] = True
    sys.path.append(str(Path(__file__).with_name("startup")))  # for the processes that tests start
    refusals.record(errors)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--first-of-each", action="store_true", help="of a test with several cases only the first"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out (visibly, as deselected) what has no package here or was not asked for; orders the
    others."""
    wanted = [item for item in items if not MISSING & {mark.name for mark in item.iter_markers()}]
    if config.getoption("first_of_each"):
        wanted = list({item.nodeid.partition("[")[0]: item for item in reversed(wanted)}.values())[
            ::-1
        ]
    if left_out := set(items) - set(wanted):
        config.hook.pytest_deselected(items=list(left_out))
    place = {name: i for i, name in enumerate(LONGEST)}
    items[:] = sorted(wanted, key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """Collects garbage seldom: what is imported by now stays, and JAX's traces are many objects of
    a short life."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    gc.enable()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fails a whole run that passed and left refusals without a test (`tests.refusals`)."""
    config = session.config
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    whole = whole and not config.option.markexpr and not config.getoption("first_of_each")
    if OWNS_REFUSALS in config.stash and whole and exitstatus == 0:
        reached = refusals.read_reached(Path(os.environ[refusals.FOLDER]))
        config.stash[COMPLAINTS] = refusals.judge(refusals.read_refusals(), reached)
        if config.stash[COMPLAINTS]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Lists the refusals without a test."""
    if complaints := config.stash.get(COMPLAINTS, []):
        terminalreporter.section("refusals without a test")
        for complaint in complaints:
            terminalreporter.write_line(complaint)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the folder of compiled programs and that of refusals, if this process named them."""
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if folder.endswith(f"nalora-tests-{os.getpid()}"):
        shutil.rmtree(folder, ignore_errors=True)
    if OWNS_REFUSALS in config.stash:
        shutil.rmtree(os.environ[refusals.FOLDER], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _seconds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs need not collect garbage after they compiled (0.5 s), nor a new NALORA_CACHE the CPU
    kernels (15 s). Tokens are made once a session: those of an earlier one hide what a change of
    the code does to them."""
    from nalora_jax.common.downloads import cache_dir
    from nalora_jax.kinds.on_policy import SampledStep
    from nalora_jax.kinds.rl.kind import RolloutStep
    from nalora_jax.train.profile import Profile

    folder = cache_dir()
    tokens = tmp_path_factory.mktemp("cache")

    def tokens_dir() -> Path:
        named = cache_dir()
        return tokens if named == folder else named

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nalora_jax.assembly.compilation.gc", SimpleNamespace(collect=lambda: 0))
        if HAS_CPU:
            patch.setattr("nalora_jax.cpu.native.library.cache_dir", lambda: folder)
        patch.setattr("nalora_jax.train.profile.Profile.step", _without_transfers(Profile.step))
        for step in (RolloutStep, SampledStep):  # their samples are on the host
            patch.setattr(step, "__call__", jax.transfer_guard("allow")(step.__call__))
        patch.setattr("nalora_jax.data.store.cache_dir", tokens_dir)
        yield


def _without_transfers(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the context of a training step, in which any hidden transfer then raises an error."""

    @contextlib.contextmanager
    def guarded(self: Any, *args: Any) -> Iterator[None]:
        with step(self, *args), jax.transfer_guard("disallow"):
            yield

    return guarded


@pytest.fixture(scope="module", autouse=True)
def _module(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module's programs are optimised only if it is marked; reports have pictures only in the
    tests of reports.

    Programs are freed at its end: each holds maps of memory, of which a process may have 65,530.
    """
    optimised = request.node.get_closest_marker("optimised") is not None
    jax.config.update("jax_disable_most_optimizations", not optimised)
    with pytest.MonkeyPatch.context() as patch:
        if "report" not in request.path.parts:
            patch.setattr("nalora_jax.report.html._draw", lambda history: [])
        yield
    jax.clear_caches()


@pytest.fixture(params=["xla", *(["cpu", "cpu without kernels"] if HAS_CPU else [])])
def numerics(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Numerics]:
    """Makes the numerics of a dtype, in every implementation that the machine has, for a program on
    one device."""
    from nalora_jax.ops.dispatch import numerics_for

    name, _, without = request.param.partition(" without ")
    if without:
        monkeypatch.setenv("NALORA_NATIVE", "0")

    def make(dtype: str = "float32", **changes: Any) -> Numerics:
        return replace(numerics_for(dtype, "cpu", name), **changes)

    return make


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take one of the simulated devices."""
    from nalora_jax.mesh import distributed

    make = distributed.make_mesh
    monkeypatch.setattr(
        distributed, "make_mesh", lambda mesh, devices=None: make(mesh, jax.devices()[:1])
    )


@pytest.fixture
def google(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Any, list[tuple[str, str]]]]:
    """An emulator that gcsfs takes for Google's store: its objects, and the path and range of each
    request."""
    from nalora_jax.common import buckets
    from tests import emulator

    requests: list[tuple[str, str]] = []
    monkeypatch.setenv("NALORA_CACHE", str(tmp_path / "cache"))
    with emulator.emulator(tmp_path / "google", requests) as (held, address):
        for name, value in emulator.variables(address).items():
            monkeypatch.setenv(name, value)
        buckets._filesystem_of.cache_clear()
        yield held, requests
        buckets._filesystem_of.cache_clear()


def make_in_session(name: str, factory: pytest.TempPathFactory) -> Callable[..., Path]:
    pytest.importorskip("transformers")
    from tests import vision

    return lambda family, **changes: getattr(vision, name)(
        factory.mktemp(family), family, **changes
    )


@pytest.fixture(scope="session")
def dual_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes folders of tiny dual encoders: ``dual_folder("clip", vision={...}, text={...},
    ...)``."""
    return make_in_session("make_dual", tmp_path_factory)


@pytest.fixture(scope="session")
def tower_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a ViT and of a BERT that were never trained together."""
    pytest.importorskip("transformers")
    from tests import vision

    return vision.make_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes folders of tiny vision-language models: ``vision_folder("llava", vision={...}, text={...},
    ...)``."""
    return make_in_session("make_vision_model", tmp_path_factory)
