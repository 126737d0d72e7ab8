"""Read YAML settings of `train`: small files of plain values; errors name the line.

Other features of YAML are rejected: aliases that expand to any size, tags that make objects, keys set twice.
"""

from pathlib import Path
from typing import Any

import yaml

from mixencoder.errors import DataError

_MOST_BYTES = 2**20
_DEEPEST = 20


class _PlainLoader(yaml.SafeLoader):
    """Reads numbers, texts, lists and mappings, but no aliases or tags; dates stay texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (yaml's own form)
        first: [pair for pair in resolvers if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Raise on aliases, on tags, and on values nested too deep."""
        event = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            raise _Rejected("aliases (*name) are not read; write the value out", event.start_mark)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _Rejected("tags (!name) are not read; write a plain value", event.start_mark)
        if self._depth >= _DEEPEST:
            raise _Rejected(f"values nest deeper than {_DEEPEST} levels", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raise on keys that are lists or mappings, or are set twice."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Rejected("a key is not a plain name", key.start_mark)
            if (name := self.construct_object(key)) in seen:
                raise _Rejected(f"{name} is set twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


class _Rejected(yaml.MarkedYAMLError):
    """Valid YAML that settings may not use."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(None, None, problem, mark)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the fields of a YAML file.

    Raises:
        DataError: it cannot be read, or holds something else; the message names file and line.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(raw) > _MOST_BYTES:
        raise DataError(f"{path} has more than {_MOST_BYTES:,} bytes; expected a file of settings")
    fields = parse_value(text, str(path))
    if not isinstance(fields, dict):
        raise DataError(f"{path} holds a {type(fields).__name__}; expected fields with values")
    if wrong := [name for name in fields if not isinstance(name, str)]:
        raise DataError(f"{path}: the field {wrong[0]!r} is not a name; expected fields with values")
    return fields


def parse_value(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        DataError: the text is not valid, or its value is not plain; the message starts with where.
    """
    try:
        # the loader is a safe one
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise DataError(f"{where}{line}: {problem}") from error
    except (ValueError, RecursionError) as error:
        # for example a number with thousands of digits
        raise DataError(f"{where} cannot be read: {error}") from error
