"""Read YAML files and dotted overrides, and convert them to frozen dataclasses.

In ``--config base.yaml --config overlay.yaml --a.b value``, the later file takes precedence over
the earlier one, and the option, at any position, over both. Mappings are merged key by key, and
lists are replaced. ``--rewards.0.weight 2`` changes a key of the first entry of a list.
"""

from __future__ import annotations

import copy
import functools
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import yaml
from typing_extensions import is_typeddict

from rlhf.common.files import is_utf8_encodable
from rlhf.common.names import closest_name, did_you_mean
from rlhf.common.plugins import load_plugins, resolve_code_references
from rlhf.common.ranges import convert_to_type, shortened_repr
from rlhf.common.text import first_secret_key
from rlhf.common.yaml_text import load_yaml, read_yaml_or_json
from rlhf.config.help import ConfigSection, class_with_fields_in, keys_of_class, sections_of
from rlhf.errors import UserError
from rlhf.runs.renamed import check_no_old_names

T = TypeVar("T")

ConfigSource = str | Path | Mapping[str, Any]
"""A configuration: the path of a YAML file, or its content."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file gives an empty mapping.

    A file whose name ends in ``.json`` is read as JSON.

    Raises:
        UserError: The file is missing, is not YAML, or contains no mapping.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"config file {path} does not exist{did_you_mean(path.name, siblings)}")
    try:
        tree = read_yaml_or_json(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file; --config expects a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(
            f"{location}: not valid YAML: {getattr(error, 'problem', error)}"
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(tree).__name__}")
    return tree


def merge_trees(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``base`` with the keys of ``over``.

    If a key has a mapping in ``base`` and in ``over``, the two mappings are merged; otherwise the
    value in ``over`` replaces that in ``base``.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge_trees(old, value) if both else value  # type: ignore[arg-type]
    return merged


def parse_option_value(key: str, text: str) -> Any:
    """Parse the text of a command-line option as YAML.

    A mapping must be written with braces, and a list with brackets. Other text that YAML would read
    as a mapping or a list, such as ``a: b``, is returned unchanged. Text that is not valid YAML and
    does not begin with a brace or a bracket is also returned unchanged.

    Raises:
        UserError: The text cannot be encoded in UTF-8, or it begins with a brace or a bracket but
            is not valid YAML.
    """
    if not is_utf8_encodable(text):
        raise UserError(f"--{key}: {text!r} cannot be encoded in UTF-8; remove invalid characters")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        if not text.startswith(("{", "[")):
            return text
        raise UserError(
            f"--{key}: {text!r} is not valid YAML; put text that begins with a brace or a bracket "
            "in additional quotes"
        ) from error
    bare = isinstance(value, dict | list) and not text.lstrip().startswith(("{", "["))
    return text if bare else value


def assemble_tree_and_load_plugins(
    sources: Sequence[ConfigSource], overrides: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
    """Merge configurations into one tree of plain data, apply the overrides, and load plug-ins.

    Relative paths of Python files refer to the folder of the configuration file, or to the working
    directory if a mapping or an override has them. The plug-ins are loaded here, because they can
    define what the configuration names.

    Raises:
        UserError: A file cannot be read, a dotted key is invalid, the tree contains a secret, or a
            plug-in cannot be loaded.
    """
    tree: dict[str, Any] = {}
    for source in sources:
        if isinstance(source, Mapping):
            part, folder = copy.deepcopy(dict(source)), Path()
        else:
            part, folder = read_yaml(source), Path(source).parent
        tree = merge_trees(tree, resolve_code_references(part, folder))
    for key, value in overrides:  # a later key may change a part of an earlier value
        set_dotted_key(tree, key, copy.deepcopy(value))
    tree = resolve_code_references(tree, Path())
    if key := first_secret_key(tree):
        raise UserError(
            f"{key}: a configuration must not contain an API key, a token or a password, because "
            "the configuration is written to files and reports: set an environment variable such "
            "as OPENAI_API_KEY or HF_TOKEN instead"
        )
    load_plugins(convert_to_type(list[str], tree.get("plugins") or [], "plugins"))
    return tree


def set_dotted_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key such as ``a.b.0.c``, in place; create missing mappings.

    Raises:
        UserError: A parent of the last part of the key is neither a mapping nor a list, or an index
            of a list is invalid.
    """
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_list_index(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(
                f"--{key}: {'.'.join(parents[: depth + 1])} is not a mapping; its value is {node!r}"
            )
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _list_index(items: list[Any], part: str, key: str) -> int:
    """Convert the part of a dotted key to an index of a list; raise UserError if it is invalid."""
    if not part.isdecimal() or int(part) >= len(items):
        raise UserError(
            f"--{key}: {part!r} is not an index of the list, which has {len(items)} entries"
        )
    return int(part)


def build_config(
    cls: type[T], tree: Mapping[str, Any], option_classes: Mapping[str, type] | None = None
) -> T:
    """Check a tree of plain data and convert it to a frozen dataclass.

    Args:
        cls: The configuration class; its ``__post_init__`` checks further conditions.
        tree: Plain data, as read from YAML.
        option_classes: Name of a field with a mapping -> class that defines the keys of the
            mapping, for example ``{"trainer": trl.SFTConfig}``. The keys and values of the mapping
            are checked against this class. The field of the result is still a mapping.

    Raises:
        UserError: A key is unknown or was renamed, or a value is invalid. For an unknown key, the
            message suggests a similar key.
    """
    option_classes = option_classes or {}
    sections = functools.partial(sections_of, cls, option_classes)
    check_no_old_names(tree)
    _check_keys(cls, tree, option_classes, "", sections)
    _check_utf8(tree)
    tree = copy.deepcopy(dict(tree))
    for name, options in option_classes.items():
        hints = typing.get_type_hints(options, include_extras=True)
        for key, value in tree.get(name, {}).items():
            tree[name][key] = convert_to_type(hints[key], value, f"{name}.{key}")
    return convert_to_type(cls, tree)


def _check_keys(
    cls: type,
    tree: Mapping[str, Any],
    option_classes: Mapping[str, type],
    prefix: str,
    sections: Callable[[], list[ConfigSection]],
) -> None:
    """Raise UserError for an unknown key, or for a wrong value that `convert_to_type` accepts.

    Nested mappings are checked too. ``prefix`` is the dotted path of ``tree`` in the whole
    configuration. ``sections`` returns all sections of the whole configuration, because the
    correct key may be in a different section.
    """
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            if is_typeddict(cls):  # other keys are the settings of a kind, which checks them
                continue
            raise UserError(f"unknown key {name!r}{_suggest_keys(key, hints, sections())}")
        if value is None and type(None) not in typing.get_args(hints[key]):
            required = any(known.name == key and known.required for known, _ in keys_of_class(cls))
            advice = "give one" if required else "remove the key to use its default"
            raise UserError(f"{name}: has no value; {advice}")
        section = option_classes.get(key) or class_with_fields_in(hints[key])
        if section is None or value is None:
            continue
        items = [(name, value)]
        if typing.get_origin(hints[key]) is list:
            if not isinstance(value, list):  # `convert_to_type` reports it
                continue
            items = [(f"{name}.{index}", item) for index, item in enumerate(value)]
        for path, item in items:
            if not isinstance(item, Mapping):
                known = ", ".join(typing.get_type_hints(section))
                known = shorten(known, 100, placeholder="...")
                raise UserError(
                    f"{path}: expected a mapping with {known}; got {shortened_repr(item)}"
                )
            _check_keys(section, item, {}, f"{path}.", sections)


def _check_utf8(value: Any) -> None:
    """Raise UserError if plain data contain text that cannot be encoded in UTF-8, at any depth."""
    if isinstance(value, str) and not is_utf8_encodable(value):
        raise UserError(
            f"{shortened_repr(value)} has an unpaired surrogate, so it cannot be encoded in UTF-8"
        )
    items = [*value, *value.values()] if isinstance(value, Mapping) else value
    if isinstance(items, list):
        for item in items:
            _check_utf8(item)


def _suggest_keys(key: Any, known_keys: Iterable[str], sections: list[ConfigSection]) -> str:
    """Return a suggestion for an unknown key, as the end of an error message.

    The suggestion contains the dotted keys whose last part is ``key``, first those with the fewest
    parts. If there are none, it is the most similar key. If no key is similar, it is the list of
    known keys.
    """
    paths = [row.name for section in sections for row in section.keys]
    paths.sort(key=lambda path: path.count("."))
    elsewhere = [path for path in paths if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {' or '.join(map(repr, elsewhere[:3]))}?"
    if close := did_you_mean(str(key), known_keys):
        return close
    leaves = {path.rpartition(".")[2]: path for path in reversed(paths)}
    match = closest_name(str(key), leaves, cutoff=0.75)
    if match:
        return f"; did you mean {leaves[match]!r}?"
    return f"; the keys are {shorten(', '.join(known_keys), 100, placeholder='...')}"
