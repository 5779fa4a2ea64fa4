"""`Registry`, a table of extensible parts by name, such as algorithms, rewards or optimizers."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import Any, Self, TypeVar

from rlhf.common.names import did_you_mean
from rlhf.common.plugins import current_plugin
from rlhf.common.ranges import UnmetConditionError
from rlhf.errors import UserError

T = TypeVar("T")


class Registry(dict[str, T]):
    """Entries by name: those of the toolkit, and those that plug-ins add.

    Args:
        what: What an entry is, for messages, such as "algorithm".
        entries: The entries of the toolkit.
    """

    def __init__(self, what: str, entries: dict[str, T] | None = None) -> None:
        super().__init__(entries or {})
        self.what = what
        self.sources: dict[str, str] = {}
        """Name -> file or module of the code that added the entry, for entries of plug-ins."""

    def add(self, name: str, entry: T, definition: Any) -> None:
        """Add an entry. The same file or module can replace its entry, as in a notebook.

        Args:
            name: Name of the entry.
            entry: The entry.
            definition: Function or class of the entry, from which its source is determined.

        Raises:
            UserError: The name is not a text or is empty, or different code has an entry of this
                name.
        """
        check_and_record_new_name(self.what, name, self, self.sources, definition)
        self[name] = entry

    def require(self, name: str) -> T:
        """Return an entry.

        Raises:
            UserError: There is no entry of this name.
        """
        if name not in self:
            hint = did_you_mean(name, self) or f"; known: {', '.join(self)}"
            raise UserError(f"unknown {self.what} {name!r}{hint}")
        return self[name]

    def copy(self) -> Self:
        """Return a copy, which can be changed independently."""
        copied = type(self)(self.what, dict(self))
        copied.sources = dict(self.sources)
        return copied


def check_and_record_new_name(
    what: str, name: str, known_names: Container[str], sources: dict[str, str], definition: Any
) -> None:
    """Check the name of a new entry of a table, and record its source in ``sources``.

    Args:
        what: What an entry is, for the message.
        name: Name of the new entry.
        known_names: Names of the existing entries.
        sources: Name -> source, for the entries of plug-ins.
        definition: Function or class of the new entry.

    Raises:
        UserError: The name is not a text or is empty, or different code has an entry of this name.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"the name of a new {what} must be a text that is not empty, got {name!r}")
    source = _source_of(definition)
    if name in known_names and sources.get(name) != source:
        owner = sources.get(name, "the toolkit")
        raise UserError(f"{what} {name!r} exists already in {owner}: choose another name")
    if source is not None:
        sources[name] = source


class OneOf:
    """Annotation of a configuration key whose value is a name in a registry.

    >>> Annotated[str, OneOf(OPTIMIZERS)]  # doctest: +SKIP
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return the schema by which pydantic checks a value."""
        check = {"type": "no-info", "function": self._check}
        return {"type": "function-after", "function": check, "schema": handler(source)}

    def _check(self, name: str) -> str:
        if name not in self.registry:
            *names, last = map(repr, self.registry)
            raise UnmetConditionError(f"{', '.join(names)} or {last}" if names else last)
        return name


def _source_of(definition: Any) -> str | None:
    """Return the plug-in, file or module that adds code; None for code of the toolkit."""
    name = getattr(definition, "__module__", None) or type(definition).__module__
    if name.partition(".")[0] == "rlhf":
        return None
    return current_plugin() or getattr(sys.modules.get(name), "__file__", None) or name
