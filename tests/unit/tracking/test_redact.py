from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tsforge.core.config import Config
from tsforge.tracking import redact as module
from tsforge.tracking.redact import redact, redact_tree


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://ann:s3cr3t@db:5432/x", "postgresql+psycopg://ann:***@db:5432/x"),
        ("https://ann:p@ss@host/path", "https://ann:***@host/path"),
        ("http://:only@host", "http://:***@host"),
        ("https://ghp_0123456789abcdef@host/x", "https://***@host/x"),
        ("https://ann.of.accounts@host/x", "https://ann.of.accounts@host/x"),
        ("postgresql://a_long_user_of_forecasts@db/x", "postgresql://a_long_user_of_forecasts@db/x"),
        ("to https://hooks.slack.com/services/T0/B0/abc failed", "to https://hooks.slack.com/services/*** failed"),
        ("'https://discord.com/api/v10/webhooks/12/ab-c'", "'https://discord.com/api/v10/webhooks/***'"),
        ("https://firm.webhook.office.com/webhookb2/ab@c/x", "https://firm.webhook.office.com/***"),
        ("https://docs.slack.com/services/T0", "https://docs.slack.com/services/T0"),
        ("open https://host/?user=a&password=hunter2&x=1", "open https://host/?user=a&password=***&x=1"),
        ("https://host/?api_key=abcdef;x=1", "https://host/?api_key=***;x=1"),
        ("password=hunter22 host=x", "password=*** host=x"),
        ("(password=hunter22)", "(password=***"),  # ')' may belong to the password
        ("'password=hunter22'", "'password=***'"),
        ("host=x password='two words' port=1", "host=x password=*** port=1"),
        (r"host=x password='it\'s two' port=1", "host=x password=*** port=1"),
        ("host=x password='cut off", "host=x password=*** off"),
        ("password = hunter22", "password = ***"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3D{x}%3BUID%3Du%3BPWD%3Dhunter22", "mssql+pyodbc:///?odbc_connect=***"),
        ("?odbc_connect=DRIVER=x;UID=u;PWD=hunter22;&a=1", "?odbc_connect=***&a=1"),
        ("DRIVER={x};UID=u;PWD={hunter;22};", "DRIVER={x};UID=u;PWD=***;"),
        ("x%3BUID%3Du%3BPWD%3Dhunter22%3Bport%3D1", "x%3BUID%3Du%3BPWD%3D***%3Bport%3D1"),
        ("https://b?X-Amz-Credential=abc&X-Amz-Signature=dead", "https://b?X-Amz-Credential=abc&X-Amz-Signature=***"),
        ("https://b/k?X-Amz-Security-Token=sekrit&x=1", "https://b/k?X-Amz-Security-Token=***&x=1"),
        ("https://b/c?sig=sekrit", "https://b/c?sig=***"),
        ("https://b/c?sv=1&sig=sekrit", "https://b/c?sv=1&sig=***"),
        ("http://h/?apikey=abc&api-key=def", "http://h/?apikey=***&api-key=***"),
        ("Endpoint=x;SharedAccessKey=abc==;AccountKey=d=", "Endpoint=x;SharedAccessKey=***;AccountKey=***"),
        ("Authorization: Bearer abcdef", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic YTpi=', 'x': 1}", "{'authorization': 'Basic ***', 'x': 1}"),
        ("Authorization: AWS4-HMAC-SHA256 Credential=AK/x, Signature=abc", "Authorization: AWS4-HMAC-SHA256 ***"),
        ("Authorization: abcdefghijklmnop", "Authorization: ***"),
        ("authorization: pick a role", "authorization: pick a role"),
        ("https://x/?pass=abc&b=1", "https://x/?pass=***&b=1"),
        ('{"token": "abc", "max_token": "5"}', '{"token": ***, "max_token": "5"}'),
        ("num_tokens=7 bypass=1 design=x signature=y", "num_tokens=7 bypass=1 design=x signature=y"),
        ("if token == expected", "if token == expected"),
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
        "db_pass": "x",
        "api_keys": ["a", "b"],
        "passwords": {"db": "x", "other": "y"},
        "headers": {"Authorization": "Bearer x", "Accept": "json"},
        "bypass": "b",
        "passes": 3,
    }
    assert redact_tree(tree) == {
        "db": {"password": "***", "user": "ann", "url": "mysql://a:***@c/d"},
        "token": None,
        "keys": ["postgresql://a:***@c/d", 3],
        "aws_secret_access_key": {"nested": 1},
        "num_tokens": 7,
        "tokenizer": "t",
        "db_pass": "***",
        "api_keys": "***",
        "passwords": {"db": "***", "other": "***"},
        "headers": {"Authorization": "***", "Accept": "json"},
        "bypass": "b",
        "passes": 3,
    }


def test_numbers_are_secrets_too_and_switches_are_not() -> None:
    assert redact_tree({"password": 1, "secrets": {"a": 0, "b": 1.0, "c": True}}) == {
        "password": "***",
        "secrets": {"a": "***", "b": "***", "c": True},
    }


CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_configs_at_hand_hold_nothing_that_is_hidden(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_environment_secrets", lambda: iter(()))
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    text = yaml.safe_dump(plain, sort_keys=False)
    assert redact_tree(plain) == plain
    assert redact(text) == text


def test_no_setting_is_called_like_a_secret() -> None:
    import tsforge.app.batch
    import tsforge.app.detect
    import tsforge.app.fit
    import tsforge.app.tune
    import tsforge.app.watch.settings  # noqa: F401

    def below(kind: type[Config]) -> list[type[Config]]:
        return [kind, *(one for part in kind.__subclasses__() for one in below(part))]

    names = {name for kind in below(Config) for name in kind.model_fields if kind.__module__.startswith("tsforge.")}
    assert len(names) > 200
    assert {name for name in names if redact_tree({name: "x"}) != {name: "x"}} == set()
