"""``data=NAME`` of an ingested data set: its own settings hold, in every command, without a config file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from tsforge.app.stored_choices import StoredData
from tsforge.core.config import Config, compose, load
from tsforge.core.errors import ConfigError


@pytest.fixture
def tsforge(workspace_root: Path, command: Any) -> Any:
    return command


@pytest.fixture
def shops(tsforge: Any, tmp_path: Path) -> Any:
    """Six shops below two regions, with a covariate, ingested once with their hierarchy."""
    rng = np.random.default_rng(0)
    hours = pl.datetime_range(
        pl.datetime(2024, 1, 1), pl.datetime(2024, 1, 1) + pl.duration(hours=399), "1h", eager=True
    )
    parts = []
    for region, number in (("n", 3), ("s", 3)):
        for shop in range(number):
            wave = 10 + 5 * np.sin(np.arange(400) * 2 * np.pi / 24 + shop) + rng.normal(size=400)
            parts.append(
                pl.DataFrame({"when": hours, "shop": f"{region}/{shop}", "units": wave, "promo": rng.random(400) < 0.1})
            )
    table = pl.concat(parts).with_columns(pl.col("promo").cast(pl.Float64))
    table.write_csv(tmp_path / "shops.csv")
    code, _, told = tsforge(
        *("ingest", "data=csv", "data.name=shops", f"data.source.path={tmp_path / 'shops.csv'}", "data.layout=long"),
        *("data.series=shop", "data.time=when", "data.targets=[units]", "data.known=[promo]"),
        "data.hierarchy={levels: [region, shop], separator: /}",
    )
    assert code == 0, told
    return tsforge


def test_the_settings_of_the_ingestion_hold(shops: Any) -> None:
    code, shown, _ = shops("fit", "data=shops", "model=ar_net", "--dry-run")
    assert code == 0
    data = yaml.safe_load(shown)["data"]
    assert (data["name"], data["series"], data["targets"], data["known"]) == ("shops", "shop", ["units"], ["promo"])
    assert data["hierarchy"]["levels"] == ["region", "shop"]
    window = ["window.context_length=48", "window.horizon=6"]
    code, out, err = shops("fit", "data=shops", "model=ar_net", "model.lags=24", *window, "--json")
    assert code == 0, err
    assert json.loads(out)["artifact"].startswith("ar_net-")
    code, shown, _ = shops("tune", "data=shops", "model=linear", "--dry-run")
    assert code == 0
    assert yaml.safe_load(shown)["fit"]["data"]["known"] == ["promo"]
    code, _, err = shops("ingest", "data=shops")
    assert code == 0, err


def test_a_backtest_reconciles_by_the_stored_hierarchy_however_the_data_is_named(shops: Any) -> None:
    window = [
        "window.context_length=48",
        "window.horizon=6",
        "backtest.num_cutoffs=3",
        "backtest.baselines=[last_value]",
    ]
    for data in (["data=shops"], ["data=csv", "data.name=shops", "data.targets=[units]"]):
        code, out, err = shops(
            "backtest", *data, "model=linear", *window, "backtest.reconcile.method=bottom_up", "--json"
        )
        assert code == 0, err
        models = {row["model"] for row in json.loads(out)["rows"]}
        assert "linear" in models
        assert any(name.startswith("linear") and "bottom_up" in name for name in models)


def test_a_config_file_may_name_an_ingested_set(shops: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for group in ("data", "/data"):
        path.write_text(f"defaults: [{{{group}: shops}}, {{model: linear}}, {{train: default}}, _self_]\n")
        code, shown, err = shops("fit", "--config", str(path), "--dry-run")
        assert code == 0, err
        assert yaml.safe_load(shown)["data"]["known"] == ["promo"]
    path.write_text("defaults: [{data: shop}, {model: linear}, {train: default}, _self_]\n")
    code, _, err = shops("fit", "--config", str(path))
    assert code == 2
    assert "data=shop: no such choice; did you mean 'shops'" in err
    assert "ingested: shops" in err


def test_an_unknown_name_lists_what_there_is(shops: Any, tsforge: Any) -> None:
    code, _, err = shops("fit", "data=shop")
    assert code == 2
    assert "data=shop: no such choice; did you mean 'shops'" in err
    assert "ingested: shops" in err
    code, _, err = shops("fit", "data=../shops")
    assert code == 2
    assert "no such choice" in err


class Named(Config):
    """What a stored choice holds here."""

    text: str
    numbers: tuple[int, ...] = ()


class Outer(Config):
    """A config with one group."""

    data: Named


class Kept:
    """Choices that need no store."""

    def names(self, group: str) -> list[str]:
        return ["mine", "small"] if group == "data" else []

    def settings(self, group: str, name: str) -> dict[str, Any]:
        return {"text": "costs ${oc.env:HOME} and \\${x}, ä", "numbers": [1, 2]}


def test_text_of_a_store_is_no_interpolation_and_files_go_first(tmp_path: Path) -> None:
    root = tmp_path / "configs"
    (root / "data").mkdir(parents=True)
    (root / "outer.yaml").write_text("defaults:\n  - _self_\n  - data: small\n", encoding="utf-8")
    (root / "data" / "small.yaml").write_text("text: file\n", encoding="utf-8")
    found = load(Outer, "outer", ["data=mine", "data.numbers=[3]"], root, Kept())
    assert found.data == Named(text="costs ${oc.env:HOME} and \\${x}, ä", numbers=(3,))
    assert load(Outer, "outer", ["data=small"], root, Kept()).data.text == "file"
    assert compose("outer", (), root, Kept()) == {"data": {"text": "file"}}
    with pytest.raises(ConfigError, match=r"data=other: no such choice.*known: small; ingested: mine, small"):
        load(Outer, "outer", ["data=other"], root, Kept())


def test_an_empty_store_offers_nothing(workspace_root: Path) -> None:
    stored = StoredData(workspace_root)
    assert stored.names("data") == []
    assert stored.names("model") == []
