"""From YAML files and dotted overrides to frozen dataclasses, with errors that name key and cure.

``--config base.yaml --config overlay.yaml --a.b value``: later wins. A mapping is merged key by
key, a list is replaced; ``--rewards.0.weight 2`` reaches into a list.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from rlhf.common.names import closest, nearest
from rlhf.config.help import dataclass_in, key_paths
from rlhf.errors import UserError
from rlhf.runs.renamed import renamed_key

if TYPE_CHECKING:
    import jsonargparse

T = TypeVar("T")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UserError: the file is missing, is not YAML, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"config file {path} does not exist{nearest(path.name, siblings)}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8; --config takes a YAML file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(tree).__name__}")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: ``1e-5`` is a number, which YAML 1.1 reads as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``: mappings merge, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def read_value(key: str, text: str) -> Any:
    """Read the text of an option as YAML; a mapping needs its braces, since text may have a colon.

    Raises:
        UserError: The text begins with a brace or a bracket and is not valid YAML.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        if not text.startswith(("{", "[")):
            return text
        raise UserError(
            f"--{key}: {text!r} is not valid YAML; text that begins with a brace or bracket needs "
            "quotes of its own"
        ) from error
    bare = isinstance(value, dict | list) and not text.lstrip().startswith(("{", "["))
    return text if bare else value


def assemble(files: Sequence[str | Path], overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Config files and overrides as one tree of plain data."""
    tree: dict[str, Any] = {}
    for file in files:
        tree = merge(tree, read_yaml(file))
    for key, value in overrides:
        set_key(tree, key, value)
    return tree


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.0.c`` in place.

    Raises:
        UserError: the path runs through a plain value or past the end of a list.
    """
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"--{key}: {'.'.join(parents[: depth + 1])} is {node!r}, not a mapping")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"--{key}: {part!r} is not an index of a list of {len(items)}")
    return int(part)


def build(cls: type[T], tree: Mapping[str, Any], extra: Mapping[str, type] | None = None) -> T:
    """Check a tree of plain data against a frozen dataclass and make it.

    Args:
        cls: the configuration class; its ``__post_init__`` checks what types cannot say.
        tree: plain data, as read from YAML.
        extra: mapping fields that are checked against a foreign class of options, for example
            ``{"trainer": trl.SFTConfig}``; only what the tree sets is kept.

    Raises:
        UserError: an unknown key (with the nearest right one), a wrong type, a bad value.
    """
    import jsonargparse  # takes half the time of `rlhf --help`, which builds nothing

    extra = extra or {}
    check_keys(cls, tree, extra)
    parser = _make_parser(cls, extra)
    try:
        parsed = parser.parse_object(copy.deepcopy(dict(tree)))  # it writes into its argument
        for name in extra:
            given = tree.get(name) or {}
            parsed[name] = {key: parsed[name][key] for key in given}
        made = cls(**vars(parser.instantiate(parsed)))
        return _as_written(made, tree, but=extra)
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(_one_line(str(error))) from error


def _as_written(made: Any, tree: Mapping[str, Any], but: Iterable[str] = ()) -> Any:
    """Put back values of no declared type: in them the parser reads a text "yes" as true."""
    hints = typing.get_type_hints(type(made))
    kept: dict[str, Any] = {}
    for key in tree.keys() - set(but):
        value, parsed = tree[key], getattr(made, key)
        if dataclass_in(hints[key]) is None:
            if _holds(hints[key], Any):
                kept[key] = copy.deepcopy(value)
        elif isinstance(value, list):
            kept[key] = [_as_written(*pair) for pair in zip(parsed, value, strict=True)]
        elif value is not None:
            kept[key] = _as_written(parsed, value)
    return dataclasses.replace(made, **kept)


def _holds(hint: Any, wanted: Any) -> bool:
    """Whether a type is another one, or made of it."""
    return hint is wanted or any(_holds(part, wanted) for part in typing.get_args(hint))


def _make_parser(cls: type, extra: Mapping[str, type]) -> jsonargparse.ArgumentParser:
    """The parser of one configuration class, for type checks."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(cls, None, skip=set(extra))
    for name, options in extra.items():
        parser.add_class_arguments(options, name, fail_untyped=False, instantiate=False)
    return parser


def check_keys(cls: type, tree: Mapping[str, Any], extra: Mapping[str, type]) -> None:
    """Refuse a key that no field has, at any depth of the tree.

    Raises:
        UserError: names the key, and the nearest right one: a key of the same section, or one of
            the same name in another section.
    """
    _check_section(cls, tree, extra, "", lambda: key_paths(cls, extra))


def _check_section(
    cls: type,
    tree: Mapping[str, Any],
    extra: Mapping[str, type],
    prefix: str,
    all_paths: Callable[[], list[str]],
) -> None:
    """``check_keys`` of one section; ``all_paths`` gives every key of the whole configuration."""
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            if new := renamed_key(prefix + str(key)):
                raise UserError(f"{prefix}{key} was renamed to {new}")
            raise UserError(f"unknown key {prefix + str(key)!r}{_hint(key, hints, all_paths())}")
        if value is None and key not in extra and not _holds(hints[key], type(None)):
            raise UserError(f"{prefix}{key}: has no value; leave the key out for its default")
        if key in extra and value is not None:
            if not isinstance(value, Mapping):
                raise UserError(f"{prefix}{key}: expected a mapping of options; got {value!r}")
            known = [f.name for f in dataclasses.fields(extra[key])]
            for option in value:
                if option not in known:
                    if new := renamed_key(f"{prefix}{key}.{option}"):
                        raise UserError(f"{prefix}{key}.{option} was renamed to {new}")
                    hint = _hint(option, known, all_paths())
                    raise UserError(f"unknown key {f'{prefix}{key}.{option}'!r}{hint}")
        elif inner := dataclass_in(hints[key]):
            items = value if isinstance(value, list) else [value]
            for index, item in enumerate(items):
                place = f"{prefix}{key}.{index}" if isinstance(value, list) else f"{prefix}{key}"
                if isinstance(item, Mapping):
                    _check_section(inner, item, {}, f"{place}.", all_paths)
                elif item is not None:
                    fields = ", ".join(field.name for field in dataclasses.fields(inner))
                    raise UserError(f"{place}: expected a mapping with {fields}; got {item!r}")


def _hint(key: Any, known: Iterable[str], paths: Iterable[str]) -> str:
    """The right key, as the end of an error message: by its name anywhere, or by its spelling."""
    elsewhere = [path for path in paths if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {' or '.join(map(repr, elsewhere[:3]))}?"
    if close := nearest(str(key), known):
        return close
    leaves = {path.rpartition(".")[2]: path for path in paths}
    match = closest(str(key), leaves, cutoff=0.75)
    return f"; did you mean {leaves[match]!r}?" if match else ""


def _one_line(message: str) -> str:
    """jsonargparse's many lines as one: the innermost reason, after the key it belongs to."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    keys = [match.group(1) for line in lines if (match := re.search(r'key "([^"]+)"', line))]
    noise = ("Does not validate", "Subtypes", "Errors:", "Given value", "Problem with given")
    reasons = [
        line
        for line in lines
        if not line.startswith((*noise, "Parser key")) and "NoneType" not in line
    ]
    reason = reasons[0] if reasons else lines[0]
    reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", reason).replace("typing.", "")
    reason = reason.replace("Expected a int", "Expected an int")
    given = re.search(r"^\s*Given value: (.*)$", message, re.MULTILINE)
    if given and given.group(1) not in reason and not given.group(1).startswith("Namespace("):
        reason += f". Got value: {given.group(1)}"
    key = ".".join(dict.fromkeys(keys))
    return f"{key}: {reason}" if key and not reason.startswith(key) else reason


def as_tree(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain data, ready for YAML."""
    return dataclasses.asdict(config)
