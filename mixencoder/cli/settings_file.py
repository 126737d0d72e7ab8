"""Settings in YAML, as `train` takes them: plain values alone, small, and refused by line where they are anything else.

YAML can do more than settings need: aliases that unfold to any size, tags that make objects, keys named twice.
"""

from pathlib import Path
from typing import Any

import yaml

from mixencoder.errors import DataError

_MOST_BYTES = 2**20
_DEEPEST = 20


class _PlainLoader(yaml.SafeLoader):
    """Reads numbers, texts, lists and mappings; neither aliases nor tags, and dates as the texts that they are."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (yaml's own form)
        first: [pair for pair in resolvers if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse what unfolds, nests deeper than settings do, or asks for objects."""
        event = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            raise _Refused("aliases (*name) are not read; write the value out", event.start_mark)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _Refused("tags (!name) are not read; write a plain value", event.start_mark)
        if self._depth >= _DEEPEST:
            raise _Refused(f"values nest deeper than {_DEEPEST} levels", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse keys that are no texts or numbers, or come twice."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key is no plain name", key.start_mark)
            if (name := self.construct_object(key)) in seen:
                raise _Refused(f"{name} is set twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


class _Refused(yaml.MarkedYAMLError):
    """YAML that is valid and not read here."""

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
        raise DataError(f"{path}: the field {wrong[0]!r} is no name; expected fields with values")
    return fields


def parse_value(text: str, where: str) -> Any:
    """Return what a YAML text spells.

    Raises:
        DataError: it spells nothing that is read here; the message starts with where.
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
        # numbers of thousands of digits, for one
        raise DataError(f"{where} cannot be read: {error}") from error
