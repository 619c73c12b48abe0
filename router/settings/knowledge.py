"""Knowledge: settings in `config/models.yaml`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from router.settings.files import Frozen

TaskKnowledge = Literal["off", "own_client", "all"]


def _spelled(value: Any) -> Any:
    if value is False:  # as YAML reads off
        return "off"
    return value.replace(" ", "_") if isinstance(value, str) else value


class KnowledgeSettings(Frozen):
    """Whose solved tasks a search may see: nobody's, the client's own, or everybody's."""

    tasks: Annotated[TaskKnowledge, BeforeValidator(_spelled)] = "own_client"
