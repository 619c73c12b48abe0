"""Mutation test of the script: random walks or a directed check must detect each removed guard."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from local.redis import RedisServer
from router.limiter.limiter import SCRIPT
from tests.support.limiter.checks import CHECKS, check
from tests.support.limiter.mutants import MUTANTS, Mutant
from tests.support.limiter.random_walk import PALETTES, Walk, interactive_walk, walks
from tests.support.limiter.redis import Connection
from tests.support.limiter.world import Mismatch

MAX_WALKS = 40  # an undetected guard costs all of them


@pytest.fixture(scope="module")
def connection(redis_server: RedisServer) -> Iterator[Connection]:
    opened = Connection(redis_server)
    yield opened
    opened.close()


def walk_for(mutant: Mutant, seed: int) -> Walk:
    if mutant.where.get("interactive"):
        return replace(interactive_walk(seed), **mutant.where)
    walk = replace(Walk.random(seed), **mutant.where)
    return walk if mutant.palette is None else replace(walk, lines=tuple(PALETTES[mutant.palette]))


def mismatch(mutant: Mutant, connection: Connection) -> str:
    """Returns the mismatch by which the mutant was detected; empty if it was not."""
    assert SCRIPT.count(mutant.old) == 1, f"{mutant.old!r} is {SCRIPT.count(mutant.old)} times in the script"
    script = SCRIPT.replace(mutant.old, mutant.new)
    try:
        if mutant.check:
            asyncio.run(check(mutant.check, connection, script))
        else:
            for seed in range(MAX_WALKS):
                walks(connection, script, [walk_for(mutant, seed)])
    except Mismatch as found:
        return str(found).splitlines()[-1]
    return ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_missing_guard_is_detected(mutant: Mutant, connection: Connection) -> None:
    found = mismatch(mutant, connection)
    assert found
    assert "the script failed" not in found  # detected by behavior, not by a script that fails


@pytest.mark.parametrize("name", CHECKS)
def test_script_passes_the_check(name: str, connection: Connection) -> None:
    asyncio.run(check(name, connection, SCRIPT))
