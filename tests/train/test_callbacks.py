"""Callbacks: settings, failures, and the numbers that trackers get; tests/test_run_data.py shows
the order of calls."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

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

RECORD = {
    "loss": np.float32(1.5),
    "tokens_per_second": None,
    "layers": {"limit": np.array([0.25, np.nan])},
}
EVAL = {"loss": 2.0, "n": 4, "samples": [{"prompt": "x"}], "right": [True]}


def tell(callback: Callback, folder: Path, *, step: int = 0, message: str = "") -> None:
    """A short run."""
    with Callbacks([callback]) as told:
        told.start(Started(folder, {"steps": 9, "lora": {"rules": [{"rank": 4}]}}, step))
        told.tell("on_eval", step, EVAL, "initial")
        told.tell("on_log", step + 7, RECORD)
        told.tell("on_eval", step + 7, EVAL, "")
        told.tell("on_end", Ended(message=message) if message else Ended(step + 9, step + 7))


@register_callback("loudest")
@dataclass
class Loudest(Callback):
    times: int = 1
    share: float = 0.5
    name: str = ""
    on: bool = False


def test_settings_are_typed_as_their_defaults() -> None:
    found = make_callbacks(["loudest:times=3,share=0.25,name=x,on=true", "tensorboard"])
    assert found[0] == Loudest(3, 0.25, "x", True)
    assert isinstance(found[1], TensorBoard)
    for text, said in [
        ("none", "^--callbacks: expected one of .*loudest.*, found 'none'"),
        (
            "loudest:time=3",
            "loudest:time=3: expected NAME:setting=value, with a setting of times, share",
        ),
        ("loudest:times=many", "expected times of type int, found 'many'"),
        ("loudest:on=perhaps", "expected on of type bool, found 'perhaps'"),
    ]:
        with pytest.raises(NaloraError, match=said):
            make_callbacks([text])


def raising(event: str, error: Exception, *, required: bool = False) -> mock.Mock:
    return mock.Mock(spec=Callback, required=required, **{f"{event}.side_effect": error})


def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path, caplog) -> None:
    own = mock.Mock(spec=Callback, required=True)
    well = mock.Mock(spec=Callback, required=False)
    broken = raising("on_log", OSError("no route to host"))
    told = Callbacks([own, broken, well])
    with caplog.at_level(logging.WARNING, "nalora_jax"):
        told.tell("on_log", 1, RECORD)
        told.tell("on_end", Ended(2, 1))
    assert [one.on_end.call_count for one in (broken, well, own)] == [0, 1, 1]
    assert caplog.messages == ["Mock is left out from here on: OSError: no route to host"]
    full = raising("on_log", OSError("no route to host"), required=True)
    with pytest.raises(OSError, match="no route"):
        Callbacks([full]).tell("on_log", 1, RECORD)  # the run's own log has to be kept
    stops = raising("on_log", NaloraError("here", expected="less", found="more"))
    with pytest.raises(NaloraError, match="here"):
        Callbacks([stops]).tell("on_log", 1, RECORD)
    no_server = raising("on_start", ConnectionError("refused\nby the server"))
    message = "--callbacks, Mock: expected a callback that can begin, found Connection"
    with pytest.raises(NaloraError, match=message):
        Callbacks([own, no_server]).start(Started(tmp_path, {}))


def test_tensorboard_is_told_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_run_data.py has its files."""
    writer = mock.MagicMock()
    monkeypatch.setattr("tensorboardX.SummaryWriter", writer)
    tell(TensorBoard(), tmp_path)
    writer.assert_called_with(str(tmp_path / "tensorboard"), purge_step=None)
    assert [call.args for call in writer.return_value.add_scalar.call_args_list] == [
        ("before/loss", 2.0, 0),
        ("before/n", 4.0, 0),
        ("train/loss", 1.5, 7),
        ("limit/layer_00", 0.25, 7),
        ("eval/loss", 2.0, 7),
        ("eval/n", 4.0, 7),
    ]
    writer.return_value.close.assert_called_with()
    tell(TensorBoard(), tmp_path, step=3)
    writer.assert_called_with(str(tmp_path / "tensorboard"), purge_step=4)


def test_weights_and_biases_is_told_every_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = wandb.init.return_value
    tell(*make_callbacks(["wandb:project=gates,mode=offline"]), tmp_path)
    run.finish.assert_called_with(exit_code=0)
    run.define_metric.assert_any_call("*", step_metric="step")
    run.log.assert_any_call({"step": 7, "train/loss": 1.5, "limit/layer_00": 0.25})
    run.log.assert_any_call({"step": 0, "before/loss": 2.0, "before/n": 4})
    run.summary.__setitem__.assert_called_with("best_step", 7)
    tell(*make_callbacks(["wandb"]), tmp_path, step=3, message="stopped")
    run.finish.assert_called_with(exit_code=1)
    tell(*make_callbacks(["wandb"]), tmp_path / "other")
    first, resumed, other = (call.kwargs for call in wandb.init.call_args_list)
    assert first["id"] == resumed["id"] != other["id"]
    assert (first["project"], first["mode"], first["name"]) == ("gates", "offline", tmp_path.name)
    assert first["config"]["lora"] == {"rules": [{"rank": 4}]}


def test_a_missing_tracker_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    message = "--callbacks mlflow: expected the library mlflow.*pip install mlflow"
    with pytest.raises(NaloraError, match=message):
        make_callbacks(["mlflow"])


def test_mlflow_is_told_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = mock.MagicMock()
    mlflow.entities.Metric = mlflow.entities.Param = lambda *values: values
    client = mlflow.MlflowClient.return_value
    client.get_experiment_by_name.return_value = None
    client.create_run.return_value.info.run_id = "r1"
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    tell(*make_callbacks(["mlflow:uri=file:x,name=mine"]), tmp_path)
    mlflow.MlflowClient.assert_called_with(tracking_uri="file:x")
    client.create_experiment.assert_called_with("nalora_jax")
    assert client.create_run.call_args.kwargs == {"run_name": "mine"}
    batches = [call.kwargs for call in client.log_batch.call_args_list]
    assert ("steps", "9") in batches[0]["params"]
    metrics = [
        (tag, value, step) for one in batches for tag, value, _, step in one.get("metrics", ())
    ]
    assert ("train/loss", 1.5, 7) in metrics
    client.set_terminated.assert_called_with("r1", "FINISHED")
    tell(*make_callbacks(["mlflow"]), tmp_path, step=3, message="stopped")
    client.update_run.assert_called_with("r1", status="RUNNING")
    client.set_terminated.assert_called_with("r1", "FAILED")


def test_weights_and_biases_gets_a_table_of_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sample = {"completion": " 7", "rewards": {"number": 1.0}, "advantage": 0.5}
    group = {"step": 7, "prompt": "3 + 4 =", "samples": [sample, sample]}
    with Callbacks(make_callbacks(["wandb"])) as told:
        told.start(Started(tmp_path, {}))
        told.tell("on_samples", 7, [group])
    table = wandb.Table.return_value
    assert table.add_data.call_args_list == [mock.call("3 + 4 =", " 7", '{"number": 1.0}', 0.5)] * 2
    wandb.init.return_value.log.assert_called_with({"step": 7, "samples": table})


def test_mlflow_gets_a_table_of_samples_with_all_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = mock.MagicMock()
    client = mlflow.MlflowClient.return_value
    client.create_run.return_value.info.run_id = "r1"
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    turns = [
        {"author": "model", "text": "calc(3 + 4)<end>"},
        {"author": "environment", "text": "7"},
        {"author": "model", "text": "7"},
    ]
    sample = {"completion": "x", "rewards": {"sums": 1.0}, "advantage": 0.5, "turns": turns}
    group = {"step": 7, "prompt": "3 + 4 =", "samples": [sample]}
    with Callbacks(make_callbacks(["mlflow"])) as told:
        told.start(Started(tmp_path, {}))
        told.tell("on_samples", 7, [group])
    conversation = "model: calc(3 + 4)<end>\nenvironment: 7\nmodel: 7"
    table = {
        "columns": ["prompt", "completion", "rewards", "advantage"],
        "data": [["3 + 4 =", conversation, '{"sums": 1.0}', 0.5]],
    }
    client.log_dict.assert_called_once_with("r1", table, "samples/7.json")
