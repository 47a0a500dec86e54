"""Hierarchies: which series (or variates) are sums of which others, as a sparse summing matrix.

Nodes are series ids, or names of target variates. The *bottoms* are sums of nothing else; every other node, an
*aggregate*, is a weighted sum of bottoms: y = S b with the summing matrix S [n, m], aggregates first (Athanasopoulos et
al. 2009, IJF 25:146-166, Eq. 1). Crossed (grouped) structures are the same thing with more rows. With
``aggregate: mean`` the rows of S hold 1 / (number of bottoms below); everything that follows from S holds for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal, TypeAlias

import numpy as np
import polars as pl
from pydantic import Field, model_validator
from scipy import sparse

from tsforge.core.config import Config
from tsforge.core.errors import ConfigError, DataError, listing, nearest
from tsforge.data.grid import Ints

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
BOTTOM = "bottom"


class HierarchyConfig(Config):
    """Which nodes add up to which.

    Either ``children`` names the members of every aggregate, or ``levels`` lets them follow from the ids: with a
    ``separator`` an id such as ``north/shop1`` has one part a level, the last of which is the bottom; without one the
    levels are static columns, whose values become nodes such as ``region=2``.
    """

    levels: tuple[str, ...] = ()
    """Names of the levels below the total, coarsest first."""
    separator: str | None = Field(None, min_length=1)
    """Splits ids into their parts."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Crossed structure: the combinations of levels that are summed, such as ``[[region], [product]]``. Without it the
    levels are nested: each is summed within all the coarser ones."""
    total: str | None = "total"
    """Name of the sum of everything (``levels`` only); None for no such node."""
    children: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Members of every aggregate, bottoms or other aggregates."""
    over: Literal["series", "variates"] = "series"
    """What the nodes are."""
    aggregate: Literal["sum", "mean"] = "sum"
    """An aggregate is the sum of the bottoms below it, or their unweighted mean."""
    given: Literal["error", "warn", "rebuild"] = "error"
    """Aggregates that the data holds but that are not what the bottoms make them: refuse, say so, or replace them."""
    tolerance: float = Field(1e-6, ge=0)
    """Largest difference that counts as equal, relative to the sum of absolute values of the bottoms."""

    @model_validator(mode="after")
    def _consistent(self) -> HierarchyConfig:
        if bool(self.levels) == bool(self.children):
            raise ValueError("give either levels or children")
        # by value, not by what was given: a stored config states every field, and must be read back
        if self.children and (self.separator or self.groups or self.total != "total"):
            raise ValueError("separator, groups and total have no effect with children; remove them")
        if self.over == "variates" and self.levels and not self.separator:
            raise ValueError("levels of variates are parts of their names; give a separator")
        for what, names in (("levels", self.levels), *(("a group", group) for group in self.groups)):
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(f"{what} names {listing(dict.fromkeys(twice))} twice")
        unknown = [name for group in self.groups for name in group if name not in self.levels]
        if unknown:
            raise ValueError(f"groups name unknown level(s) {listing(unknown)} (levels: {listing(self.levels)})")
        whole = [group for group in self.groups if not group or (self.separator and set(group) == set(self.levels))]
        if whole:
            raise ValueError("a group of no level is the total, one of all parts the bottom: leave them out of groups")
        return self


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Nodes and how they add up.

    Attributes:
        nodes: [n] names, aggregates first, bottoms last.
        levels: [n] name of each node's level; the bottoms' is ``bottom``.
        summing: sparse S [n, m]; its last m rows are the identity.
        parents: int64 [n], position of the next coarser node, -1 for a top; None when a node has more than one.
        over: whether the nodes are series or variates.
    """

    nodes: tuple[str, ...]
    levels: tuple[str, ...]
    summing: sparse.csr_array
    parents: Ints | None
    over: Literal["series", "variates"] = "series"

    @property
    def num_bottoms(self) -> int:
        """m, the number of bottoms."""
        return int(self.summing.shape[1])

    @property
    def num_aggregates(self) -> int:
        """n - m, the number of aggregates."""
        return len(self.nodes) - self.num_bottoms

    @property
    def bottoms(self) -> tuple[str, ...]:
        """Names of the bottoms in the order of the columns of S."""
        return self.nodes[self.num_aggregates :]

    @property
    def level_names(self) -> tuple[str, ...]:
        """Every level once, in the order of its first node."""
        return tuple(dict.fromkeys(self.levels))

    @cached_property
    def aggregation(self) -> sparse.csr_array:
        """Sparse A [n - m, m]: the aggregates in terms of the bottoms."""
        return sparse.csr_array(self.summing[: self.num_aggregates])

    @cached_property
    def constraints(self) -> sparse.csr_array:
        """Sparse C [n - m, n] = [I, -A]: C y = 0 for coherent y."""
        identity = sparse.eye_array(self.num_aggregates, format="csr")
        return sparse.csr_array(sparse.hstack([identity, -self.aggregation], format="csr"))

    def at_level(self, name: str) -> Ints:
        """Return the positions of the nodes of a level.

        Raises:
            ConfigError: there is no such level.
        """
        if name not in self.levels:
            raise ConfigError(f"unknown level '{name}'{nearest(name, self.level_names)} ({listing(self.level_names)})")
        return np.flatnonzero(np.array(self.levels) == name).astype(np.int64)

    def incoherence(self, values: Floats) -> Floats:
        """Return by how much each aggregate misses what its bottoms make it: [N, n] -> [N, n - m]."""
        return np.asarray((self.constraints @ values.T).T)


def build_hierarchy(config: HierarchyConfig, names: Sequence[str], static: pl.DataFrame | None = None) -> Hierarchy:
    """Return the hierarchy over the nodes that a data set has.

    Args:
        config: what adds up to what.
        names: series ids or variates at hand; aggregates may be among them, every bottom must be.
        static: ``series_id`` and static columns, for levels without a separator.

    Raises:
        DataError: bottoms are missing, ids do not have one part a level, nodes go round in a circle, occur twice or are
            counted twice in a sum, or a name of the data belongs nowhere.
    """
    if config.children:
        return _from_children(config, tuple(names))
    return _from_levels(config, tuple(names), static)


def is_aggregate(config: HierarchyConfig, name: str) -> bool:
    """Return whether a name of the data can only be an aggregate: one with children, or without a part a level."""
    if config.children:
        return name in config.children
    if config.separator:
        parts = name.split(config.separator)
        return "*" in parts or len(parts) != len(config.levels) or not all(parts)
    return name == config.total or any(name.startswith(f"{level}=") for level in config.levels)


def _from_children(config: HierarchyConfig, names: tuple[str, ...]) -> Hierarchy:
    children = config.children
    for parent, listed in children.items():
        if len(set(listed)) < len(listed):
            twice = [name for name in listed if listed.count(name) > 1]
            raise DataError(f"hierarchy: '{parent}' lists {listing(dict.fromkeys(twice))} twice")
        if not listed:
            raise DataError(f"hierarchy: '{parent}' has no children; leave it out, a bottom is not a sum")
    try:
        order = [name for name in TopologicalSorter(children).static_order() if name in children][::-1]
    except CycleError as error:
        raise DataError(f"hierarchy: nodes go round in a circle: {' <- '.join(error.args[1])}") from error
    bottoms = list(dict.fromkeys(name for listed in children.values() for name in listed if name not in children))
    _demand_bottoms(bottoms, names)
    lowest = set(bottoms)
    stray = [name for name in names if name not in children and name not in lowest]
    if stray:
        raise DataError(
            f"hierarchy: {len(stray)} of {len(names)} {config.over} belong nowhere ({listing(stray)}); add them to "
            "children, or leave them out of the data"
        )
    place = {name: position for position, name in enumerate(bottoms)}
    below: dict[str, Mapping[int, int]] = {name: {position: 1} for name, position in place.items()}
    depth: dict[str, int] = {}
    for name in order:  # coarse to fine
        depth.setdefault(name, 0)
        for child in children[name]:
            depth[child] = max(depth.get(child, 0), depth[name] + 1)
    for name in reversed(order):
        counts: dict[int, int] = {}
        for child in children[name]:
            for position, times in below[child].items():
                counts[position] = counts.get(position, 0) + times
        double = [bottoms[position] for position, times in counts.items() if times > 1]
        if double:
            raise DataError(f"hierarchy: the sum '{name}' counts {listing(double)} more than once")
        below[name] = counts
    order.sort(key=lambda name: depth[name])
    members = [np.array(sorted(below[name]), dtype=np.int64) for name in order]
    levels = tuple(f"level{depth[name]}" for name in order)
    parents = _parents({child: name for name in order for child in children[name]}, children, (*order, *bottoms))
    return _assemble(config, tuple(order), levels, members, tuple(bottoms), parents)


def _parents(parent: dict[str, str], children: Mapping[str, Sequence[str]], nodes: tuple[str, ...]) -> Ints | None:
    """Return the position of each node's parent, None when a node has several."""
    if sum(len(members) for members in children.values()) > len(parent):
        return None
    place = {name: position for position, name in enumerate(nodes)}
    return np.array([place[parent[name]] if name in parent else -1 for name in nodes], dtype=np.int64)


def _demand_bottoms(bottoms: Sequence[str], names: Sequence[str]) -> None:
    have = set(names)
    missing = [name for name in bottoms if name not in have]
    if missing:
        raise DataError(
            f"hierarchy: {len(missing)} of {len(bottoms)} bottoms are not in the data ({listing(missing)}"
            f"{nearest(missing[0], names)}); it has {listing(names, 10)}"
        )


def _from_levels(config: HierarchyConfig, names: tuple[str, ...], static: pl.DataFrame | None) -> Hierarchy:
    labels, bottoms = _labels_of_ids(config, names) if config.separator else _labels_of_static(config, names, static)
    nested = not config.groups
    if nested:
        last = len(config.levels) - 1 if config.separator else len(config.levels)
        groups = tuple(config.levels[: size + 1] for size in range(last))
    else:
        groups = config.groups
    order, levels, members = [], [], []
    if config.total is not None:
        order.append(config.total)
        levels.append(config.total)
        members.append(np.arange(len(bottoms), dtype=np.int64))
    for group in groups:
        keys = [_node_name(config, group, label) for label in labels]
        found = dict.fromkeys(keys)
        inside: dict[str, list[int]] = {name: [] for name in found}
        for position, key in enumerate(keys):
            inside[key].append(position)
        order += list(found)
        levels += [" x ".join(group) if not nested else group[-1]] * len(found)
        members += [np.array(inside[name], dtype=np.int64) for name in found]
    lowest, coarser = set(bottoms), set(order)
    clash = [name for name in order if order.count(name) > 1] if len(coarser) < len(order) else []
    clash += [name for name in order if name in lowest]
    if clash:
        raise DataError(f"hierarchy: the node(s) {listing(dict.fromkeys(clash))} occur twice; rename total or the ids")
    stray = [name for name in names if name not in coarser and name not in lowest]
    if stray:
        example = config.separator.join(config.levels) if config.separator else "an id"
        raise DataError(
            f"hierarchy: {len(stray)} of {len(names)} {config.over} are neither a bottom ({example}) nor one of the "
            f"aggregates {listing(order)}: {listing(stray)}"
        )
    parents = _nested_parents(members, len(bottoms)) if nested else None
    return _assemble(config, tuple(order), tuple(levels), members, bottoms, parents)


def _labels_of_ids(config: HierarchyConfig, names: tuple[str, ...]) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Return the part of each bottom at each level, and the bottoms: the ids with one part a level."""
    bottoms = tuple(name for name in names if not is_aggregate(config, name))
    if not bottoms:
        raise DataError(
            f"hierarchy: no id has {len(config.levels)} parts split by '{config.separator}' (levels "
            f"{listing(config.levels)}); the ids are {listing(names)}"
        )
    labels = [dict(zip(config.levels, name.split(config.separator), strict=True)) for name in bottoms]
    return labels, bottoms


def _labels_of_static(
    config: HierarchyConfig, names: tuple[str, ...], static: pl.DataFrame | None
) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Return the static values of each bottom at each level, and the bottoms: the series that are no aggregate."""
    have = [] if static is None else [name for name in static.columns if name != "series_id"]
    missing = [name for name in config.levels if name not in have]
    if static is None or missing:
        raise DataError(
            f"hierarchy: level(s) {listing(missing)} are no static column (the data has {listing(have) or 'none'}); "
            "declare them as static, or give a separator that splits the ids"
        )
    bottoms = tuple(name for name in names if not is_aggregate(config, name))
    rows = static.select("series_id", *config.levels).rows()
    known = {row[0]: {k: f"{k}={v:g}" for k, v in zip(config.levels, row[1:], strict=True)} for row in rows}
    _demand_bottoms(bottoms, list(known))
    if not bottoms:
        raise DataError("hierarchy: the data has no bottom series")
    return [known[name] for name in bottoms], bottoms


def _node_name(config: HierarchyConfig, group: tuple[str, ...], label: Mapping[str, str]) -> str:
    """Return ``north`` or ``north/shop`` (nested parts), ``*/shop`` (crossed parts), ``region=1/kind=2`` (static)."""
    if config.separator and config.groups:
        return config.separator.join(label[level] if level in group else "*" for level in config.levels)
    return (config.separator or "/").join(label[level] for level in config.levels if level in group)


def _nested_parents(members: list[Ints], num_bottoms: int) -> Ints:
    """Return each node's parent: the last coarser node over its bottoms; ``members`` run from coarse to fine."""
    above = np.full(num_bottoms, -1, dtype=np.int64)
    parents = []
    for position, inside in enumerate(members):
        parents.append(int(above[inside[0]]))
        above[inside] = position
    return np.concatenate([np.array(parents, dtype=np.int64), above])


def _assemble(
    config: HierarchyConfig,
    aggregates: tuple[str, ...],
    levels: tuple[str, ...],
    members: list[Ints],
    bottoms: tuple[str, ...],
    parents: Ints | None,
) -> Hierarchy:
    sizes = np.array([len(inside) for inside in members], dtype=np.int64)
    weights = np.repeat(1.0 / sizes if config.aggregate == "mean" else np.ones(len(sizes)), sizes)
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    columns = np.concatenate(members) if members else np.zeros(0, dtype=np.int64)
    top = sparse.csr_array((weights, columns, indptr), shape=(len(aggregates), len(bottoms)))
    summing = sparse.csr_array(sparse.vstack([top, sparse.eye_array(len(bottoms), format="csr")], format="csr"))
    return Hierarchy(
        nodes=(*aggregates, *bottoms),
        levels=(*levels, *[BOTTOM] * len(bottoms)),
        summing=summing,
        parents=parents,
        over=config.over,
    )
