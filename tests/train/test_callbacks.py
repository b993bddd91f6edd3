"""Who listens to a run: the protocol, settings as typed, and what the trackers are told."""

from __future__ import annotations

import logging
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nalora_jax.errors import NaloraError
from nalora_jax.train.callbacks import (
    Callback,
    Callbacks,
    Ended,
    Started,
    make_callbacks,
    register_callback,
)
from nalora_jax.train.log import TensorBoard

RECORD = {"loss": np.float32(1.5), "tokens_per_second": None, "layers": {"limit": np.array([0.25, np.nan])}}
EVAL = {"loss": 2.0, "n": 4, "samples": [{"prompt": "x"}], "right": [True]}


def tell(callback: Callback, folder: Path, *, step: int = 0, message: str = "") -> None:
    """A short run."""
    with Callbacks(None, [callback]) as told:
        told.start(Started(folder, {"steps": 9, "lora": {"rules": [{"rank": 4}]}}, step))
        told.evaluation(step, EVAL, "initial")
        told.log(step + 7, RECORD)
        told.evaluation(step + 7, EVAL)
        told.save(step + 7, folder / "checkpoints" / "7")
        told.end(Ended(message=message) if message else Ended(step + 9, step + 7))


@register_callback("loudest")
@dataclass
class Loudest(Callback):
    """Notes what it is told."""

    times: int = 1
    share: float = 0.5
    name: str = ""
    on: bool = False

    def __post_init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def on_log(self, step: int, record: Any) -> None:
        self.told.append((step, float(record["loss"])))

    def on_save(self, step: int, folder: Path) -> None:
        self.told.append((step, folder.name))

    def on_eval(self, step: int, values: Any, kind: str) -> None:
        self.told.append((step, kind, values["loss"]))

    def on_end(self, ended: Ended) -> None:
        self.told.append((ended.step, ended.best_step, ended.message))


def test_a_callback_is_told_what_happens_in_order(tmp_path: Path) -> None:
    callback = Loudest()
    tell(callback, tmp_path)
    assert callback.told == [(0, "initial", 2.0), (7, 1.5), (7, "", 2.0), (7, "7"), (9, 7, "")]


def test_settings_are_typed_as_their_defaults(tmp_path: Path) -> None:
    found = make_callbacks(["loudest:times=3,share=0.25,name=x,on=true", "tensorboard"])
    assert found[0] == Loudest(3, 0.25, "x", True)
    assert isinstance(found[1], TensorBoard)
    for text, said in [
        ("none", "^--callbacks: expected one of .*loudest.*, found 'none'"),
        (
            "loudest:time=3",
            "--callbacks loudest:time=3: expected NAME:setting=value, with a setting of times, share",
        ),
        ("loudest:times=many", "expected times of type int, found 'many'"),
        ("loudest:on=perhaps", "expected on of type bool, found 'perhaps'"),
    ]:
        with pytest.raises(NaloraError, match=said):
            make_callbacks([text])


def test_one_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Loudest):
        def on_log(self, step: int, record: Any) -> None:
            raise OSError("no route to host")

    broken, well, own = Broken(), Loudest(), Loudest()
    told = Callbacks(own, [broken, well])
    with caplog.at_level(logging.WARNING, "nalora_jax"):
        told.log(1, RECORD)
        told.end(Ended(2, 1))
    assert (len(broken.told), len(well.told), len(own.told)) == (0, 2, 2)
    assert caplog.messages == ["Broken is left out from here on: OSError: no route to host"]
    with pytest.raises(OSError, match="no route"):
        Callbacks(broken).log(1, RECORD)  # the run's own log has to be kept

    class Stops(Callback):
        def on_log(self, step: int, record: Any) -> None:
            raise NaloraError("here", expected="less", found="more")

    with pytest.raises(NaloraError, match="here"):
        Callbacks(None, [Stops()]).log(1, RECORD)

    class NoServer(Callback):
        def on_start(self, started: Started) -> None:
            raise ConnectionError("refused\nby the server")

    with pytest.raises(
        NaloraError, match="--callbacks, NoServer: expected a callback that can begin, found Connection"
    ):
        Callbacks(own, [NoServer()]).start(Started(tmp_path, {}))


def test_tensorboard_events_hold_the_scalars(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    tell(TensorBoard(), tmp_path)
    data = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    found: dict[tuple[str, int], float] = {}
    at = 0
    while at < len(data):  # TFRecord: length (8 bytes), crc (4), the event, crc (4)
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += 16 + size
    assert found == {
        ("before/loss", 0): 2.0,
        ("before/n", 0): 4.0,
        ("train/loss", 7): 1.5,
        ("limit/layer_00", 7): 0.25,
        ("eval/loss", 7): 2.0,
        ("eval/n", 7): 4.0,
    }


def _wandb(runs: list[Any]) -> Any:
    class Run:
        def __init__(self, **settings: Any) -> None:
            self.settings, self.rows, self.summary, self.metrics, self.code = settings, [], {}, [], None
            runs.append(self)

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            self.metrics.append((name, step_metric))

        def log(self, row: dict[str, Any]) -> None:
            self.rows.append(row)

        def finish(self, exit_code: int) -> None:
            self.code = exit_code

    return types.SimpleNamespace(init=Run)


def test_weights_and_biases_is_told_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", _wandb(runs))
    tell(*make_callbacks(["wandb:project=gates,mode=offline"]), tmp_path)
    (run,) = runs
    assert (run.settings["project"], run.settings["mode"], run.settings["name"]) == (
        "gates",
        "offline",
        tmp_path.name,
    )
    assert run.settings["config"]["lora"] == {"rules": [{"rank": 4}]}
    assert ("*", "step") in run.metrics
    assert {"step": 7, "train/loss": 1.5, "limit/layer_00": 0.25} in run.rows
    assert {"step": 0, "before/loss": 2.0, "before/n": 4} in run.rows
    assert (run.summary, run.code) == ({"best_step": 7}, 0)
    tell(*make_callbacks(["wandb"]), tmp_path, step=3, message="stopped")
    assert runs[1].settings["id"] == run.settings["id"]
    assert runs[1].code == 1
    tell(*make_callbacks(["wandb"]), tmp_path / "other")
    assert runs[2].settings["id"] != run.settings["id"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_tracker_is_said_before_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        NaloraError, match=f"--callbacks {name}: expected the library {name}.*pip install {name}"
    ):
        make_callbacks([name])


def test_mlflow_is_told_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class Client:
        def __init__(self, tracking_uri: str | None) -> None:
            calls.append(("uri", tracking_uri))

        def get_experiment_by_name(self, name: str) -> Any:
            return None

        def create_experiment(self, name: str) -> str:
            return name

        def create_run(self, experiment: str, run_name: str) -> Any:
            calls.append(("run", experiment, run_name))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))

        def update_run(self, run: str, status: str) -> None:
            calls.append(("again", run, status))

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            calls.extend([("metric", one[0], one[1], one[3]) for one in metrics])
            calls.extend([("param", *one) for one in params])

        def set_terminated(self, run: str, status: str) -> None:
            calls.append(("ended", run, status))

    entities = types.SimpleNamespace(Metric=lambda *values: values, Param=lambda *values: values)
    monkeypatch.setitem(
        sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=Client, entities=entities)
    )
    tell(*make_callbacks(["mlflow:uri=file:x,name=mine"]), tmp_path)
    assert calls[:2] == [("uri", "file:x"), ("run", "nalora_jax", "mine")]
    assert ("param", "steps", "9") in calls
    assert ("metric", "train/loss", 1.5, 7) in calls
    assert calls[-1] == ("ended", "r1", "FINISHED")
    calls.clear()
    tell(*make_callbacks(["mlflow"]), tmp_path, step=3, message="stopped")
    assert calls[1] == ("again", "r1", "RUNNING")
    assert calls[-1] == ("ended", "r1", "FAILED")
