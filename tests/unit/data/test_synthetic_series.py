"""The generator: repeatable, exact labels, every kind visible, and the structure it promises."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from pydantic import ValidationError

from tsforge.data.synthetic import ANOMALY_KINDS, Generated, SyntheticConfig, generate, generate_with_twin

STEP = timedelta(hours=1)


@pytest.fixture(scope="module")
def made() -> Generated:
    return generate_with_twin(SyntheticConfig(num_series=5, num_rows=6000, num_variates=4, num_anomalies=18, seed=3))


def cells(made: Generated) -> pl.DataFrame:
    """Return series_id, time, variate, value with and without anomalies, one row a cell."""
    names = made.frame.schema.targets
    long = [
        frame.table.unpivot(on=list(names), index=["series_id", "time"], variable_name="variate", value_name=value)
        for frame, value in ((made.frame, "given"), (made.clean, "clean"))
    ]
    return long[0].join(long[1], on=["series_id", "time", "variate"], how="full", coalesce=True)


def of_label(made: Generated, label: dict[str, Any], variate: str) -> tuple[np.ndarray, np.ndarray]:
    inside = (pl.col("series_id") == label["series_id"]) & pl.col("time").is_between(label["start"], label["end"])
    given, clean = (frame.table.filter(inside)[variate].to_numpy() for frame in (made.frame, made.clean))
    return given, clean


def test_labels_cover_exactly_the_changed_cells(made: Generated) -> None:
    changed = cells(made).filter(~pl.col("given").eq_missing(pl.col("clean"))).select("series_id", "time", "variate")
    labelled = (
        made.labels.with_columns(time=pl.datetime_ranges("start", "end", "1h")).explode("time").explode("variates")
    ).select("series_id", "time", pl.col("variates").alias("variate"))
    assert changed.height > 1000
    assert labelled.is_duplicated().sum() == 0
    assert changed.sort(pl.all()).equals(labelled.with_columns(pl.col("variate").cast(pl.String)).sort(pl.all()))


def test_every_kind_occurs_in_every_series_after_the_clean_span(made: Generated) -> None:
    counts = made.labels.group_by("series_id", "kind").len()
    assert counts.height == 5 * len(ANOMALY_KINDS)
    assert set(counts["len"]) == {3}
    assert made.labels["start"].min() >= made.frame.table["time"][0] + 3600 * STEP  # type: ignore[operator]
    assert made.labels["start"].is_sorted() is False  # by series first
    for _, part in made.labels.group_by("series_id"):
        assert (part["start"][1:] - part["end"][:-1] > STEP).all()


@pytest.mark.parametrize("kind", ANOMALY_KINDS)
def test_every_kind_is_visible(made: Generated, kind: str) -> None:
    """Each event against its anomaly-free twin, measured in the twin's own short-term noise."""
    for label in made.labels.filter(kind=kind).iter_rows(named=True):
        for variate in label["variates"]:
            given, clean = of_label(made, label, variate)
            whole = made.clean.table.filter(series_id=label["series_id"])[variate].drop_nulls().to_numpy()
            noise = float(np.std(np.diff(whole)))
            change = given - clean
            if kind == "missing_burst":
                assert np.isnan(given).all()
                assert not np.isnan(clean).any()
            elif kind == "spike":
                assert len(change) <= 3
                assert np.abs(change).min() > 2 * noise
            elif kind == "level_shift":
                assert np.ptp(change) < 1e-9 * np.abs(whole).max()
                assert np.abs(change).min() > 1.5 * noise
            elif kind == "drift":
                assert np.all(np.diff(np.abs(change)) > 0)
                assert np.abs(change[-1]) > 2 * noise
            elif kind == "frozen_sensor":
                assert len(set(given)) == 1
                assert np.std(clean) > 0.5 * noise
            else:
                assert np.abs(change).mean() > 0.5 * noise


def test_a_broken_correlation_turns_the_relation_to_the_driver_around() -> None:
    config = SyntheticConfig(
        num_series=8, num_rows=5000, num_anomalies=16, anomalies=("broken_correlation",), cross=0.0, driver=2.0,
        seasonalities=(), trend=0.0, regime_change=None, seed=1,
    )  # fmt: skip
    data = generate_with_twin(config)
    products: dict[str, list[float]] = {"given": [], "clean": []}
    for label in data.labels.iter_rows(named=True):
        inside = (pl.col("series_id") == label["series_id"]) & pl.col("time").is_between(label["start"], label["end"])
        driver = data.frame.table.filter(inside)["driver"].to_numpy()
        sign = np.sign(
            np.corrcoef(
                *(
                    data.clean.table.filter(series_id=label["series_id"])
                    .drop_nulls()[[label["variates"][0], "driver"]]
                    .to_numpy()
                    .T
                )
            )[0, 1]
        )
        given, clean = of_label(data, label, label["variates"][0])
        products["given"].append(sign * float(np.corrcoef(given, driver)[0, 1]))
        products["clean"].append(sign * float(np.corrcoef(clean, driver)[0, 1]))
    assert np.mean(products["clean"]) > 0.7
    assert np.mean(products["given"]) < -0.7


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not() -> None:
    config = SyntheticConfig(num_rows=3000, num_anomalies=6)
    first, again = generate(config), generate(SyntheticConfig(num_rows=3000, num_anomalies=6))
    assert first[0].fingerprint() == again[0].fingerprint()
    assert first[1].equals(again[1])
    assert generate(config.model_copy(update={"seed": 1}))[0].fingerprint() != first[0].fingerprint()


def test_the_twin_does_not_depend_on_the_anomalies() -> None:
    few, many = (
        generate_with_twin(SyntheticConfig(num_rows=3000, num_anomalies=n, missing_share=0.0)).clean for n in (0, 6)
    )
    assert few.fingerprint() == many.fingerprint()


def test_clean_series_have_no_labels() -> None:
    frame, labels = generate(SyntheticConfig(num_rows=100, num_anomalies=0, anomalies=()))
    assert labels.height == 0
    assert labels.schema["start"] == frame.table.schema["time"]


def test_the_structure_is_there() -> None:
    config = SyntheticConfig(
        num_series=1, num_rows=20_000, num_variates=2, num_anomalies=0, missing_share=0.05, cross=1.0, driver=0.0,
        seasonalities=(24.0,), trend=0.0, regime_change=None, heteroskedasticity=0.6, seed=5,
    )  # fmt: skip
    table = generate(config)[0].table
    missing = table["x1"].is_null().mean()
    assert missing == pytest.approx(0.05, abs=0.015)
    values = table.select(pl.col("x1", "x2").interpolate().backward_fill().forward_fill()).to_numpy()
    phase = np.arange(len(values)) % 24
    season = np.stack([values[phase == k].mean(axis=0) for k in range(24)])
    rest = values - season[phase]
    assert season[:, 0].var() / values[:, 0].var() > 0.5
    # the second variate follows the first by cross_lag rows: its lagged correlation peaks there
    lags = range(-8, 9)
    correlation = [np.corrcoef(rest[20:-20, 1], rest[20 - lag : len(rest) - 20 - lag, 0])[0, 1] for lag in lags]
    assert lags[int(np.argmax(correlation))] == config.cross_lag
    assert max(correlation) > 0.8
    # noise spread varies: windows of equal length differ far more than chance allows
    spread = rest[: 200 * 100, 0].reshape(-1, 100).std(axis=1)
    assert spread.max() / spread.min() > 3


def test_the_regime_changes_for_good() -> None:
    config = SyntheticConfig(
        num_series=1,
        num_rows=8000,
        num_variates=1,
        num_anomalies=0,
        missing_share=0.0,
        driver=0.0,
        trend=0.0,
        regime_change=0.5,
    )
    values = generate(config)[0].table["x1"].to_numpy()
    plain = generate(config.model_copy(update={"regime_change": None}))[0].table["x1"].to_numpy()
    assert np.array_equal(values[:4000], plain[:4000])
    assert (values[4000:] - plain[4000:]).mean() > 0.5 * plain.std()
    assert values[4000:].std() > 1.2 * plain[4000:].std()


def test_future_rows_carry_only_the_driver() -> None:
    frame, _ = generate(SyntheticConfig(num_series=2, num_rows=2000, num_anomalies=6, future_rows=48))
    table = frame.table.filter(series_id="series_1")
    assert table.height == 2048
    assert table["driver"].null_count() == 0
    assert table["x1"][2000:].null_count() == 48
    assert frame.last_observed()["time"].max() <= table["time"][1999]


@pytest.mark.parametrize(
    ("freq", "start"), [("15m", "2024-02-28"), ("1d", "2000-01-01"), ("1mo", "1990-01-31"), ("1i", 0)]
)
def test_any_frequency(freq: str, start: str | int) -> None:
    frame, labels = generate(SyntheticConfig(num_series=1, num_rows=1500, num_anomalies=4, freq=freq, start=start))
    assert frame.schema.freq == freq
    assert labels["start"].is_in(frame.table["time"].implode()).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_rows": 400}, "12 anomalies of up to 120 rows do not fit into the last 40% of 400 rows"),
        ({"num_rows": -1}, "greater than or equal"),
        ({"seasonalities": (1.0,)}, "at least 2 rows"),
        ({"anomalies": ()}, "needs kinds"),
        ({"driver": 0.0}, "needs a driver"),
        ({"freq": "often"}, "not a frequency"),
        ({"anomalies": ("glitch",)}, "spike"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SyntheticConfig(**values)


def test_short_kinds_fit_short_series() -> None:
    _, labels = generate(SyntheticConfig(num_rows=200, anomalies=("spike",), num_anomalies=10))
    assert labels.height == 40


@pytest.mark.slow
def test_a_million_rows_take_seconds() -> None:
    start = time.perf_counter()
    assert generate(SyntheticConfig(num_series=1, num_rows=1_000_000))[0].num_rows == 1_000_000
    assert time.perf_counter() - start < 30  # 4 s on a quiet core
