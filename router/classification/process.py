"""The categoriser in a process of its own, behind an async interface.

scikit-learn and numpy would hold the interpreter's lock of whoever solves tasks. The child reads lines of
JSON from its standard input, `{"id", "prompts"}`, and writes lines with `id` and what it found; it ends when
its input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import Self

from router.background import cancel_and_wait
from router.classification.classifier import Classification, Classifier
from router.classification.features import cut
from router.errors import RouterError
from router.settings import ClassificationSettings, classifier_folder

log = logging.getLogger("router.classification.process")

MOST_WAITING = 4096  # prompts; further callers take the default at once
PROMPTS_A_MESSAGE = 128
START_SECONDS = 60.0  # on a machine that is busy; two or three as a rule
HANG_SECONDS = 10.0
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 30.0
LONGEST_LINE_BYTES = 64 * 1024 * 1024
CHILD = (sys.executable, "-m", "router.classification.process")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class ClassifierProcess:
    """Categories from a child process, started when it is first wanted and again if it dies or hangs.

    Whoever has no answer within `settings.timeout_seconds` takes the default category, and the log says so.
    """

    def __init__(self, settings: ClassificationSettings) -> None:
        self.settings = settings
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[list[Classification]]] = {}
        self._waiting_prompts = 0
        self._unanswered: dict[int, float] = {}  # when each was sent, also if nobody waits any more
        self._keeper: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self._ready = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._complained = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        """End the child; who still waits takes the default."""
        if self._keeper is not None:
            await cancel_and_wait(self._keeper)
            self._keeper = None
        self._give_up("it was stopped")

    @property
    def ready(self) -> bool:
        """Whether the child is there and has learned."""
        return self._ready.is_set()

    def warm_up(self) -> None:
        """Have the child start, if it has not; returns at once."""
        self._wanted.set()
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="router categoriser")

    async def until_ready(self, seconds: float) -> bool:
        """Have the child start and wait until it can answer, at most `seconds`; whether it can."""
        self.warm_up()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._ready.wait(), seconds)
        return self.ready

    async def classify(self, prompts: Sequence[str]) -> list[Classification]:
        """The category of each prompt, in their order; the default one where it cannot be had in time."""
        deadline = time.monotonic() + self.settings.timeout_seconds
        self.warm_up()
        done: list[Classification] = []
        for start in range(0, len(prompts), PROMPTS_A_MESSAGE):
            batch = prompts[start : start + PROMPTS_A_MESSAGE]
            done.extend(await self._ask(batch, deadline - time.monotonic()))
        return done

    async def _ask(self, prompts: Sequence[str], seconds: float) -> list[Classification]:
        if self._waiting_prompts + len(prompts) > MOST_WAITING:
            return self._default(len(prompts), "too many prompts wait for a category")
        number = next(self._numbers)
        answer: asyncio.Future[list[Classification]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._waiting_prompts += len(prompts)
        try:
            return await asyncio.wait_for(self._exchange(number, prompts, answer), max(0.0, seconds))
        except asyncio.TimeoutError:
            why = "it is still starting" if not self.ready else "it did not answer"
            return self._default(
                len(prompts), f"no category within {self.settings.timeout_seconds:g} s: {why}"
            )
        finally:
            self._waiting.pop(number, None)
            self._waiting_prompts -= len(prompts)

    async def _exchange(
        self, number: int, prompts: Sequence[str], answer: asyncio.Future[list[Classification]]
    ) -> list[Classification]:
        await self._ready.wait()
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.write(_line({"id": number, "prompts": [cut(prompt) for prompt in prompts]}))
            self._unanswered[number] = time.monotonic()
            with contextlib.suppress(OSError):  # it died: the answer will be given up
                await process.stdin.drain()
        return await answer

    def _default(self, number: int, why: str) -> list[Classification]:
        if not self._complained:
            log.warning("categoriser: %s; the default category %r is taken (said once until it answers)",
                        why, self.settings.default_category)  # fmt: skip
        self._complained = True
        return [Classification(self.settings.default_category, 0.0, f"default: {why}")] * number

    def _give_up(self, why: str) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(asyncio.TimeoutError(why))

    # Keeping the child.

    async def _keep(self) -> None:
        pause = SHORTEST_PAUSE_SECONDS
        while True:
            await self._wanted.wait()
            started = time.monotonic()
            try:
                await self._live()
            except (OSError, RouterError, ValueError, asyncio.TimeoutError) as error:
                log.warning("categoriser: %s; tasks without a category take %r until it is back",
                            str(error) or type(error).__name__, self.settings.default_category)  # fmt: skip
            finally:
                self._ready.clear()
                self._process = None
                self._unanswered.clear()
                self._give_up("it ended")
            lived = time.monotonic() - started > LONGEST_PAUSE_SECONDS
            pause = SHORTEST_PAUSE_SECONDS if lived else min(2 * pause, LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _live(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *CHILD, stdin=PIPE, stdout=PIPE, stderr=PIPE,
            limit=LONGEST_LINE_BYTES, env={**os.environ, **ONE_THREAD},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stderr is not None
        said = asyncio.get_running_loop().create_task(
            _last_words(process.stderr), name="router categoriser words"
        )
        try:
            process.stdin.write(self.settings.model_dump_json().encode() + b"\n")
            hello = await asyncio.wait_for(_read(process), START_SECONDS)
            if hello is not None and "error" in hello:
                raise RouterError(str(hello["error"]))
            if hello is not None:
                log.info("categoriser: ready, learned in %.1f s", hello["seconds"])
                self._process = process
                self._ready.set()
                await self._listen(process)
            raise RouterError(f"the process ended: {await said or 'without a word'}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            said.cancel()
            process.stdin.close()
            await process.wait()

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        while True:
            reading = asyncio.ensure_future(_read(process))
            try:
                while not (await asyncio.wait({reading}, timeout=HANG_SECONDS / 4))[0]:
                    if self._overdue():
                        raise RouterError(f"the process has not answered for {HANG_SECONDS:g} s")
            finally:
                reading.cancel()
            found = reading.result()
            if found is None:
                return
            self._complained = False
            self._unanswered.pop(found["id"], None)
            answer = self._waiting.get(found["id"])
            if answer is not None and not answer.done():
                answer.set_result([Classification(*row) for row in found["found"]])

    def _overdue(self) -> bool:
        oldest = min(self._unanswered.values(), default=time.monotonic())
        return time.monotonic() - oldest > HANG_SECONDS


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"  # ASCII: half a surrogate pair gets through as well


async def _read(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    line = await process.stdout.readline()
    return json.loads(line) if line else None


async def _last_words(stream: asyncio.StreamReader) -> str:
    last = b""
    while line := await stream.readline():
        last = line.strip() or last
    return last.decode("utf-8", "replace")[:500]


# The child.


def serve(requests: BinaryIO, answers: BinaryIO, learned_in: Path) -> None:
    """Answer until `requests` ends. Its first line holds the settings; the first answer says: learned."""
    started = time.monotonic()
    try:
        settings = ClassificationSettings.model_validate_json(requests.readline())
        categoriser = Classifier.build(settings, learned_in)
        categoriser.classify("warm")
    except RouterError as error:
        answers.write(_line({"error": str(error)}))
        answers.flush()
        return
    answers.write(_line({"seconds": time.monotonic() - started}))
    answers.flush()
    for line in requests:
        request = json.loads(line)
        found = categoriser.classify_many(request["prompts"])
        rows = [(one.category, one.confidence, one.reason) for one in found]
        answers.write(_line({"id": request["id"], "found": rows}))
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer, classifier_folder())
