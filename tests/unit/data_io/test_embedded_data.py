"""The embedded weather data equals its origin, and its shipped configuration does what it promises."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from tsforge.core.config import compose, validate
from tsforge.core.errors import ConfigError, DataError
from tsforge.data.cleaning import read_dataset
from tsforge.data.config import DataConfig
from tsforge.data.embedded import embedded_datasets, load_embedded

ROOT = Path(__file__).resolve().parents[3]
ERROR_TIME = datetime(2013, 2, 12, 8, tzinfo=UTC)


def test_the_file_is_the_one_of_the_provenance_page() -> None:
    path = load_embedded("nyc_weather")
    page = (path.parent / "PROVENANCE.md").read_text(encoding="utf-8")
    assert hashlib.sha256(path.read_bytes()).hexdigest() in page
    assert path.stat().st_size < 300_000
    table = pl.read_parquet(path)
    assert table.shape == (8730, 28)
    assert re.search(r"8,730 x 28", page)


def test_the_values_equal_the_shared_copy(shared_data: Path) -> None:
    shared = pl.read_parquet(shared_data / "forecast" / "nyc_weather.parquet")
    assert pl.read_parquet(load_embedded("nyc_weather")).equals(shared)


def test_the_build_script_refuses_another_file(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build_nyc_weather", ROOT / "scripts" / "build_nyc_weather.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "weather.csv"
    path.write_text("origin,time_hour\n")
    with pytest.raises(DataError, match="another version"):
        script.weather_csv(path)


def test_the_build_joins_airports_on_a_complete_hourly_index() -> None:
    spec = importlib.util.spec_from_file_location("build_nyc_weather", ROOT / "scripts" / "build_nyc_weather.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    header = "origin," + ",".join(script.VARIABLES) + ",time_hour\n"
    rows = "LGA,1,2,3,4,5,NA,7,8,9,2013-01-01T08:00:00Z\nEWR,11,2,3,4,5,NA,7,8,9,2013-12-30T23:00:00Z\n"
    table = script.build((header + rows).encode())
    assert table.shape == (8730, 28)
    assert table["LGA.temp"].drop_nulls().to_list() == [1.0]
    assert table["LGA.temp"][2] == 1.0
    assert table["EWR.temp"][8729] == 11.0
    assert table["LGA.wind_gust"].null_count() == 8730


def test_unknown_names_are_refused() -> None:
    assert embedded_datasets() == ["nyc_weather"]
    with pytest.raises(ConfigError, match="did you mean 'nyc_weather'"):
        load_embedded("nyc_wether")


def test_the_shipped_config_reads_three_series_and_keeps_the_sensor_error() -> None:
    config = validate(DataConfig, compose("ingest", ["data=nyc_weather"])["data"])
    dataset = read_dataset(config)
    frame = dataset.frame
    assert frame.series_ids == ("EWR", "JFK", "LGA")
    assert frame.schema.targets == ("temp", "dewp", "humid", "wind_speed")
    assert frame.num_rows == 3 * 8730
    row = frame.table.filter((pl.col("series_id") == "EWR") & (pl.col("time") == ERROR_TIME))
    assert row["wind_speed"][0] == pytest.approx(1048.36, abs=0.01)
    masked, counts = frame.mask_outside(dict(config.valid_range))
    assert counts == {"wind_speed": 1}
    assert masked.table.filter((pl.col("series_id") == "EWR") & (pl.col("time") == ERROR_TIME))["wind_speed"][0] is None
    assert not [name for name in frame.schema.columns if "gust" in name]
