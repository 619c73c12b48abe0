"""Reports of worker processes about why they do not send."""

from __future__ import annotations

import asyncpg
import pytest

from router.errors import DatabaseError
from router.status import Reason
from router.workers.standstill import MAX_REPORTS, StandstillReports, without_secrets
from tests.support.queue import Probe

READ = "SELECT model, code, detail FROM current_worker_reports ORDER BY worker, model, code"


async def test_reports_are_stored_kept_and_removed(database: str, probe: Probe) -> None:
    async with asyncpg.create_pool(database, min_size=1, max_size=2) as pool:
        reports, other = StandstillReports(pool, "w1"), StandstillReports(pool, "w2")
        reports.record(Reason.CLAIMS_FAILING, 'column "x" does not exist\nLINE 1', "phi-4")
        reports.record(Reason.REDIS_UNAVAILABLE)
        other.record(Reason.CLAIMS_FAILING, "another", "phi-4")
        await reports.step()
        await other.step()
        assert [tuple(row) for row in await probe.all(READ)] == [
            ("", "redis_unavailable", ""),
            ("phi-4", "claims_failing", 'column "x" does not exist'),
            ("phi-4", "claims_failing", "another"),
        ]

        since = await probe.value("SELECT since FROM worker_reports WHERE worker = 'w1' AND model = 'phi-4'")
        reports.clear(Reason.REDIS_UNAVAILABLE)
        reports.record(Reason.CLAIMS_FAILING, "a newer error", "phi-4")
        await reports.step()
        assert [row["detail"] for row in await probe.all(READ)] == ["a newer error", "another"]
        still = await probe.value("SELECT since FROM worker_reports WHERE worker = 'w1'")
        assert still == since

        reports.loop_began("phi-4")
        reports.loop_ended("phi-4")
        await reports.step()
        assert [row["detail"] for row in await probe.all(READ)] == ["another"]
        await other.withdraw()
        assert await probe.all(READ) == []


async def test_reports_that_could_not_be_written_are_written_later(database: str, probe: Probe) -> None:
    async with asyncpg.create_pool(database, min_size=1, max_size=2) as pool:
        reports = StandstillReports(pool, "w1")
        reports.record(Reason.CLAIMS_FAILING, "an error", "phi-4")
        await probe.run("ALTER TABLE worker_reports RENAME TO gone")
        with pytest.raises(DatabaseError):
            await reports.step()
        await probe.run("ALTER TABLE gone RENAME TO worker_reports")
        await reports.step()
        assert len(await probe.all(READ)) == 1


async def test_unchanged_reports_are_not_written_at_each_step(database: str, probe: Probe) -> None:
    async with asyncpg.create_pool(database, min_size=1, max_size=2) as pool:
        reports = StandstillReports(pool, "w1")
        reports.record(Reason.CLAIMS_FAILING, "one", "phi-4")
        await reports.step()
        for number in range(3):
            reports.record(Reason.CLAIMS_FAILING, f"error {number}", "phi-4")
            await reports.step()
        assert [row["detail"] for row in await probe.all(READ)] == ["one"]
        for number in range(2 * MAX_REPORTS):
            reports.record(Reason.NO_WORKER, "", f"m{number}")
        assert len(reports.models(Reason.NO_WORKER)) < MAX_REPORTS


@pytest.mark.parametrize(
    ("detail", "shown"),
    [
        ("cannot reach redis://user:s3cret@host:6379/0", "cannot reach redis://***@host:6379/0"),
        ("postgresql://u:p@ss/w@rd@h/db is away", "postgresql://***@h/db is away"),
        ("first\nsecond", "first"),
        ("a\x00b", "a\ufffdb"),
        ("x" * 1_000, "x" * 300),
    ],
)
def test_details_show_no_secrets_and_fit_one_line(detail: str, shown: str) -> None:
    assert without_secrets(detail) == shown
