"""``--dry-run`` refuses what the command itself would refuse before it reads any data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tsforge.core.errors import ConfigError

FIT = ("fit", "data=nyc_weather")
TUNE = ("tune", "data=nyc_weather", "model=linear")
BACKTEST = ("backtest", "data=nyc_weather", "model=linear")


@pytest.fixture
def tsforge(command: Any, workspace_root: Path) -> Any:
    return command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TUNE, "study.space.model.nope.high=5"), "space.model.nope: the configuration has no such field"),
        ((*TUNE, "study.space.model.ridge.high=-5"), "space.model.ridge: low 0.01 is above high -5"),
        ((*TUNE, "study.metric=nonsense"), "study.metric=nonsense: no fit reports it"),
        ((*TUNE, "fit.warm_start.artifact=latest"), "fit.warm_start.artifact=latest has no effect"),
        ((*FIT, "model=auto", "model.candidates=[nope]"), "model.candidates: unknown model 'nope'"),
        ((*FIT, "model=auto", "model.candidates=[auto]"), "model.candidates: auto is itself a mixture"),
        ((*FIT, "model=auto", "log_graphs=1"), "log_graphs has no effect with model=auto"),
        ((*FIT, "model=auto", "warm_start.artifact=x"), "warm_start.artifact has no effect with model=auto"),
        (
            (*FIT, "model=auto", "entities.held_out=0.5", "entities.watch=unseen_valid"),
            "entities.watch=unseen_valid has",
        ),
        ((*FIT, "model=linear", "log_graphs=1"), "log_graphs=1 has no effect: model 'linear'"),
        (
            (*FIT, "model=gru", "scaling.kind=window"),
            "model 'gru' does not support scaling 'window'; use one of global",
        ),
        ((*FIT, "model=temporal", "model.widths=[1,5]"), "model.widths: bins of 5 steps do not fill window.horizon=24"),
        (
            (*FIT, "model=temporal", "model.widths=[1,24]", "window.context_length=12"),
            "bins of 24 steps do not fill window.horizon=24 or exceed window.context_length=12",
        ),
        ((*BACKTEST, "compare=[nope]"), "compare: unknown model 'nope'"),
        ((*BACKTEST, "scaling.kind=series_max", "compare=[gru]"), "does not support scaling 'series_max'"),
        ((*BACKTEST, "warm_start.artifact=x"), "warm_start.artifact=x works with tsforge fit and retrain only"),
    ],
)
def test_what_the_command_would_refuse_is_refused(tsforge: Any, arguments: tuple[str, ...], message: str) -> None:
    code, shown, err = tsforge(*arguments, "--dry-run")
    assert (code, shown) == (ConfigError.exit_code, "")
    assert message in err
    assert err.count("\n") == 1
    assert tsforge(*arguments)[::2] == (code, err)  # the data set is not stored, and nobody asked for it


@pytest.mark.parametrize(
    "arguments",
    [
        (*TUNE, "study.space.model.ridge.high=1000"),
        (*FIT, "model=auto", "model.candidates=[linear,gru]", "covariates=all"),
        (*FIT, "model=regenn", "log_graphs=1"),
        (*FIT, "model=gru", "scaling.kind=series"),
        (*FIT, "model=temporal", "model.widths=[1,6,24]"),
        (*FIT, "warm_start.artifact=latest"),
        (*BACKTEST, "compare=[gru]"),
    ],
)
def test_what_may_run_is_printed(tsforge: Any, arguments: tuple[str, ...]) -> None:
    code, shown, err = tsforge(*arguments, "--dry-run")
    assert code == 0, err
    assert "nyc_weather" in shown


def test_a_schedule_names_the_job_whose_config_is_missing(tsforge: Any, tmp_path: Path) -> None:
    place = tmp_path / "schedule.yaml"
    text = "jobs: [{name: night, cron: '0 2 * * *', run: batch, config: CONFIG, overrides: [OVERRIDE]}]"
    place.write_text(text.replace("CONFIG", "batch/nyc_wether").replace("OVERRIDE", "name=n"))
    code, shown, err = tsforge("schedule", "run", str(place), "--dry-run")
    assert (code, shown) == (ConfigError.exit_code, "")
    assert "job night: no config 'batch/nyc_wether'" in err
    place.write_text(text.replace("CONFIG", "batch/nyc_weather").replace("OVERRIDE", "data=nowhere"))
    code, _, err = tsforge("schedule", "run", str(place), "--dry-run")
    assert code == ConfigError.exit_code
    assert "job night:" in err
    assert "nowhere" in err
    place.write_text(text.replace("CONFIG", "batch/nyc_weather").replace("OVERRIDE", "name=n"))
    assert tsforge("schedule", "run", str(place), "--dry-run")[0] == 0
