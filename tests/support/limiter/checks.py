"""What a random walk meets too rarely, each thing by itself and on purpose."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

from router.task import Outcome
from tests.support.limiter.redis import Connection
from tests.support.limiter.world import KEY, MODEL, Difference, World, reserve_many

Check = Callable[[World], Awaitable[None]]


def agree(so: object, otherwise: str) -> None:
    if not so:
        raise Difference(otherwise)


async def an_older_generation(world: World) -> None:
    await world.reserve(0, (0,))
    world.save()
    world.flush()
    await world.set_target(0, world.lines[0])
    await world.reserve(0, (0,))
    world.pass_time(2_000_000)
    await world.reserve(0, (0,))
    world._restore()
    world._gone(target=True)
    await world.reserve(0, (0,))


async def a_blind_start(world: World) -> None:
    """A newcomer may start what nobody knows; whoever knew more finds it out, and then it is lost for all."""
    await world.reserve(0, (0,))
    world.pass_time(1_000)
    world.flush()
    world.restart_client(1)
    await world.everyone[1].set_target(MODEL, world.lines[0])
    agree((await world.everyone[1].reserve(MODEL)), "a newcomer starts what it cannot know to be lost")
    agree(not await world.everyone[0].reserve(MODEL), "a blind start is believed by one who knew more")
    agree(not await world.everyone[1].reserve(MODEL), "the blind one goes on")


async def a_chunk_and_a_new_target(world: World) -> None:
    await world.set_target(0, "40/s, burst")
    await world.reserve(0, (1,) * 20)
    world.lose_chunk(0)
    await world.set_target(0, "30 tokens/s, burst")
    await world.reserve(0, (20,))


async def a_loss_and_a_clock_set_back(world: World) -> None:
    await world.reserve(0, (0,))
    world.flush()
    await world.set_target(0, world.lines[0])
    await world.reserve(0, (0,))
    world.jump(-3_600_000_000)
    for _ in range(12):
        world.pass_time(300_000)
        await world.reserve(0, (0,))
    agree(world.state == "sound", "the loss lasts as long as the clock is behind")


async def a_loss_that_others_know(world: World) -> None:
    await world.reserve(0, (0,))
    world.flush()
    await world.set_target(0, world.lines[0])
    await world.reserve(0, (0,))
    script = world.everyone[1]._script
    reply = await script.call(KEY, "rebuild", struct.pack("<6d", 1, 0, 8e6, 0, 0, 0), b"", b"", b"", "me", "")
    agree(reply == struct.pack("<d", 0), "a newcomer starts what others know to be lost")


async def a_chunk_that_is_gone(world: World) -> None:
    await world.reserve(0, (0, 0, 0))
    world.lose_chunk(0)
    world.pass_time(2_000_000)
    agree(not await world.everyone[0].reserve(MODEL), "a lost chunk is taken for an empty one")
    world.pass_time(400_000)
    agree(await world.everyone[0].reserve(MODEL), "a lost chunk is never made good")


async def a_chunk_made_anew(world: World) -> None:
    await world.set_target(0, "4/s, burst")
    await world.reserve(0, (0, 0))
    world.lose_chunk(0)
    await world.reserve(0, (0,))
    await world.everyone[0].reserve(MODEL)
    agree(not await world.everyone[0].reserve(MODEL), "what a lost chunk held is taken for long ago")


async def an_older_memory(world: World) -> None:
    await world.reserve(0, (0,))
    world.save()
    await world.reserve(0, (0,))
    agree(world.roll_back(), "there is an older memory")
    await world.reserve(0, (0,))


async def chunks_without_their_hash(world: World) -> None:
    """Tokens of sends that nobody knows any more are not those of new sends with the same numbers."""
    limiter, line = world.everyone[0], "20k tokens/s, burst"
    await limiter.set_target(MODEL, line)
    await reserve_many(limiter, (10,) * 1400)
    world.lose_key()
    world.pass_time(70_000_000)
    await limiter.set_target(MODEL, line)
    await reserve_many(limiter, (0,))
    world.pass_time(400_000)
    await reserve_many(limiter, (0,) * 1010)
    world.pass_time(600_000)
    await reserve_many(limiter, (0,) * 10)
    world.pass_time(600_000)
    permits, _ = await reserve_many(limiter, (19_990, 60))
    agree(len(permits) == 1, "tokens of lost sends are taken off")


async def a_clock_set_back(world: World) -> None:
    for _ in range(30):
        await world.reserve(0, (0,))
        world.pass_time(1_000_000)
    world.jump(-3_600_000_000)
    await world.reserve(0, (0,))
    world.pass_time(1_060_000)
    agree(await world.reserve(0, (0,)), "a clock set back stops the model for longer than a window")


async def two_rebuilds(world: World) -> None:
    await world.reserve(0, (0,))
    before = world.redis.do("HGET", KEY, "now")
    script = world.everyone[0]._script
    ask = struct.pack("<6d", 0, 0, 8e6, 0, 0, 0)
    await script.call(KEY, "rebuild", ask, b"", b"", b"", "me", "")
    agree(world.redis.do("HGET", KEY, "now") == before, "a second rebuild forgets what the first one knew")


async def what_was_dropped(world: World) -> None:
    """Far more sends than are kept, and then a window that is longer than what is known."""
    limiter = world.everyone[0]
    await limiter.set_target(MODEL, "1000/s, burst")
    for _ in range(6):
        await reserve_many(limiter, (0,) * 900)
        world.pass_time(70_000_000)
    await limiter.set_target(MODEL, "5000/h, burst")
    agree(not await limiter.reserve(MODEL), "what is no longer kept is free")


async def tokens_of_before_a_loss(world: World) -> None:
    """Without a history nothing is known but that it is lost: a longer window waits for its own length."""
    await world.set_target(0, "50 tokens/s, burst")
    await world.reserve(0, (20, 20))
    for held in world.held:
        world.send(held, 0)
    world.flush()
    await world.set_target(0, "50 tokens/s, burst")
    for _ in range(12):
        await world.reserve(0, (0,))
        world.pass_time(200_000)
    agree(world.state == "sound", "the model is back")
    await world.set_target(0, "30 tokens/60s, burst")
    agree(not await world.reserve(0, (20,)), "what was sent before the loss is free")


async def tokens_of_a_longer_slack(world: World, ask_after: int = 1_070_000) -> None:
    await world.set_target(0, "40 tokens/10s, burst")
    await world.reserve(0, (20, 20))
    world.pass_time(50_000)
    for held in world.held:
        world.send(held, world.transit)  # as late as their own slack allows
    await world.set_target(0, "40 tokens/s, burst")
    world.pass_time(ask_after - 50_000)
    await world.reserve(0, (20,))


async def tokens_of_a_longer_slack_ahead(world: World) -> None:
    await tokens_of_a_longer_slack(world, 1_000_000)


async def requests_of_a_longer_slack(world: World) -> None:
    await world.set_target(0, "9/10s, burst")
    await world.reserve(0, (0, 0))
    await world.set_target(0, "5/s, burst")
    world.pass_time(1_000)
    await world.reserve(0, (0, 0))
    await world.set_target(0, "2/s, burst")
    world.pass_time(1_000_000)
    await world.reserve(0, (0,))


async def tokens_that_left(world: World) -> None:
    """While all places are taken nothing is decided, and yet the first tokens leave the window."""
    await world.set_target(0, "50 tokens/s, 2 at once, burst")
    await world.reserve(0, (20,))
    world.pass_time(600_000)
    await world.reserve(0, (10,))
    world.pass_time(500_000)
    await world.look(0)


async def nothing_sent_under_a_longer_slack(world: World) -> None:
    await world.cool_down(0, 0.3)
    await world.reserve(0, (0,))
    await world.set_target(0, "7/3s, burst")
    await world.reserve(0, (0,))
    world.pass_time(300_000)
    await world.set_target(0, "4/2s, burst")
    await world.reserve(0, (0, 0, 0))
    await world.set_target(0, "3/s, burst")
    await world.reserve(0, (0,))


async def a_correction_behind_a_long_walk(world: World) -> None:
    await world.set_target(0, "100 tokens/s, burst")
    held = []
    for _ in range(100):
        held += await world.reserve(0, (1,))
        world.pass_time(5_000)
    await world.reserve(0, (80,))
    for last in held[90:]:
        world.send(last, 0)
        await world.end(last, 0)
    await world.reserve(0, (80,))


async def a_call_too_large(world: World) -> None:
    await world.set_target(0, "20 tokens/s")
    await world.reserve(0, (50,))


async def places_of_an_earlier_limit(world: World) -> None:
    await world.set_target(0, "2 at once")
    first, _ = await world.reserve(0, (0, 0))
    world.send(first, 0)
    await world.set_target(0, "3/s, burst")
    await world.end(first, None)
    await world.set_target(0, "2 at once")
    await world.reserve(0, (0,))


async def places_that_are_gone(world: World) -> None:
    await world.set_target(0, "2 at once")
    await world.reserve(0, (0, 0))
    world.lose_holders()
    agree(not await world.everyone[0].reserve(MODEL), "calls in flight that are gone are taken for ended")


async def a_call_of_before_a_loss(world: World) -> None:
    _, old = await world.reserve(0, (0, 0))
    world.flush()
    await world.set_target(0, world.lines[0])
    await world.reserve(0, (0,))
    world.pass_time(400_000)
    await world.reserve(0, (0,))
    for _ in range(5):
        await world.record_outcome(0, Outcome.ERROR, None, None)
    world.pass_time(1_200_000)
    await world.reserve(0, (0,))  # the probe, which has the old call's number
    await world.record_outcome(0, Outcome.RATE_LIMITED, 0.1, old)
    world.pass_time(1_200_000)
    await world.reserve(0, (0,))


async def a_free_place(world: World) -> None:
    await world.set_target(0, "1 at once")
    (held,) = await world.reserve(0, (0,))
    world.send(held, 0)
    await world.reserve(1, (0,))
    listener = Connection(world.connection.server)
    try:
        listener.ask(("SUBSCRIBE", "router:traffic"))
        await world.end(held, None)
        agree(listener.hears(0.5), "nobody says that a place is free")
    finally:
        listener.close()


async def a_cancelled_permit(world: World, after: int = 0) -> bool:
    """Whether anybody is told of it."""
    await world.set_target(0, "2/s, burst")
    held, _ = await world.reserve(0, (0, 0))
    await world.reserve(1, (0,))
    world.pass_time(after)
    listener = Connection(world.connection.server)
    try:
        listener.ask(("SUBSCRIBE", "router:traffic"))
        await world.cancel(held)
        return listener.hears(0.3)
    finally:
        listener.close()


async def a_permit_cancelled_in_time(world: World) -> None:
    agree(await a_cancelled_permit(world), "nobody says that there is room again")


async def a_permit_cancelled_late(world: World) -> None:
    agree(not await a_cancelled_permit(world, 2_000_000), "all are woken, and there is no more room")


async def a_cancelled_permit_of_a_later_moment(world: World) -> None:
    """It left when an earlier send no longer counted; whoever comes in its place leaves sooner."""
    await world.set_target(0, "20 tokens/s, burst")
    await world.reserve(0, (10,))
    world.pass_time(900_000)
    (held,) = await world.reserve(0, (15,))
    await world.cancel(held)
    await world.reserve(0, (15,))


CHECKS: dict[str, tuple[Check, bool]] = {  # with its own word on whether there is a history
    "an older generation is found out": (an_older_generation, True),
    "a blind start is found out": (a_blind_start, False),
    "a chunk that is gone is found out by a new target": (a_chunk_and_a_new_target, True),
    "a loss noticed before the clock was set back ends in time": (a_loss_and_a_clock_set_back, True),
    "a chunk that is gone is found out": (a_chunk_that_is_gone, True),
    "a chunk that is gone and made anew is found out": (a_chunk_made_anew, True),
    "a clock set back costs no more than a window": (a_clock_set_back, True),
    "an older memory in the same run is found out": (an_older_memory, True),
    "chunks without their hash are made anew": (chunks_without_their_hash, True),
    "nobody starts blindly what others know to be lost": (a_loss_that_others_know, False),
    "the second of two rebuilds changes nothing": (two_rebuilds, True),
    "what was dropped counts as sent just before": (what_was_dropped, True),
    "tokens of before a loss are not known": (tokens_of_before_a_loss, False),
    "tokens sent before a target with a shorter slack count longer": (tokens_of_a_longer_slack, True),
    "tokens sent before a target with a shorter slack are waited for": (tokens_of_a_longer_slack_ahead, True),
    "requests sent before a target with a shorter slack count longer": (requests_of_a_longer_slack, True),
    "a target under which nothing was sent makes nothing late": (nothing_sent_under_a_longer_slack, True),
    "a correction behind a long walk makes room": (a_correction_behind_a_long_walk, True),
    "tokens that left are not shown": (tokens_that_left, True),
    "what a cancelled permit left behind counts again": (a_cancelled_permit_of_a_later_moment, True),
    "a call larger than the window is said to be": (a_call_too_large, True),
    "places of an earlier limit do not come back": (places_of_an_earlier_limit, True),
    "places that are gone are not free": (places_that_are_gone, True),
    "a call of before a loss says nothing about a probe": (a_call_of_before_a_loss, True),
    "who was refused is told of a free place": (a_free_place, True),
    "who waits is told of a permit that was cancelled in time": (a_permit_cancelled_in_time, True),
    "nobody is told of a permit that was cancelled too late": (a_permit_cancelled_late, True),
}


async def check(name: str, connection: Connection, script: str) -> None:
    """Difference if this script fails the check."""
    steps, with_history = CHECKS[name]
    lines = ["3/s, burst", "40/s, burst", "30 tokens/60s, burst", "1 at once"]
    world = World(connection, script, lines, with_history=with_history)
    await world.set_target(0, lines[0])
    await steps(world)
    world.judge_the_door()
