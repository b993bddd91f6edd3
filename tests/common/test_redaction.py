"""Passwords, private paths and foreign names in what is written about a run."""

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nalora_jax.__main__ import guard
from nalora_jax.common.redaction import REDACTED, redact, redact_private
from nalora_jax.errors import NaloraError
from nalora_jax.train.session import Running


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "mlflow:uri=https://me:pass@host/x,name=a",
            f"mlflow:uri=https://{REDACTED}@host/x,name=a",
        ),
        ("https://me:p@ss:w@host", f"https://{REDACTED}@host"),
        (
            "own:password=secret,token=abc,name=a",
            f"own:password={REDACTED},token={REDACTED},name=a",
        ),
        ("own:API_KEY=a own:hub-token=b", f"own:API_KEY={REDACTED} own:hub-token={REDACTED}"),
        ("key AKIAABCDEFGHIJKLMNOP", f"key {REDACTED}"),
        ("s3://AKIAABCDEFGHIJKLMNOP:ab/cd+e@bucket/x", f"s3://{REDACTED}@bucket/x"),
        ("Authorization: Bearer abc.def-123", f"Authorization: Bearer {REDACTED}"),
        (
            "run --password x --hub-token 'a b' --n 5",
            f"run --password {REDACTED} --hub-token {REDACTED} --n 5",
        ),
        ("s3://b/a@b, https://host:80/x", "s3://b/a@b, https://host:80/x"),
        ("--max-new-tokens=5, --token --n 5", "--max-new-tokens=5, --token --n 5"),
    ],
)
def test_passwords_and_tokens_are_replaced(text, expected):
    assert redact({"callbacks": (text,), "n": 3}) == {"callbacks": (expected,), "n": 3}


def test_errors_on_the_terminal_and_in_the_log_of_a_run_have_no_secrets(capsys):
    error = NaloraError(
        "s3://KEY:SECRET@b/x?token=abc&n=1", expected="a folder", found="Bearer abcdefghi"
    )
    said = f"s3://{REDACTED}@b/x?token={REDACTED}&n=1: expected a folder, found Bearer {REDACTED}"
    ended = []
    session = Running.__new__(Running)
    session.callbacks = cast(
        Any, SimpleNamespace(tell=lambda event, ended_run: ended.append(ended_run))
    )

    def failing():
        logging.getLogger("nalora_jax").warning("%s", error)
        with session.reporting_errors():
            raise error

    assert guard(failing) == 2
    session.fail(error)
    assert capsys.readouterr().err == f"{said}\nerror: {said}\n"
    assert [end.message for end in ended] == [said, said]


def test_a_setting_with_the_name_of_a_secret_is_replaced():
    settings = {"password": "x", "hub_token": "y", "user": "z", "add_tokens": ["<a>"]}
    assert redact({"auth": settings}) == {
        "auth": settings | {"password": REDACTED, "hub_token": REDACTED}
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "nalora train --data.train-split /home/me/a/x.jsonl",
            "nalora train --data.train-split x.jsonl",
        ),
        ("nalora train --output '/home/me/a b/x'", "nalora train --output 'x'"),
        ("--config=~/secret/x.yaml ../up/y ./here/z", "--config=x.yaml y z"),
        ("mlflow:uri=file:///home/me/runs", "mlflow:uri=runs"),
        ("owner/model 1/2 and/or https://host/a/b", "owner/model 1/2 and/or https://host/a/b"),
    ],
)
def test_private_folders_are_not_published(text, expected):
    assert redact_private(text) == expected
