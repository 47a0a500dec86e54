"""The page of reconstructions, headless: with a result, without any, and with damaged ones; and its charts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from streamlit.testing.v1 import AppTest

from dashboards import dynamics_charts as charts
from tsforge.app import catalog_dynamics
from tsforge.core.workspace import Workspace

EVALUATION = {
    "sigma": 5.0,  # few rows
    "capture_runs": 5,
    "capture_steps": 500,
    "capture_tangent_steps": 100,
    "lyapunov_steps": 200,
    "lyapunov_transient": 20,
}
CYCLE = {"on_data": True, "distance": 0.5, "captured": 0.0, "multipliers": [], "residual": 0.0}
CYCLES = [
    {**CYCLE, "period": 1, "kind": "saddle", "modulus": 1.5, "points": [[1.0, -1.0, 0.5]]},
    {**CYCLE, "period": 2, "kind": "stable", "modulus": 0.9, "points": [[0.0, 0.0, 0.0], [2.0, 1.0, 1.0]]},
]
OBSERVATION = {"kind": "identity", "loc": [10.0, 20.0, 30.0], "scale": [2.0, 3.0, 4.0]}


@pytest.fixture(scope="module")
def reconstructed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a reconstruction of three variates by two seeds, made by the use-case itself."""
    from tsforge.app.reconstruct import ReconstructConfig, reconstruct
    from tsforge.core.config import validate

    folder = tmp_path_factory.mktemp("dynamics")
    rows = np.arange(600)
    waves = {name: np.sin(rows * 0.3 + shift) for shift, name in enumerate(("x", "y", "z"))}
    pl.DataFrame({"step": rows, **waves}).write_parquet(folder / "wave.parquet")
    plain = {
        "data": {"path": str(folder / "wave.parquet"), "split": 0.7},
        "model": {"hidden": 8},
        "train": {"epochs": 3, "batches_per_epoch": 5, "batch_size": 4, "sequence_length": 20, "accelerator": "cpu"},
        "evaluation": EVALUATION,
        "seeds": [0, 1],
        "tracking": {"enabled": False},
    }
    reconstruct(validate(ReconstructConfig, plain), Workspace.open(folder / "home"))
    return folder / "home"


@pytest.fixture
def filled(reconstructed: Path, workspace_root: Path) -> Path:
    """A copy of the reconstruction, in the workspace of TSFORGE_HOME; returns its folder."""
    shutil.copytree(reconstructed, workspace_root)
    return next((workspace_root / "reports" / "reconstruct").iterdir())


def draw(**query: str) -> Any:
    test = AppTest.from_string("from dashboards.views import dynamics\ndynamics.show()\n", default_timeout=240)
    for name, value in query.items():
        test.query_params[name] = value
    return test.run()


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    place = folder / "result.json"
    document = json.loads(place.read_text())
    change(document)
    place.write_text(json.dumps(document))


def with_cycles(document: dict[str, Any]) -> None:
    document["observation"] = OBSERVATION
    document["seeds"][0]["findings"]["cycles"] = CYCLES


def box(page: Any, label: str) -> Any:
    return next(found for found in page.selectbox if found.label.startswith(label))


def markdown(found: Any) -> list[str]:
    return [item.value for item in found]


def test_the_caption_says_what_lost_runs_were_held_against(filled: Path) -> None:
    assert any("as most moving ones do" in note for note in markdown(draw().caption))
    place = filled / "config.yaml"
    settings = yaml.safe_load(place.read_text())
    settings["evaluation"]["expected"] = "chaos"
    place.write_text(yaml.safe_dump(settings))
    assert any("do not end in chaos, as the data do" in note for note in markdown(draw().caption))


def test_the_axes_of_a_space_are_not_cut_off(filled: Path) -> None:
    eye = json.loads(draw(view="3-D").get("plotly_chart")[0].proto.spec)["layout"]["scene"]["camera"]["eye"]
    assert np.linalg.norm(list(eye.values())) > np.linalg.norm([1.25] * 3), "further off than the library's own"


def test_without_a_reconstruction_the_page_says_the_command(workspace_root: Path) -> None:
    page = draw()
    assert not page.exception
    assert "No reconstruction yet" in page.info[0].value
    assert any("tsforge reconstruct" in block.value for block in page.code)


def test_a_reconstruction_with_all_its_parts(filled: Path) -> None:
    page = draw()
    assert not page.exception
    assert not page.error
    assert not page.info
    assert markdown(page.subheader) == [
        "Trajectories",
        "Fixed points and cycles",
        "Power spectra",
        "All seeds",
        "Lyapunov spectra",
        "Training",
    ]
    summary = json.loads((filled / "result.json").read_text())["summary"]
    rows = page.dataframe[-1].value.set_index("seed")
    assert list(rows.index) == ["0", "1", "median", "MAD"]
    assert rows.loc["median", "d_stsp"] == pytest.approx(summary["d_stsp"])
    assert rows.loc["MAD", "d_stsp"] == pytest.approx(summary["d_stsp_mad"])


def test_the_warnings_of_the_chosen_seed_are_shown(filled: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["seeds"][0] |= {"warnings": ["All runs are lost."], "healthy": False, "failed": ""}
        document["seeds"][1] |= {"warnings": [], "healthy": True, "failed": ""}

    edit(filled, change)
    page = draw(seed="0")
    assert "All runs are lost." in markdown(page.warning)
    assert not page.success
    page = box(page, "Seed").select("1").run()
    assert "All runs are lost." not in markdown(page.warning)
    assert "No warning" in page.success[0].value


def test_the_best_seed_comes_first(filled: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["seeds"][0] |= {"healthy": False, "failed": "", "d_stsp": 0.1}
        document["seeds"][1] |= {"healthy": True, "failed": "", "d_stsp": 0.2}

    edit(filled, change)
    assert box(draw(), "Seed").value == "1"


def test_a_seed_that_loses_no_run_comes_before_one_with_a_better_divergence(filled: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["seeds"][0] |= {"healthy": False, "failed": "", "d_stsp": 0.1, "captured": 0.15}
        document["seeds"][1] |= {"healthy": False, "failed": "", "d_stsp": 0.2, "captured": 0.0}

    edit(filled, change)
    assert box(draw(), "Seed").value == "1"


def test_axes_can_be_picked_and_sent_as_a_link(filled: Path) -> None:
    page = draw(view="2-D", x="z")
    assert not page.exception
    assert box(page, "Axis x").value == "z"
    assert [found.label for found in page.selectbox if found.label.startswith("Axis")] == ["Axis x", "Axis y"]
    page = box(page, "Axis y").select("x").run()
    assert not page.exception
    assert page.query_params["y"] in ("x", ["x"])  # by the version of Streamlit


def test_fixed_points_are_listed_in_the_units_of_the_data(filled: Path) -> None:
    edit(filled, with_cycles)
    page = draw(seed="0")
    rows = page.dataframe[0].value
    assert list(rows["kind"]) == ["saddle", "stable", "stable"]
    assert list(rows["what"]) == ["fixed point", "2-cycle", "2-cycle"]
    assert list(rows["x"]) == [12.0, 10.0, 14.0]
    assert list(rows["z"]) == [32.0, 30.0, 34.0]


def test_fixed_points_of_an_affine_read_out_are_where_it_shows_them(filled: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        with_cycles(document)
        document["observation"] = {**OBSERVATION, "kind": "affine"}
        seen = [[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]
        found = document["seeds"][0]["findings"]
        found["cycles"] = [{**cycle, "observed": place} for cycle, place in zip(CYCLES, seen, strict=True)]

    edit(filled, change)
    page = draw(seed="0")
    assert not page.exception
    rows = page.dataframe[0].value
    assert list(rows["x"]) == [1.0, 4.0, 7.0]
    assert list(rows["z"]) == [3.0, 6.0, 9.0]
    assert not any("not stored" in caption.value for caption in page.caption)


def test_every_figure_of_the_training_can_be_drawn(filled: Path) -> None:
    page = draw()
    assert box(page, "Figure").value == "alpha"
    assert len(box(page, "Figure").options) == 5  # no validation
    for figure in ("kappa", "loss", "gradient_norm", "max_abs_A"):
        page = box(page, "Figure").select(figure).run()
        assert not page.exception
        assert not page.error


def test_a_training_stored_before_kappa_was_traced_is_drawn_without_it(filled: Path) -> None:
    for seed in (0, 1):
        place = filled / "seeds" / str(seed) / "trace.parquet"
        pl.read_parquet(place).select("epoch", "loss", "alpha", "max_abs_A", "failed_steps").write_parquet(place)
    page = draw()
    assert not page.exception
    assert not page.error
    assert len(box(page, "Figure").options) == 3


def test_a_validated_driven_reconstruction_says_so(filled: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["inputs"] = [{"name": "pump", "loc": 0.0, "scale": 1.0}]
        for row, epoch, score in zip(document["seeds"], (2, 3), (0.5, 0.4), strict=True):
            row |= {"validation": {"epoch": epoch, "score": score}, "healthy": None, "failed": "", "captured": None}
            row["findings"] = {"cycles": [], "notes": ["Fixed points are those of the map at the mean inputs."]}

    edit(filled, change)
    for seed, score in ((0, 0.5), (1, 0.4)):
        table = pl.DataFrame({"epoch": [2, 3], "score": [score, None], "d_stsp": [0.1, None]})
        table.write_parquet(filled / "seeds" / str(seed) / "validation.parquet")
    page = draw(figure="validation")
    assert not page.exception
    assert not page.error
    assert box(page, "Seed").value == "1"  # the better score
    captions = markdown(page.caption)
    assert any("Driven by pump" in text for text in captions)
    assert any("Weights of epoch 3" in text for text in captions)
    assert not any("not examined" in text for text in captions)
    rows = page.dataframe[-1].value.set_index("seed")
    assert rows.loc["1", "kept_epoch"] == 3
    assert box(page, "Figure").value == "validation"
    traces = catalog_dynamics.load_traces(Workspace.open(filled.parents[2]), filled.name, [0, 1])
    assert traces.filter(pl.col("seed") == 1).drop_nulls("validation").select("epoch", "validation").rows() == [
        (2, 0.4)
    ]


def test_without_a_scaling_fixed_points_stay_in_latent_units(filled: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        with_cycles(document)
        document["observation"] = {"kind": "affine"}

    edit(filled, change)
    page = draw(seed="0")
    assert not page.exception
    assert next(iter(page.dataframe[0].value["latent"])) == "1, -1, 0.5"
    assert any("not stored" in caption.value for caption in page.caption)


@pytest.mark.parametrize("rest", ["nothing", "columns"])
def test_damaged_tables_of_a_seed_are_one_message_and_the_page_lives_on(filled: Path, rest: str) -> None:
    place = filled / "seeds" / "0" / "trajectory.parquet"
    if rest == "nothing":
        place.write_bytes(b"PAR1 and then nothing")
    else:
        pl.read_parquet(place).drop("y").write_parquet(place)
    page = draw(seed="0")
    assert not page.exception
    assert len(page.error) == 1
    assert "damaged" in page.error[0].value
    assert "refresh=true" in page.error[0].value
    assert "All seeds" in markdown(page.subheader)
    page = box(page, "Seed").select("1").run()
    assert not page.error


@pytest.mark.parametrize("text", ["{", "[]", '{"summary": {"name": "a"}}'])
def test_a_damaged_result_is_left_out_and_named(filled: Path, text: str) -> None:
    other = filled.with_name("broken-1")
    shutil.copytree(filled, other)
    (other / "result.json").write_text(text)
    page = draw()
    assert not page.exception
    assert not page.error
    assert any("broken-1" in warning.value for warning in page.warning)
    assert page.dataframe
    (filled / "result.json").write_text(text)
    assert "No reconstruction yet" in draw().info[0].value


def test_a_result_with_damaged_seeds_is_one_message(filled: Path) -> None:
    edit(filled, lambda document: document.update(seeds=[{"seed": 0}]))
    page = draw()
    assert not page.exception
    assert len(page.error) == 1
    assert "damaged" in page.error[0].value


def test_names_do_not_lead_out_of_the_folder(filled: Path) -> None:
    with pytest.raises(catalog_dynamics.BackendError, match="no reconstruction"):
        catalog_dynamics.load_reconstruction(Workspace.open(filled.parents[2]), f"../reconstruct/{filled.name}")


def trajectory() -> pl.DataFrame:
    rows = [("data", 0, 1.0, 2.0, 3.0), ("data", 1, 2.0, 3.0, 4.0), ("free_run", 0, 1.0, float("nan"), 3.0)]
    rows.append(("free_run", 1, 5.0, 5.0, 5.0))
    return pl.DataFrame(rows, schema=["kind", "step", "x", "y", "z"], orient="row")


def found() -> pl.DataFrame:
    kinds = {
        "kind": ["stable", "saddle", "unstable", "stable"],
        "period": [1, 1, 2, 1],
        "modulus": [0.5, 1.2, 2.0, 0.1],
    }
    places = [1.0, 2.0, 3.0, None]  # the last one has no place in the units of the data
    return pl.DataFrame({**kinds, "x": places, "y": places, "z": places})


@pytest.mark.parametrize("variates", [["x", "y"], ["z", "x", "y"]])
def test_phase_chart_shows_both_series_and_the_stability(variates: list[str]) -> None:
    figure = charts.phase_chart(trajectory(), found(), variates=variates)
    traces = {trace.name: trace for trace in figure.data}
    names = ["stable fixed point", "saddle fixed point", "unstable cycle"]
    assert list(traces) == ["data", "free run", *names]
    assert {trace.type for trace in figure.data} == {"scatter" if len(variates) == 2 else "scatter3d"}
    first = {"x": (1.0, 2.0), "z": (3.0, 4.0)}
    assert tuple(traces["data"].x) == first[variates[0]]
    assert len({traces[name].marker.symbol for name in names}) == 3
    assert tuple(traces["stable fixed point"].x) == (1.0,)
    assert traces["unstable cycle"].text[0].startswith("cycle of 2 steps, unstable")
    gap = traces["free run"].y if len(variates) == 2 else traces["free run"].z
    assert tuple(gap) == (None, 5.0)


def test_a_free_run_that_failed_is_in_no_legend() -> None:
    lost = trajectory().with_columns(pl.when(kind="data").then(pl.col("x", "y", "z")))
    figure = charts.phase_chart(lost, found(), variates=["x", "y"])
    assert "free run" not in [trace.name for trace in figure.data]
    columns = {"variate": ["x", "y"], "frequency": [0.1, 0.1], "data": [0.4, 0.6], "free_run": [None, 0.2]}
    spectra = charts.spectra_chart(pl.DataFrame(columns), variates=["x", "y"])
    assert [trace.name for trace in spectra.data if trace.showlegend] == ["data", "free run"]
    assert [trace.name for trace in spectra.data] == ["data", "data", "free run"]
    assert spectra.layout.yaxis2.title.text == "share of power"
    assert "per unit of time" in spectra.layout.xaxis2.title.text


def test_without_exponents_the_page_says_so(filled: Path) -> None:
    edit(filled, lambda document: [row.update(lyapunov_spectrum=[]) for row in document["seeds"]])
    page = draw()
    assert not page.exception
    assert any("No seed has exponents" in note for note in markdown(page.caption))


def test_phase_chart_of_one_variate_runs_over_the_steps() -> None:
    figure = charts.phase_chart(trajectory(), found(), variates=["x"])
    assert [trace.name for trace in figure.data] == ["data", "free run"]
    assert tuple(figure.data[0].x) == (0.0, 1.0)


def test_spectra_chart_has_a_panel_a_variate() -> None:
    columns = {"variate": ["x", "x", "y", "y"], "frequency": [0.1, 0.2] * 2, "data": [0.4, 0.6, 1.0, 0.0]}
    table = pl.DataFrame({**columns, "free_run": [0.5, 0.5, float("nan"), 1.0]})
    figure = charts.spectra_chart(table, variates=["y", "x"])
    assert [trace.name for trace in figure.data] == ["data", "free run"] * 2
    assert tuple(figure.data[0].y) == (1.0, None)
    assert tuple(figure.data[1].y) == (None, 1.0)
    assert tuple(figure.data[2].y) == (0.4, 0.6)
    assert figure.layout.yaxis2.range == pytest.approx((np.log10(0.4) - 2, 0.3))
    assert figure.layout.yaxis.type == figure.layout.yaxis2.type == "log"


def test_bars_and_lines_of_every_seed() -> None:
    figure = charts.lyapunov_chart(
        [{"seed": 3, "lyapunov_spectrum": [0.9, 0.0, -14.5]}, {"seed": 5, "lyapunov_spectrum": []}]
    )
    assert [(bar.name, tuple(bar.y)) for bar in figure.data] == [("seed 3", (0.9, 0.0, -14.5)), ("seed 5", ())]
    traces = pl.DataFrame({"seed": [3, 3, 5], "epoch": [2, 1, 1], "alpha": [0.5, 1.0, float("nan")]})
    figure = charts.trace_chart(traces, figure_of="alpha", title="alpha")
    assert [(line.name, tuple(line.y)) for line in figure.data] == [("seed 3", (1.0, 0.5)), ("seed 5", (None,))]
    assert (figure.layout.yaxis.type, figure.layout.yaxis.title.text) == (None, "alpha")
    holes = traces.with_columns(alpha=pl.Series([None, 1.0, 2.0]))
    figure = charts.trace_chart(holes, figure_of="alpha", title="alpha", logarithmic=True)
    assert [tuple(line.x) for line in figure.data] == [(1,), (1,)]
    assert figure.layout.yaxis.type == "log"
