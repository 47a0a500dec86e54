"""Pages of a backtest report about forecasts as distributions: calibration, and the horizon as a whole."""

from __future__ import annotations

import polars as pl

from tsforge.metrics.pit import pit_distance, reliability

Section = tuple[str, str, pl.DataFrame]


def quality_sections(pit: pl.DataFrame, leaderboard: pl.DataFrame) -> list[Section]:
    """Return (title, text, table) of each section; none for what the report has no numbers of.

    Args:
        pit: table of the report, all models.
        leaderboard: with ``energy`` ... of the models that draw paths.
    """
    sections: list[Section] = []
    if pit.height:
        sections.append(
            (
                "Calibration",
                "Share of observed values at or below each published quantile, the level in the heading; last, the "
                "largest difference from a level (Kolmogorov's distance of PIT values from uniform, at the levels).",
                _calibration(pit),
            )
        )
    names = ("energy", "energy_apart", "variogram", "variogram_apart")
    if "energy" in leaderboard.columns:
        joint = leaderboard.drop_nulls("energy").select("model", *names)
        if joint.height:
            sections.append(
                (
                    "The horizon as a whole",
                    "Energy and variogram score of sample paths, smaller is better; *apart*: the same quantiles, steps "
                    "drawn independently. The difference is what knowing the dependence is worth.",
                    joint,
                )
            )
    return sections


def _calibration(pit: pl.DataFrame) -> pl.DataFrame:
    """Return one row a model: the observed share below each level, and the largest difference."""
    shares = reliability(pit, ["model"]).sort("level")
    wide = shares.with_columns(pl.col("level").map_elements(lambda level: f"{level:g}", return_dtype=pl.String))
    wide = wide.pivot(on="level", index="model", values="observed", maintain_order=True)
    order = pit["model"].unique(maintain_order=True).to_list()
    rows = wide.join(pit_distance(pit, ["model"]).select("model", "distance"), on="model")
    return rows.sort(pl.col("model").replace_strict({name: place for place, name in enumerate(order)}))
