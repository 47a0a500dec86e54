"""What pydantic says of a wrong setting, as one line a user can act on: its dotted path, the fault, the closest key.

Pydantic names the branch it took below a choice of several classes (``data.source.csv.path``); users do not write it
(``data.source.path``), so the path is followed through the classes and these names are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tsforge.core.errors import listing, nearest

_NOT_A_CHOICE = ("union_tag_not_found", "union_tag_invalid", "model_attributes_type")  # pydantic, of tagged unions


@dataclass(frozen=True, kw_only=True)
class Below:
    """What a setting holds.

    Attributes:
        config: the class of its settings, None where it has none or one of several.
        choices: these by their names. named: the key that chooses.
        has_items: a mapping or a sequence, of whose items the others tell.
    """

    config: type[BaseModel] | None = None
    choices: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    named: str | None = None
    has_items: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a path leads: its keys as a user writes them, the class that has the last of them, and what is below."""

    path: tuple[str, ...]
    holder: type[BaseModel] | None
    below: Below


def config_class(info: FieldInfo) -> type[BaseModel] | None:
    """Return the config class that a field is annotated with, None where it is anything else."""
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def place_of(cls: type[BaseModel], loc: Iterable[int | str]) -> Place:
    """Return where pydantic's location of an error leads, from ``cls`` on."""
    path: list[str] = []
    holder: type[BaseModel] | None = None
    below = Below(config=cls)
    for part in loc:
        name = str(part)
        if below.has_items:  # which item: what is below stays
            path.append(name)
            below = Below(config=below.config, choices=below.choices, named=below.named)
        elif below.choices:
            below = Below(config=below.choices.get(name))
        else:
            path.append(name)
            holder = below.config
            info = None if holder is None else holder.model_fields.get(name)
            below = Below() if info is None else _below(info.annotation, info.discriminator)
    return Place(path=tuple(path), holder=holder, below=below)


def _below(annotation: Any, discriminator: Any = None) -> Below:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        found = [item.discriminator for item in parts[1:] if isinstance(item, FieldInfo)]
        return _below(parts[0], found[0] if found else discriminator)
    if origin in (Union, UnionType):
        parts = tuple(part for part in parts if part is not type(None))
        if isinstance(discriminator, str):
            classes = [part for part in parts if hasattr(part, "model_fields")]
            choices = {
                str(tag): part for part in classes for tag in get_args(part.model_fields[discriminator].annotation)
            }
            return Below(choices=choices, named=discriminator)
        held = [_below(part) for part in parts]
        told = [one for one in held if one.config or one.choices]
        return told[0] if len(told) == 1 else Below()
    if origin in (dict, Mapping, tuple, list, Sequence) and parts:
        item = _below(parts[1] if origin in (dict, Mapping) else parts[0])
        return Below(config=item.config, choices=item.choices, named=item.named, has_items=True)
    is_config = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return Below(config=annotation if is_config else None)


def has_truth(value: Any, annotation: Any) -> bool:
    """Return whether a value, or an item of it, is true or false where the annotation asks for a number.

    Configs inside a value look at their own settings.
    """
    kinds = list(_alternatives(annotation))
    if isinstance(value, bool):
        return bool not in kinds and (int in kinds or float in kinds)
    if isinstance(value, Mapping):
        items = [get_args(kind)[1] for kind in kinds if get_origin(kind) in (dict, Mapping)]
        return any(has_truth(one, item) for item in items for one in value.values())
    if isinstance(value, list | tuple):
        rows = [get_args(kind) for kind in kinds if get_origin(kind) in (tuple, list, Sequence)]
        return any(
            has_truth(one, row[place] if place < len(row) and row[-1] is not Ellipsis else row[0])
            for row in rows
            for place, one in enumerate(value)
        )
    return False


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the kinds of value that an annotation allows."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _alternatives(parts[0])
    elif origin in (Union, UnionType):
        for part in parts:
            yield from _alternatives(part)
    elif origin is Literal:
        yield from {type(part) for part in parts if isinstance(part, bool)}
    else:
        yield annotation


def explain(item: Any, cls: type[BaseModel], where: str) -> str:
    """Return the line of one of pydantic's errors.

    Args:
        item: of ``ValidationError.errors()``.
        cls: the class that refused.
        where: dotted prefix of the place in a larger config.
    """
    place = place_of(cls, item["loc"])
    dotted = ".".join(filter(None, [where, *place.path]))
    if item["type"] == "extra_forbidden":
        return f"{dotted}: unknown key{_hint(place)}"
    if item["type"] == "missing":
        return f"{dotted}: required, but not given"
    shown, below = item.get("input"), place.below
    given = f" (given: {shown!r})" if isinstance(shown, str | int | float | bool) else ""
    if below.named is not None and item["type"] in _NOT_A_CHOICE:
        wrong = shown.get(below.named) if isinstance(shown, Mapping) else shown
        if isinstance(shown, str) and shown in below.choices:
            return f"{dotted}: it holds several settings; write {dotted}.{below.named}={shown}"
        tell = "" if wrong is None else f" {wrong!r} is none of them{nearest(str(wrong), below.choices)}"
        known = listing(below.choices, 20)
        return f"{dotted}: say which one with {dotted}.{below.named} ({known});{tell}".rstrip(";")
    if below.config is not None and item["type"] == "model_type":
        keys = listing(below.config.model_fields, 20)
        return f"{dotted}: it holds several settings; write {dotted}.KEY=VALUE (keys: {keys}){given}"
    if item["type"] in ("tuple_type", "list_type") and given:
        return f"{dotted}: it is a list; write '{dotted}=[{shown}]'"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{dotted}: {message}{given}" if dotted else f"{message}{given}"  # settings that do not go together


def _hint(place: Place) -> str:
    """Return what an unknown key may have meant: here, or one level deeper, else what is known."""
    known = [] if place.holder is None else list(place.holder.model_fields)
    fields = {} if place.holder is None else place.holder.model_fields
    deeper = {
        f"{key}.{name}": name
        for key, info in fields.items()
        for name in getattr(_below(info.annotation, info.discriminator).config, "model_fields", {})
    }
    wrong = place.path[-1]
    same = next((path for path, name in deeper.items() if name == wrong), "")
    hint = f"; did you mean '{same}'?" if same else nearest(wrong, known)
    return hint or nearest(wrong, deeper) or (f" (known: {listing(known, 20)})" if known else "")
