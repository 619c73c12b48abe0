"""Directed checks of situations that random walks reach too rarely."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

from router.limiter import Wait, WaitReason
from router.limiter.codec import pack_target
from router.task import Outcome
from router.traffic import TrafficTarget
from tests.support.limiter.following import SETTINGS
from tests.support.limiter.redis import Connection
from tests.support.limiter.world import KEY, MODEL, IssuedPermit, Mismatch, World, reserve_many

Check = Callable[[World], Awaitable[None]]


def require(condition: object, message: str) -> None:
    if not condition:
        raise Mismatch(message)


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
    """A new client may start a model that it does not know; a client that knew more revokes that."""
    await world.reserve(0, (0,))
    world.pass_time(1_000)
    world.flush()
    world.restart_client(1)
    await world.limiters[1].set_target(MODEL, world.lines[0])
    require(await world.limiters[1].reserve(MODEL), "a new client does not start a model unknown to it")
    require(not await world.limiters[0].reserve(MODEL), "a client that knew more accepts a blind start")
    require(not await world.limiters[1].reserve(MODEL), "the client that started blindly continues")


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
    require(world.state == "sound", "the loss lasts until the clock catches up")


async def a_loss_known_to_others(world: World) -> None:
    await world.reserve(0, (0,))
    world.flush()
    await world.set_target(0, world.lines[0])
    await world.reserve(0, (0,))
    script = world.limiters[1]._script
    reply = await script.call(KEY, "rebuild", struct.pack("<6d", 1, 0, 8e6, 0, 0, 0), *[b""] * 5, "me", "")
    require(reply == struct.pack("<d", 0), "a new client starts a model that others know to be lost")


async def a_lost_chunk(world: World) -> None:
    await world.reserve(0, (0, 0, 0))
    world.lose_chunk(0)
    world.pass_time(2_000_000)
    require(not await world.limiters[0].reserve(MODEL), "a lost chunk counts as empty")
    world.pass_time(400_000)
    require(await world.limiters[0].reserve(MODEL), "a lost chunk is never rebuilt")


async def a_recreated_chunk(world: World) -> None:
    await world.set_target(0, "4/s, burst")
    await world.reserve(0, (0, 0))
    world.lose_chunk(0)
    await world.reserve(0, (0,))
    await world.limiters[0].reserve(MODEL)
    require(not await world.limiters[0].reserve(MODEL), "sends of a lost chunk count as old")


async def older_state_in_the_same_run(world: World) -> None:
    await world.reserve(0, (0,))
    world.save()
    await world.reserve(0, (0,))
    require(world.roll_back(), "there is no older state")
    await world.reserve(0, (0,))


async def chunks_without_their_hash(world: World) -> None:
    """Chunks left by lost state are not used for new sends with the same numbers."""
    limiter, line = world.limiters[0], "20k tokens/s, burst"
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
    require(len(permits) == 1, "tokens of lost sends are subtracted")


async def a_clock_set_back(world: World) -> None:
    for _ in range(30):
        await world.reserve(0, (0,))
        world.pass_time(1_000_000)
    world.jump(-3_600_000_000)
    await world.reserve(0, (0,))
    world.pass_time(1_060_000)
    require(await world.reserve(0, (0,)), "a clock set back blocks the model for longer than a window")


async def two_rebuilds(world: World) -> None:
    await world.reserve(0, (0,))
    before = world.redis.do("HGET", KEY, "state")
    script = world.limiters[0]._script
    ask = struct.pack("<6d", 0, 0, 8e6, 0, 0, 0)
    await script.call(KEY, "rebuild", ask, *[b""] * 5, "me", "")
    require(world.redis.do("HGET", KEY, "state") == before, "a second rebuild changes the state")


async def a_window_longer_than_the_log(world: World) -> None:
    """Sends more than are kept, and then sets a window longer than the log."""
    limiter = world.limiters[0]
    await limiter.set_target(MODEL, "1000/s, burst")
    for _ in range(6):
        await reserve_many(limiter, (0,) * 900)
        world.pass_time(70_000_000)
    await limiter.set_target(MODEL, "5000/h, burst")
    require(not await limiter.reserve(MODEL), "dropped sends do not count")


async def a_window_longer_than_the_known_sends(world: World) -> None:
    """With a history, a longer window is rebuilt from it, and blocks nothing but for the permits in use."""
    (held,) = await world.reserve(0, (0,))
    world.send(held, 0)
    await world.set_target(0, "2/2min, burst")
    require(not await world.limiters[0].reserve(MODEL), "permits are granted before the window is known")
    world.pass_time(400_000)
    require(await world.limiters[0].reserve(MODEL), "a longer window blocks the model")
    require(not await world.limiters[0].reserve(MODEL), "sends before the change do not count")


async def another_format(world: World) -> None:
    """State of another version of the script, with more counters, is not used, and is rebuilt."""
    await world.reserve(0, (0,))
    state = world.redis.do("HGET", KEY, "state")
    for more in (b"", bytes(8)):
        world.redis.do("HSET", KEY, "run", b"9:run1", "state", state + more)
        require(not await world.limiters[0].reserve(MODEL), "state of another format is used")
    world.pass_time(400_000)
    require(await world.limiters[0].reserve(MODEL), "state of another format is never rebuilt")


async def an_older_target(world: World) -> None:
    older = int(world.spec.version) + 5
    await world.set_target(0, "1 at once", older + 1)
    await world.reserve(0, (0,))
    script = world.limiters[1]._script
    packed = pack_target(TrafficTarget.parse("40/s, burst"), SETTINGS, MODEL)
    world.redis.do("HDEL", KEY, "spec:4", "target")
    await script.call(KEY, "target", struct.pack("<3d", older, 8e6, 0), packed, "40/s, burst", "me")
    require(
        not await world.limiters[0].reserve(MODEL), "an older target is obeyed by a client that saw a newer"
    )
    traffic = await world.limiters[1].snapshot([MODEL])
    require(traffic[MODEL].target == "1 at once", "the newer target is not put back")


async def a_model_without_a_target(world: World) -> None:
    world.flush()
    world.restart_client(1)
    wait = await world.limiters[1].reserve(MODEL)
    require(isinstance(wait, Wait) and wait.reason is WaitReason.NO_TARGET, f"{wait} without a target")


async def rebuilt(world: World, line: str, count: int) -> list[IssuedPermit]:
    """Returns calls that were sent before a loss and are in flight after the rebuild."""
    await world.set_target(0, line)
    held = await world.reserve(0, (0,) * count)
    for one in held:
        world.send(one, 0)
    world.flush()
    await world.set_target(0, line)
    await world.reserve(0, (0,))
    world.pass_time(400_000)
    return held


async def an_end_after_a_loss(world: World) -> None:
    """The slot of a call that was sent before a loss becomes free when the call ends, and once only."""
    first, _ = await rebuilt(world, "2 at once", 2)
    require(not await world.limiters[0].reserve(MODEL), "a call in flight is forgotten")
    await world.end(first, None)
    await world.end_again(first, None, unused=False)
    require(await world.limiters[0].reserve(MODEL), "the end of a call from before a loss is void")
    require(not await world.limiters[0].reserve(MODEL), "an end frees two slots")


async def a_logged_call_that_is_sent_after_a_loss(world: World) -> None:
    """A call that was rebuilt as sent, and is sent afterwards, takes one slot until it ends."""
    await world.set_target(0, "4 at once")
    held = await world.reserve(0, (0,) * 4)
    world.flush()
    await world.set_target(0, "2 at once")
    await world.reserve(0, (0,))
    world.pass_time(400_000)
    (again,) = await world.reserve(0, (0,))  # number 3 is in the log, unsent
    again.permit.call_id = held[3].permit.call_id
    require(not await world.limiters[0].reserve(MODEL), "the unsent call takes no slot")
    world.send(again, 0)
    await world.end(again, None)
    for _ in range(2):
        require(await world.limiters[0].reserve(MODEL), "a call that was sent later keeps its slot")


async def a_permit_from_before_a_loss(world: World) -> None:
    await world.set_target(0, "1 at once")
    (old,) = await world.reserve(0, (0,))
    world.flush()
    await world.set_target(0, "1 at once")
    await world.reserve(0, (0,))
    world.pass_time(400_000)
    (new,) = await world.reserve(0, (0,))
    require(new.permit.number == old.permit.number, "the numbers differ")
    await world.cancel(old)
    require(not await world.limiters[0].reserve(MODEL), "a permit from before a loss frees a slot")


async def a_minute_of_many_chunks(world: World) -> None:
    limiter = world.limiters[0]
    await limiter.set_target(MODEL, "1000/s, burst")
    for _ in range(7):
        await reserve_many(limiter, (0,) * 900)
        world.pass_time(2_000_000)
    await limiter.set_target(MODEL, "7000/min, burst")
    require(await limiter.reserve(MODEL), "sends of the last minute are unknown")


async def a_turn(world: World) -> None:
    """Tokens for a denied call that waits are kept free of later calls of others, until it leaves."""
    big, small, late = world.limiters
    await big.set_target(MODEL, "100 tokens/s, burst")
    await reserve_many(small, (60,), waits=True)
    world.pass_time(500_000)
    await reserve_many(small, (30,), waits=True)
    permits, _ = await reserve_many(big, (60,), waits=True)
    require(not permits, "more tokens than fit")
    for other, waits in ((small, True), (late, False)):
        permits, _ = await reserve_many(other, (10,), waits=waits)
        require(not permits, "a later call overtakes a turn")
    permits, _ = await reserve_many(late, (0,))
    require(permits, "a call without tokens waits for a turn")
    world.pass_time(560_000)
    permits, _ = await reserve_many(small, (10,), waits=True)
    require(permits, "a turn blocks tokens that it does not need")
    permits, _ = await reserve_many(big, (60,), waits=True)
    require(permits, "a turn is not kept")


async def a_turn_for_money(world: World) -> None:
    big, small = world.limiters[:2]
    await big.set_target(MODEL, "$1/10s, burst")
    await reserve_many(small, ((0, 500_000),), waits=True)
    await reserve_many(big, ((0, 600_000),), waits=True)
    require(not (await reserve_many(small, ((0, 100_000),)))[0], "a later call overtakes a turn for money")
    require((await reserve_many(small, ((50, 0),)))[0], "a call without cost waits for a turn")


async def a_budget_that_denied(world: World) -> None:
    await world.set_target(0, "$1/60s, burst")
    await world.reserve(0, ((0, 500_000),))
    world.pass_time(1_000_000)
    await world.reserve(0, ((0, 200_000),))
    await world.peek(0)
    for cost in (900_000, 600_000, 800_000):
        await world.reserve(0, ((0, cost),))
        await world.peek(0)
    traffic = (await world.limiters[0].snapshot([MODEL]))[MODEL]
    require(traffic.waiting_for is WaitReason.BUDGET, f"the budget is used up, not {traffic.waiting_for}")
    require((traffic.next_seconds or 0) > 50, f"again in {traffic.next_seconds} s")
    world.pass_time(31_000_000)
    await world.peek(0)


async def a_call_too_expensive(world: World) -> None:
    await world.set_target(0, "$2/s")
    await world.reserve(0, ((0, 2_000_001),))


async def a_month_and_its_end(world: World) -> None:
    """The world begins 20 s before March of a leap year."""
    await world.set_target(0, "$2/calendar month, burst")
    for micro in (0, 0, 19_999_000, 1_000, 900_000, 86_400_000_000, 30 * 86_400_000_000, 21_000_000):
        world.pass_time(micro)
        await world.reserve(0, ((0, 1_000_000),))


async def a_send_that_may_arrive_after_midnight(world: World) -> None:
    await world.set_target(0, "$2/calendar day, burst")
    world.pass_time(19_900_000)
    await world.reserve(0, ((0, 1_500_000),))
    world.pass_time(300_000)
    await world.reserve(0, ((0, 1_000_000),))
    await world.reserve(0, ((0, 400_000),))


async def a_day_of_many_sends(world: World) -> None:
    """At midnight the sends of the day leave at once, but for those that may arrive after it."""
    await world.set_target(0, "$90/calendar day, burst")
    await world.reserve(0, ((0, 8_000),) * 1_500)
    world.pass_time(19_900_000)
    await world.reserve(0, ((0, 1_000_000),))
    world.pass_time(50_000)
    await world.reserve(0, ((0, 85_000_000),))
    await world.check_snapshot(0)
    world.pass_time(60_000)
    await world.reserve(0, ((0, 4_000_000), (0, 1)))
    await world.check_snapshot(0)


async def money_after_a_loss(world: World) -> None:
    await world.set_target(0, "$5/60s, burst")
    for held in await world.reserve(0, ((5, 1_000_000), (5, 1_500_000), (5, 2_000_000))):
        world.send(held, 0)
    await world.end(world.held[-1], 5, spent=1_800_000)
    world.flush()
    await world.set_target(0, "$5/60s, burst")
    await world.reserve(0, (0,))
    world.pass_time(400_000)
    await world.reserve(0, ((0, 700_000), (0, 1)))
    require(world.held[-1].permit.cost == 700_000, "the rest of the budget is not granted")


async def an_abandoned_turn(world: World) -> None:
    big, small = world.limiters[:2]
    await big.set_target(MODEL, "100 tokens/10s, burst")
    await reserve_many(small, (50,), waits=True)
    await reserve_many(big, (60,), waits=True)
    require(not (await reserve_many(small, (10,), waits=True))[0], "a later call overtakes a turn")
    world.pass_time(3_100_000)
    require((await reserve_many(small, (10,), waits=True))[0], "an abandoned turn never ends")
    await reserve_many(big, (60,), waits=True)
    await reserve_many(big, (), waits=True)
    require((await reserve_many(small, (10,), waits=True))[0], "a turn that was left stays")


async def an_ask_that_ended(world: World) -> None:
    """It keeps no send, also while another sender still waits for its tokens."""
    asker, big, batch = world.limiters
    await batch.set_target(MODEL, "1/s, 100 tokens/10s")
    await reserve_many(batch, (90,))
    await reserve_many(asker, (0,), waits=True, interactive=True)
    await reserve_many(big, (60,), waits=True, interactive=True)
    require(not (await reserve_many(batch, (0,)))[0], "a batch call is sent within the gap")
    world.pass_time(2_000_000)
    await reserve_many(big, (60,), waits=True, interactive=True)
    world.pass_time(1_100_000)
    require((await reserve_many(batch, (0,)))[0], "an ask that ended keeps a send")


async def batch_after_many_requests(world: World) -> None:
    """Interactive calls keep the pacing gap only; the next batch call keeps the pace of the window."""
    await world.set_target(0, "20/min")
    for _ in range(8):
        require(await world.reserve(0, (0,), interactive=True), "a request waits for more than the gap")
        world.pass_time(2_700_000)
    require(not await world.reserve(1, (0,)), "the sends of requests are not counted in the pace")


async def a_used_up_share(world: World) -> None:
    """The next send is kept for the batch call until that may be sent by its pace."""
    world.waits = True
    await world.set_target(0, "20/min")
    await world.reserve(1, (0,))
    for _ in range(4):
        world.pass_time(2_700_000)
        require(await world.reserve(0, (0,), interactive=True), "a request waits for more than the gap")
        await world.reserve(1, (0,))
    world.pass_time(2_600_000)
    require(not await world.reserve(0, (0,), interactive=True), "requests take more than their share")
    world.pass_time(1_500_000)
    require(await world.reserve(1, (0,)), "the batch call does not get the send that is kept for it")


async def no_asks_for_ten_minutes(world: World) -> None:
    asker, batch = world.limiters[:2]
    await batch.set_target(MODEL, "30/s")
    require((await reserve_many(asker, (0,), interactive=True))[0], "a request is denied on an idle model")
    world.pass_time(599_000_000)
    few = (await reserve_many(batch, (0,) * 6))[0]
    world.pass_time(2_000_000)
    many = (await reserve_many(batch, (0,) * 6))[0]
    require(len(few) < len(many) == 6, f"{len(few)} and {len(many)} batch calls are granted ahead")


async def a_batch_turn(world: World) -> None:
    """A batch call that waits for tokens keeps none from interactive ones, but from other batch calls."""
    big, small, asker = world.limiters
    await big.set_target(MODEL, "100 tokens/s, burst")
    await reserve_many(small, (90,), waits=True)
    await reserve_many(big, (60,), waits=True)
    require(not (await reserve_many(small, (10,)))[0], "a later batch call overtakes a turn")
    require((await reserve_many(asker, (10,), interactive=True))[0], "a batch turn delays a request")


async def an_interactive_turn(world: World) -> None:
    """It goes before an earlier turn of a batch call."""
    batch, other, asker = world.limiters
    await batch.set_target(MODEL, "100 tokens/s, burst")
    await reserve_many(other, (90,), waits=True)
    await reserve_many(batch, (60,), waits=True)
    await reserve_many(asker, (50,), waits=True, interactive=True)
    world.pass_time(1_060_000)
    for _ in range(2):
        require(not (await reserve_many(batch, (60,), waits=True))[0], "a batch turn goes before a request")
        world.pass_time(60_000)
    permits, _ = await reserve_many(asker, (50,), waits=True, interactive=True)
    require(permits, "a request does not get its tokens")


async def a_turn_and_a_kept_send(world: World) -> None:
    """A call that yields a send keeps its turn for tokens."""
    big, other, asker = world.limiters
    await big.set_target(MODEL, "1/s, 100 tokens/10s")
    await reserve_many(other, (60,), waits=True)
    for _ in range(4):
        await reserve_many(big, (60,), waits=True)
        world.pass_time(2_425_000)
    await reserve_many(other, (0,), waits=True)
    world.pass_time(500_000)
    await reserve_many(asker, (0,), waits=True, interactive=True)
    world.pass_time(350_000)
    _, wait = await reserve_many(big, (60,), waits=True)
    require(wait.reason is WaitReason.PRIORITY, f"the call waits for {wait.reason.name}")
    await reserve_many(asker, (), waits=True, interactive=True)
    require(not (await reserve_many(other, (50,), waits=True))[0], "a later call overtakes the turn")


async def tokens_from_before_a_loss(world: World) -> None:
    """Without a history, a longer window set after a loss waits for its own length."""
    await world.set_target(0, "50 tokens/s, burst")
    await world.reserve(0, (20, 20))
    for held in world.held:
        world.send(held, 0)
    world.flush()
    await world.set_target(0, "50 tokens/s, burst")
    for _ in range(12):
        await world.reserve(0, (0,))
        world.pass_time(200_000)
    require(world.state == "sound", "the model is not rebuilt")
    await world.set_target(0, "30 tokens/60s, burst")
    require(not await world.reserve(0, (20,)), "sends before the loss do not count")


async def tokens_of_a_longer_slack(world: World, ask_after: int = 1_070_000) -> None:
    await world.set_target(0, "40 tokens/10s, burst")
    await world.reserve(0, (20, 20))
    world.pass_time(50_000)
    for held in world.held:
        world.send(held, world.transit)  # as late as their slack allows
    await world.set_target(0, "40 tokens/s, burst")
    world.pass_time(ask_after - 50_000)
    await world.reserve(0, (20,))


async def tokens_of_a_longer_slack_ahead(world: World) -> None:
    await tokens_of_a_longer_slack(world, 1_000_000)


async def tokens_of_a_longer_slack_in_turn(world: World) -> None:
    await world.set_target(0, "40 tokens/10s, burst")
    await world.reserve(0, (20,))
    world.pass_time(30_000)
    await world.reserve(0, (20,))
    await world.set_target(0, "40 tokens/s, burst")
    world.pass_time(1_080_000)
    await world.reserve(0, (40,))


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
    """Tokens leave the window while no slot is free and nothing is decided."""
    await world.set_target(0, "50 tokens/s, 2 at once, burst")
    await world.reserve(0, (20,))
    world.pass_time(600_000)
    await world.reserve(0, (10,))
    world.pass_time(500_000)
    await world.check_snapshot(0)


async def a_longer_slack_without_sends(world: World) -> None:
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


async def slots_of_an_earlier_limit(world: World) -> None:
    await world.set_target(0, "2 at once")
    first, _ = await world.reserve(0, (0, 0))
    world.send(first, 0)
    await world.set_target(0, "3/s, burst")
    await world.end(first, None)
    await world.set_target(0, "2 at once")
    await world.reserve(0, (0,))


async def lost_calls_in_flight(world: World) -> None:
    await world.set_target(0, "2 at once")
    await world.reserve(0, (0, 0))
    world.lose_holders()
    require(not await world.limiters[0].reserve(MODEL), "lost calls in flight count as ended")


async def a_call_from_before_a_loss(world: World) -> None:
    _, old = await world.reserve(0, (0, 0))
    world.flush()
    await world.set_target(0, world.lines[0])
    await world.reserve(0, (0,))
    world.pass_time(400_000)
    await world.reserve(0, (0,))
    for _ in range(5):
        await world.record_outcome(0, Outcome.ERROR, None, None)
    world.pass_time(1_200_000)
    await world.reserve(0, (0,))  # the probe, with the old call's number
    await world.record_outcome(0, Outcome.RATE_LIMITED, 0.1, old)
    world.pass_time(1_200_000)
    await world.reserve(0, (0,))


async def a_free_slot(world: World) -> None:
    await world.set_target(0, "1 at once")
    (held,) = await world.reserve(0, (0,))
    world.send(held, 0)
    await world.reserve(1, (0,))
    listener = Connection(world.connection.server)
    try:
        listener.ask(("SUBSCRIBE", "router:traffic"))
        await world.end(held, None)
        require(listener.receives(0.5), "a free slot is not published")
    finally:
        listener.close()


async def a_cancelled_permit(world: World, after: int = 0) -> bool:
    """Returns whether a notification is published."""
    await world.set_target(0, "2/s, burst")
    held, _ = await world.reserve(0, (0, 0))
    await world.reserve(1, (0,))
    world.pass_time(after)
    listener = Connection(world.connection.server)
    try:
        listener.ask(("SUBSCRIBE", "router:traffic"))
        await world.cancel(held)
        return listener.receives(0.3)
    finally:
        listener.close()


async def a_permit_cancelled_in_time(world: World) -> None:
    require(await a_cancelled_permit(world), "a cancelled permit is not published")


async def a_permit_cancelled_late(world: World) -> None:
    require(not await a_cancelled_permit(world, 2_000_000), "a useless notification is published")


async def a_cancelled_permit_replaced_by_an_earlier_send(world: World) -> None:
    """The send that replaces the cancelled one is earlier, when a previous send still counts."""
    await world.set_target(0, "20 tokens/s, burst")
    await world.reserve(0, (10,))
    world.pass_time(900_000)
    (held,) = await world.reserve(0, (15,))
    await world.cancel(held)
    await world.reserve(0, (15,))


CHECKS: dict[str, tuple[Check, bool]] = {  # with whether there is a history
    "an older generation is detected": (an_older_generation, True),
    "a blind start is detected": (a_blind_start, False),
    "a lost chunk is detected by a new target": (a_chunk_and_a_new_target, True),
    "a loss noticed before the clock was set back ends in time": (a_loss_and_a_clock_set_back, True),
    "a lost chunk is detected": (a_lost_chunk, True),
    "a recreated chunk is detected": (a_recreated_chunk, True),
    "a clock set back costs no more than a window": (a_clock_set_back, True),
    "older state in the same run is detected": (older_state_in_the_same_run, True),
    "chunks without their hash are replaced": (chunks_without_their_hash, True),
    "a model known to be lost is not started blindly": (a_loss_known_to_others, False),
    "a second rebuild changes nothing": (two_rebuilds, True),
    "dropped sends count as sent just before": (a_window_longer_than_the_log, False),
    "a longer window is rebuilt from the history": (a_window_longer_than_the_known_sends, True),
    "another format is rebuilt": (another_format, True),
    "an older target is not obeyed": (an_older_target, True),
    "a model without a target is reported": (a_model_without_a_target, True),
    "an end after a loss frees one slot": (an_end_after_a_loss, True),
    "a logged call that is sent after a loss takes one slot": (a_logged_call_that_is_sent_after_a_loss, True),
    "a permit from before a loss frees nothing": (a_permit_from_before_a_loss, True),
    "the latest minute is kept": (a_minute_of_many_chunks, True),
    "a turn is kept": (a_turn, True),
    "a turn for money is kept": (a_turn_for_money, True),
    "a peek asks for what a budget denied": (a_budget_that_denied, True),
    "a call beyond the budget is reported": (a_call_too_expensive, True),
    "a calendar month ends at midnight UTC": (a_month_and_its_end, True),
    "a send that may arrive after midnight counts on both days": (
        a_send_that_may_arrive_after_midnight,
        True,
    ),
    "a day of many sends ends at once": (a_day_of_many_sends, True),
    "money is known after a loss": (money_after_a_loss, True),
    "an abandoned turn ends": (an_abandoned_turn, True),
    "an ask that ended keeps no send": (an_ask_that_ended, True),
    "a send is kept for the pace of batch": (a_used_up_share, True),
    "the pace counts all sends": (batch_after_many_requests, True),
    "ten minutes after the latest ask nothing is left of it": (no_asks_for_ten_minutes, True),
    "a batch turn does not delay a request": (a_batch_turn, True),
    "a request goes before a batch turn": (an_interactive_turn, True),
    "a turn outlives a kept send": (a_turn_and_a_kept_send, True),
    "tokens from before a loss are unknown": (tokens_from_before_a_loss, False),
    "a target with a shorter slack counts earlier tokens longer": (tokens_of_a_longer_slack, True),
    "a target with a shorter slack waits for earlier tokens": (tokens_of_a_longer_slack_ahead, True),
    "a target with a shorter slack waits for each of the earlier tokens": (
        tokens_of_a_longer_slack_in_turn,
        True,
    ),
    "a target with a shorter slack counts earlier requests longer": (requests_of_a_longer_slack, True),
    "a target without sends makes no send late": (a_longer_slack_without_sends, True),
    "a correction behind a long walk makes room": (a_correction_behind_a_long_walk, True),
    "snapshots exclude tokens that left": (tokens_that_left, True),
    "sends passed by a cancelled permit count again": (a_cancelled_permit_replaced_by_an_earlier_send, True),
    "a call larger than the window is reported": (a_call_too_large, True),
    "slots of an earlier limit do not come back": (slots_of_an_earlier_limit, True),
    "lost calls in flight are not free slots": (lost_calls_in_flight, True),
    "a call from before a loss does not affect the probe": (a_call_from_before_a_loss, True),
    "a free slot is published to denied clients": (a_free_slot, True),
    "a permit cancelled in time is published": (a_permit_cancelled_in_time, True),
    "a permit cancelled too late is not published": (a_permit_cancelled_late, True),
}


async def check(name: str, connection: Connection, script: str) -> None:
    """Raises Mismatch if the script fails the check."""
    steps, with_history = CHECKS[name]
    lines = ["3/s, burst", "40/s, burst", "30 tokens/60s, burst", "1 at once"]
    world = World(connection, script, lines, with_history=with_history)
    await world.set_target(0, lines[0])
    await steps(world)
    world.judge_arrivals()
