"""Each guard of the script taken out once: what is replaced, by what, and where a walk meets it.

An `old` text must stand in the script exactly once, so that a change of the script is noticed here.
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
    """`where` are settings of the walks that look for it, `palette` their targets; `check` names a directed one."""

    name: str
    old: str
    new: str
    palette: int | None = None
    where: dict[str, Any] = field(default_factory=dict)
    check: str = ""


MUTANTS = [
    # The clock
    Mutant("a clock set back is believed", "if now < clock then\n  offset, now, changed = offset + clock - now, clock, true",
           "if false then", where={"back": True}),
    Mutant("a clock set ahead is believed", "elseif bound > 0 and seen == gen and now >", "elseif false and now >",
           where={"forward": True}),
    Mutant("a clock set ahead gains a slack", "local latest = max(floor(bound), clock)",
           "local latest = max(floor(bound), clock) + slack", where={"forward": True}),
    Mutant("the corrected clock is not kept", "offset, now, changed = offset - (now - latest), latest, true",
           "now = latest", where={"forward": True}),
    Mutant("the clock of a grant is not kept", "    clock, changed = now, true\n", "    changed = true\n",
           check="a clock set back costs no more than a window"),
    # Memory
    Mutant("another run's memory is taken", "local live = stored[2] and stored[1] == RUN",
           "local live = stored[2] and stored[1] and true", where=LOSING),
    Mutant("a lost memory grants", "if not live then return pack(REPLY, LOST", "if false then return pack(REPLY, LOST",
           where=LOSING),
    Mutant("an older generation is taken", "broken = seen > gen or (", "broken = (", check="an older generation is found out"),
    Mutant("fewer sends than were seen are taken", "(seen == gen and seen_head > head)", "false",
           check="an older memory in the same run is found out"),
    Mutant("a blind start stays", "(seen > 0 and seen < gen and blind == 1)", "false", check="a blind start is found out"),
    Mutant("a missing chunk is empty", "if #text == 0 then broken = true return now end",
           "if #text == 0 then return 1 end", check="a chunk that is gone is found out"),
    Mutant("zeros are moments", "  if sent_at == 0 then broken = true return now end  -- the chunk was lost, and created again by a later send\n",
           "", check="a chunk that is gone and made anew is found out"),
    Mutant("zeros are moments to those who walk back", "      if sent_at == 0 then broken = true end\n      if broken or not",
           "      if sent_at == 0 or not", check="a chunk that is gone is found out by a new target"),
    Mutant("what is broken is not marked", "if broken and live and verb ~= 'snapshot' then", "if false then",
           check="a chunk that is gone is found out"),
    Mutant("chunks of a lost hash stay", "      call('DEL', key .. ':m:' .. chunk, key .. ':t:' .. chunk)  -- left by state whose hash was lost\n",
           "", check="chunks without their hash are made anew"),
    Mutant("a generation comes twice", "gen = max(now, gen + 1, seen_gen + 1)", "gen = max(gen, 1)", where=LOSING),
    Mutant("what was known is not marked", "if sender_knew == 1 or stored[2] then call('HSET', key, 'known', '1') end", "",
           where={"losses": True, "with_history": False}),
    Mutant("a blind start beside a known loss", "if is_blind == 1 and call('HEXISTS', key, 'known') == 1 then", "if false then",
           check="nobody starts blindly what others know to be lost"),
    Mutant("it is rebuilt twice", "if live or not spec then return pack('<d', live and 1 or 0) end",
           "if not spec then return pack('<d', 0) end", check="the second of two rebuilds changes nothing"),
    Mutant("old chunks are dropped too soon", "if broken or last + keep > now then break end", "if broken then break end",
           6, SMALL),
    Mutant("a minute is not kept", "local KEPT_AGE = 61e6", "local KEPT_AGE = 0", 7, SMALL),
    Mutant("what was dropped is forgotten", "oldest, since = oldest + 1, last", "oldest = oldest + 1", 7, SMALL,
           "what was dropped counts as sent just before"),
    Mutant("what is not known counts for nothing", "      elseif since > 0 then\n        t = max(t, since + period)",
           "      elseif false then", 7, SMALL, "what was dropped counts as sent just before"),
    # Limits
    Mutant("a model without a target is sent to", "if not spec then return pack(REPLY, NO_TARGET",
           "if false then return pack(REPLY, NO_TARGET", where=LOSING),
    Mutant("0 does not stop", "    if stopped == 1 then break end\n", "", 0),
    Mutant("a call larger than the window waits", "then reason = TOO_MANY_TOKENS end", "then reason = STOPPED end",
           check="a call larger than the window is said to be"),
    Mutant("one call at once too many", "if concurrency >= 0 and in_flight >= concurrency then", "if concurrency >= 0 and in_flight > concurrency then", 3),
    Mutant("places end never", "elseif concurrency >= 0 and (in_flight + count > concurrency or in_flight % 64 == 63) then",
           "elseif false then", 3),
    Mutant("grants of one ask share a place", "    if concurrency >= 0 then in_flight = in_flight + 1 end\n", "", 3, {"bulk": 4}),
    Mutant("no place is taken", "if concurrency >= 0 then call('ZADD', key .. ':holders', granted[n] + max_call, n) end", "", 3),
    Mutant("no gap between paced sends", "max(now, sent + gap), WINDOW", "max(now, sent), WINDOW", 0),
    Mutant("moments go back", "max(now, sent + gap), WINDOW", "now, WINDOW", 0),
    Mutant("holes are not looked behind", "        if before == i then break end\n", "        if true then break end\n", 0),
    Mutant("a period one microsecond short", "t = max(t, send_time(i, w) + period)\n", "t = max(t, send_time(i, w) + period - 1)\n", 0),
    Mutant("one request too many", "      local i = head - limit\n", "      local i = head - limit - 1\n", 0),
    Mutant("permits far ahead", "or t > now + look_ahead then break end", "then break end", 0),
    Mutant("a rest is not kept", "    if cooldown_until > t then t, reason = cooldown_until, COOLING_DOWN end\n", "", where=FAILING),
    Mutant("tokens fit always", "and tail[k + 1] + need <= limit\n", "\n", 2),
    Mutant("tokens go too far", "while tried[k + 1] + need_now > limit and", "while tried[k + 1] > limit and", 2),
    Mutant("tokens leave with the request before them", "by = max(by, tried[k + 2] + period + (", "by = max(by, tried[k + 2] + (", 2),
    Mutant("reserved tokens are not counted", "tail[k], tail[k + 1] = tried[k], tried[k + 1] + need", "tail[k], tail[k + 1] = tried[k], tried[k + 1]", 2),
    Mutant("the pace has no memory", "    head, sent = head + 1, t\n", "    head = head + 1\n", 0),
    Mutant("tokens of before a loss are free", "easy = easy and since + period <= t and", "easy = easy and", 2,
           check="tokens of before a loss are not known"),
    # What is given back
    Mutant("it is given back twice", "i % SENDS, 1) == 0 then", "i % SENDS, 1) >= 0 then", 4),
    Mutant("another generation's send is given back", "      if of == gen then\n", "      if true then\n", 4, LOSING),
    Mutant("a correction is for all windows", "if tail[k] <= i then tail[k + 1] = tail[k + 1] + delta end",
           "tail[k + 1] = tail[k + 1] + delta", 2),
    Mutant("a correction is not counted", "if tail[k] <= i then tail[k + 1] = tail[k + 1] + delta end", "", 2),
    Mutant("places that are gone are free", "    if ended + left ~= in_flight then broken = true end  -- the sorted set was lost\n", "",
           check="places that are gone are not free"),
    Mutant("a place is not given back", "if concurrency >= 0 and call('ZREM', key .. ':holders', i) == 1 then",
           "if false then", 3),
    Mutant("a hole is counted", "    holes = holes + 1\n", "", 0),
    Mutant("a cancelled moment is lost", "      sent = send_time(i - 1, 'hole')\n", "", 0),
    Mutant("a cancelled permit forgets tokens", "while n >= oldest * SENDS and ends(n, send_time(n, 'hole'), period) > max(clock, sent) do",
           "while false do", check="what a cancelled permit left behind counts again"),
    Mutant("those refused are not told", "local notify = freed and denied == 1", "local notify = false",
           check="who was refused is told of a free place"),
    Mutant("those who wait for a window are not told", "if takes_room(i) then freed, denied = true, 1 end", "",
           check="who waits is told of a permit that was cancelled in time"),
    Mutant("all are woken for nothing", "if takes_room(i) then freed, denied = true, 1 end", "freed, denied = true, 1",
           check="nobody is told of a permit that was cancelled too late"),
    # Notifications of the target
    Mutant("an older version wins", "if spec and version > new_version then", "if false then", 0),
    Mutant("new windows of tokens are empty", "      count_tokens(clock, known)  --", "      count_tokens(clock + 1e15, known)  --", 2),
    Mutant("windows of tokens are taken for others'", "local k, same = 3 * w - 2, known[period]",
           "local k = 3 * w - 2 local _, same = next(known)", 2),
    Mutant("a correction behind a long walk is not counted", "reach[k + 1], reach_changed = reach[k + 1] + delta, true",
           "reach_changed = true", check="a correction behind a long walk makes room"),
    Mutant("a grant behind a long walk is not counted", "    if #reach > 0 then reach, reach_changed = {}, true end\n    granted[head]",
           "    granted[head]", 2, where=SMALL),
    Mutant("a long walk is never gone back", "while i > tried[k] and steps < SCAN_STEPS and send_time(i - 1, -k) + period > by\n",
           "while false\n", 2, where=SMALL),
    Mutant("a long walk waits for nothing", "                by = max(by, send_time(i - 1, -k) + period)\n", "", 2, where=SMALL),
    Mutant("tokens stay in what is shown", "      while i < head and ends(i, first, period) <= now do", "      while false do",
           check="tokens that left are not shown"),
    Mutant("a new limit at once knows no call", "        find_holders(longest)\n      end\n      changed", "      end\n      changed", 3),
    Mutant("ended calls take a new limit's places", "if call('GETBIT', key .. ':m:' .. floor(send / SENDS), send % SENDS) == 0 then",
           "if true then", 3),
    Mutant("old places come back", "        call('DEL', key .. ':holders')\n        in_flight = 0\n", "",
           check="places of an earlier limit do not come back"),
    Mutant("earlier permits die with the new slack", "if slack_was > slack and head > 0 then late,", "if false then late,", 7),
    Mutant("a target that let nothing go is late", "if slack_was > slack and head > 0 then late,", "if slack_was > slack then late,",
           check="a target under which nothing was sent makes nothing late"),
    Mutant("a later send overtakes a late one", "(i < late_head and send_time(i, w) or late_sent) + period + extra) end",
           "send_time(i, w) + period + (i < late_head and extra or 0)) end",
           check="requests sent before a target with a shorter slack count longer"),
    Mutant("late tokens leave in time", "(tails[k] < late_head and extra or 0) <= by", "0 <= by",
           check="tokens sent before a target with a shorter slack count longer"),
    Mutant("late tokens are not waited for", "(tried[k] < late_head and extra or 0))", "0)",
           check="tokens sent before a target with a shorter slack are waited for"),
    Mutant("late tokens leave with the rest", "and (extra == 0 or late_sent + period + extra <= by) then", "then",
           check="tokens sent before a target with a shorter slack count longer"),
    # The breaker
    Mutant("a tripped model is not probed singly", "    if trips > 0 and probe_end > now then\n", "    if false then\n", where=FAILING),
    Mutant("several probes in one ask", "    if trips > 0 then probe, probe_end = head - 1, t + max_call end\n", "",
           where={**FAILING, "bulk": 4}),
    Mutant("an ended probe keeps its place", "        if trips > 0 and i == probe then\n", "        if false then\n", where=FAILING),
    Mutant("earlier calls speak for the probe", "    local stale = trips > 0 and ((i >= 0 and i < opened) or (i < 0 and cooldown_until > now))\n",
           "    local stale = false\n", where=FAILING),
    Mutant("calls of before a loss speak for new ones", "    if of ~= gen then i = NEVER end\n", "",
           check="a call of before a loss says nothing about a probe"),
]  # fmt: skip
