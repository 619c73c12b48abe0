"""Arrival server for millions of sends: one datagram each, timestamped by the kernel.

Timestamps by Python would be late on a busy machine, and the judge would see windows that never were. The
kernel uses the wall clock; timestamps are converted to the monotonic clock as they are read.
"""

from __future__ import annotations

import selectors
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.judge import Arrival
from bench.judge.arrivals import NANOSECONDS

# kind (0 start of a call, 1 end), model, number within the process, time of the permit check, tokens
RECORD = struct.Struct("<BBIqI")
LOG = np.dtype([("process", "<u4"), ("kind", "u1"), ("model", "u1"), ("number", "<u4"), ("checked_at", "<i8"),
                ("tokens", "<u4"), ("at", "<i8")])  # fmt: skip
_ROW = struct.Struct("<IBBIqIq")
_SO_TIMESTAMPNS = 35  # Linux; not defined by Python
_STAMP = struct.Struct("@qq")
_BUFFER_BYTES = 8 << 20
_STOP = b"close"


class ArrivalServer:
    """One socket per sender, so that no burst fills the buffer of another."""

    def __init__(self, log: Path, senders: int) -> None:
        self._log = log
        self._sockets = [_listening() for _ in range(senders)]
        self.ports: list[int] = [one.getsockname()[1] for one in self._sockets]

    def close(self) -> None:
        """Ends `serve`."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            out.sendto(_STOP, ("127.0.0.1", self.ports[0]))
        for one in self._sockets:
            one.close()

    def serve(self) -> None:
        """Logs arrivals until `close`."""
        with self._log.open("wb", buffering=1 << 20) as log:
            for sender, data, at in self._arrivals():
                log.write(_ROW.pack(sender, *RECORD.unpack(data), at))

    def _arrivals(self) -> Iterator[tuple[int, bytes, int]]:
        selector = selectors.DefaultSelector()
        for number, one in enumerate(self._sockets):
            selector.register(one, selectors.EVENT_READ, number)
        while True:
            for key, _ in selector.select():
                ready: Any = key.fileobj
                while True:
                    try:
                        data, ancillary, _, _ = ready.recvmsg(RECORD.size, 64)
                    except BlockingIOError:
                        break
                    if data == _STOP:
                        return
                    yield key.data, data, _arrived_at(ancillary)


def _listening() -> socket.socket:
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    if sys.platform == "linux":
        one.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    one.bind(("127.0.0.1", 0))
    one.setblocking(False)  # noqa: FBT003 - the socket module's own signature
    return one


def _arrived_at(ancillary: list[tuple[int, int, bytes]]) -> int:
    """Returns the timestamp on the monotonic clock, in nanoseconds; now, if there is none."""
    now = time.monotonic_ns()
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = _STAMP.unpack(data)
            return now - (time.time_ns() - int(seconds) * NANOSECONDS - int(nanoseconds))
    return now


def read_log(path: Path) -> NDArray[Any]:
    """Reads the log as columns of `LOG`."""
    return np.fromfile(path, dtype=LOG)


def arrivals_of(log: NDArray[Any], models: tuple[str, ...]) -> list[Arrival]:
    """Converts a log for the judge; a call without an end ends as it starts."""
    ends = {}
    for row in log[log["kind"] == 1]:
        ends[int(row["process"]), int(row["model"]), int(row["number"])] = int(row["at"]) / NANOSECONDS
    arrivals = []
    begun = log[log["kind"] == 0]
    columns = (begun["process"], begun["model"], begun["number"], begun["at"], begun["tokens"])
    for process, model, number, at, tokens in zip(*(column.tolist() for column in columns), strict=True):
        ended = ends.get((process, model, number), at / NANOSECONDS)
        arrivals.append(Arrival(at / NANOSECONDS, ended, models[model], f"{process}-{number}", tokens))
    return arrivals
