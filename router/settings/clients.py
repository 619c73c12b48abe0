"""Clients: settings in `config/models.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from router.settings.files import Frozen
from router.settings.models import TrafficTargetLine
from router.task import CLIENT_PATTERN

DEFAULT_CLIENT = "default"  # the entry whose values other clients have
ClientName = Annotated[str, Field(pattern=rf"^({CLIENT_PATTERN})?$")]


class ClientSettings(Frozen):
    """A client's weight in the queue, and its limit over all models."""

    weight: float = Field(default=1.0, gt=0, le=1000)
    limit: TrafficTargetLine | None = None


def settings_of(clients: Mapping[str, ClientSettings], name: str) -> ClientSettings:
    """Returns the settings of a client; values that its entry does not set are those of `default`."""
    default = clients.get(DEFAULT_CLIENT, ClientSettings())
    own = clients.get(name)
    if own is None:
        return default
    return default.model_copy(update={field: getattr(own, field) for field in own.model_fields_set})
