"""Composition and validation: every mistake is one readable line."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from tsforge.core.config import Config, compose, config_dir, fingerprint, load, search_space, to_yaml, tunable, validate
from tsforge.core.errors import ConfigError


class Inner(Config):
    width: int = tunable(64, low=16, high=256, log=True, ge=1)
    kind: Literal["a", "b"] = tunable("a", choices=["a", "b"])


class Outer(Config):
    name: str
    rate: float = tunable(0.1, low=0.01, high=1.0, log=True, gt=0)
    inner: Inner = Inner()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "configs"
    (root / "inner").mkdir(parents=True)
    (root / "outer.yaml").write_text("defaults:\n  - _self_\n  - inner: small\nname: x\n", encoding="utf-8")
    (root / "inner" / "small.yaml").write_text("width: 2\n", encoding="utf-8")
    (root / "inner" / "large.yaml").write_text("width: 200\nkind: b\n", encoding="utf-8")
    return root


@pytest.mark.parametrize("text", [";", "a;b", "it's", "C:\\data\\x.csv", "%d.%m.%Y", "(1", "a b"])
def test_text_that_the_override_grammar_cannot_read_is_text(tree: Path, text: str) -> None:
    assert load(Outer, "outer", [f"name={text}"], tree).name == text


def test_group_choice_and_dotted_override(tree: Path) -> None:
    config = load(Outer, "outer", ["inner=large", "inner.width=99", "rate=0.5"], tree)
    assert (config.inner.width, config.inner.kind, config.rate) == (99, "b", 0.5)


def test_dotted_override_of_a_key_the_yaml_leaves_at_its_default(tree: Path) -> None:
    assert load(Outer, "outer", ["inner.kind=b"], tree).inner.kind == "b"


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["inner.widht=3"], ["inner.widht: unknown key", "did you mean 'width'"]),
        (["inner.width=many"], ["inner.width", "integer", "'many'"]),
        (["inner.width=-3"], ["inner.width", "greater than or equal to 1", "-3"]),
        (["inner=huge"], ["huge", "large", "small"]),
        (["inner.kind=c"], ["inner.kind", "'a' or 'b'"]),
        (["nonsense"], ["'nonsense' is not an override"]),
        (["rate=["], ["rate", "valid number", "'['"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tree: Path, overrides: list[str], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Outer, "outer", overrides, tree)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checks.old.severity=warn"], "checks is a list; index it by number (checks.0.severity) or give it whole"),
        (["name=y", "inner.names.x=3"], "inner.names is a list; index it by number (inner.names.0) or give it whole"),
        (["inner.names=[a]", "+inner.names.x=3"], None),  # Hydra's own words for one that must not be there yet
        (["made=[{a: 1}]", "made.b.a=3"], "made is a list; index it by number (made.0.a) or give it whole"),
        (["checks.0.x.y=3", "checks.0.x.z=[1]", "checks.0.x.z.w=1"], "checks.0.x.z is a list"),
    ],
)
def test_a_word_below_a_list_is_one_line_that_names_the_list(
    tree: Path, overrides: list[str], message: str | None
) -> None:
    text = "checks:\n  - {kind: old}\ninner: {names: [a, b]}\n"
    (tree / "lists.yaml").write_text(text, encoding="utf-8")
    assert compose("lists", ["checks.0.severity=warn"], tree)["checks"] == [{"kind": "old", "severity": "warn"}]
    with pytest.raises(ConfigError) as caught:
        compose("lists", overrides, tree)
    assert (message or "") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_required_key_and_several_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Outer, {"rate": "fast", "inner": {"width": 0}})
    assert "name: required" in str(caught.value)
    assert "rate" in str(caught.value)
    assert "inner.width" in str(caught.value)


def test_a_required_value_that_nobody_gave_is_named(tree: Path) -> None:
    (tree / "needy.yaml").write_text("data:\n  path: ???\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.path: required, but not given; add data\.path=VALUE"):
        compose("needy", [], tree)
    assert compose("needy", ["data.path=x.csv"], tree) == {"data": {"path": "x.csv"}}


def test_missing_file_names_the_nearest(tree: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'outer'"):
        compose("outr", directory=tree)
    with pytest.raises(ConfigError, match="does not exist"):
        compose("nowhere.yaml", directory=tree)


def test_own_file_outside_the_tree_may_use_its_groups(tree: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("defaults:\n  - inner: large\n  - _self_\nname: mine\ninner:\n  width: 7\n", encoding="utf-8")
    config = validate(Outer, compose(str(own), directory=tree))
    assert (config.name, config.inner.width, config.inner.kind) == ("mine", 7, "b")


def test_file_in_a_folder_of_the_tree_uses_its_groups_too(tree: Path) -> None:
    (tree / "experiment").mkdir()
    text = "defaults:\n  - inner: large\n  - _self_\nname: deep\n"
    (tree / "experiment" / "one.yaml").write_text(text, encoding="utf-8")
    for name in ("experiment/one", str(tree / "experiment" / "one.yaml")):
        config = load(Outer, name, ["inner=small", "rate=0.3"], tree)
        assert (config.name, config.inner.width, config.rate) == ("deep", 2, 0.3)


def test_broken_yaml_is_a_config_error(tree: Path) -> None:
    (tree / "broken.yaml").write_text("name: [1, 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="broken"):
        compose("broken", directory=tree)


def test_a_file_that_is_no_utf_8_text_is_a_config_error(tree: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    for encoding in ("latin-1", "utf-16"):
        own.write_bytes("name: größe\n".encode(encoding))
        with pytest.raises(ConfigError, match=r"own\.yaml.* is no UTF-8 text .*save it as UTF-8"):
            compose(str(own), directory=tree)
    own.write_bytes("name: größe\n".encode())
    assert compose(str(own), directory=tree) == {"name": "größe"}
    (tree / "inner" / "small.yaml").write_bytes("kind: a  # größe\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="'outer': it, or a file that it chooses, is no UTF-8 text"):
        compose("outer", directory=tree)


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: " + "[" * 5000])
def test_a_file_without_an_end_is_a_config_error(tree: Path, text: str) -> None:
    (tree / "loop.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="'loop': it holds itself"):
        compose("loop", directory=tree)


def test_other_endings_and_folders_are_refused_by_name(tree: Path) -> None:
    (tree / "short.yml").write_text("name: x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"short\.yml: rename it to short\.yaml"):
        compose(str(tree / "short.yml"), directory=tree)
    (tree / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.yaml is a folder"):
        compose(str(tree / "folder.yaml"), directory=tree)


@pytest.mark.parametrize(
    "override", ["hydra.run.dir=x", "+hydra.job.chdir=true", "hydra/launcher=basic", "~hydra.sweep"]
)
def test_settings_of_hydra_itself_are_refused(tree: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"'outer': hydra.* has no effect"):
        compose("outer", [override], tree)
    (tree / "own.yaml").write_text("name: x\nhydra: {run: {dir: x}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'own': hydra has no effect"):
        compose("own", directory=tree)


class Numbers(Config):
    """Every form in which settings hold numbers."""

    whole: int = 1
    real: float | None = None
    bounded: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    moment: str | int | None = None
    many: tuple[float, ...] = ()
    pair: tuple[str, int] = ("a", 1)
    named: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)
    text: str | float = "x"


class Truths(Config):
    """Settings that may be true or false."""

    plain: bool = False
    maybe: bool | int = 2
    word: Literal["on", True] = "on"
    flags: tuple[bool, ...] = ()
    anything: Any = None
    inner: dict[str, Any] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("whole", True),
        ("real", False),
        ("bounded", True),
        ("moment", True),
        ("many", [0.5, True]),
        ("pair", ["a", False]),
        ("named", {"a": (None, True)}),
        ("text", True),
    ],
)
def test_true_and_false_are_no_numbers(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting}: it is a number, not true or false"):
        validate(Numbers, {setting: value})


def test_numbers_and_truths_are_read_as_ever() -> None:
    plain = {"whole": "3", "real": 2, "bounded": "0.5", "many": ["1", 2], "pair": ["true", 4.0], "text": "true"}
    assert validate(Numbers, plain) == Numbers(
        whole=3, real=2.0, bounded=0.5, many=(1, 2), pair=("true", 4), text="true"
    )
    truths = {"plain": True, "maybe": True, "word": True, "flags": [True], "anything": True, "inner": {"a": [True]}}
    assert validate(Truths, truths).model_dump() == {**truths, "flags": (True,)}


def test_config_is_immutable_and_round_trips() -> None:
    config = Outer(name="x", rate=0.25)
    with pytest.raises(ValueError, match="frozen"):
        config.rate = 1.0
    assert validate(Outer, yaml.safe_load(to_yaml(config))) == config


def test_fingerprint_changes_with_any_setting() -> None:
    config = Outer(name="x")
    assert fingerprint(config) == fingerprint(Outer(name="x"))
    assert fingerprint(config) != fingerprint(Outer(name="x", inner=Inner(width=65)))


def test_search_space_is_nested_and_typed() -> None:
    assert search_space(Outer) == {
        "rate": {"low": 0.01, "high": 1.0, "log": True, "type": "float"},
        "inner.width": {"low": 16, "high": 256, "log": True, "type": "int"},
        "inner.kind": {"choices": ["a", "b"]},
    }


def test_tunable_needs_a_space() -> None:
    with pytest.raises(ConfigError, match="range or choices|low and high"):
        tunable(1, low=0)


def test_threads_may_compose_at_the_same_time(tree: Path) -> None:
    results: list[int] = []
    threads = [
        threading.Thread(
            target=lambda width=width: results.append(load(Outer, "outer", [f"inner.width={width}"], tree).inner.width)
        )
        for width in range(1, 7)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [1, 2, 3, 4, 5, 6]


def test_config_dir_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSFORGE_CONFIGS", str(tmp_path))
    assert config_dir() == tmp_path.resolve()
    monkeypatch.setenv("TSFORGE_CONFIGS", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="not a folder"):
        config_dir()


def test_a_group_choice_goes_where_the_file_placed_the_group(tree: Path) -> None:
    (tree / "job.yaml").write_text("defaults:\n  - inner@fit.part: small\n  - _self_\nother: 1\n", encoding="utf-8")
    assert compose("job", [], tree) == {"fit": {"part": {"width": 2}}, "other": 1}
    for override in ("inner=large", "inner@fit.part=large"):
        assert compose("job", [override, "fit.part.width=7"], tree)["fit"] == {"part": {"width": 7, "kind": "b"}}
    with pytest.raises(ConfigError, match="did you mean 'large'"):
        compose("job", ["inner=larg"], tree)


def test_a_choice_below_a_mapping_says_which_setting_names_it() -> None:
    from tsforge.app.watch.settings import WatchConfig

    plain = {"sinks": {"file": {"path": "events.jsonl"}}}
    with pytest.raises(ConfigError, match=r"sinks\.file: say which one with sinks\.file\.kind \(jsonl, .*\)(;|$)"):
        validate(WatchConfig, plain)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (
            {"source": {"kind": "folder", "path": "in", "patern": "*.csv"}},
            r"source\.patern: unknown key; did you mean 'pattern'\?",
        ),
        ({"sinks": {"a": {"kind": "jsonl"}}}, r"sinks\.a\.path: required, but not given"),
        ({"sinks": {"a": {"kind": "jsonl", "pat": "x"}}}, r"sinks\.a\.pat: unknown key; did you mean 'path'\?"),
        ({"sinks": {"a": "jsonl"}}, r"sinks\.a: it holds several settings; write sinks\.a\.kind=jsonl(;|$)"),
        ({"detector": {"rule": "quantile"}}, r"write detector\.rule\.kind=quantile(;|$)"),
        (
            {"detector": {"score": {"winsor": float("inf")}}},
            r"detector\.score\.winsor: .*finite number",
        ),
        ({"detector": {"rule": {"kind": "fixed", "value": float("nan")}}}, r"detector\.rule\.value: .*finite number"),
        ({"sinks": {"a": {"kind": "jsonll"}}}, r"kind \(jsonl, .*\); 'jsonll' is none of them; did you mean 'jsonl'\?"),
        (
            {"detector": {"score": {"smoothing": {"kind": "median", "windw": 3}}}},
            r"detector\.score\.smoothing\.windw: unknown key; did you mean 'window'\?",
        ),
        ({"detector": {"rule": {"kind": "quantile", "alpha": 7}}}, r"(^|; )detector\.rule\.alpha: "),
        ({"detector": {"score": {"kind": {}}}}, r"detector\.score\.kind: "),
    ],
)
def test_paths_are_those_a_user_writes_below_a_choice_too(plain: dict[str, Any], message: str) -> None:
    from tsforge.app.watch.settings import WatchConfig

    with pytest.raises(ConfigError, match=message):
        validate(WatchConfig, plain)


def test_a_key_that_belongs_one_level_deeper_is_named_there() -> None:
    from tsforge.app.tune import TuneJobConfig

    for wrong, meant in (
        ("window", "fit.window"),
        ("num_trials", "study.num_trials"),
        ("study_trials", "study.num_trials"),
    ):
        with pytest.raises(ConfigError, match=rf"{wrong}: unknown key; did you mean '{meant}'\?"):
            validate(TuneJobConfig, {wrong: 3})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"likelihood": {"loss": "mae"}}, r"likelihood: say which one with likelihood\.name \(point, .*, quantiles\)$"),
        (
            {"likelihood": "quantile"},
            r"likelihood\.name \(.*\); 'quantile' is none of them; did you mean 'quantiles'\?$",
        ),
        (
            {"likelihood": {"name": "norml"}},
            r"likelihood\.name \(.*\); 'norml' is none of them; did you mean 'normal'\?$",
        ),
        ({"likelihood": 3}, r"^likelihood: say which one with likelihood\.name \(.*\); 3 is none of them$"),
        (
            {"calibration": "recent"},
            r"^calibration: .* write calibration\.KEY=VALUE \(keys.*'recent'\)$",
        ),
        ({"window": 3}, r"^window: .*; write window\.KEY=VALUE \(keys: .*context_length"),
    ],
)
def test_a_group_of_settings_given_wrongly_says_what_to_write(setting: dict[str, Any], message: str) -> None:
    from tsforge.app.fit import FitConfig

    plain = {"data": {"name": "x", "source": {"kind": "embedded"}}, "model": "linear", **setting}
    with pytest.raises(ConfigError, match=message):
        validate(FitConfig, plain)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"tracking": {"register_as": "x", "enabled": False}},
            "tracking: register_as has no effect with enabled=false",
        ),
        ({"tracking": {"alias": "champion"}}, "tracking: alias has no effect without register_as"),
        ({"scaling": {"kind": "none", "robust": True}}, r"scaling\.robust has no effect with scaling\.kind=none"),
        (
            {"calibration": {"enabled": False, "half_life": 9}},
            "calibration: half_life has no effect with enabled=false",
        ),
        ({"calibration": {"enabled": False, "quantile_levels": [0.1, 0.9]}}, "quantile_levels has no effect"),
        ({"train": {"seed": 2**63}}, r"train\.seed: Input should be less than or equal to 9223372036854775807"),
        ({"data": {"source": {"kind": "synthetic", "generator": {"seed": 2**63}}}}, r"generator\.seed: .*less than"),
    ],
)
def test_settings_without_an_effect_and_seeds_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    from tsforge.app.fit import FitConfig

    plain = {"data": {"name": "x", "source": {"kind": "embedded"}}, "model": "linear"}
    setting = {**setting, "data": {**plain["data"], **setting.get("data", {})}}
    with pytest.raises(ConfigError, match=message):
        validate(FitConfig, {**plain, **setting})
    fine = {"tracking": {"enabled": False}, "calibration": {"enabled": False, "dependence": "empirical"}}
    config = validate(FitConfig, {**plain, **fine, "train": {"seed": 2**63 - 1}})
    assert validate(FitConfig, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sampler": "random", "num_startup_trials": 3}, "num_startup_trials has no effect with sampler=random"),
        ({"pruner": "none", "num_warmup_reports": 3}, "num_warmup_reports has no effect with pruner=none"),
        ({"pruner": "hyperband", "num_warmup_reports": 0}, "num_warmup_reports has no effect with pruner=hyperband"),
        ({"seed": 2**64}, "seed: Input should be less than"),
    ],
)
def test_settings_of_a_study_without_an_effect_are_refused(setting: dict[str, Any], message: str) -> None:
    from tsforge.tuning.config import TuneConfig

    with pytest.raises(ConfigError, match=message):
        validate(TuneConfig, {"name": "x", **setting})
    config = validate(TuneConfig, {"name": "x", "sampler": "random", "pruner": "none", "seed": 2**63 - 1})
    assert validate(TuneConfig, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seeds": [2**63]}, "a seed is at most 9223372036854775807"),
        ({"seeds": 2**40}, rf"so many seeds; for a single one write seeds=\[{2**40}\]"),
        ({"data": {"system": {"seed": 2**63}}}, r"data\.system\.seed: .*less than"),
    ],
)
def test_seeds_of_a_reconstruction_have_a_bound(setting: dict[str, Any], message: str) -> None:
    from tsforge.dynamics.config import ReconstructionConfig

    with pytest.raises(ConfigError, match=message):
        validate(ReconstructionConfig, {"data": {"system": {}}, **setting})
