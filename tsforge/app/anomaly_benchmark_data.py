"""Labelled families for the anomaly benchmark: files, what is known about them, series ready to fit and to grade.

Rows are numbered: time stamps give the rows a day and nothing else, since several sources repeat or skip them. The test
rows follow the training rows; where these are separate recordings the first forecasts of the test see the end of the
training rows, which is stated.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray
from pydantic import Field

from tsforge.core.config import Config, fingerprint, validate
from tsforge.core.errors import ConfigError, DataError, listing, nearest
from tsforge.data.frame import SeriesFrame
from tsforge.data.schema import SeriesSchema
from tsforge.data.synthetic import SyntheticConfig, generate

FloatArray = NDArray[np.float64]
SYNTHETIC = "synthetic"
NOT_MEASURED = ("ds", "step", "label")
IMPOSSIBLE = 1e30  # values beyond are sentinels of the source
_TEST, _TRAIN = "_test.parquet", "_train.parquet"
_SECONDS_PER_DAY = 86_400.0


class Family(Config):
    """What is known about a family beforehand."""

    title: str = ""
    rows_per_day: float | Literal["clock"] | None = "clock"
    """``clock``: from the median step of ``ds``; null: unknown."""
    scaled: bool = False
    """Values are used as published."""
    list_end: Literal["inclusive", "exclusive"] = "inclusive"
    """Of segments in ``interpretation.parquet``."""
    drop: tuple[str, ...] = ()
    """Columns that are no measurement."""
    sensor: str | None = None
    """The only measured column, where the others are commands."""
    train: str | None = None
    """Training rows of series without a training file of their own."""
    season: int | None = Field(None, ge=2)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LabelledSeries:
    """One series, ready.

    Attributes:
        family, name: where it comes from. columns: variates.
        train [N, V], test [M, V]: NaN where missing, or where a training row is labelled anomalous.
        labels: [M]. rows_per_day: None where unknown. season: rows, None where unknown.
        experts: per listed event (first, last + 1, variates). clean: training rows that are not left out.
    """

    family: str
    name: str
    columns: tuple[str, ...]
    train: FloatArray
    test: FloatArray
    labels: NDArray[np.bool_]
    rows_per_day: float | None
    season: int | None = None
    experts: tuple[tuple[int, int, tuple[str, ...]], ...] = ()
    fingerprint: str = field(default="", compare=False)

    def frame(self, *, test: bool) -> SeriesFrame:
        """Return the training rows, and the test rows after them if asked, as a frame of numbered rows."""
        values = np.vstack([self.train, self.test]) if test else self.train
        table = pl.DataFrame({name: values[:, place] for place, name in enumerate(self.columns)}).fill_nan(None)
        table = table.with_columns(series_id=pl.lit(self.name), time=pl.int_range(len(values), dtype=pl.Int64))
        return SeriesFrame(table, SeriesSchema(targets=self.columns, freq="1i"))


@dataclass(frozen=True, kw_only=True)
class LabelledFamily:
    """Series of a family by name, what a reader has to know, and series that cannot be used with the reasons."""

    name: str
    about: Family
    series: tuple[LabelledSeries, ...]
    notes: tuple[str, ...]
    unusable: tuple[tuple[str, str], ...]


@cache
def known_families() -> dict[str, Family]:
    """Return the families known by name."""
    plain = yaml.safe_load(Path(__file__).with_name("anomaly_families.yaml").read_text(encoding="utf-8"))
    return {name: validate(Family, values, where=name) for name, values in plain.items()}


def read_family(
    name: str,
    folder: str | None = None,
    *,
    sensor_only: bool = False,
    only: tuple[str, ...] | None = None,
    limit: int | None = None,
) -> LabelledFamily:
    """Return a family: ``synthetic``, a known one below the data folder, or a folder of ``*_test.parquet`` files.

    Args:
        name: of a known family, or a path. folder: where known families lie (or in its ``anomaly/``); default
            ``TSFORGE_DATA``.
        sensor_only: leave out the commands of families that have one sensor.
        only: names of series. limit: the first so many series.

    Raises:
        ConfigError: neither a family nor a folder, or no data folder is given.
        DataError: the folder holds no series, a series is not there, or a file cannot be used.
    """
    if name == SYNTHETIC:
        return _synthetic()
    place, about = _locate(name, folder)
    files = sorted(place.glob(f"*{_TEST}"))
    if not files:
        raise DataError(f"{place} holds no *{_TEST} file; a family has SERIES{_TRAIN} and SERIES{_TEST} with a label")
    names = [path.name.removesuffix(_TEST) for path in files]
    missing = [item for item in only or () if item not in names]
    if missing:
        raise DataError(f"{place.name} has no series {listing(missing)}{nearest(missing[0], names)}")
    chosen = [path for path, item in zip(files, names, strict=True) if only is None or item in only][:limit]
    lists = _expert_lists(place, about)
    found, unusable = [], []
    for path in chosen:
        series = path.name.removesuffix(_TEST)
        train = path.with_name(series + _TRAIN)
        if about.train is not None and not train.is_file():
            train = path.with_name(about.train + _TRAIN)
        if not train.is_file():
            unusable.append((series, "no training rows"))
            continue
        found.append(_series(place.name, series, train, path, about, lists.get(series, ()), sensor_only=sensor_only))
    notes = list(about.notes)
    if sensor_only and about.sensor is not None:
        notes.append(f"only {about.sensor} is scored; the commands are left out")
    contaminated = sum(int(np.isnan(item.train).all(axis=1).sum()) for item in found)
    if contaminated:
        notes.append(f"{contaminated} training rows are labelled anomalous or empty and take no part")
    return LabelledFamily(
        name=place.name, about=about, series=tuple(found), notes=tuple(notes), unusable=tuple(unusable)
    )


def _locate(name: str, folder: str | None) -> tuple[Path, Family]:
    families = known_families()
    if name not in families:
        own = Path(name).expanduser()
        if own.is_dir():
            return own, families.get(own.name, Family())
        names = [*families, SYNTHETIC]
        raise ConfigError(f"no family '{name}'{nearest(name, names)}: give one of {', '.join(names)}, or a folder")
    given = folder or os.environ.get("TSFORGE_DATA")
    if not given:
        raise ConfigError(f"'{name}' is a known family; say where it lies: data_folder=PATH or TSFORGE_DATA")
    places = [Path(given).expanduser() / part / name for part in ("", "anomaly")]
    place = next((item for item in places if item.is_dir()), None)
    if place is None:
        raise DataError(f"family '{name}': no folder {places[0]} and none {places[1]}")
    return place, families[name]


def _series(
    family: str,
    name: str,
    train_file: Path,
    test_file: Path,
    about: Family,
    experts: tuple[tuple[int, int, tuple[str, ...]], ...],
    *,
    sensor_only: bool,
) -> LabelledSeries:
    train, test = pl.read_parquet(train_file), pl.read_parquet(test_file)
    if "label" not in test.columns:
        raise DataError(f"{test_file} has no column 'label' with 0 and 1")
    columns = tuple(
        column
        for column, kind in train.schema.items()
        if kind.is_numeric() and column not in (*NOT_MEASURED, *about.drop) and column in test.columns
    )
    if sensor_only and about.sensor is not None:
        columns = (about.sensor,)
    if not columns:
        raise DataError(f"{train_file} and {test_file} share no numeric column")
    rows, judged = (_values(table, columns) for table in (train, test))
    if "label" in train.columns:
        rows[train["label"].fill_null(1).to_numpy() > 0] = np.nan
    seen = np.asarray(~np.isnan(rows).all(axis=0))
    columns = tuple(column for column, kept in zip(columns, seen.tolist(), strict=True) if kept)
    if not columns:
        raise DataError(f"{train_file} has no observed value")
    rows, judged = rows[:, seen], judged[:, seen]
    if not about.scaled:
        low, high = np.nanmin(rows, axis=0), np.nanmax(rows, axis=0)
        reach = np.where(high > low, high - low, np.maximum(np.abs(high), 1e-12))
        rows, judged = (rows - low) / reach, (judged - low) / reach
    labels = test["label"].fill_null(1).to_numpy() > 0
    per_day = _rows_per_day(test) if about.rows_per_day == "clock" else about.rows_per_day
    season = about.season
    if season is None and per_day is not None and len(rows) >= 3 * per_day >= 72:
        season = round(per_day)
    mark = fingerprint({"columns": columns, "rows": _digest(rows), "test": _digest(judged), "labels": _digest(labels)})
    return LabelledSeries(
        family=family,
        name=name,
        columns=columns,
        train=rows,
        test=judged,
        labels=labels,
        rows_per_day=per_day,
        season=season,
        experts=tuple(item for item in experts if item[1] <= len(labels)),
        fingerprint=mark,
    )


def _values(table: pl.DataFrame, columns: tuple[str, ...]) -> FloatArray:
    x = table.select(pl.col(columns).cast(pl.Float64)).to_numpy().astype(np.float64)
    return np.where(np.isfinite(x) & (np.abs(x) < IMPOSSIBLE), x, np.nan)


def _digest(values: NDArray[Any]) -> str:
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def _rows_per_day(table: pl.DataFrame) -> float | None:
    if "ds" not in table.columns or not isinstance(table.schema["ds"], pl.Datetime):
        return None
    step = table["ds"].diff().dt.total_microseconds().drop_nulls().median()
    if not isinstance(step, int | float) or step <= 0:
        return None
    return _SECONDS_PER_DAY * 1e6 / float(step)


def _expert_lists(place: Path, about: Family) -> dict[str, tuple[tuple[int, int, tuple[str, ...]], ...]]:
    """Return, by series, the listed events as rows [first, last) with the names of their variates."""
    path = place / "interpretation.parquet"
    if not path.is_file():
        return {}
    extra = 1 if about.list_end == "inclusive" else 0
    found: dict[str, list[tuple[int, int, tuple[str, ...]]]] = {}
    for row in pl.read_parquet(path).iter_rows(named=True):
        dims = row["dims"]
        numbers = [int(part) for part in dims.split(",")] if isinstance(dims, str) else [int(part) for part in dims]
        names = tuple(f"v{number:02d}" for number in numbers)
        found.setdefault(str(row["series"]), []).append((int(row["start"]), int(row["end"]) + extra, names))
    return {name: tuple(items) for name, items in found.items()}


def _synthetic() -> LabelledFamily:
    """Return two small generated series: for tests and a first look, no evidence of anything."""
    config = SyntheticConfig(
        num_series=2,
        num_rows=1600,
        num_variates=4,
        missing_share=0.0,
        regime_change=None,
        anomalies=("spike", "level_shift", "drift", "frozen_sensor", "broken_correlation"),
        num_anomalies=5,
    )
    frame, labels = generate(config)
    columns, cut = frame.schema.targets, 900
    found = []
    for name in frame.series_ids:
        table = frame.table.filter(pl.col("series_id") == name)
        values, times = table.select(columns).to_numpy().astype(np.float64), table["time"]
        flags = np.zeros(len(values), dtype=bool)
        experts = []
        for row in labels.filter(pl.col("series_id") == name).iter_rows(named=True):
            first, last = int((times < row["start"]).sum()), int((times <= row["end"]).sum())
            flags[first:last] = True
            experts.append((first - cut, last - cut, tuple(row["variates"])))
        found.append(
            LabelledSeries(
                family=SYNTHETIC,
                name=name,
                columns=columns,
                train=values[:cut],
                test=values[cut:],
                labels=flags[cut:],
                rows_per_day=24.0,
                season=24,
                experts=tuple(item for item in experts if item[0] >= 0 and item[2]),
                fingerprint=fingerprint({"synthetic": name, "rows": _digest(values)}),
            )
        )
    notes = ("generated by tsforge itself: for tests and a first look, no evidence",)
    return LabelledFamily(name=SYNTHETIC, about=Family(), series=tuple(found), notes=notes, unusable=())
