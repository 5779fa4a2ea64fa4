"""Generate `rlhf COMMAND --help`: configuration keys with types, descriptions and defaults.

The defaults in the help are the effective values, including those of the algorithm. Keys that have
no effect on the command are omitted.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Required

import docstring_parser
import yaml

from rlhf.common.ranges import has_fields, range_text
from rlhf.common.registry import OneOf
from rlhf.common.yaml_text import load_yaml

HELP_WIDTH = 96
"""Width of the help text in columns."""

TYPE_PLACEHOLDERS = {str: "TEXT", int: "INT", float: "FLOAT", bool: "true|false"}


@dataclasses.dataclass(frozen=True)
class ConfigKey:
    """A configuration key in the help."""

    name: str
    type: str
    required: bool
    default: Any
    description: str
    choices: tuple[str, ...] = ()
    """The values that the key can have; empty if it can have others."""

    def help_entry(self) -> str:
        """Return a line with name, type and default, followed by the wrapped description."""
        has_default = self.default is not dataclasses.MISSING
        value = f" = {_default_text(self.default)}" if has_default else ""
        head = f"  --{self.name} {self.type}{value}"
        body = textwrap.fill(
            self.description, HELP_WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8
        )
        return f"{head}\n{body}" if self.description else head


@dataclasses.dataclass(frozen=True)
class ConfigSection:
    """The keys of one configuration class, with a title."""

    title: str
    keys: list[ConfigKey]


def help_text(
    cls: type,
    *,
    command: str,
    summary: str,
    arguments: str = "",
    option_classes: Mapping[str, type] | None = None,
    defaults: Mapping[str, Any] | None = None,
    hidden_keys: Collection[str] = (),
    notes: Collection[str] = (),
) -> str:
    """Return the help of a command: first the required keys, then the other keys by section.

    Args:
        cls: The configuration class.
        command: The command, for example ``rlhf grpo``.
        summary: What the command does.
        arguments: Names of the positional arguments.
        option_classes: Name of a field with a mapping -> class that defines the keys of the
            mapping (see `build_config`).
        defaults: Dotted key -> effective default, for keys whose effective default differs from the
            default of the class.
        hidden_keys: Dotted keys to omit, because they have no effect on the command.
        notes: Text below the keys.
    """
    sections = [
        ConfigSection(
            section.title, [_with_effective_default(key, defaults or {}) for key in section.keys]
        )
        for section in sections_of(cls, option_classes or {})
    ]
    keys = [key for section in sections for key in section.keys if key.name not in hidden_keys]
    call = " ".join(["usage:", command, *([arguments] if arguments else [])])
    blocks = [f"{command}: {summary}", f"{call} [--config FILE ...] [--key value ...]"]
    if required := [key.help_entry() for key in keys if key.required]:
        blocks.append("\n".join(["Required:", *required]))
    for section in sections:
        rest = [
            k.help_entry() for k in section.keys if not k.required and k.name not in hidden_keys
        ]
        if rest:
            blocks.append("\n".join([section.title, *rest]))
    return "\n\n".join([*blocks, *notes])


def _with_effective_default(key: ConfigKey, defaults: Mapping[str, Any]) -> ConfigKey:
    if key.name not in defaults:
        return key
    return dataclasses.replace(key, default=defaults[key.name], required=False)


def sections_of(
    cls: type, option_classes: Mapping[str, type], prefix: str = ""
) -> list[ConfigSection]:
    """Return the keys of a configuration class in sections.

    Args:
        cls: A dataclass or a `TypedDict`.
        option_classes: Name of a field with a mapping -> class that defines the keys of the
            mapping.
        prefix: Dotted path of ``cls`` in the whole configuration, with a final dot. The name of
            every key begins with this prefix.

    Returns:
        The section of the keys of ``cls`` itself, followed by a section for each nested
        configuration.
    """
    class_keys: list[ConfigKey] = []
    nested: list[ConfigSection] = []
    foreign = cls in option_classes.values()
    for field, hint in keys_of_class(cls):
        name = f"{prefix}{field.name}"
        key = dataclasses.replace(field, name=name)
        inner = option_classes.get(field.name) or class_with_fields_in(hint)
        if inner is None or foreign:
            class_keys.append(key)
            continue
        is_list = typing.get_origin(hint) is list
        if is_list:
            class_keys.append(dataclasses.replace(key, type="LIST"))
        first, *rest = sections_of(inner, option_classes, f"{name}.{'N.' if is_list else ''}")
        # Keys of list items are shown as optional because the list may be empty.
        optional = is_list or not key.required
        keys = [dataclasses.replace(k, required=k.required and not optional) for k in first.keys]
        nested += [ConfigSection(f"{name}: {key.description}", keys), *rest]
    return [ConfigSection(prefix or "Options:", class_keys), *nested]


def keys_of_class(cls: type) -> Iterator[tuple[ConfigKey, Any]]:
    """Yield each key of a dataclass or a `TypedDict`, with its type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    descriptions: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if has_fields(base):
            parsed = docstring_parser.parse_from_object(base)
            descriptions |= {p.arg_name.strip("`"): p.description or "" for p in parsed.params}
    if not dataclasses.is_dataclass(cls):  # a TypedDict has no defaults
        for name, hint in hints.items():
            required = typing.get_origin(hint) is Required
            hint = typing.get_args(hint)[0] if required else hint
            yield _make_key(name, hint, required, dataclasses.MISSING, descriptions[name]), hint
        return
    for field in dataclasses.fields(cls):
        if field.init:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            description = field.metadata.get("help") or descriptions.get(field.name, "")
            required = default is dataclasses.MISSING
            hint = hints[field.name]
            yield _make_key(field.name, hint, required, default, str(description)), hint


def _make_key(name: str, hint: Any, required: bool, default: Any, description: str) -> ConfigKey:
    text = " ".join(description.split())
    return ConfigKey(name, _type_text(hint), required, default, text, _choices(hint))


def _type_text(hint: Any) -> str:
    """Format a type for the help, such as ``INT>=1``, with the range of a number."""
    if typing.get_origin(hint) is typing.Annotated:
        for names in hint.__metadata__:
            if isinstance(names, OneOf):
                return "|".join(names.registry)
        return _type_text(typing.get_args(hint)[0]) + range_text(hint)
    if hint in TYPE_PLACEHOLDERS:
        return TYPE_PLACEHOLDERS[hint]
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "|".join(_default_text(a) if isinstance(a, bool) else str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_text(a) for a in arguments if a is not type(None))
    return "MAPPING" if origin is dict else "LIST" if origin in (list, tuple) else "VALUE"


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the values that a type allows, as texts; empty if it allows other values."""
    if typing.get_origin(hint) is typing.Annotated:
        for names in hint.__metadata__:
            if isinstance(names, OneOf):
                return tuple(names.registry)
        return _choices(typing.get_args(hint)[0])
    if hint is bool:
        return ("true", "false")
    if typing.get_origin(hint) is typing.Literal:
        return tuple(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arguments = [a for a in typing.get_args(hint) if a is not type(None)]
        return _choices(arguments[0]) if len(arguments) == 1 else ()
    return ()


def _default_text(value: Any) -> str:
    """Format a default as YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _is_plain_yaml(value) else json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_default_text, value))}]"
    return str(value)


def _is_plain_yaml(text: str) -> bool:
    """Return whether YAML reads a text without quotes as this text."""
    try:
        return text.isprintable() and load_yaml(text) == text
    except yaml.YAMLError:
        return False


def class_with_fields_in(hint: Any) -> type | None:
    """Return the first class with fields X in ``X``, ``X | None``, ``list[X]`` or a union of these.

    A class with fields is a dataclass or a `TypedDict`. The result is None if the type contains
    none.
    """
    if has_fields(hint):
        return hint
    if typing.get_origin(hint) in (list, typing.Union, types.UnionType):
        for argument in typing.get_args(hint):
            if inner := class_with_fields_in(argument):
                return inner
    return None
