"""Catalogs of models: a file, or the model list of an OpenAI-compatible provider.

A catalog is validated entry by entry: a bad entry is refused with its reason. A catalog that cannot be read
at all raises CatalogError, which names it and the next step, and does not affect the others.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
import yaml

from router.discovery.catalog_entry import Reading, read_entries, shown_value
from router.errors import CatalogError, InputError
from router.settings import (
    MEGABYTE,
    DiscoverySettings,
    FileCatalogSettings,
    ProviderCatalogSettings,
    own_or_shipped,
)

CONNECT_SECONDS = 5.0
MAX_DEPTH = 20  # levels of nested YAML
LIST_DEPTH = 3  # of open collections in which the list of entries is found
MIN_SECRET = 8  # characters; a shorter key could match innocent text
LIST_KEYS = ("models", "data")  # keys that may hold the list; OpenAI uses the second


class Catalog(Protocol):
    """A source of models."""

    @property
    def name(self) -> str:
        """Its name in search.yaml."""

    def read(self) -> Reading:
        """Reads the catalog; blocks. Raises CatalogError if it cannot be read at all."""


def open_catalogs(
    settings: DiscoverySettings, folder: Path, environment: Mapping[str, str] | None = None
) -> tuple[Catalog, ...]:
    """Opens the catalogs of search.yaml in order; skips a provider whose address is not set."""
    environment = os.environ if environment is None else environment
    catalogs: list[Catalog] = []
    for catalog in settings.catalogs:
        if isinstance(catalog, FileCatalogSettings):
            catalogs.append(FileCatalog(catalog, own_or_shipped(folder, catalog.path)))
        elif url := environment.get(catalog.url_variable, "").strip():
            key = environment.get(catalog.key_variable, "").strip()
            catalogs.append(ProviderCatalog(catalog, url, key or None))
    return tuple(catalogs)


@dataclass(frozen=True, slots=True)
class FileCatalog:
    """A file of models: JSON by its suffix, else YAML."""

    settings: FileCatalogSettings
    path: Path

    @property
    def name(self) -> str:
        """Its name in search.yaml."""
        return self.settings.name

    def read(self) -> Reading:
        """Reads the file. Raises CatalogError, which names it, if it cannot be read at all."""
        entries = json_entries if self.path.suffix.lower() == ".json" else yaml_entries
        try:
            return read_entries(entries(self._content(), self.settings.max_models), self.name)
        except InputError as error:
            hint = "Fix the file, or remove it from search.yaml."
            raise CatalogError(f"Catalog {self.name}: {self.path}: {error}. {hint}") from error

    def _content(self) -> bytes:
        limit = int(self.settings.max_megabytes * MEGABYTE)
        if not self.path.is_file():
            raise InputError("no such file")
        try:
            with self.path.open("rb") as file:
                content = file.read(limit + 1)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}") from error
        if len(content) > limit:
            raise InputError(f"larger than {self.settings.max_megabytes:g} MB (max_megabytes)")
        return content


@dataclass(frozen=True, slots=True)
class ProviderCatalog:
    """GET /models of an OpenAI-compatible provider. No text shows the key, even if the provider echoes it."""

    settings: ProviderCatalogSettings
    url: str = field(repr=False)
    key: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Its name in search.yaml."""
        return self.settings.name

    def read(self) -> Reading:
        """Fetches the list. Raises CatalogError with the cause and the setting to check."""
        try:
            address = self._address()
            # In its own thread, since the caller may have a running loop. aiohttp and not requests: its
            # deadline covers the whole reply, also one that arrives byte by byte.
            with ThreadPoolExecutor(1, thread_name_prefix=f"catalog-{self.name}") as thread:
                content = thread.submit(asyncio.run, self._fetch(address)).result()
            return read_entries(json_entries(self._without_key(content), self.settings.max_models), self.name)
        except InputError as error:
            raise CatalogError(f"Catalog {self.name}: {error}.") from None

    def _address(self) -> str:
        invalid = f"{self.settings.url_variable} is not an http(s) address; set it to the part before /models"
        try:
            parts = urlsplit(self.url)
            parts.port  # noqa: B018 - raises for an invalid port
        except ValueError:
            raise InputError(invalid) from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InputError(invalid)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(f"{self.settings.url_variable} must not contain a password, ? or #")
        key = self.key or ""
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"{self.settings.key_variable} contains characters that are invalid in a header")
        return f"{self.url.rstrip('/').removesuffix('/chat/completions')}/models"

    async def _fetch(self, address: str) -> bytes:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        timeout = aiohttp.ClientTimeout(total=self.settings.timeout_seconds, connect=CONNECT_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as session,
                session.get(address, headers=headers, allow_redirects=False) as response,
            ):
                self._check(response)
                return await self._body(response)
        except asyncio.TimeoutError:
            raise InputError(
                f"no complete reply within {self.settings.timeout_seconds:g} s; the next search tries again"
            ) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise InputError(
                f"the provider cannot be reached ({type(error).__name__}): check {self.settings.url_variable}"
            ) from None

    def _check(self, response: aiohttp.ClientResponse) -> None:
        status = response.status
        if status == 200 and response.headers.get("Content-Encoding", "identity") == "identity":  # noqa: PLR2004 - OK
            return
        if status == 200:  # noqa: PLR2004 - OK
            raise InputError("the provider compressed its list, which the request ruled out")
        if status in {401, 403}:
            raise InputError(f"the provider refuses the key ({status}): check {self.settings.key_variable}")
        if 300 <= status < 400:  # noqa: PLR2004 - redirects
            hint = f"redirects are not followed; set {self.settings.url_variable} to the final address"
            raise InputError(f"the provider answers {status}: {hint}")
        if status == 404:  # noqa: PLR2004 - not found
            hint = f"check {self.settings.url_variable}; usually /v1 is missing"
            raise InputError(f"no list of models at the provider's address (404): {hint}")
        raise InputError(f"the provider answers {status}; the next search tries again")

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        limit = int(self.settings.max_megabytes * MEGABYTE)
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) > limit:
                response.close()
                raise InputError(
                    f"the provider's list is larger than {self.settings.max_megabytes:g} MB (max_megabytes)"
                )
        return bytes(content)

    def _without_key(self, content: bytes) -> bytes:
        if self.key is None or len(self.key) < MIN_SECRET:
            return content
        return content.replace(self.key.encode(), b"***")


def json_entries(content: bytes, limit: int) -> list[Any]:
    """Parses JSON into at most `limit` entries. Raises InputError."""
    try:
        # int() raises for thousands of digits and would refuse the whole text; float() returns infinity.
        document = json.loads(_text(content), object_pairs_hook=_mapping, parse_int=float)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else shown_value(str(error))
        raise InputError(f"not valid JSON: {reason}") from error
    return _entries(document, limit)


def yaml_entries(content: bytes, limit: int) -> list[Any]:
    """Parses YAML into at most `limit` entries; every scalar stays text. Raises InputError.

    Tags are ignored. Aliases are refused, since a few of them can expand into millions of entries.
    """
    try:
        text = _text(content)
        _refuse_excess(text, limit)
        document = yaml.load(text, Loader=_EntryLoader)  # noqa: S506 - constructs text, lists and mappings only
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {shown_value(str(error), 300)}") from error
    return _entries(document, limit)


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 at byte {error.start}") from error


def _entries(document: Any, limit: int) -> list[Any]:
    if isinstance(document, dict):
        document = next((document[key] for key in LIST_KEYS if key in document), document)
    if not isinstance(document, list):
        raise InputError(f"no list of models at the top or under {' or '.join(LIST_KEYS)}")
    if len(document) > limit:
        raise InputError(f"more than {limit} entries (max_models)")
    return document


class _RepeatedKey(str):
    """Takes the place of a mapping in which a key occurs twice, so that only its own entry is refused."""

    __slots__ = ()


def _mapping(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any] | _RepeatedKey:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            return _RepeatedKey(f"a mapping with the key {shown_value(key, 30)} twice")
        found[key] = value
    return found


_Loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # ten times as fast where libyaml is installed


class _EntryLoader(_Loader):  # type: ignore[misc]
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:  # noqa: FBT001, FBT002 - inherited
        return _mapping(
            (str(self.construct_object(key)), self.construct_object(value, deep)) for key, value in node.value
        )


def _refuse_excess(text: str, limit: int) -> None:
    """Refuses, before anything is built, what would take far more memory than the text."""
    sizes = [0]  # nodes in each open collection
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"line {line}: an alias (*{shown_value(event.anchor, 30)}); write out its value")
        sizes[-1] += isinstance(event, yaml.NodeEvent)
        if len(sizes) <= LIST_DEPTH and sizes[-1] > 2 * limit:  # a mapping has two nodes per key
            raise InputError(f"more than {limit} entries (max_models)")
        if isinstance(event, yaml.CollectionStartEvent):
            sizes.append(0)
        elif isinstance(event, yaml.CollectionEndEvent):
            sizes.pop()
        if len(sizes) > MAX_DEPTH + 1:
            raise InputError(f"line {line}: nested more than {MAX_DEPTH} levels deep")
