"""Runs a classifier in a child process, behind an async interface.

In the parent, numpy would hold the GIL and delay the sending of calls. The child reads JSON Lines from
standard input, first the settings, then `{"id", "prompts"}`, and answers with lines of `id` and `found`. It
exits at the end of its input.
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

from router.background import cancel_and_wait, child_process, wait_for_event
from router.classification.classifier import Classification, Classifier
from router.classification.features import shortened
from router.errors import RouterError
from router.settings import ClassificationSettings, classifier_folder

log = logging.getLogger("router.classification.process")

MAX_WAITING = 4096  # prompts; further ones get the default category at once
PROMPTS_PER_MESSAGE = 128
START_SECONDS = 60.0  # on a busy host; otherwise two or three
HANG_SECONDS = 10.0
MIN_RESTART_SECONDS, MAX_RESTART_SECONDS = 0.2, 30.0
MAX_LINE_BYTES = 64 * 1024 * 1024
CHILD = (sys.executable, "-m", "router.classification.process")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class ClassifierProcess:
    """Classifies in a child process, which is started on first use and restarted if it dies or hangs.

    Prompts without a result within `settings.timeout_seconds` get the default category; the log says so once.
    """

    def __init__(self, settings: ClassificationSettings) -> None:
        self.settings = settings
        self._ids = count()
        self._results: dict[int, asyncio.Future[list[Classification]]] = {}
        self._waiting_prompts = 0
        self._unanswered: dict[int, float] = {}  # id -> time of sending, also if the caller has timed out
        self._supervisor: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._default_logged = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        """Ends the child; pending calls return the default category."""
        if self._supervisor is not None:
            await cancel_and_wait(self._supervisor)
            self._supervisor = None
        self._fail_pending("the classifier was stopped")

    @property
    def ready(self) -> bool:
        """Whether the child can classify."""
        return self._ready.is_set()

    def warm_up(self) -> None:
        """Starts the child if it is not running; returns at once."""
        if self._supervisor is None or self._supervisor.done():
            loop = asyncio.get_running_loop()
            self._supervisor = loop.create_task(self._supervise(), name="router classifier")

    async def until_ready(self, seconds: float) -> bool:
        """Starts the child and waits at most `seconds`; returns whether it can classify."""
        self.warm_up()
        return await wait_for_event(self._ready, seconds)

    async def classify(self, prompts: Sequence[str]) -> list[Classification]:
        """Classifies prompts in order; those without a result in time get the default category."""
        deadline = time.monotonic() + self.settings.timeout_seconds
        self.warm_up()
        done: list[Classification] = []
        for start in range(0, len(prompts), PROMPTS_PER_MESSAGE):
            batch = prompts[start : start + PROMPTS_PER_MESSAGE]
            done.extend(await self._classify_batch(batch, deadline - time.monotonic()))
        return done

    async def _classify_batch(self, prompts: Sequence[str], seconds: float) -> list[Classification]:
        if self._waiting_prompts + len(prompts) > MAX_WAITING:
            return self._default(len(prompts), "too many prompts wait for a category")
        number = next(self._ids)
        result: asyncio.Future[list[Classification]] = asyncio.get_running_loop().create_future()
        self._results[number] = result
        self._waiting_prompts += len(prompts)
        try:
            return await asyncio.wait_for(self._exchange(number, prompts, result), max(0.0, seconds))
        except asyncio.TimeoutError:
            state = "is still starting" if not self.ready else "did not answer"
            within = f"no category within {self.settings.timeout_seconds:g} s"
            return self._default(len(prompts), f"{within}: the classifier {state}")
        finally:
            if result.done() and not result.cancelled():
                result.exception()  # marks it as retrieved, also if the prompt was never sent
            self._results.pop(number, None)
            self._waiting_prompts -= len(prompts)

    async def _exchange(
        self, number: int, prompts: Sequence[str], result: asyncio.Future[list[Classification]]
    ) -> list[Classification]:
        await self._ready.wait()
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.write(_line({"id": number, "prompts": [shortened(prompt) for prompt in prompts]}))
            self._unanswered[number] = time.monotonic()
            with contextlib.suppress(OSError):  # it died: the supervisor fails the pending results
                await process.stdin.drain()
        return await result

    def _default(self, number: int, reason: str) -> list[Classification]:
        category = self.settings.default_category
        if not self._default_logged:
            log.warning("classifier: %s; using the default category %r (logged once)", reason, category)
        self._default_logged = True
        return [Classification(category, 0.0, f"default: {reason}")] * number

    def _fail_pending(self, reason: str) -> None:
        for result in self._results.values():
            if not result.done():
                result.set_exception(asyncio.TimeoutError(reason))

    async def _supervise(self) -> None:
        """Keeps a child running; restarts it after a pause that doubles while children die young."""
        pause = MIN_RESTART_SECONDS
        while True:
            started = time.monotonic()
            try:
                await self._run_child()
            except (OSError, RouterError, ValueError, asyncio.TimeoutError) as error:
                log.warning("classifier: %s; tasks without a category get %r until it is back",
                            str(error) or type(error).__name__, self.settings.default_category)  # fmt: skip
            finally:
                self._ready.clear()
                self._process = None
                self._unanswered.clear()
                self._fail_pending("the process ended")
            lived_long = time.monotonic() - started > MAX_RESTART_SECONDS
            pause = MIN_RESTART_SECONDS if lived_long else min(2 * pause, MAX_RESTART_SECONDS)
            await asyncio.sleep(pause)

    async def _run_child(self) -> None:
        async with child_process(
            *CHILD, stdin=PIPE, stdout=PIPE, stderr=PIPE,
            limit=MAX_LINE_BYTES, env={**os.environ, **ONE_THREAD},
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stderr is not None
            last_line = asyncio.create_task(_last_line(process.stderr), name="router classifier stderr")
            try:
                process.stdin.write(self.settings.model_dump_json().encode() + b"\n")
                hello = await asyncio.wait_for(_read(process), START_SECONDS)
                if hello is not None and "error" in hello:
                    raise RouterError(str(hello["error"]))
                if hello is not None:
                    log.info("classifier: ready after %.1f s", hello["seconds"])
                    self._process = process
                    self._ready.set()
                    await self._receive(process)
                raise RouterError(f"the process ended: {await last_line or 'no output'}")
            finally:
                last_line.cancel()

    async def _receive(self, process: asyncio.subprocess.Process) -> None:
        while True:
            reading = asyncio.ensure_future(_read(process))
            try:
                while not (await asyncio.wait({reading}, timeout=HANG_SECONDS / 4))[0]:
                    if self._hangs():
                        raise RouterError(f"the process has not answered for {HANG_SECONDS:g} s")
            finally:
                reading.cancel()
            message = reading.result()
            if message is None:
                return
            self._default_logged = False
            self._unanswered.pop(message["id"], None)
            result = self._results.get(message["id"])
            if result is not None and not result.done():
                result.set_result([Classification(*row) for row in message["found"]])

    def _hangs(self) -> bool:
        oldest = min(self._unanswered.values(), default=time.monotonic())
        return time.monotonic() - oldest > HANG_SECONDS


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"  # ASCII, so that lone surrogates pass


async def _read(process: asyncio.subprocess.Process) -> Any:
    assert process.stdout is not None
    line = await process.stdout.readline()
    return json.loads(line) if line else None


async def _last_line(stream: asyncio.StreamReader) -> str:
    last = b""
    while line := await stream.readline():
        last = line.strip() or last
    return last.decode("utf-8", "replace")[:500]


def serve(requests: BinaryIO, answers: BinaryIO, cache: Path) -> None:
    """Runs in the child: reads the settings, reports that it is ready, and answers until `requests` ends."""
    started = time.monotonic()
    try:
        settings = ClassificationSettings.model_validate_json(requests.readline())
        classifier = Classifier.build(settings, cache)
        classifier.classify("warm up")
    except RouterError as error:
        answers.write(_line({"error": str(error)}))
        answers.flush()
        return
    answers.write(_line({"seconds": time.monotonic() - started}))
    answers.flush()
    for line in requests:
        request = json.loads(line)
        found = classifier.classify_many(request["prompts"])
        rows = [(one.category, one.confidence, one.reason) for one in found]
        answers.write(_line({"id": request["id"], "found": rows}))
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer, classifier_folder())
