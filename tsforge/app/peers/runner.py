"""Forecast benchmark windows with another library. Run by the benchmark in that library's own environment.

A plain script: needs numpy and the library asked for, nothing of tsforge.

    python runner.py versions            what is installed here, as one JSON line
    python runner.py run FOLDER          read FOLDER/spec.json, write FOLDER/forecast.npy and FOLDER/done.json

FOLDER holds ``train.npy`` float32 [R, V], the training and then the validation rows in standardised units (NaN where
not observed), and ``context.npy`` float32 [N, L, V], the look-back of every test window; no value of a window's own
horizon is in its context. ``forecast.npy`` is float32 [N, H, V]. Every window is forecast from its own context alone.
Missing values are filled with the last observed one (0, the training mean, before the first).

The end of standard input ends the program, so that no run outlives the benchmark that asked for it. Exit status: 0
done, 3 refused with a message on the last line of standard error.
"""

import difflib
import importlib
import inspect
import json
import os
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("neuralforecast", "statsforecast", "darts", "torch", "scikit-learn", "numpy")
IMPORTED = {"neuralforecast": "neuralforecast", "statsforecast": "statsforecast", "darts": "darts"}
SERIES_AT_ONCE = 4096


class Refused(Exception):
    """What was asked for cannot be done here; the message says why."""


def need(name: str) -> Any:
    """Return a module of this environment, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise Refused(
            f"{package} is not installed in {sys.executable} ({error}); install it there: pip install {package}"
        ) from error


def versions() -> dict[str, str]:
    """Return the version of every package here that a forecast may depend on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Deadline:
    """The compute budget of one run."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.began = time.monotonic()

    def check(self, done: int, total: int) -> None:
        """Raise when the time is spent; ``done`` of ``total`` windows tell how much would be needed."""
        spent = time.monotonic() - self.began
        if self.seconds is not None and spent > self.seconds:
            needed = spent * total / max(done, 1)
            raise Refused(
                f"over its budget of {self.seconds:.0f} s after {done} of {total} series of windows (about "
                f"{needed:.0f} s needed); raise budget_seconds or leave this model to shorter data"
            )


def filled(values: Any) -> Any:
    """Return values [..., T, V] with each gap filled by the last observed value, by 0 before the first."""
    seen = ~np.isnan(values)
    if seen.all():
        return values
    steps = np.arange(values.shape[-2]).reshape(-1, 1)
    last = np.maximum.accumulate(np.where(seen, steps, -1), axis=-2)
    taken = np.take_along_axis(np.nan_to_num(values), np.maximum(last, 0), axis=-2)
    return np.where(last >= 0, taken, np.float32(0.0)).astype(np.float32)


def check_settings(build: Any, settings: dict[str, Any], name: str) -> None:
    """Refuse a setting that the model does not name, instead of passing it on to a trainer that may ignore it."""
    known = inspect.signature(build).parameters
    unknown = [key for key in settings if key not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(known), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f" among its {len(known) - 1} settings"
        raise Refused(f"{name} has no setting {', '.join(unknown)}{hint}")


def series_of_windows(context: Any) -> tuple[Any, int]:
    """Return a reader of rows [k, L] of (window, variate) pairs, window after window, and how many there are."""
    windows, _, variates = context.shape

    def read(start: int, stop: int) -> Any:
        first, last = start // variates, -(-stop // variates)
        block = filled(np.asarray(context[first:last])).transpose(0, 2, 1).reshape(-1, context.shape[1])
        return block[start - first * variates : stop - first * variates]

    return read, windows * variates


def by_series(context: Any, horizon: int, deadline: Deadline, forecast: Any, at_once: int) -> Any:
    """Return [N, H, V] from ``forecast(rows [k, L]) -> [k, H]``, in blocks."""
    windows, _, variates = context.shape
    read, total = series_of_windows(context)
    answer = np.empty((total, horizon), dtype=np.float32)
    for start in range(0, total, at_once):
        stop = min(start + at_once, total)
        answer[start:stop] = forecast(read(start, stop))
        deadline.check(stop, total)
    return answer.reshape(windows, variates, horizon).transpose(0, 2, 1)


# ---- the libraries: fit(spec, train, deadline) -> (forecast of rows [k, L], rows at once)


def plain(spec: dict[str, Any], train: Any, deadline: Deadline) -> tuple[Any, int]:
    """Forecasts that need no library: to check the way there and back."""
    horizon, settings = spec["horizon"], dict(spec["settings"])
    season = settings.pop("season_length", spec["season"]) if spec["model"] == "seasonal_naive" else 1
    if spec["model"] not in ("last_value", "seasonal_naive") or settings:
        raise Refused(f"plain has last_value and seasonal_naive (season_length), not {spec['model']} {settings}")
    if season > spec["context_length"]:
        raise Refused(f"season_length {season} does not fit into context_length {spec['context_length']}")
    step = np.arange(horizon) % season
    return lambda rows: rows[:, -season:][:, step], SERIES_AT_ONCE


def neuralforecast(spec: dict[str, Any], train: Any, deadline: Deadline) -> tuple[Any, int]:
    """Models of neuralforecast: one global model of all variates as series; validation rows stop early if asked."""
    models, data = need("neuralforecast.models"), need("neuralforecast.tsdataset")
    losses = need("neuralforecast.losses.pytorch")
    build = getattr(models, spec["model"], None)
    if build is None:
        raise Refused(f"neuralforecast has no model {spec['model']}")
    settings = {"max_steps": 1000, **spec["settings"]}
    if "loss" in settings and isinstance(settings["loss"], str):
        settings["loss"] = getattr(losses, settings["loss"])()
    settings.setdefault("loss", losses.MSE())  # the table grades squared errors
    check_settings(build.__init__, settings, spec["model"])
    parameters = inspect.signature(build.__init__).parameters
    if "n_series" in parameters:
        raise Refused(f"{spec['model']} couples the variates of a window; this runner serves univariate models only")
    model = build(
        h=spec["horizon"],
        input_size=spec["context_length"],
        random_seed=spec["seed"] + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **settings,
    )

    def dataset(rows: Any, seen: Any) -> Any:
        count, length = rows.shape
        table = np.stack([rows.ravel(), seen.ravel()], axis=1).astype(np.float32)
        return data.TimeSeriesDataset(
            temporal=table,
            temporal_cols=["y", "available_mask"],
            indptr=np.arange(0, count * length + 1, length),
            y_idx=0,
        )

    observed = ~np.isnan(train)
    valid = spec["valid_rows"] if settings.get("early_stop_patience_steps", -1) > 0 else 0
    rows = train if valid else train[: spec["train_rows"]]
    seen = observed if valid else observed[: spec["train_rows"]]
    model.fit(dataset(filled(rows).T, seen.T), val_size=valid)
    deadline.check(0, 1)

    def forecast(rows: Any) -> Any:
        answer = model.predict(dataset(rows, np.ones_like(rows)))
        return np.asarray(answer).reshape(len(rows), spec["horizon"], -1)[..., 0]

    return forecast, SERIES_AT_ONCE


def statsforecast(spec: dict[str, Any], train: Any, deadline: Deadline) -> tuple[Any, int]:
    """Models of statsforecast: one fit for every window and variate, on the look-back alone."""
    models = need("statsforecast.models")
    build = getattr(models, spec["model"], None)
    if build is None:
        raise Refused(f"statsforecast has no model {spec['model']}")
    settings = dict(spec["settings"])
    parameters = inspect.signature(build.__init__).parameters
    if "season_length" in parameters:
        settings.setdefault("season_length", spec["season"])
    check_settings(build.__init__, settings, spec["model"])
    horizon = spec["horizon"]

    def forecast(rows: Any) -> Any:
        answer = np.empty((len(rows), horizon), dtype=np.float32)
        for place, row in enumerate(rows.astype(np.float64)):
            answer[place] = build(**settings).forecast(y=row, h=horizon)["mean"]
        return answer

    return forecast, 64


def darts(spec: dict[str, Any], train: Any, deadline: Deadline) -> tuple[Any, int]:
    """Models of Darts: one global model of all variates as series."""
    series, models = need("darts"), need("darts.models")
    build = getattr(models, spec["model"], None)
    if not inspect.isclass(build):  # Darts gives a placeholder for what it cannot import
        raise Refused(f"darts has no model {spec['model']} here; some need another package installed beside it")
    settings = dict(spec["settings"])
    length, horizon = spec["context_length"], spec["horizon"]
    names = inspect.signature(build.__init__).parameters
    if "lags" in names:
        settings = {"lags": length, "output_chunk_length": horizon, **settings}
    else:
        silent = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        settings = {
            "input_chunk_length": length,
            "output_chunk_length": horizon,
            "random_state": spec["seed"],
            "pl_trainer_kwargs": {**silent, "max_steps": settings.pop("max_steps", 1000)},
            "n_epochs": 1_000_000,  # the steps end it
            "save_checkpoints": False,
            **settings,
        }
    model: Any = build(**settings)
    rows = filled(train[: spec["train_rows"]])
    targets = [series.TimeSeries.from_values(np.ascontiguousarray(column)) for column in rows.T]
    model.fit(targets)
    deadline.check(0, 1)

    def forecast(rows: Any) -> Any:
        contexts = [series.TimeSeries.from_values(row) for row in rows]
        answer = model.predict(n=horizon, series=contexts, verbose=False)
        return np.stack([item.values()[:, 0] for item in answer])

    return forecast, SERIES_AT_ONCE


LIBRARIES = {"plain": plain, "neuralforecast": neuralforecast, "statsforecast": statsforecast, "darts": darts}


def run(folder: Path) -> None:
    """Fit on the training rows and write the forecast of every window."""
    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    if spec["library"] not in LIBRARIES:
        raise Refused(f"no peer library {spec['library']}; there are {', '.join(LIBRARIES)}")
    np.random.seed(spec["seed"])
    train = np.load(folder / "train.npy")
    context = np.load(folder / "context.npy", mmap_mode="r")
    deadline = Deadline(spec["budget_seconds"])
    began = time.perf_counter()
    forecast, at_once = LIBRARIES[spec["library"]](spec, train, deadline)
    fitted = time.perf_counter()
    answer = by_series(context, spec["horizon"], deadline, forecast, at_once)
    finished = time.perf_counter()
    np.save(folder / "forecast.npy", answer.astype(np.float32))
    facts = {"fit_seconds": fitted - began, "eval_seconds": finished - fitted, "versions": versions()}
    (folder / "done.json").write_text(json.dumps(facts), encoding="utf-8")


def end_with_the_caller() -> None:
    """Leave at once when standard input closes: whoever asked is gone."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(4)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """Do what the arguments say and return the exit status."""
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(versions()))
        return 0
    if len(sys.argv) != 3 or sys.argv[1] != "run":
        print("usage: runner.py versions | runner.py run FOLDER", file=sys.stderr)
        return 2
    end_with_the_caller()
    try:
        run(Path(sys.argv[2]))
    except Refused as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
