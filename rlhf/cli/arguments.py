"""Parse a command line into config files, overrides, flags and positional arguments."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.load import parse_option_value
from rlhf.errors import UserError

FLAGS = ("--dry-run", "--print-config", "--help", "-h")
# Options whose value may be omitted: `--resume` is the same as `--resume true`.
OPTIONAL_VALUE_FLAGS = ("resume", "overwrite", "json", "blind")


@dataclass(frozen=True)
class Arguments:
    """Parsed arguments of a command."""

    positional: tuple[str, ...]
    """Positional arguments."""
    files: tuple[str, ...]
    """Values of --config, in order."""
    overrides: tuple[tuple[str, Any], ...]
    """Pairs of a dotted key and its value."""
    flags: frozenset[str] = frozenset()
    """The flags on the command line, a subset of FLAGS."""

    def has_any_flag(self, *flags: str) -> bool:
        """Return whether at least one of the flags is on the command line."""
        return not self.flags.isdisjoint(flags)

    def bind_positional_to_keys(
        self, command: str, keys: Sequence[str], config_class: type
    ) -> list[Arguments]:
        """Replace positional arguments by overrides of configuration keys.

        If the last key is a list, it receives all remaining arguments. If the command has only one
        key, and the key is not a list, the command is called once for each argument. If ``keys``
        contains "config", the positional arguments are config files.

        Args:
            command: Name of the command, for the error message.
            keys: Configuration keys that positional arguments set, in order.
            config_class: Configuration class of the command.

        Returns:
            The arguments of each call of the command, without positional arguments.

        Raises:
            UserError: There are more arguments than keys.
        """
        words = list(self.positional)
        if "config" in keys:
            return [dataclasses.replace(self, positional=(), files=(*words, *self.files))]
        if (
            words
            and keys
            and typing.get_origin(typing.get_type_hints(config_class)[keys[-1]]) is list
        ):
            head, rest = words[: len(keys) - 1], words[len(keys) - 1 :]
            return [self._replace_positional_by_overrides(zip(keys, [*head, rest], strict=False))]
        if len(keys) == 1 and len(words) > 1:
            return [self._replace_positional_by_overrides([(keys[0], word)]) for word in words]
        if len(words) > len(keys):
            raise UserError(
                f"{command}: unexpected argument {words[-1]!r}: write options as --key value"
            )
        return [self._replace_positional_by_overrides(zip(keys, words, strict=False))]

    def _replace_positional_by_overrides(self, pairs: Iterable[tuple[str, Any]]) -> Arguments:
        return dataclasses.replace(self, positional=(), overrides=(*pairs, *self.overrides))


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Parse ``--config FILE``, ``--a.b value`` or ``--a.b=value``, flags and positional arguments.

    The values of options are parsed as YAML.

    Raises:
        UserError: An option has no value, or its value cannot be encoded in UTF-8, or begins with a
            brace or a bracket but is not valid YAML.
    """
    positional: list[str] = []
    files: list[str] = []
    overrides: list[tuple[str, Any]] = []
    flags: set[str] = set()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in FLAGS:
            flags.add(word)
            continue
        if not word.startswith("--"):
            positional.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if (
            not equals
            and key in OPTIONAL_VALUE_FLAGS
            and (not rest or rest[0] not in ("true", "false"))
        ):
            value = "true"
        elif not equals:
            if not rest:
                raise UserError(f"--{key} needs a value")
            value = rest.pop(0)
        if key == "config":
            files.append(value)
        else:
            overrides.append((key.replace("-", "_"), parse_option_value(key, value)))
    return Arguments(tuple(positional), tuple(files), tuple(overrides), frozenset(flags))
