"""Composes JSON that is valid by a JSON schema, for answers with a format and for calls of tools."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 24
_FORMATS: Mapping[str, str] = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT5M",
    "email": "someone@example.org",
    "hostname": "example.org",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.org/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
_Schema = Mapping[str, Any]


class UnsupportedSchemaError(ValueError):
    """No value can be composed for the schema."""


def compose_json(schema: Any, text: str) -> Any:
    """Returns a value of the schema whose free texts are `text`. Raises UnsupportedSchemaError."""
    return _Composer(schema, text).value(schema, 0)


class _Composer:
    def __init__(self, root: Any, text: str) -> None:
        self._root = root
        self._text = text

    def value(self, schema: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise UnsupportedSchemaError("the schema is recursive or nested too deep")
        if schema is True or schema == {}:
            return self._text
        if not isinstance(schema, dict):
            raise UnsupportedSchemaError(f"no value is valid by the schema {schema!r}")
        schema = self._flat(schema)
        for key in ("const", "default"):
            if key in schema:
                return schema[key]
        return schema["enum"][0] if schema.get("enum") else self._typed(_kind(schema), schema, depth)

    def _flat(self, schema: _Schema) -> dict[str, Any]:
        """Merges what the schema refers to into it, and one of its alternatives."""
        for _ in range(MAX_DEPTH):
            parts = [self._resolve(schema["$ref"])] if "$ref" in schema else []
            parts += [*schema.get("allOf", ()), *schema.get("anyOf", ())[-1:], *schema.get("oneOf", ())[-1:]]
            if not parts:
                return dict(schema)
            schema = {
                key: value for key, value in schema.items() if key not in {"$ref", "allOf", "anyOf", "oneOf"}
            }
            for part in parts:
                schema = _merged(schema, part)
        raise UnsupportedSchemaError("the schema is recursive or nested too deep")

    def _typed(self, kind: str, schema: _Schema, depth: int) -> Any:
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            return self._array(schema, depth)
        if kind == "string":
            return self._string(schema)
        if kind in {"number", "integer"}:
            return _number(kind, schema)
        return {"boolean": True, "null": None}[kind]

    def _object(self, schema: _Schema, depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        names = schema.get("required", properties if depth < 2 else ())
        return {name: self.value(properties.get(name, True), depth + 1) for name in names}

    def _array(self, schema: _Schema, depth: int) -> list[Any]:
        first = schema.get("prefixItems", [])
        size = max(schema.get("minItems", min(1, schema.get("maxItems", 1))), 0)
        if schema.get("uniqueItems"):
            size = min(size, 1)
        items = [self.value(item, depth + 1) for item in first[:size]]
        return items + [self.value(schema.get("items", True), depth + 1) for _ in range(size - len(items))]

    def _string(self, schema: _Schema) -> str:
        text = _FORMATS.get(schema.get("format", ""), self._text)
        text = text.ljust(schema.get("minLength", 0), ".")
        return text[: schema["maxLength"]] if "maxLength" in schema else text

    def _resolve(self, reference: str) -> Any:
        found = self._root
        for key in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
            found = found.get(key) if isinstance(found, dict) else None
        if not reference.startswith("#") or found is None:
            raise UnsupportedSchemaError(f"the schema has no {reference!r}")
        return found


def _kind(schema: _Schema) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((each for each in kind if each != "null"), "null")
    if kind is None:
        kind = "object" if "properties" in schema else "array" if "items" in schema else "string"
    if kind not in {"object", "array", "string", "number", "integer", "boolean", "null"}:
        raise UnsupportedSchemaError(f"{kind!r} is not a type of JSON")
    return str(kind)


def _number(kind: str, schema: _Schema) -> float:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    step = 1 if kind == "integer" else 0.5
    if schema.get("exclusiveMinimum") is not None:
        low = max(low, schema["exclusiveMinimum"] + step)
    if schema.get("exclusiveMaximum") is not None:
        high = min(high, schema["exclusiveMaximum"] - step)
    value = min(max(1, low), high)
    multiple = schema.get("multipleOf")
    if multiple:
        value = math.ceil(value / multiple) * multiple
    return math.ceil(value) if kind == "integer" else float(value)


def _merged(first: _Schema, second: Any) -> dict[str, Any]:
    if not isinstance(second, dict):
        return dict(first)
    merged = {**first, **second}
    if "properties" in first and "properties" in second:
        merged["properties"] = {**first["properties"], **second["properties"]}
    if "required" in first and "required" in second:
        merged["required"] = [*first["required"], *second["required"]]
    return merged
