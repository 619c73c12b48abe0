"""Mutants of the script: each removes one guard.

Every `old` text must be in the script exactly once, so that a change of the script is noticed here.
"""

# ruff: noqa: E501 - the script's own lines, whole

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SMALL = {"small_chunks": True, "bulk": 30}
LOSING = {"losses": True, "with_history": True}
FAILING = {"failing": True}


@dataclass(frozen=True)
class Mutant:
    """`where` and `palette` are settings and targets of the walks that detect it; `check` is a directed check."""

    name: str
    old: str
    new: str
    palette: int | None = None
    where: dict[str, Any] = field(default_factory=dict)
    check: str = ""


MUTANTS = [
    # The clock
    Mutant("a clock set back is accepted", "if now < clock then\n  offset, now, changed = offset + clock - now, clock, true",
           "if false then", where={"back": True}),
    Mutant("a clock set ahead is accepted", "elseif bound > 0 and seen == gen and now >", "elseif false and now >",
           where={"forward": True}),
    Mutant("a clock set ahead gains a slack", "local latest = max(floor(bound), clock)",
           "local latest = max(floor(bound), clock) + slack", where={"forward": True}),
    Mutant("the corrected clock is not stored", "offset, now, changed = offset - (now - latest), latest, true",
           "now = latest", where={"forward": True}),
    Mutant("the clock of a grant is not stored", "    clock, changed = now, true\n", "    changed = true\n",
           check="a clock set back costs no more than a window"),
    # State
    Mutant("state of another run is used", "local live = stored[2] and stored[1] == RUN",
           "local live = stored[2] and stored[1] and true", where=LOSING),
    Mutant("state of another format is used", "local live = stored[2] and stored[1] == RUN",
           "local live = stored[2] and string.sub(stored[1] or '', 3) == string.sub(RUN, 3)", check="another format is rebuilt"),
    Mutant("an older target is obeyed", "if seen_version > version and not broken then", "if false then", check="an older target is not obeyed"),
    Mutant("a longer window is not rebuilt", "if since + period > now then broken = true end", "",
           check="a longer window is rebuilt from the history"),
    Mutant("lost state grants", "if not live then return pack(REPLY, LOST", "if false then return pack(REPLY, LOST",
           where=LOSING),
    Mutant("an older generation is used", "broken = seen > gen or (", "broken = (", check="an older generation is detected"),
    Mutant("fewer sends than seen are accepted", "(seen == gen and seen_head > head)", "false",
           check="older state in the same run is detected"),
    Mutant("a blind start stays", "(seen > 0 and seen < gen and blind == 1)", "false", check="a blind start is detected"),
    Mutant("a missing chunk is empty", "if #text == 0 then broken = true return now end",
           "if #text == 0 then return 1 end", check="a lost chunk is detected"),
    Mutant("zeros are send times", "  if sent_at == 0 then broken = true return now end  -- the chunk was lost, and created again by a later send\n",
           "", check="a recreated chunk is detected"),
    Mutant("zeros are send times for walks back", "        if sent_at == 0 then broken = true return end\n", "", check="a lost chunk is detected by a new target"),
    Mutant("broken state is not marked", "if broken and live and verb ~= 'snapshot' then", "if false then",
           check="a lost chunk is detected"),
    Mutant("chunks of a lost hash stay", "      call('DEL', key .. ':m:' .. chunk, key .. ':t:' .. chunk)  -- left by state whose hash was lost\n",
           "", check="chunks without their hash are replaced"),
    Mutant("a generation comes twice", "gen = max(now, gen + 1, seen_gen + 1)", "gen = max(gen, 1)", where=LOSING),
    Mutant("known state is not marked", "if sender_knew == 1 or stored[2] then call('HSET', key, 'known', '1') end", "",
           where={"losses": True, "with_history": False}),
    Mutant("a blind start despite a known loss", "if is_blind == 1 and call('HEXISTS', key, 'known') == 1 then", "if false then",
           check="a model known to be lost is not started blindly"),
    Mutant("state is rebuilt twice", "if live or not spec then return pack('<d', live and 1 or 0) end",
           "if not spec then return pack('<d', 0) end", check="a second rebuild changes nothing"),
    Mutant("chunks are dropped too early", "if broken or last + keep > now then break end", "if broken then break end",
           6, SMALL),
    Mutant("a minute is not kept", "local KEPT_AGE = 61e6", "local KEPT_AGE = 0", check="the latest minute is kept"),
    Mutant("dropped sends do not count", "oldest, since = oldest + 1, last", "oldest = oldest + 1", 7, SMALL,
           "dropped sends count as sent just before"),
    Mutant("unknown sends do not count", "      elseif since > 0 then\n        t = max(t, since + period)",
           "      elseif false then", 7, SMALL, "dropped sends count as sent just before"),
    # Limits
    Mutant("a model without a target is granted", "if not spec then return pack(REPLY, NO_TARGET",
           "if false then return pack(REPLY, NO_TARGET", check="a model without a target is reported"),
    Mutant("0 does not stop", "    if stopped == 1 then break end\n", "", 0),
    Mutant("a call larger than the window waits", "then reason = TOO_MANY_TOKENS end", "then reason = STOPPED end",
           check="a call larger than the window is reported"),
    Mutant("one concurrent call too many", "if concurrency >= 0 and in_flight >= concurrency then", "if concurrency >= 0 and in_flight > concurrency then", 3),
    Mutant("slots never end", "elseif concurrency >= 0 and (in_flight + count > concurrency or in_flight % 64 == 63) then",
           "elseif false then", 3),
    Mutant("grants of one request share a slot", "    if concurrency >= 0 then in_flight = in_flight + 1 end\n", "", 3, {"bulk": 4}),
    Mutant("no slot is used", "if concurrency >= 0 then call('ZADD', key .. ':holders', granted[n] + max_call, n) end", "", 3),
    Mutant("no gap between paced sends", "max(now, sent + gap), WINDOW", "max(now, sent), WINDOW", 0),
    Mutant("send times decrease", "max(now, sent + gap), WINDOW", "now, WINDOW", 0),
    Mutant("holes count", "        if before == i then break end\n", "        if true then break end\n", 0),
    Mutant("a period one microsecond short", "t = max(t, send_time(i, w) + period)\n", "t = max(t, send_time(i, w) + period - 1)\n", 0),
    Mutant("one request too many", "      local i = head - limit\n", "      local i = head - limit - 1\n", 0),
    Mutant("permits far ahead", "or t > now + horizon then break end", "then break end", 0),
    Mutant("a cool-down is ignored", "    if cooldown_until > t then t, reason = cooldown_until, COOLING_DOWN end\n", "", where=FAILING),
    Mutant("tokens always fit", "and tail[k + 1] + wanted <= limit\n", "\n", 2),
    Mutant("tokens exceed the window", "while tried[k + 1] + need_now > limit and", "while tried[k + 1] > limit and", 2),
    Mutant("tokens leave a period early", "by = max(by, tried[k + 2] + period + (", "by = max(by, tried[k + 2] + (", 2),
    Mutant("reserved tokens are not counted", "tail[k], tail[k + 1] = tried[k], tried[k + 1] + need", "tail[k], tail[k + 1] = tried[k], tried[k + 1]", 2),
    Mutant("pacing ignores the last send", "    head, sent = head + 1, t\n", "    head = head + 1\n", 0),
    Mutant("tokens from before a loss do not count", "easy = easy and since + period <= t and", "easy = easy and", 2,
           check="tokens from before a loss are unknown"),
    # Releases
    Mutant("a permit is released twice", "i % SENDS, 1) == 0 then", "i % SENDS, 1) >= 0 then", 4),
    Mutant("a send of another generation is released", "      if of == gen then\n", "      if true then\n",
           check="a permit from before a loss frees nothing"),
    Mutant("the end of a rebuilt call is void", "freed = end_call(open, used, unused) or freed", "freed = false",
           check="an end after a loss frees one slot"),
    Mutant("an unsent rebuilt call keeps its slot", "if open >= 0 then freed = end_call(open, 0, 1) or freed end", "",
           check="a logged call that is sent after a loss takes one slot"),
    Mutant("turns are ignored", "        others = others + need\n        if", "        if", check="a turn is kept"),
    Mutant("an abandoned turn stays", "elseif expiry > now and (same or not in_front) then", "elseif same or not in_front then", check="an abandoned turn ends"),
    Mutant("a turn that was left stays", "      if who ~= sender then\n", "      if true then\n",
           check="an abandoned turn ends"),
    Mutant("a correction applies to all windows", "if tail[k] <= i then tail[k + 1] = tail[k + 1] + delta end",
           "tail[k + 1] = tail[k + 1] + delta", 2),
    Mutant("a correction is not counted", "if tail[k] <= i then tail[k + 1] = tail[k + 1] + delta end", "", 2),
    Mutant("lost calls in flight are free slots", "    if ended + left ~= in_flight then broken = true end  -- the sorted set was lost\n", "",
           check="lost calls in flight are not free slots"),
    Mutant("a slot is not released", "if concurrency >= 0 and call('ZREM', key .. ':holders', i) == 1 then",
           "if false then", 3),
    Mutant("a hole is not stored", "    holes = holes + 1\n", "", 0),
    Mutant("a cancelled send time is lost", "      sent = send_time(i - 1, 'hole')\n", "", 0),
    Mutant("a cancelled permit drops tokens", "while n >= oldest * SENDS and ends(n, send_time(n, 'hole'), period) > max(clock, sent) do",
           "while false do", check="sends passed by a cancelled permit count again"),
    Mutant("denied clients are not notified", "local notify = freed and denied == 1", "local notify = false",
           check="a free slot is published to denied clients"),
    Mutant("clients that wait for a window are not notified", "if takes_room(i) then freed, denied = true, 1 end", "",
           check="a permit cancelled in time is published"),
    Mutant("all clients are woken for nothing", "if takes_room(i) then freed, denied = true, 1 end", "freed, denied = true, 1",
           check="a permit cancelled too late is not published"),
    # Targets
    Mutant("an older version wins", "if spec and version > new_version then", "if false then", 0),
    Mutant("new token windows are empty", "      build()\n      for w = 1, has_log", "      building = 0\n      for w = 1, has_log", 2),
    Mutant("a window grants before it is built", "(broken or building == 1) and 0 or count + 1", "broken and 0 or count + 1", 2, SMALL),
    Mutant("a correction behind a long walk is not counted", "reach[k + 1], reach_changed = reach[k + 1] + delta, true",
           "reach_changed = true", check="a correction behind a long walk makes room"),
    Mutant("a grant behind a long walk is not counted", "    if #reach > 0 then reach, reach_changed = {}, true end\n    granted[head]",
           "    granted[head]", 2, where=SMALL),
    Mutant("a long walk never goes back", "while i > tried[k] and steps < SCAN_STEPS and send_time(i - 1, -k) + period > by\n",
           "while false\n", 2, where=SMALL),
    Mutant("a long walk waits for nothing", "                by = max(by, send_time(i - 1, -k) + period)\n", "", 2, where=SMALL),
    Mutant("snapshots include tokens that left", " - sum_tokens(tail[k], first)", "",
           check="snapshots exclude tokens that left"),
    Mutant("a new concurrency limit ignores calls in flight", "        find_holders(longest)\n      end\n      changed", "      end\n      changed", 3),
    Mutant("ended calls use slots of a new limit", "if bits % 2 ^ (8 - bit) < 2 ^ (7 - bit) and i < head then",
           "if i < head then", 3),
    Mutant("old slots come back", "        call('DEL', key .. ':holders')\n        in_flight = 0\n", "",
           check="slots of an earlier limit do not come back"),
    Mutant("earlier permits expire with the new slack", "if slack_was > slack and head > 0 then late,", "if false then late,", 7),
    Mutant("a target without sends is late", "if slack_was > slack and head > 0 then late,", "if slack_was > slack then late,",
           check="a target without sends makes no send late"),
    Mutant("a later send overtakes a late one", "(i < late_head and send_time(i, w) or late_sent) + period + extra) end",
           "send_time(i, w) + period + (i < late_head and extra or 0)) end",
           check="a target with a shorter slack counts earlier requests longer"),
    Mutant("late tokens leave in time", "(tails[k] < late_head and extra or 0) <= by", "0 <= by",
           check="a target with a shorter slack counts earlier tokens longer"),
    Mutant("late tokens are not waited for", "(tried[k] < late_head and extra or 0))", "0)",
           check="a target with a shorter slack waits for earlier tokens"),
    Mutant("late tokens leave with the others", "and (extra == 0 or late_sent + period + extra <= by) then", "then",
           check="a target with a shorter slack counts earlier tokens longer"),
    # The breaker
    Mutant("a tripped model is not probed singly", "    if trips > 0 and probe_end > now then\n", "    if false then\n", where=FAILING),
    Mutant("several probes in one request", "    if trips > 0 then probe, probe_end = head - 1, t + max_call end\n", "",
           where={**FAILING, "bulk": 4}),
    Mutant("an ended probe keeps its slot", "    if trips > 0 and i == probe then\n", "    if false then\n", where=FAILING),
    Mutant("earlier calls count for the probe", "    local stale = trips > 0 and ((i >= 0 and i < opened) or (i < 0 and cooldown_until > now))\n",
           "    local stale = false\n", where=FAILING),
    Mutant("calls from before a loss count for new ones", "    if of ~= gen then i = NEVER end\n", "",
           check="a call from before a loss does not affect the probe"),
]  # fmt: skip
