"""Configuration: frozen pydantic classes, YAML composed by Hydra, every mistake one readable line.

``configs/`` is a Hydra tree. A shell composes it once (``load``), and from then on only the validated object travels.
Search spaces stand beside the defaults they vary (``tunable``).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from tsforge.core.config_errors import config_class, explain, has_truth
from tsforge.core.errors import ConfigError, listing, nearest

_COMPOSE_LOCK = threading.Lock()  # Hydra's compose API is a process-wide singleton


class Config(BaseModel):
    """Base of every config: immutable, keyword-only, unknown keys refused, numbers finite and never true or false."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_number(cls, values: Any) -> Any:
        """Refuse true and false where a number belongs; pydantic would read 1 and 0."""
        known = cls.model_fields
        given = values if isinstance(values, Mapping) else {}
        found = [name for name, value in given.items() if name in known and has_truth(value, known[name].annotation)]
        if found:  # by hand, since a validator of every field is not allowed on the key of a tagged union
            fault = PydanticCustomError("truth_for_number", "it is a number, not true or false")
            faults = [InitErrorDetails(type=fault, loc=(name,), input=given[name]) for name in found]
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return values


C = TypeVar("C", bound=Config)
QuantileLevel = Annotated[float, Field(gt=0.0, lt=1.0)]
"""0.8, not 80."""
MAX_SEED = 2**63 - 1
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
"""What every generator of random numbers takes."""


class StoredChoices(Protocol):
    """Choices of a config group that no file holds, such as data sets in a store."""

    def names(self, group: str) -> Sequence[str]:
        """Return the names that may be chosen besides the files of the group."""
        ...

    def settings(self, group: str, name: str) -> Mapping[str, Any]:
        """Return what such a choice stands for, plain types."""
        ...


def tunable(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
    choices: Sequence[Any] | None = None,
    stand_in: float | None = None,
    **field: Any,
) -> Any:
    """Return a pydantic field that carries its own search space.

    Args:
        default: value used when the user says nothing.
        low, high: inclusive range of the search (integers stay integers); it is not a bound on the user's value.
        log: sample on a logarithmic scale.
        choices: categories instead of a range.
        stand_in: number that a search begins with in place of a default that is none.
        field: passed on to ``pydantic.Field`` (``ge``, ``le`` and the like do bound the user's value).

    Raises:
        ConfigError: neither a full range nor choices, or both.
    """
    ranged = low is not None and high is not None
    if ranged == (choices is not None):
        raise ConfigError("tunable() needs either low and high, or choices")
    space: dict[str, Any] = (
        {"choices": list(choices)} if choices is not None else {"low": low, "high": high, "log": log}
    )
    if stand_in is not None:
        space["stand_in"] = {"value": default, "number": stand_in}
    return Field(default, json_schema_extra={"tunable": space}, **field)


def search_space(config: type[BaseModel] | BaseModel) -> dict[str, dict[str, Any]]:
    """Return ``{dotted field name: space}`` for every tunable field, nested configs included.

    A space is ``{"choices": [...]}`` or ``{"low", "high", "log", "type"}`` with type ``"int"`` or ``"float"``, and
    ``stand_in`` where a default is no number.
    """
    cls = config if isinstance(config, type) else type(config)
    spaces: dict[str, dict[str, Any]] = {}
    for name, field in cls.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, Mapping) and "tunable" in extra:
            space = dict(extra["tunable"])  # type: ignore[arg-type]
            if "low" in space:
                space["type"] = "int" if field.annotation is int else "float"
            spaces[name] = space
            continue
        value = getattr(config, name, None) if not isinstance(config, type) else None
        nested = value if isinstance(value, BaseModel) else config_class(field)
        if nested is not None:
            spaces.update({f"{name}.{key}": space for key, space in search_space(nested).items()})
    return spaces


def validate(cls: type[C], values: Mapping[str, Any], *, where: str = "") -> C:
    """Return ``cls`` built from plain values.

    Args:
        cls: the config class.
        values: nested plain types, as read from YAML.
        where: dotted prefix of the place in a larger config, for messages.

    Raises:
        ConfigError: one line per mistake: its dotted path, what is wrong, and the closest known key.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(explain(item, cls, where) for item in error.errors())) from error


def config_dir() -> Path:
    """Return the config tree: ``TSFORGE_CONFIGS``, else ``configs/`` of the checkout, else the packaged copy.

    Raises:
        ConfigError: ``TSFORGE_CONFIGS`` names no folder.
    """
    given = os.environ.get("TSFORGE_CONFIGS")
    if given:
        if not Path(given).is_dir():
            raise ConfigError(f"TSFORGE_CONFIGS={given} is not a folder")
        return Path(given).resolve()
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "configs", package / "_configs"):
        if candidate.is_dir():
            return candidate
    raise ConfigError("no config tree found beside the package; set TSFORGE_CONFIGS to a folder with one")


def compose(
    name: str, overrides: Sequence[str] = (), directory: Path | None = None, stored: StoredChoices | None = None
) -> dict[str, Any]:
    """Return the composed config ``name`` as plain nested types.

    Args:
        name: file below the config tree without ``.yaml`` (``fit``, ``batch/demo``), or a path to a YAML file.
        overrides: ``group=choice`` and ``dotted.key=value``, as typed by a user.
        directory: the config tree (default ``config_dir()``).
        stored: choices that are no files; a file of the same name goes first.

    Raises:
        ConfigError: missing file, unknown group or choice (the message lists the choices), bad override, bad YAML, text
            that is not UTF-8, settings of Hydra itself, a required value (``???``) that nobody gave.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError, safe_load

    root = directory or config_dir()
    path = _config_path(name, root)
    with _COMPOSE_LOCK, tempfile.TemporaryDirectory(prefix="tsforge-configs-") as kept:
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(path.parent), version_base="1.3"):
                _check_no_hydra(name, path, overrides)
                placed = _placed_groups(path)
                roots = {root, path.parent}
                # a file below a folder, or a user's own file elsewhere, still finds the groups of the tree
                found = [] if path.parent == root else [root]
                asked = [*_default_choices(path), *(text.partition("=")[::2] for text in overrides)]
                if _write_stored(asked, roots, stored, Path(kept)):
                    roots, found = roots | {Path(kept)}, [*found, Path(kept)]
                searched = ",".join(f"file://{folder}" for folder in found)
                extra = [f"hydra.searchpath=[{searched}]"] if found else []
                for key, value in _default_choices(path):
                    if value != "???" and "${" not in value and "/" not in value:  # what Hydra resolves itself
                        _check_choice(key, value, roots, stored)
                own = _own_settings(path, roots)
                plain_ones = [text for text in overrides if text.partition("=")[0] in own]
                choices = [text for text in overrides if text not in plain_ones]
                if not _default_choices(path):  # else Hydra knows better, after it has read what they bring
                    _check_no_choice(name, choices, roots)
                settings = [_struct_override(text, roots, placed, stored) for text in choices]
                try:
                    composed = hydra_compose(path.stem, overrides=[*extra, *settings])
                except (TypeError, ValueError) as error:  # what OmegaConf says of a word where a list is indexed
                    raise _below_a_list(path.stem, extra, settings) or error from error
                for text in plain_ones:  # Hydra would take them for choices
                    key, _, value = text.partition("=")
                    OmegaConf.update(composed, key, safe_load(value))
            plain = OmegaConf.to_container(composed, resolve=True)
            absent = sorted(OmegaConf.missing_keys(composed))
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            message = " ".join(str(error).split())
            group = re.search(r"Could not override '([^'@]+)[^']*'\. No match in the defaults list", message)
            if group is not None:  # a group of the tree that this config has no place for
                raise _no_choice(name, group[1]) from error
            raise ConfigError(f"config '{name}': {message}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"config '{name}': it, or a file that it chooses, is no UTF-8 text ({error.reason}); save it as UTF-8"
            ) from error
        except RecursionError as error:
            raise ConfigError(
                f"config '{name}': it holds itself (by *NAME in &NAME), or is nested too deeply"
            ) from error
    if absent:
        example = f"{absent[0]}=VALUE"
        raise ConfigError(f"{listing(absent)}: required, but not given; add {example} to the command or the config")
    if not isinstance(plain, dict):
        raise ConfigError(f"config '{name}' holds no mapping of settings")
    return {str(key): value for key, value in plain.items()}


def _config_path(name: str, root: Path) -> Path:
    """Return the file that ``name`` means: a path to a YAML file, or a name below the config tree."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser().resolve()
        if not path.exists():
            raise ConfigError(f"config file {name} does not exist")
        if not path.is_file():
            raise ConfigError(f"config file {name} is a folder; name a file in it")
        if path.suffix == ".yml":  # Hydra reads no other ending
            raise ConfigError(f"config file {name}: rename it to {path.stem}.yaml, files that end in .yml are not read")
        return path
    path = root / f"{name}.yaml"
    if not path.is_file():
        folder = path.parent
        found = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
        known = [str(item.relative_to(root).with_suffix("")) for item in found]
        raise ConfigError(f"no config '{name}' below {root}{nearest(name, known)} (known: {listing(known, 20)})")
    return path


def _placed_groups(path: Path) -> dict[str, str]:
    """Return ``{group: group@place}`` of the groups that a config file puts somewhere else (``data@fit.data: csv``)."""
    return {key.partition("@")[0]: key for key, _ in _default_choices(path) if "@" in key}


def _check_no_hydra(name: str, path: Path, overrides: Sequence[str]) -> None:
    """Refuse settings of Hydra itself: files are composed here, and nothing of a run is Hydra's."""
    import yaml

    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = [*(plain if isinstance(plain, dict) else ()), *(key for key, _ in _default_choices(path))]
    keys += [text.partition("=")[0].lstrip("+~") for text in overrides]
    found = next((str(key) for key in keys if re.match(r"hydra([./@]|$)", str(key))), None)
    if found is not None:
        raise ConfigError(f"config '{name}': {found} has no effect, Hydra only composes the files; leave it out")


def _own_settings(path: Path, roots: set[Path]) -> set[str]:
    """Return the plain settings of a config file that are named like a group: no choice of its defaults goes there."""
    import yaml

    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    chosen = {key.partition("@")[0] for key, _ in _default_choices(path)}
    settings = plain.items() if isinstance(plain, dict) else ()
    named = {str(key) for key, value in settings if not isinstance(value, dict | list)} - chosen
    return {key for key in named if any((root / key).is_dir() for root in roots)}


def _default_choices(path: Path) -> list[tuple[str, str]]:
    """Return the (group, choice) pairs in the ``defaults`` of a config file; a group may end in @ and a place."""
    import yaml

    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = plain.get("defaults") or [] if isinstance(plain, dict) else []
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return [
        (str(key).removeprefix("override ").removeprefix("/"), name) for key, name in pairs if isinstance(name, str)
    ]


def _write_stored(
    asked: Sequence[tuple[str, str]], roots: set[Path], stored: StoredChoices | None, folder: Path
) -> bool:
    """Write the stored choices among (group, choice) pairs as files of their groups; return whether there were any."""
    import yaml

    if stored is None:
        return False
    wrote = False
    for key, value in asked:
        group = key.partition("@")[0]
        if not any((root / group).is_dir() for root in roots) or "/" in value or value in ("", ".", ".."):
            continue
        if any((root / group / f"{value}.yaml").is_file() for root in roots) or value not in stored.names(group):
            continue
        content = yaml.safe_dump(_plain_text(dict(stored.settings(group, value))), allow_unicode=True)
        (folder / group).mkdir(exist_ok=True)
        (folder / group / f"{value}.yaml").write_text(content, encoding="utf-8")
        wrote = True
    return wrote


def _plain_text(value: Any) -> Any:
    """Return nested settings in which no text is taken for an interpolation (``${...}``)."""
    if isinstance(value, dict):
        return {key: _plain_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_text(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + "\\${", value)
    return value


def _check_no_choice(name: str, overrides: Sequence[str], roots: set[Path]) -> None:
    """Refuse choices of groups in a config without any, before what there is to choose from is told."""
    for text in overrides:
        group = text.partition("=")[0].partition("@")[0]
        if "=" in text and group and any((root / group).is_dir() for root in roots):
            raise _no_choice(name, group)


def _no_choice(name: str, group: str) -> ConfigError:
    return ConfigError(f"config '{name}': there is no choice of '{group}' in it; `--dry-run` shows its settings")


def _struct_override(text: str, roots: set[Path], placed: Mapping[str, str], stored: StoredChoices | None) -> str:
    """Let an override add a key that the YAML leaves at its default; pydantic refuses unknown keys later.

    A choice of a group goes where the config file has placed the group.
    """
    if "=" not in text:
        raise ConfigError(f"'{text}' is not an override; write key=value, for example model=ar_net or model.lags=48")
    key, value = text.split("=", 1)
    group = key.partition("@")[0]
    if not any((root / group).is_dir() for root in roots):
        plain = f"{key}={_readable(key, value)}"
        return plain if key.startswith(("+", "~")) else f"++{plain}"
    _check_choice(key, value, roots, stored)
    return f"{placed.get(key, key)}={value}"


def _check_choice(key: str, value: str, roots: set[Path], stored: StoredChoices | None) -> None:
    """Refuse a choice that a group of the tree does not have; ``key`` is the group, also with @ and a place."""
    group = key.partition("@")[0]
    folders = [root / group for root in roots if (root / group).is_dir()]
    choices = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    if folders and value not in choices:
        kept = [] if stored is None else sorted(stored.names(group))
        more = f"; ingested: {listing(kept, 30)}" if kept else ""
        close = nearest(value, [*choices, *kept])
        raise ConfigError(f"{key}={value}: no such choice{close} (known: {listing(choices, 30)}{more})")


def _below_a_list(name: str, extra: Sequence[str], settings: Sequence[str]) -> ConfigError | None:
    """Return what to say of the first setting whose key takes a list for a mapping, None where there is no such one."""
    from hydra import compose as hydra_compose
    from omegaconf import ListConfig, OmegaConf

    for place, text in enumerate(settings):
        before = hydra_compose(name, overrides=[*extra, *settings[:place]])
        parts = text.lstrip("+").partition("=")[0].split(".")
        for depth in range(1, len(parts)):
            key = ".".join(parts[:depth])
            if isinstance(OmegaConf.select(before, key), ListConfig) and not parts[depth].isdecimal():
                example = ".".join([key, "0", *parts[depth + 1 :]])
                return ConfigError(f"{key} is a list; index it by number ({example}) or give it whole")
    return None


def _readable(key: str, value: str) -> str:
    """Return the value as it is where Hydra can read it, else quoted as text: a shell has eaten the user's quotes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return value


def load(
    cls: type[C],
    name: str,
    overrides: Sequence[str] = (),
    directory: Path | None = None,
    stored: StoredChoices | None = None,
) -> C:
    """Compose ``name`` and validate it as ``cls`` (see ``compose`` and ``validate`` for the errors)."""
    return validate(cls, compose(name, overrides, directory, stored))


def to_yaml(config: BaseModel) -> str:
    """Return the resolved config as YAML that ``validate`` reads back."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def fingerprint(config: BaseModel | Mapping[str, Any]) -> str:
    """Return 16 hex digits that change when any setting changes."""
    plain = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
