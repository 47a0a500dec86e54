from __future__ import annotations

import pytest

from tsforge.tracking.redact import redact, redact_tree


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://ann:s3cr3t@db:5432/x", "postgresql+psycopg://ann:***@db:5432/x"),
        ("https://ann:p@ss@host/path", "https://ann:***@host/path"),
        ("http://:only@host", "http://:***@host"),
        ("open https://host/?user=a&password=hunter2&x=1", "open https://host/?user=a&password=***&x=1"),
        ("https://host/?api_key=abcdef;x=1", "https://host/?api_key=***;x=1"),
        ("nothing to hide at 12:30, mail a@b.c", "nothing to hide at 12:30, mail a@b.c"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    ],
)
def test_addresses_and_settings_lose_their_passwords(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_secrets_of_the_environment_are_hidden_wherever_they_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse")
    monkeypatch.setenv("PIN_TOKEN", "abc")  # too short to be searched for in free text
    assert redact("login failed for 'correct-horse' (abc)") == "login failed for '***' (abc)"


def test_the_working_folder_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PWD": "/work/place", "OLDPWD": "/work/before", "DB_PWD": "correct-horse"}.items():
        monkeypatch.setenv(name, value)
    assert (
        redact("/work/place/runs.db, /work/before/a.csv: correct-horse")
        == "/work/place/runs.db, /work/before/a.csv: ***"
    )


def test_fields_with_telling_names_lose_their_value_and_others_keep_theirs() -> None:
    tree = {
        "db": {"password": "x", "user": "ann", "url": "mysql://a:b@c/d"},
        "token": None,
        "keys": ["postgresql://a:b@c/d", 3],
        "aws_secret_access_key": {"nested": 1},
        "num_tokens": 7,
        "tokenizer": "t",
    }
    assert redact_tree(tree) == {
        "db": {"password": "***", "user": "ann", "url": "mysql://a:***@c/d"},
        "token": None,
        "keys": ["postgresql://a:***@c/d", 3],
        "aws_secret_access_key": {"nested": 1},
        "num_tokens": 7,
        "tokenizer": "t",
    }
