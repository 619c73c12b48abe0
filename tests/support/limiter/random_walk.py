"""Random walks through a `World`, reproducible by seed."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace

from router.settings import InteractiveShare
from router.task import Outcome
from tests.support.limiter.redis import Connection
from tests.support.limiter.world import IssuedPermit, Mismatch, World

PALETTES = [
    ["3/s, burst", "5/s", "2/s, burst", "0"],
    ["3/2s, 2/s, burst", "7/3s", "4/2s, burst", "9/3s, 4/s, burst"],
    [
        "20 tokens/s, burst",
        "30 tokens/2s, 5/s, burst",
        "50 tokens/3s, 20 tokens/s",
        "40 tokens/2s, 3 at once",
    ],
    ["2 at once", "3 at once, 5/s, burst", "1 at once, 20 tokens/s", "6/s, burst", "0"],
    ["6/3s, 90 tokens/3s, 3 at once", "4/2s, 30 tokens/2s, 2 at once, burst", "9/s, burst"],
    ["8/min, burst", "3/s", "5/10s, burst", "6/min, 60 tokens/min"],
    ["40/s, burst", "100/3s", "300 tokens/s, burst", "70/2s, 20 at once, burst"],
    ["5/s", "4/2min, burst", "3/10s, burst", "6/s, burst"],
    ["$2/s, burst", "$3/2s, 5/s, burst", "$5/3s, $2/s, 20 tokens/s", "$4/2s, 3 at once", "$0/day"],
    ["$3/calendar day, burst", "$4/calendar month, $2/s, burst", "9/s, $6/2s, $3/s, $90/day", "$2/s, burst"],
]
INTERACTIVE_LINES = (
    ("5/s", "12/3s", "30/s", "20/min"),
    ("6/3s, 4/s", "20/10s", "2 at once, 5/s"),
    ("2 at once", "3 at once, 5/s, burst", "6/s, burst", "0"),
    ("8/min, burst", "3/s", "20/min", "6/10s, 3 at once"),
)
TOKENS = [0, 1, 5, 10, 20]
COSTS = [0, 1, 400_000, 1_000_000, 2_000_000]
SPENT = [None, 0, 300_000, 1_000_000, 2_500_000]
HOURS = 3600 * 1_000_000
CHUNKS = ("SENDS, BITMAP = 1000, 125", "KEPT_CHUNKS = 4", "LONG_WALK = 64", "BUILD_STEPS = 5000")
SMALL_CHUNKS = ("SENDS, BITMAP = 16, 2", "KEPT_CHUNKS = 2", "LONG_WALK = 1", "BUILD_STEPS = 3")


@dataclass(frozen=True)
class Walk:
    """Settings of one walk: its targets, and the faults that may happen."""

    seed: int
    lines: tuple[str, ...]
    steps: int = 250
    losses: bool = False
    back: bool = False
    forward: bool = False
    failing: bool = False
    with_history: bool = True
    waits: bool = False
    travel: bool = False
    interactive: bool = False  # some calls are
    share: InteractiveShare = field(default_factory=InteractiveShare)
    small_chunks: bool = False  # so that sends often cross chunks
    bulk: int = 4

    @classmethod
    def random(cls, seed: int, *, forward: bool = True) -> Walk:
        """Returns the walk of a seed; about half of them have no faults."""
        chance = random.Random(seed)
        walk = cls(
            seed,
            tuple(PALETTES[seed % len(PALETTES)]),
            bulk=chance.choice([1, 4, 30]),
            small_chunks=chance.random() < 0.5,
        )
        if chance.random() < 0.5:
            return walk
        return replace(
            walk,
            losses=chance.random() < 0.6,
            back=chance.random() < 0.4,
            forward=forward and chance.random() < 0.4,
            with_history=chance.random() < 0.7,
            waits=chance.random() < 0.3,
            travel=chance.random() < 0.5,
            failing=chance.random() < 0.4,
        )


async def take(walk: Walk, connection: Connection, script: str) -> World:
    """Takes all steps. Mismatch names the seed and the last steps."""
    for normal, small in zip(CHUNKS, SMALL_CHUNKS, strict=True) if walk.small_chunks else ():
        assert script.count(normal) == 1
        script = script.replace(normal, small)
    world = World(
        connection, script, list(walk.lines),
        with_history=walk.with_history, waits=walk.waits, share=walk.share,
    )  # fmt: skip
    steps = _Steps(walk, world)
    try:
        await world.set_target(0, walk.lines[0])
        for _ in range(walk.steps):
            await steps.one()
        world.judge_arrivals()
    except Mismatch as difference:
        steps_taken = "\n  ".join(steps.log[-25:])
        raise Mismatch(f"{walk}\n  {steps_taken}\n{difference}") from difference
    return world


class _Steps:
    def __init__(self, walk: Walk, world: World) -> None:
        self.walk, self.world = walk, world
        self.chance = random.Random(walk.seed * 7 + 1)
        self.log: list[str] = []
        kinds = {
            "reserve": 30,
            "pass": 20,
            "send": 22,
            "end": 14,
            "cancel": 5,
            "release_again": 2,
            "target": 2,
            "cool_down": 0.4,
            "outcome": 1.0 + 4 * walk.failing,
            "snapshot": 1.5,
            "forget_scripts": 0.2,
            "save": 0.5 * walk.losses,
            "lose": 0.7 * walk.losses,
            "back": 0.7 * walk.back,
            "forward": 0.7 * walk.forward,
            "new_client": 0.3 * walk.with_history,
            "peek": 8 * walk.interactive,
            "ask": 12 * walk.interactive,
            "leave": 1 * walk.interactive,
        }
        self.kinds, self.weights = list(kinds), list(kinds.values())

    async def one(self) -> None:
        (kind,) = self.chance.choices(self.kinds, self.weights)
        if self.walk.travel:
            self.world.travels = [self.chance.choice([0, 0, 100, 5_000, 12_000]) for _ in range(8)]
        result = await getattr(self, f"_{kind}")()
        self.log.append(f"{self.world.now} {kind} {result or ''}")

    def _who(self) -> int:
        return self.chance.randrange(len(self.world.limiters))

    def _open(self) -> IssuedPermit | None:
        """Returns a recent permit."""
        held = self.world.held[-12:]
        return self.chance.choice(held) if held else None

    async def _reserve(self) -> str:
        count = self.chance.randint(1, self.walk.bulk)
        needs = tuple((self.chance.choice(TOKENS), self.chance.choice(COSTS)) for _ in range(count))
        made = await self.world.reserve(self._knowing(), needs)
        return f"{needs} {[held.send_at for held in made]}"

    async def _ask(self) -> str:
        """An interactive call; most wait alone."""
        needs = (0,) * self.chance.choice([1, 1, 1, 2, 4])
        made = await self.world.reserve(self._knowing(), needs, interactive=True)
        return f"{needs} {[held.send_at for held in made]}"

    async def _leave(self) -> None:
        await self.world.reserve(self._knowing(), (), interactive=True)

    async def _peek(self) -> None:
        await self.world.peek(self._knowing())

    def _knowing(self) -> int:
        """Without a history only clients that had seen a model can detect its loss."""
        who = self._who()
        if self.walk.with_history or self.world.state == "sound":
            return who
        return max(range(len(self.world.limiters)), key=self.world.seen)

    async def _pass(self) -> str:
        world = self.world
        send_times = [held.send_at for held in world.held[-5:] if held.send_at > world.now]
        kind = self.chance.random()
        if kind < 0.25 and send_times:
            micro = send_times[0] - world.now + self.chance.choice([0, 0, 1, 24_000, 25_000, 26_000])
        elif kind < 0.5:
            again = world.spec.decide(world.now, 0).send_at or world.now
            micro = again - world.now + self.chance.choice([0, -1, 1, -250_000, -250_001])
        elif kind < 0.97:
            micro = self.chance.choice([1, 1_000, 20_000, 100_000, 400_000, 900_000])
        else:
            micro = self.chance.randint(1_000_000, world.retention + 2_000_000)
        world.pass_time(max(0, micro))
        return str(micro)

    async def _send(self) -> str:
        held = self._open()
        if held is None:
            return ""
        world = self.world
        if held.sent_at is None and held.send_at > world.now:
            world.now = held.send_at + self.chance.choice([0, 0, 24_999, 25_000])
        if self.chance.random() < 0.1:
            world.pass_time(2_000_000)  # the event loop stalled
        return f"{held.send_at} {world.send(held, self.chance.choice([0, world.transit, world.transit]))}"

    async def _end(self) -> str:
        held = self._open()
        used, spent = self.chance.choice([None, 0, 3, 10, 25]), self.chance.choice(SPENT)
        if held is not None:
            await self.world.end(held, used, self.chance.choice([1, 1, 2]), spent)
        return f"{held and held.send_at} {used} {spent}"

    async def _cancel(self) -> str:
        held = self.world.held[-1] if self.world.held and self.chance.random() < 0.5 else self._open()
        if held is not None:
            await self.world.cancel(held, self.chance.choice([1, 1, 2]))
        return f"{held and held.send_at}"

    async def _release_again(self) -> str:
        held = self._open()
        if held is not None:
            await self.world.end_again(
                held, self.chance.choice([None, 0, 30]), unused=self.chance.random() < 0.5
            )
        return f"{held and held.send_at}"

    async def _target(self) -> str:
        line = self.chance.choice(self.walk.lines)
        version = None
        if self.chance.random() < 0.4:
            version = max(1, int(self.world.spec.version) + self.chance.choice([-5, 0, 1, 7]))
        await self.world.set_target(self._who(), line, version)
        return f"{line} {version}"

    async def _cool_down(self) -> str:
        seconds = self.chance.choice([0, 0.3, 1.0, 2.5])
        await self.world.cool_down(self._who(), seconds)
        return str(seconds)

    async def _outcome(self) -> str:
        outcome = self.chance.choice(
            [
                Outcome.ANSWERED,
                *[Outcome.ERROR] * (6 * self.walk.failing),
                Outcome.RATE_LIMITED,
                Outcome.OVERLOADED,
                Outcome.ABANDONED,
            ]
        )
        seconds = self.chance.choice([None, 0.4])
        held = self.chance.choice([None, self._open()])
        await self.world.record_outcome(self._who(), outcome, seconds, held)
        return f"{outcome} {seconds} {held and held.send_at}"

    async def _snapshot(self) -> None:
        await self.world.check_snapshot(self._who())

    async def _forget_scripts(self) -> None:
        self.world.forget_scripts()

    async def _save(self) -> None:
        if self.world.state == "sound":
            self.world.save()

    async def _lose(self) -> str:
        world = self.world
        kind = self.chance.choice(["flush", "key", "chunk", "kept", "empty", "old", "rolled back"])
        if kind == "flush":
            world.flush()
        elif kind == "key":
            world.lose_key()
        elif kind == "chunk":
            world.lose_chunk(self.chance.randrange(10))
        elif kind != "rolled back":
            world.restart(state=kind)
        elif world.roll_back():
            await world.reserve(max(range(len(world.limiters)), key=world.seen), (0,))
        return kind

    async def _back(self) -> str:
        micro = -self.chance.choice([1, 500_000, 5_000_000, HOURS])
        self.world.jump(micro)
        return str(micro)

    async def _forward(self) -> str:
        micro = self.chance.choice([500_000, 5_000_000, HOURS, 24 * HOURS])
        self.world.jump(micro)
        await self.world.reserve(max(range(len(self.world.limiters)), key=self.world.seen), (0,))
        return str(micro)

    async def _new_client(self) -> None:
        self.world.restart_client(self._who())


def interactive_walk(seed: int) -> Walk:
    """Returns a walk with interactive calls, by turns with each share and without a limit of tokens."""
    shares = [{}, {"at_most": 0.9}, {"reserved": 0.2}, {"at_most": 1.0}, {"at_most": 0.2}]
    share = InteractiveShare.model_validate(shares[seed % len(shares)])
    walk = replace(Walk.random(seed), back=False, forward=False, interactive=True, waits=True, share=share)
    return replace(walk, lines=INTERACTIVE_LINES[seed % len(INTERACTIVE_LINES)], bulk=2)


def walks(connection: Connection, script: str, several: list[Walk]) -> tuple[int, int]:
    """Takes all walks; returns the number of steps and of permits."""

    async def take_all() -> tuple[int, int]:
        steps = permits = 0
        for walk in several:
            world = await take(walk, connection, script)
            steps, permits = steps + walk.steps, permits + len(world.held)
        return steps, permits

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(take_all())
    finally:
        loop.close()
