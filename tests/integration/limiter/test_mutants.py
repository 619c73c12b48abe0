"""Each guard of the script taken out once: the walks or a directed check must notice every one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from local.redis import RedisServer
from router.limiter.limiter import SCRIPT
from tests.support.limiter.checks import CHECKS, check
from tests.support.limiter.mutants import MUTANTS, Mutant
from tests.support.limiter.random_walk import PALETTES, Walk, walks
from tests.support.limiter.redis import Connection
from tests.support.limiter.world import Difference

MOST_WALKS = 16


@pytest.fixture(scope="module")
def connection(redis_server: RedisServer) -> Iterator[Connection]:
    opened = Connection(redis_server)
    yield opened
    opened.close()


def looking_for(mutant: Mutant, seed: int) -> Walk:
    walk = replace(Walk.drawn(seed), **mutant.where)
    return walk if mutant.palette is None else replace(walk, lines=tuple(PALETTES[mutant.palette]))


def difference(mutant: Mutant, connection: Connection) -> str:
    """How this script was found out; empty if it was not."""
    assert SCRIPT.count(mutant.old) == 1, (
        f"{mutant.old!r} stands {SCRIPT.count(mutant.old)} times in the script"
    )
    script = SCRIPT.replace(mutant.old, mutant.new)
    try:
        if mutant.check:
            asyncio.run(check(mutant.check, connection, script))
        else:
            for seed in range(MOST_WALKS):
                walks(connection, script, [looking_for(mutant, seed)])
    except Difference as found:
        return str(found).splitlines()[-1]
    return ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_guard_that_is_missing_is_noticed(mutant: Mutant, connection: Connection) -> None:
    found = difference(mutant, connection)
    assert found
    assert (
        "the script failed" not in found
    )  # a guard is missed for what it does, not for a script that breaks


@pytest.mark.parametrize("name", CHECKS)
def test_the_script_itself_passes_the_check(name: str, connection: Connection) -> None:
    asyncio.run(check(name, connection, SCRIPT))
