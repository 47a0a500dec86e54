"""A registry that lists a package's modules by name and imports one only when it is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from tsforge.core.errors import ConfigError, listing, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to classes; names are module names of ``package`` plus an entry-point group for outside packages.

    Listing names imports nothing heavy, so ``tsforge models`` and error messages stay fast.
    """

    def __init__(self, kind: str, package: str, group: str, ignore: frozenset[str] = frozenset()) -> None:
        self.kind = kind
        self.package = package
        self.group = group
        self._ignore = ignore | {"registry"}
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that files the class under ``name``.

        Raises:
            ConfigError: ``name`` is taken by another class.
        """

        def decorate(cls: type[T]) -> type[T]:
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(
                    f"{self.kind} '{name}' is registered twice: {known.__module__} and {cls.__module__}; rename one"
                )
            self._classes[name] = cls
            return cls

        return decorate

    @contextmanager
    def borrowed(self, name: str, cls: type[T]) -> Iterator[None]:
        """File ``cls`` under ``name`` for the time of a block, for checks of classes that are not installed."""
        before = dict(self._classes)
        self._classes[name] = cls
        try:
            yield
        finally:
            self._classes.pop(name)
            self._classes.update({key: value for key, value in before.items() if key == name})

    def names(self) -> list[str]:
        """Return every known name, sorted, without importing the modules behind them."""
        package = importlib.import_module(self.package)
        own = {module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")}
        outside = {entry.name for entry in entry_points(group=self.group)}
        return sorted((own - self._ignore) | outside | set(self._classes))

    def get(self, name: str) -> type[T]:
        """Return the class filed under ``name``, importing its module if need be.

        Raises:
            ConfigError: nothing has that name (the message names the closest), or its module does not register it.
        """
        if name not in self._classes:
            names = self.names()
            if name not in names:
                raise ConfigError(f"unknown {self.kind} '{name}'{nearest(name, names)} (known: {listing(names, 30)})")
            outside = {entry.name: entry for entry in entry_points(group=self.group)}
            if name in outside:
                self._classes.setdefault(name, outside[name].load())
            else:
                importlib.import_module(f"{self.package}.{name}")
        if name not in self._classes:
            raise ConfigError(f"module {self.package}.{name} registers no {self.kind} of that name")
        return self._classes[name]
