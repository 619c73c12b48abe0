"""The text of a catalogue, YAML or JSON, as a list of entries. Pure.

Nothing in the text can do more than be read: YAML's tags mean nothing, its aliases, by which a few lines
become millions, are refused, every scalar stays the text that it is, and depth and number of entries have
bounds. A key that stands twice makes its own entry a bad one and no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import yaml

from router.discovery.catalog_entry import Duplicated
from router.discovery.catalog_fields import words
from router.errors import InputError

DEEPEST = 20
LONGEST_WHOLE = 30  # digits
LIST_KEYS = ("models", "data")  # under which a mapping holds the list; the second is OpenAI's
_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # the first needs libyaml, and is ten times as fast


def json_entries(content: bytes, most: int) -> list[Any]:
    """The entries of a JSON text; InputError if there is no list of at most `most`."""
    try:
        document = json.loads(_text(content), object_pairs_hook=_mapping, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else words(str(error))
        raise InputError(f"no JSON: {why}") from error
    return _entries(document, most)


def yaml_entries(content: bytes, most: int) -> list[Any]:
    """The entries of a YAML text; InputError if there is no list of at most `most`."""
    try:
        document = _document(_text(content))
    except yaml.YAMLError as error:
        raise InputError(f"no valid YAML: {_one_line(error)}") from error
    return _entries(document, most)


def _whole(digits: str) -> float:
    """The number, or what is none if it is so long that Python would refuse the whole text for it."""
    return int(digits) if len(digits) <= LONGEST_WHOLE else float("inf")


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"no UTF-8 text at byte {error.start}") from error


def _entries(document: Any, most: int) -> list[Any]:
    if isinstance(document, dict):
        document = next((document[key] for key in LIST_KEYS if key in document), document)
    if not isinstance(document, list):
        raise InputError(f"it holds no list of models, neither at its top nor under {' or '.join(LIST_KEYS)}")
    if len(document) > most:
        raise InputError(f"it holds {len(document)} entries, and at most {most} are read (max_models)")
    return document


def _mapping(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any] | Duplicated:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            return Duplicated(words(key, 60))
        found[key] = value
    return found


def _document(text: str) -> Any:
    """The first document, built from the parser's events and so without recursion."""
    open_nodes: list[tuple[Callable[[list[Any]], Any], list[Any]]] = [(list, [])]
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise InputError(
                f"{_line(event)}: an alias (*{words(event.anchor, 30)}); write out what it means"
            )
        if isinstance(event, yaml.ScalarEvent):
            open_nodes[-1][1].append(event.value)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            if len(open_nodes) > DEEPEST:
                raise InputError(f"{_line(event)}: nested more than {DEEPEST} deep")
            open_nodes.append((_yaml_mapping if isinstance(event, yaml.MappingStartEvent) else list, []))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            build, parts = open_nodes.pop()
            open_nodes[-1][1].append(build(parts))
    documents = open_nodes[0][1]
    if len(documents) > 1:
        raise InputError("it holds more than one YAML document")
    return documents[0] if documents else None


def _yaml_mapping(parts: list[Any]) -> dict[str, Any] | Duplicated:
    keys = [key if isinstance(key, str) else f"({type(key).__name__})" for key in parts[::2]]
    return _mapping(zip(keys, parts[1::2], strict=True))


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}" if event.start_mark else "somewhere"


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(words(str(error), 300).split("?"))
