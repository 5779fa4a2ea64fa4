"""Read and write YAML with limits on size and depth, and without dates and octal numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from rlhf.common.files import is_utf8_encodable, read_json
from rlhf.errors import UserError

MAX_NODES = 100_000
"""Maximum number of keys and values in a YAML text, with aliases expanded."""
MAX_DEPTH = 50
"""Maximum nesting depth of mappings and lists."""


def load_yaml(text: str) -> Any:
    """Return the plain data in YAML text.

    Raises:
        yaml.YAMLError: The text is not YAML, a mapping repeats a key, a text has a lone surrogate,
            the nesting depth exceeds `MAX_DEPTH`, or the number of keys and values with aliases
            expanded exceeds `MAX_NODES`.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, RecursionError) as error:  # e.g. 5,000 digits or 1,000 nested brackets
        raise yaml.YAMLError(str(error) or type(error).__name__) from error


def read_yaml_or_json(path: Path) -> Any:
    """Return the plain data in a YAML file, or in a JSON file if its name ends in ``.json``.

    Raises:
        UserError: The file is a JSON file and cannot be parsed.
        yaml.YAMLError: The file is a YAML file and cannot be parsed (see `load_yaml`).
        UnicodeDecodeError: The file is a YAML file and not UTF-8 text.
    """
    return read_json(path) if path.suffix == ".json" else load_yaml(path.read_text("utf-8"))


def read_mapping_or_empty(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file that a run wrote, or {} if there is no file.

    Raises:
        UserError: The file cannot be read, or its content is not a mapping.
    """
    if not path.is_file():
        return {}
    try:
        tree = read_yaml_or_json(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}".splitlines()[0]) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping, got {type(tree).__name__}")
    return tree


def dump_yaml(tree: Any) -> str:
    """Return plain data as YAML text from which `load_yaml` reads the same data."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


_REPLACED_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("timestamp", "int", "float"))
_INT_PATTERN = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+))$")
_FLOAT_PATTERN = re.compile(
    r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """Loader with the floats of YAML 1.2, unique keys, and limits on size and depth.

    ``1e-5`` is read as a number, although it is a string in YAML 1.1. Dates, times such as ``1:30``
    and integers with a leading zero, such as ``010``, are read as text, although ``1:30`` and
    ``010`` are the integers 90 and 8 in YAML 1.1. Tags of types other than `_PLAIN_TAGS` are
    errors.
    """

    yaml_constructors: ClassVar = {
        tag: function
        for tag, function in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _PLAIN_TAGS
    }
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in rows if tag not in _REPLACED_TAGS]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check_and_count_nodes(node, {}, 0)
        return node


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text that `_Loader` would read as a number."""


for _tag, _pattern in (("int", _INT_PATTERN), ("float", _FLOAT_PATTERN)):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list("-+.0123456789"))
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"),
        list("-+.0123456789"),
    )


def _check_and_count_nodes(node: yaml.Node, counts: dict[int, int], depth: int) -> int:
    """Return the number of nodes in a value, including the value itself.

    Args:
        node: The value.
        counts: Node id -> number of nodes, which is extended, so that a node with several aliases
            is visited only once.
        depth: Number of mappings and lists that contain the value.

    Raises:
        yaml.YAMLError: A text has a lone surrogate, a mapping repeats a key, or the value exceeds a
            limit. A value that contains an alias of itself exceeds `MAX_DEPTH`.
    """
    if id(node) in counts:
        return counts[id(node)]
    children: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode) and not is_utf8_encodable(node.value):
        raise _yaml_error("a lone surrogate is not a character", node)
    if isinstance(node, yaml.MappingNode):
        keys = [key for key, _ in node.value]
        names = set()
        for key in keys:
            if isinstance(key.value, str):
                if (key.tag, key.value) in names:
                    raise _yaml_error(f"the key {key.value!r} is repeated", key)
                names.add((key.tag, key.value))
        children = [*keys, *(value for _, value in node.value)]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    if depth > MAX_DEPTH:
        raise _yaml_error(f"more than {MAX_DEPTH} nested mappings and lists", node)
    total = 1 + sum(_check_and_count_nodes(child, counts, depth + 1) for child in children)
    if total > MAX_NODES:
        raise _yaml_error(f"more than {MAX_NODES:,} values with aliases expanded", node)
    counts[id(node)] = total
    return total


def _yaml_error(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
