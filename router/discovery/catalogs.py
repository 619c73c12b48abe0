"""Catalogues of models, behind one small interface: a file, and an OpenAI-compatible provider's list.

A catalogue is believed entry by entry: what cannot be is refused with its reason, and the rest is read. One
that cannot be read at all is a CatalogError that names it and what to do, and no other catalogue's trouble.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp

from router.discovery.catalog_entry import CatalogModel, Reading, Refusal, merged, read_entries
from router.discovery.catalog_text import json_entries, yaml_entries
from router.discovery.model_names import same_model
from router.errors import CatalogError, InputError
from router.settings import (
    DEFAULT_CONFIG_FOLDER,
    MEGABYTE,
    DiscoverySettings,
    FileCatalogSettings,
    ProviderCatalogSettings,
)

__all__ = [
    "Catalog",
    "CatalogModel",
    "FileCatalog",
    "ProviderCatalog",
    "Reading",
    "Refusal",
    "merged",
    "open_catalogs",
    "same_model",
]

CONNECT_SECONDS = 5.0
SHORTEST_SECRET = 8  # a shorter key would be found in innocent text


class Catalog(Protocol):
    """Something that lists models."""

    @property
    def name(self) -> str:
        """What search.yaml calls it."""

    def read(self) -> Reading:
        """What it lists now; CatalogError if it cannot be read at all. Blocks."""


def open_catalogs(
    settings: DiscoverySettings, folder: Path, environment: Mapping[str, str] | None = None
) -> tuple[Catalog, ...]:
    """The catalogues of search.yaml in its order; a provider whose address is not set is left out."""
    environment = os.environ if environment is None else environment
    catalogues: list[Catalog] = []
    for catalogue in settings.catalogs:
        if isinstance(catalogue, FileCatalogSettings):
            catalogues.append(FileCatalog(catalogue, _place_of(catalogue.path, folder)))
        elif url := environment.get(catalogue.url_variable, "").strip():
            key = environment.get(catalogue.key_variable, "").strip()
            catalogues.append(ProviderCatalog(catalogue, url, key or None))
    return tuple(catalogues)


def _place_of(path: str, folder: Path) -> Path:
    """The file in the folder, or the shipped one where that has none."""
    own, shipped = folder / path, DEFAULT_CONFIG_FOLDER / path
    return shipped if not own.exists() and shipped.exists() else own


@dataclass(frozen=True, slots=True)
class FileCatalog:
    """A file of models: JSON by its suffix, else YAML."""

    settings: FileCatalogSettings
    path: Path

    @property
    def name(self) -> str:
        """What search.yaml calls it."""
        return self.settings.name

    def read(self) -> Reading:
        """What the file lists now; CatalogError names it if it cannot be read at all."""
        entries = json_entries if self.path.suffix.lower() == ".json" else yaml_entries
        try:
            return read_entries(entries(self._content(), self.settings.max_models), self.name)
        except InputError as error:
            hint = "Put the file right, or take it out of search.yaml."
            raise CatalogError(f"Catalog {self.name}: {self.path}: {error}. {hint}") from error

    def _content(self) -> bytes:
        limit = int(self.settings.max_megabytes * MEGABYTE)
        if not self.path.is_file():
            raise InputError("there is no such file")
        try:
            with self.path.open("rb") as file:
                content = file.read(limit + 1)
        except OSError as error:
            raise InputError(f"it cannot be read: {error.strerror}") from error
        if len(content) > limit:
            raise InputError(f"larger than {self.settings.max_megabytes:g} MB (max_megabytes)")
        return content


@dataclass(frozen=True, slots=True)
class ProviderCatalog:
    """An OpenAI-compatible provider's GET /models. The key is in no text, whatever the provider answers."""

    settings: ProviderCatalogSettings
    url: str = field(repr=False)
    key: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What search.yaml calls it."""
        return self.settings.name

    def read(self) -> Reading:
        """What the provider lists now; CatalogError says why it cannot be read and what to set right."""
        try:
            address = self._address()
            # In a thread of its own, since the caller may have a running loop. aiohttp and not requests: its
            # deadline holds for the whole reply, also for one that comes byte by byte.
            with ThreadPoolExecutor(1, thread_name_prefix=f"catalogue-{self.name}") as thread:
                content = thread.submit(asyncio.run, self._fetch(address)).result()
            return read_entries(json_entries(self._without_key(content), self.settings.max_models), self.name)
        except InputError as error:
            raise CatalogError(f"Catalog {self.name}: {error}.") from None

    def _address(self) -> str:
        wrong = f"{self.settings.url_variable} is no http(s) address; set it to the part before /models"
        try:
            parts = urlsplit(self.url)
            parts.port  # noqa: B018 - raises for what is no port
        except ValueError:
            raise InputError(wrong) from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise InputError(wrong)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(f"{self.settings.url_variable} must hold neither password nor ? nor #")
        key = self.key or ""
        if not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"{self.settings.key_variable} holds characters that no header can carry")
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
                f"no whole reply within {self.settings.timeout_seconds:g} s; the next search asks again"
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
            raise InputError("the provider compressed its list, though it was asked not to")
        if status in {401, 403}:
            raise InputError(f"the provider refuses the key ({status}): check {self.settings.key_variable}")
        if 300 <= status < 400:  # noqa: PLR2004 - redirects
            hint = f"redirects are not followed; set {self.settings.url_variable} to where it leads"
            raise InputError(f"the provider answers {status}: {hint}")
        if status == 404:  # noqa: PLR2004 - not found
            hint = f"check {self.settings.url_variable}; most often /v1 is missing"
            raise InputError(f"there is no list of models at the provider's address (404): {hint}")
        raise InputError(f"the provider answers {status}; the next search asks again")

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
        if self.key is None or len(self.key) < SHORTEST_SECRET:
            return content
        return content.replace(self.key.encode(), b"***")
