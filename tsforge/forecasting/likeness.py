"""Which series a new one is like, by static features alone: nearest neighbours among those a model was fitted on.

The distance is Euclidean over features. Numbers are divided by their standard deviation over the old series, so that
their unit does not matter; a category counts 0 where equal and 1 where not, as much as one standard deviation. A number
that is the same for all old series ranks none of them. Neither values of the new series nor its rows enter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from tsforge.core.errors import ConfigError, DataError, listing, nearest

_ROUNDING = 1e-12  # relative: numbers that differ by less are the same


def nearest_series(
    static: pl.DataFrame | None,
    donors: Sequence[str],
    features: Mapping[str, float],
    *,
    count: int,
    categories: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return the ``count`` donors nearest to the features, nearest first; ties in the order of their names.

    Args:
        static: ``series_id`` and features of the old series, as in ``SeriesFrame.static``.
        donors: old series to choose from; their features decide what a standard deviation is.
        features: of the new series, each feature of ``static``, data units.
        count: how many.
        categories: features whose numbers are codes.

    Raises:
        DataError: there are no static features, or a donor lacks them.
        ConfigError: a feature is unknown or not given, or there are fewer donors than asked for.
    """
    names = check_features(static, features, categories)
    assert static is not None  # just refused
    old = static.filter(pl.col("series_id").is_in(list(donors))).sort("series_id")
    if old.height < len(set(donors)):
        lacking = sorted(set(donors) - set(old["series_id"]))
        raise DataError(f"{len(lacking)} of {len(set(donors))} series have no static features ({listing(lacking)})")
    if old.height < count:
        raise ConfigError(
            f"cold_start.neighbours is {count}, and only {old.height} fitted series can be like a new one; lower it"
        )
    distance = np.zeros(old.height)
    for name in names:
        values = old[name].to_numpy()
        if name in categories:
            distance += values != features[name]
            continue
        if np.ptp(values) > _ROUNDING * np.abs(values).max():  # the deviation of a constant is rounding, not 0
            distance += ((values - features[name]) / values.std()) ** 2
    order = np.argsort(distance, kind="stable")[:count]  # rows are in the order of names
    return tuple(old["series_id"].gather(order).to_list())


def check_features(static: pl.DataFrame | None, features: Mapping[str, float], categories: Sequence[str]) -> list[str]:
    """Return the names of the static features after a check that the new series has them all.

    Raises:
        DataError, ConfigError: as ``nearest_series``.
    """
    names = [] if static is None else [name for name in static.columns if name != "series_id"]
    if not names:
        raise DataError(
            "likeness by static features needs some, and the data has none; declare data.static, or name a series or "
            "the mean"
        )
    for name in (*features, *categories):
        if name not in names:
            hint = nearest(name, names)
            raise ConfigError(f"cold_start: no static feature '{name}'{hint} (the data has {listing(names, 20)})")
    missing = [name for name in names if name not in features]
    if missing:
        raise ConfigError(
            f"cold_start.like: {len(missing)} of {len(names)} static features of a new series are not given "
            f"({listing(missing)})"
        )
    return names
