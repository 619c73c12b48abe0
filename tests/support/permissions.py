"""Makes file modes apply to root, in one thread."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import pytest

VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE = 1 << 1  # write any file; reading of any file is another capability


@contextlib.contextmanager
def file_modes_apply() -> Iterator[None]:
    """Lets this thread write only what file modes allow; it can still read all files of a closed checkout."""
    if os.geteuid() != 0:
        yield
        return
    if not hasattr(ctypes.CDLL(None), "capset"):
        pytest.skip("file modes never apply to root here")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION_3, 0)
    former = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice, low words first
    assert libc.capget(header, former) == 0, os.strerror(ctypes.get_errno())
    reduced = (ctypes.c_uint32 * 6)(*former)
    reduced[0] &= ~CAP_DAC_OVERRIDE
    assert libc.capset(header, reduced) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, former) == 0, os.strerror(ctypes.get_errno())
