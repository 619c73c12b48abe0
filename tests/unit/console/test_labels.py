"""Labels of stored values in the console: none is missing."""

from __future__ import annotations

import re
from pathlib import Path

from router.task import AnswerRank, Outcome, Role

SOURCE = (Path(__file__).parents[3] / "plugins/console/labels.js").read_text()


def keys(name: str) -> set[str]:
    """Returns the keys of an exported map."""
    (body,) = re.findall(rf"export const {name} = {{(.*?)}};", SOURCE, re.DOTALL)
    return {quoted or plain for quoted, plain in re.findall(r'(?:"([^"]*)"|(\w+)): "', body)}


def test_every_outcome_role_and_rank_has_a_label() -> None:
    assert keys("OUTCOMES") == {outcome.value for outcome in Outcome}
    assert keys("ROLES") == {role.value for role in Role}
    assert keys("RANKS") == {
        *(str(rank.value) for rank in AnswerRank),
        *(rank.name.lower().replace("_", " ") for rank in AnswerRank),
    }
