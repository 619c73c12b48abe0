-- Rolling-window log of a model's sends: decides when the next call may be sent.
--
-- Terms. Time is in microseconds of the corrected clock: Redis's own plus `offset`.
--   send       one granted permit, numbered from 0; numbers never change
--   send time  when a send may leave; send times never decrease with the number
--   period     a window plus its slacks: the distance in time that sends N numbers apart must have
--   chunk      1,000 sends: a released bit each (125 bytes), then a send time each (8 bytes)
--   hole       a cancelled send; it is not counted
--   holder     a call in flight, with the time by which it must have ended
--   amount     tokens of a send, or its money in millionths of a US dollar
--   sum window a window of tokens or money: tokens come first
--   calendar   a window of money that begins at midnight UTC, of a day (1) or of the first of a month (2)
--   tail       of a sum window: its first send, the amount from there on, and when that send leaves the window
--   reach      of a sum window: the send that an unsuccessful request walked to, and the amount from there on
--   building   1 while a tail does not reach back to all sends that count: nothing is granted until it does
--   turn       a denied call of another process that waits for tokens or money: (sender, tokens, money, expiry), in
--              order of arrival
--   ask        a denied interactive request that waits: (sender, send time that it waits for, expiry), one per sender
--   front      the class that goes first: interactive, or batch once interactive used up its `credit` of sends
--   yield      until when the next send is kept for the class in front; 0 if nobody of the other class came
--   due        earliest send time of a batch call while batch is paced by the whole window, not at 0.9 of it
--   short      cost of the cheapest call that a budget denied lately; 0 if there is none. A peek asks for as much.
--   rebuilt    calls that were open in the call log when the state was rebuilt: call id -> send
--   trips      how often in a row the breaker opened; 0 is closed
--   probe      the one call that may be in flight while the breaker is half-open
--   client     a second state, of the client for whom a call is made: its limits are those of all its calls. Its log is
--              not in order of send times: a send is logged at the latest send time so far, if that is later.
-- Keys, all with the same hash tag:
--   <key>            hash: run, state (the counters below), spec:<format> (the target, packed), target, probe, reach,
--                    turns, asks, ...
--   <key>:m:<chunk>  released bits and send times
--   <key>:t:<chunk>  tokens, 4 bytes per send      <key>:c:<chunk>  money, 4 bytes per send
--   <key>:holders    sorted set: send -> end       <key>:holes      sorted set: send -> send
--   <key>:rebuilt    hash: call id -> send
--
-- With N requests per window, send n may leave a period after send n-N: one read, whatever N is.
-- State is valid only in the run of Redis that built it: a restart may restore an older copy. `run` begins with the
-- number of the format: state of another format counts as lost. Raise the number with each change of the layout.
-- Redis runs the whole script for each call, and defining a function costs as much as a command. Therefore code of
-- the decision comes first, without functions where possible, and the rest is only defined when it is needed.

-- `run` runs one verb on one state and returns the reply. It runs itself for the state of the client (KEYS[2]), with
-- `not_before`: how long after now the model may send, and `horizon`: how far ahead a permit may be. Its body is not
-- indented.
local run
run = function(key, verb, request, not_before, horizon)

local FORMAT, RUN, SPEC_FIELD = '4:', '4:@RUN@', 'spec:4'  -- a target of another format is not read, but restored
local SENDS, BITMAP = 1000, 125       -- a chunk has 8,125 bytes, which fits the allocator's class of 8,192
local KEPT_CHUNKS = 4                 -- kept whatever their age, so that a new, longer window is exact
local KEPT_AGE = 61e6                 -- kept whatever the target, for the same reason
local SCAN_STEPS = 5000               -- the most sends that one decision reads
local BUILD_STEPS = 5000              -- the most sends of a new sum window that one call reads
local LONG_WALK = 64                  -- an unsuccessful walk of this length is continued by the next request
local TURN_KEPT = 3e6                 -- a process renews its turn, and its ask, at least every 2 s
local ASKED_KEPT = 600e6              -- batch leaves room for interactive requests this long after the latest one
local BATCH_KEPT = 3e6                -- batch calls count as waiting this long after the latest, plus a few sends
local MIN_HORIZON = 5e4               -- look-ahead of batch where a third of the gap is shorter
local LATE = 25e4                     -- what a late batch call may make up for, where half of the gap is shorter
local GRACE = 5e4                     -- from the first call that yields a send until the send is free for it
local CREDIT = 3                      -- most interactive sends in a row, if half of the sends may be interactive
local SHORT_KEPT = 30e6               -- then a cheaper call may try
local HEADER, PRIORITIES, REPLY = '<ddddddddddddddddddddd', '<ddddd', '<dddddddddddd'
local WINDOWS = 73                    -- window w (requests first) has limit and period at byte WINDOWS + 16 w
local DAY = 86400e6
local LONGEST = { DAY, 31 * DAY }     -- calendar periods: the period of their window is this and the slacks
local MONTH_DAYS = { 0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334 }

local OK, LOST, NO_TARGET, MORE = 0, 1, 2, 3
local WINDOW, TOKENS, CONCURRENCY, STOPPED, COOLING_DOWN, TOO_MANY_TOKENS, HALF_OPEN, PRIORITY = 1, 2, 3, 4, 5, 6, 9, 11
local BUDGET, TOO_EXPENSIVE, CLIENT = 12, 13, 14
local NEVER = -1

local call, pack, unpack_struct = redis.call, struct.pack, struct.unpack
local floor, min, max = math.floor, math.min, math.max
local stored = call('HMGET', key, 'run', 'state', SPEC_FIELD, 'reach', 'turns')
local spec = stored[3]
local live = stored[2] and stored[1] == RUN
if not live and (not stored[1] or string.sub(stored[1], 1, #FORMAT) ~= FORMAT) then
  stored[2], stored[4], stored[5] = false, false, false
end

local gen, clock, offset, head, oldest, sent, since, cooldown_until, denied, holes, in_flight, blind, failures, trips =
  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
local late, late_head, late_sent, building, rebuilt, rebuilt_until, at = 0, 0, 0, 0, 0, 0, nil
local asked, asks_until, credit, batch_at, yield_until, due, short, short_until = 0, 0, 0, 0, 0, 0, 0, 0
local tail = {}  -- three numbers per sum window
local reach, reach_changed = {}, false  -- two numbers per sum window
if stored[4] then
  for k = 1, #stored[4] / 8 do reach[k] = (unpack_struct('<d', stored[4], k * 8 - 7)) end
end
if stored[2] then
  gen, clock, offset, head, oldest, sent, since, cooldown_until, denied, holes, in_flight, blind, failures, trips,
    late, late_head, late_sent, building, rebuilt, rebuilt_until, asked, at = unpack_struct(HEADER, stored[2])
  if asked ~= 0 then asks_until, credit, batch_at, yield_until, due, at = unpack_struct(PRIORITIES, stored[2], at) end
  local left = (#stored[2] - at + 1) / 8
  for k = 1, left - left % 3, 3 do
    tail[k], tail[k + 1], tail[k + 2], at = unpack_struct('<ddd', stored[2], at)
  end
  if left % 3 == 2 then short, short_until = unpack_struct('<dd', stored[2], at) end
end
local version, stopped, gap, slack, concurrency, requests, token_windows, sums = 0, 0, 0, 0, NEVER, 0, 0, 0
local step, reserves, at_most = 0, 0, 1  -- of batch: gap by the whole window, whether a share is reserved, other share
local SPEC = '<ddddddddddd'
local calendar = {}  -- of a sum window: its kind, nil if it is rolling
local read_spec
if spec then
  version, stopped, gap, slack, concurrency, requests, token_windows, step, reserves, at_most, sums =
    unpack_struct(SPEC, spec)
end
if sums > token_windows or verb == 'target' then
  read_spec = function()
    version, stopped, gap, slack, concurrency, requests, token_windows, step, reserves, at_most, sums =
      unpack_struct(SPEC, spec)
    calendar = {}
    for w = token_windows + 1, sums do
      local kind = unpack_struct('<d', spec, WINDOWS + 24 * (requests + sums) + 16 + 8 * (w - token_windows - 1))
      if kind > 0 then calendar[w] = kind end
    end
  end
  if spec then read_spec() end
end

-- A new target with a shorter slack does not make earlier permits expire sooner: sends before `late_head` may be
-- late by `late`, and no later send counts for a shorter time than the last of them.
local extra = max(0, late - slack)

-- The corrected clock never goes backwards. A client sends the `bound` that its own clock proves (valid in the
-- generation that it has `seen`). A clock that is ahead of the bound by more than a send slack was set ahead: it is
-- corrected to the bound, or to the time of the last grant if that is later.
local wall = redis.call('TIME')
wall = wall[1] * 1000000 + wall[2]
local now, seen, bound, position, changed = wall + offset, 0, 0, nil, false
if verb == 'reserve' or verb == 'peek' or verb == 'outcome' then
  seen, bound, position = unpack_struct('<dd', request)
end
if now < clock then
  offset, now, changed = offset + clock - now, clock, true
elseif bound > 0 and seen == gen and now > max(bound, clock) + slack then
  local latest = max(floor(bound), clock)
  offset, now, changed = offset - (now - latest), latest, true
end

local probe, probe_end, opened = NEVER, 0, 0
if trips > 0 then
  local text = call('HGET', key, 'probe')
  if text then probe, probe_end, opened = unpack_struct('<ddd', text) end
end

-- Reads a send time. Each `reader` has a block of its own, since each walks from a different send.
local granted, granted_tokens, granted_money, blocks = {}, {}, {}, {}
local broken, ahead = false, 1

local function send_time(i, reader)
  if granted[i] then return granted[i] end
  local b = blocks[reader]
  if not b or i < b.from or i >= b.to then
    local chunk, slot = floor(i / SENDS), i % SENDS
    local first = BITMAP + slot * 8
    local text = call('GETRANGE', key .. ':m:' .. chunk, first, first + min(ahead, SENDS - slot, head - i) * 8 - 1)
    if #text == 0 then broken = true return now end
    b = { from = i, to = i + #text / 8, text = text }
    blocks[reader] = b
  end
  local sent_at = unpack_struct('<d', b.text, (i - b.from) * 8 + 1)
  if sent_at == 0 then broken = true return now end  -- the chunk was lost, and created again by a later send
  return sent_at
end

local calendar_period, closes, leaves
local function define_leaves()
  -- Returns the calendar period that contains a time: its begin, and the begin of the next one.
  calendar_period = function(kind, time)
    local days = floor(time / DAY)
    if kind == 1 then return days * DAY, (days + 1) * DAY end
    local month, first, following = floor(days / 30.4375) - 2, 0, 0  -- months since 1970; leap years as until 2099
    repeat
      first, month = following, month + 1
      local year, of_year = floor(month / 12), month % 12 + 1
      following = 365 * year + floor((year + 1) / 4) + MONTH_DAYS[of_year]
      if of_year > 2 and (year + 2) % 4 == 0 then following = following + 1 end
    until following > days
    return first * DAY, following * DAY
  end

  -- When what leaves a rolling window `at` a time leaves the window: a calendar period has to end.
  closes = function(at, kind)
    if not kind then return at end
    local _, following = calendar_period(kind, at - LONGEST[kind])
    return following
  end

  -- When send i leaves a window. It may arrive until its slacks are over, and counts in that calendar period, too.
  leaves = function(i, sent_at, period, kind)
    local at = sent_at + period
    if extra > 0 then at = max(at, (i < late_head and sent_at or late_sent) + period + extra) end
    return kind and closes(at, kind) or at
  end
end
if not (verb == 'reserve' or verb == 'peek') then define_leaves() end

-- Extends the tails of new sum windows back over sends that still count, reading at most BUILD_STEPS of them.
local build
if building == 1 or verb == 'target' or verb == 'rebuild' then
  if not leaves then define_leaves() end
  build = function()
    local left, latest = BUILD_STEPS, max(clock, sent)
    for w = 1, sums do
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
      local k, chunk, log, amounts = 3 * w - 2, nil, nil, nil
      while tail[k] > oldest * SENDS do
        if left == 0 then return end
        local i = tail[k] - 1
        if chunk ~= floor(i / SENDS) then
          chunk = floor(i / SENDS)
          log = call('GETRANGE', key .. ':m:' .. chunk, BITMAP, -1)
          amounts = call('GET', key .. (w > token_windows and ':c:' or ':t:') .. chunk) or ''
        end
        local slot = i % SENDS
        local sent_at = #log >= slot * 8 + 8 and unpack_struct('<d', log, slot * 8 + 1) or 0
        if sent_at == 0 then broken = true return end
        local ends = leaves(i, sent_at, period, calendar[w])
        if ends <= latest then break end
        local total = tail[k + 1]
        if #amounts >= slot * 4 + 4 then total = total + unpack_struct('<I4', amounts, slot * 4 + 1) end
        tail[k], tail[k + 1], tail[k + 2], left = i, total, ends, left - 1
      end
    end
    building = 0
  end
end

-- A decision: send time of the next send (or NEVER), what it waits for, and whether that is only a time to retry.
-- `peek` and `snapshot` grant nothing; `snapshot` continues below.
local t, reason, retry_only = NEVER, 0, true
local reply

if verb == 'reserve' or verb == 'peek' or (verb == 'snapshot' and live and spec) then
  -- Request: generation seen, clock bound, head seen, target version seen, sender (0 if it does not wait, negative
  -- for interactive requests), look-ahead, maximum duration of a call, 1 if interactive, tokens and money of each
  -- permit.
  local commit, seen_head, seen_version, sender, look_ahead, max_call, count = verb == 'reserve', 0, 0, 0, 0, 0, 1
  local interactive = 1
  if verb ~= 'snapshot' then
    seen_head, seen_version, sender, look_ahead, max_call, interactive, position =
      unpack_struct('<dddddd', request, position)
    count = (#request - position + 1) / 16
    if not spec then return pack(REPLY, NO_TARGET, 0, 0, 0, NEVER, 0, 0, 0, 0, 0, 0, 0) end
    if not live then return pack(REPLY, LOST, 0, 0, version, NEVER, 0, 0, 0, 0, 0, 0, 0) end
    broken = seen > gen or (seen == gen and seen_head > head) or (seen > 0 and seen < gen and blind == 1)
    if seen_version > version and not broken then  -- a client that had missed a change restored an older target
      return pack(REPLY, NO_TARGET, 0, 0, version, NEVER, 0, 0, 0, 0, 0, 0, 0)
    end
  end
  if building == 1 and verb ~= 'snapshot' and not broken then
    build()
    changed = true
  end
  if rebuilt > 0 and now > rebuilt_until and commit then
    call('DEL', key .. ':rebuilt')
    rebuilt, changed = 0, true
  end
  -- Right of way. While somebody asks, batch is not granted far ahead, and yields the next send to an ask that waits
  -- for it; interactive yields once its credit is used up. A send that nobody of the class in front came for is free.
  local asking, first_ask, batch_waits = asked > 0 and now < asked + ASKED_KEPT, nil, false
  horizon = horizon or look_ahead
  local charge = 1 - at_most  -- of an interactive send; a batch send pays back `at_most`
  if interactive == 1 and commit and count > 0 then
    if not asking then
      asking, credit, batch_at = true, max(CREDIT * charge, at_most), 0
      -- Batch waits until its sends in each window are no more than at an even pace: the rest is free for requests.
      for w = 1, step > 0 and reserves == 0 and requests or 0 do
        local limit, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
        local low, high = oldest * SENDS, head
        while low < high do
          local middle = floor((low + high) / 2)
          if (send_time(middle, 'ask') or 0) <= now - period then low = middle + 1 else high = middle end
        end
        if low < head then due = max(due, (send_time(low, 'ask') or 0) + floor((head - low) * period / limit)) end
      end
    end
    asked, changed = now, true
  end
  if asking then
    batch_waits = at_most < 1 and batch_at > 0 and now < batch_at + BATCH_KEPT + 4 * step / charge
    if interactive == 0 then
      horizon = min(look_ahead, max(gap / 3, MIN_HORIZON))
      if sender ~= 0 and commit and count > 0 then batch_at, batch_waits, changed = now, at_most < 1, true end
    end
  end
  local asks = asks_until > now and call('HGET', key, 'asks') or ''
  for at = 1, interactive == 0 and #asks or 0, 24 do
    local _, waits_for, expiry = unpack_struct('<ddd', asks, at)
    if expiry > now then first_ask = min(first_ask or waits_for, waits_for) end
  end
  local enough = charge - 1e-9
  -- Tokens and money of turns before this request, and of all turns but its own: they are left free for them. The
  -- turns of the class in front are all before those of the other.
  local earlier, others, earlier_money, others_money = 0, 0, 0, 0
  if stored[5] then
    local found, in_front = false, (batch_waits and credit < enough) == (interactive == 0)
    for at = 1, #stored[5], 32 do
      local who, tokens, money, expiry = unpack_struct('<dddd', stored[5], at)
      local same = (who < 0) == (interactive == 1)
      if who == sender then
        found = true
      elseif expiry > now and (same or not in_front) then
        others, others_money = others + tokens, others_money + money
        if not found or not same then earlier, earlier_money = earlier + tokens, earlier_money + money end
      end
    end
  end
  if verb == 'snapshot' then
    if concurrency >= 0 then
      in_flight = call('ZCOUNT', key .. ':holders', '(' .. string.format('%.0f', now), '+inf')
    end
  elseif concurrency >= 0 and (in_flight + count > concurrency or in_flight % 64 == 63) then
    local ended = call('ZREMRANGEBYSCORE', key .. ':holders', '-inf', now)  -- only needed when slots are scarce
    local left = call('ZCARD', key .. ':holders')
    if ended + left ~= in_flight then broken = true end  -- the sorted set was lost
    in_flight, changed = left, true
  end
  if count > 1 or sums > 0 then ahead = max(count, 64) end
  local from = head
  local tried, after_sums = {}, nil  -- `tried` becomes `tail` if the send is granted

  if building == 1 then t, reason = now, TOKENS end
  local need, cost, client, answer, client_sends, logged = 0, 0, not not_before and KEYS[2], nil, {}, nil
  -- One more, without tokens, predicts the next send of a model.
  for n = 1, (broken or building == 1) and 0 or not_before and count or count + 1 do
    need, cost = 0, 0
    if n <= count and position then need, cost, position = unpack_struct('<dd', request, position) end
    if not commit and short_until > now then cost = short end
    t, reason, retry_only = NEVER, STOPPED, true
    if stopped == 1 then break end
    for w = 1, sums do
      local limit = unpack_struct('<d', spec, WINDOWS + 16 * (requests + w))
      if (w > token_windows and cost or need) > limit then
        reason = w > token_windows and TOO_EXPENSIVE or TOO_MANY_TOKENS
        break
      end
    end
    if reason ~= STOPPED then break end
    if concurrency >= 0 and in_flight >= concurrency then
      local first = call('ZRANGE', key .. ':holders', 0, 0, 'WITHSCORES')
      t, reason = first[2] and tonumber(first[2]) or NEVER, CONCURRENCY
      break
    end
    if trips > 0 and probe_end > now then
      t, reason = probe_end, HALF_OPEN
      break
    end

    t, reason, retry_only = not_before and now + not_before or max(now, sent + gap), WINDOW, false
    if interactive == 0 and due > t then t = due end
    for w = 1, requests do
      local limit, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
      local i = head - limit
      while holes > 0 do  -- holes do not count: the limit-th latest send is that many further back
        local before = head - limit - call('ZCOUNT', key .. ':holes', i, '+inf')
        if before == i then break end
        i = before
      end
      if i >= oldest * SENDS then
        t = max(t, send_time(i, w) + period)
        if extra > 0 then t = max(t, (i < late_head and send_time(i, w) or late_sent) + period + extra) end
      elseif since > 0 then
        t = max(t, since + period)
      end
    end
    if cooldown_until > t then t, reason = cooldown_until, COOLING_DOWN end
    if n > count then break end

    local easy, wanted, wanted_money = true, need, cost
    if others > 0 and need > 0 then wanted = need + (n == 1 and earlier or others) end
    if others_money > 0 and cost > 0 then wanted_money = cost + (n == 1 and earlier_money or others_money) end
    for w = 1, sums do
      local limit, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
      local k = 3 * w - 2
      tried[k], tried[k + 1], tried[k + 2] = tail[k], tail[k + 1], tail[k + 2]
      easy = easy and since + period <= t and tail[k + 1] + (w > token_windows and wanted_money or wanted) <= limit
        and (tail[k] == head and extra == 0 and not calendar[w] or tail[k] < head and tail[k + 2] > t)
    end
    if not easy then
      if not leaves then define_leaves() end
      if not after_sums then
        local function amount_of(i, w)
          local kind, known = ':t:', granted_tokens[i]
          if w > token_windows then kind, known = ':c:', granted_money[i] end
          if known then return known end
          local chunk, byte = floor(i / SENDS), i % SENDS * 4
          local b = blocks[kind]
          if not b or b.chunk ~= chunk then
            b = { chunk = chunk, text = call('GET', key .. kind .. chunk) or '' }
            blocks[kind] = b
          end
          if #b.text < byte + 4 then return 0 end
          return (unpack_struct('<I4', b.text, byte + 1))
        end

        -- Moves a tail past its first send.
        local function pass(tails, k, w, period)
          local i = tails[k]
          tails[k], tails[k + 1] = i + 1, tails[k + 1] - amount_of(i, w)
          tails[k + 2] = i + 1 < head and leaves(i + 1, send_time(i + 1, -k), period, calendar[w]) or 0
        end

        -- Moves a tail past the sends that have left the window at `by`; returns how many.
        local function leave(tails, w, period, by)
          local k, steps, kind = 3 * w - 2, 0, calendar[w]
          if tails[k] < head and tails[k + 2] <= by then
            if leaves(head - 1, sent, period, kind) <= by then
              tails[k], tails[k + 1], tails[k + 2] = head, 0, 0
            elseif kind then  -- all sends of a calendar period leave at once: few are left
              local i, total, first = head, 0, 0
              while i > tails[k] do
                local ends = leaves(i - 1, send_time(i - 1, -k), period, kind)
                if ends <= by then break end
                i, total, first = i - 1, total + amount_of(i - 1, w), ends
              end
              tails[k], tails[k + 1], tails[k + 2] = i, total, first
            end
          end
          while tails[k] < head and steps < SCAN_STEPS and tails[k + 2] <= by do
            pass(tails, k, w, period)
            steps = steps + 1
          end
          return steps
        end

        after_sums = function(by, tokens, money)
          local crowded, why = false, nil  -- crowded: with the amount of earlier turns more than a window
          for w = 1, sums do
            local limit, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
            local k, wanted_now, before, kind = 3 * w - 2, w > token_windows and money or tokens, by, calendar[w]
            local need_now = min(wanted_now, limit)
            crowded = crowded or wanted_now > limit
            leave(tail, w, period, now)
            tried[k], tried[k + 1], tried[k + 2] = tail[k], tail[k + 1], tail[k + 2]
            if since > 0 then by = max(by, closes(since + period, kind)) end
            -- Continues an earlier walk: back over sends that have not left by then and fit all the same.
            local i, total, steps = reach[2 * w - 1], reach[2 * w], 0
            if i and i > tried[k] and extra == 0 and not kind then
              while i > tried[k] and steps < SCAN_STEPS and send_time(i - 1, -k) + period > by
                  and total + amount_of(i - 1, w) + need_now <= limit do
                i, total, steps = i - 1, total + amount_of(i - 1, w), steps + 1
              end
              if i > tried[k] then
                by = max(by, send_time(i - 1, -k) + period)
                tried[k], tried[k + 1] = i, total
                tried[k + 2] = i < head and leaves(i, send_time(i, -k), period) or 0
              end
            end
            steps = steps + leave(tried, w, period, by)
            while tried[k + 1] + need_now > limit and tried[k] < head and steps < SCAN_STEPS do
              by = max(by, tried[k + 2])
              if kind then leave(tried, w, period, by) else pass(tried, k, w, period) end
              steps = steps + 1
            end
            if steps >= LONG_WALK and commit and not kind then
              for n = #reach + 1, 2 * sums do reach[n] = 0 end
              reach[2 * w - 1], reach[2 * w], reach_changed = tried[k], tried[k + 1], true
            end
            if by > before then why = w > token_windows and BUDGET or TOKENS end
            if steps >= SCAN_STEPS then return max(by, now + 1e3), true, why end  -- the next request continues
          end
          for w = 1, sums > 1 and sums or 0 do
            local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
            leave(tried, w, period, by)
          end
          if crowded then return max(by, now + 5e4), true, why end
          return by, false, why
        end
      end
      local before, why = t, nil
      t, retry_only, why = after_sums(t, wanted, wanted_money)
      if t > before then reason = why or TOKENS end
    end
    if asking and not retry_only and verb ~= 'snapshot' and t <= now + horizon then
      local used_up, yields = batch_waits and credit < enough, nil
      if interactive == 1 then
        yields = used_up and due <= t + gap  -- else batch may not have this send
      else
        yields = not used_up and first_ask and first_ask <= t + gap
      end
      if yields and yield_until == 0 then
        yield_until, changed = max(t, now + GRACE, interactive == 1 and due or 0), true
      end
      if yields and now < yield_until then t, reason, retry_only, horizon = yield_until, PRIORITY, true, 0 end
    end
    if retry_only or not commit or broken or t > now + horizon then break end
    if client then
      answer = run(client, verb, ARGV[3] .. pack('<dd', need, cost), t - now, horizon)
      if #answer == 8 * 12 then  -- denied by the client's limits
        local _, _, _, _, wait = unpack_struct('<ddddd', answer)
        t, reason = wait == NEVER and NEVER or now + wait, CLIENT
        break
      end
      local number, offset_of_client = unpack_struct('<dd', answer, 8 * 12 + 1)
      t, client_sends[head] = now + offset_of_client, number
    end
    logged = not_before and max(t, sent) or t

    for w = 1, sums do
      local k = 3 * w - 2
      tail[k], tail[k + 1], tail[k + 2] = tried[k], tried[k + 1] + (w > token_windows and cost or need), tried[k + 2]
      if tried[k] == head then
        local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
        tail[k + 2] = leaves and leaves(head, logged, period, calendar[w]) or logged + period
      end
    end
    if #reach > 0 then reach, reach_changed = {}, true end
    granted[head], granted_tokens[head], granted_money[head] = logged, need, cost
    if cost > 0 then short = 0 end
    head, sent = head + 1, logged
    if step > 0 and (asking and reserves == 0 or reserves == 1 and interactive == 0) then
      if asked == 0 then asked = -1 end  -- never, and `due` is stored
      due = max(due, reserves == 1 and t or t - max(floor(gap / 2), LATE)) + step
    end
    if asking then
      yield_until = 0
      if interactive == 0 then
        credit = min(max(CREDIT * charge, at_most), credit + at_most)
      elseif batch_waits then
        credit = max(0, credit - charge)
      end
    end
    if concurrency >= 0 then in_flight = in_flight + 1 end
    if trips > 0 then probe, probe_end = head - 1, t + max_call end
    if not_before then break end
  end

  local i = from
  while i < head do
    local chunk, slot = floor(i / SENDS), i % SENDS
    local upto = min(head, (chunk + 1) * SENDS)
    if slot == 0 then
      -- Left by state whose hash was lost.
      call('DEL', key .. ':m:' .. chunk, key .. ':t:' .. chunk, key .. ':c:' .. chunk)
      call('SETRANGE', key .. ':m:' .. chunk, BITMAP + SENDS * 8 - 1, '\0')  -- the whole size in one allocation
      local keep, before = KEPT_AGE, oldest
      for w = 1, requests + sums do
        local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
        keep = max(keep, period)
      end
      while chunk - oldest > KEPT_CHUNKS and oldest < before + 8 do
        local last = send_time(oldest * SENDS + SENDS - 1, 'old')
        if broken or last + keep > now then break end
        call('DEL', key .. ':m:' .. oldest, key .. ':t:' .. oldest, key .. ':c:' .. oldest)
        oldest, since = oldest + 1, last
      end
      if holes > 0 and oldest > before then
        call('ZREMRANGEBYSCORE', key .. ':holes', '-inf', oldest * SENDS - 1)
        holes = call('ZCARD', key .. ':holes')
      end
    end
    local text = pack('<d', granted[i])
    if upto > i + 1 then
      local parts = { text }
      for n = i + 1, upto - 1 do parts[#parts + 1] = pack('<d', granted[n]) end
      text = table.concat(parts)
    end
    call('SETRANGE', key .. ':m:' .. chunk, BITMAP + slot * 8, text)
    i = upto
  end
  for n = from, head - 1 do
    if granted_tokens[n] > 0 then
      call('SETRANGE', key .. ':t:' .. floor(n / SENDS), n % SENDS * 4, pack('<I4', granted_tokens[n]))
    end
    if granted_money[n] > 0 then
      call('SETRANGE', key .. ':c:' .. floor(n / SENDS), n % SENDS * 4, pack('<I4', granted_money[n]))
    end
    if concurrency >= 0 then call('ZADD', key .. ':holders', granted[n] + max_call, n) end
  end
  if head > from then
    clock, changed = now, true
    if trips > 0 then call('HSET', key, 'probe', pack('<ddd', probe, probe_end, opened)) end
  end

  local all = commit and head - from == count
  if not all and commit and not broken and (reason == BUDGET or reason == TOO_EXPENSIVE) then
    short, short_until = (short == 0 or now > short_until) and cost or min(short, cost), now + SHORT_KEPT
    changed = true
  end
  local for_sum = reason == TOKENS or reason == BUDGET
  if (stored[5] or for_sum) and sender ~= 0 and commit and not broken and building == 0 then
    local waits, kept = not all and (for_sum or reason == PRIORITY), {}
    local mine = pack('<dddd', sender, need, cost, now + TURN_KEPT)
    for at = 1, stored[5] and #stored[5] or 0, 32 do
      local who, _, _, expiry = unpack_struct('<dddd', stored[5], at)
      if who ~= sender then
        if expiry > now then kept[#kept + 1] = string.sub(stored[5], at, at + 31) end
      elseif waits and head == from then
        kept[#kept + 1] = mine
        waits = false
      end
    end
    if waits and for_sum then kept[#kept + 1] = mine end
    if #kept > 0 then
      call('HSET', key, 'turns', table.concat(kept))
    elseif stored[5] then
      call('HDEL', key, 'turns')
    end
  end

  if sender < 0 and commit and not broken and building == 0 and (#asks > 0 or not all) then
    local others_asks, any_time = {}, reason == CONCURRENCY or reason == HALF_OPEN
    asks_until = 0
    for at = 1, #asks, 24 do
      local who, _, expiry = unpack_struct('<ddd', asks, at)
      if who ~= sender and expiry > now then
        others_asks[#others_asks + 1] = string.sub(asks, at, at + 23)
        asks_until = max(asks_until, expiry)
      end
    end
    if not all and count > 0 and (t ~= NEVER or any_time) and reason ~= CLIENT then
      others_asks[#others_asks + 1] = pack('<ddd', sender, any_time and 0 or t, now + TURN_KEPT)
      asks_until = now + TURN_KEPT
      if reason ~= PRIORITY then yield_until = 0 end
    end
    changed = true
    if #others_asks > 0 then
      call('HSET', key, 'asks', table.concat(others_asks))
    else
      call('HDEL', key, 'asks')
    end
  end

  if verb ~= 'snapshot' and broken then
    reply = pack(REPLY, LOST, 0, 0, version, NEVER, 0, 0, 0, 0, 0, 0, 0)
  elseif verb ~= 'snapshot' and building == 1 then
    reply = pack(REPLY, MORE, gen, head, version, 0, TOKENS, slack, now, failures, trips, rebuilt, 0)
  elseif verb ~= 'snapshot' then
    if denied == 0 and not all and (for_sum or reason == CONCURRENCY) then denied, changed = 1, true end
    reply = pack(REPLY, OK, gen, head, version, t == NEVER and NEVER or max(0, t - now), reason, slack, now, failures,
                 trips, rebuilt, horizon)
    if not_before and head > from then
      reply = reply .. pack('<dd', from, t - now)
    elseif client then
      for n = from, head - 1 do reply = reply .. pack('<ddd', n, granted[n] - now, client_sends[n]) end
      reply = reply .. string.sub(answer or '', 1, 8 * 12)
    elseif head == from + 1 then
      reply = reply .. pack('<dd', from, granted[from] - now)
    elseif head > from then
      local parts = { reply }
      for n = from, head - 1 do parts[#parts + 1] = pack('<dd', n, granted[n] - now) end
      reply = table.concat(parts)
    end
  end
end

if not reply then
  local CHANNEL = 'router:traffic'
  local MAX_AMOUNT = 4294967295
  local REFUSALS_KEPT = 3600e6  -- a 429 later than this after the previous one starts a new count
  local COOL_DOWN, SUCCESS, FAILURE, RATE_LIMITED, RESTORE = 0, 1, 2, 3, 4  -- others only end the probe

  -- A user without the right to publish must not fail the call: other processes then notice within 2 s.
  local function publish(what) redis.pcall('PUBLISH', CHANNEL, key .. ' ' .. what) end
  local function number_of(text) return text and tonumber(text) or 0 end

  local function amount_of(i, kind)
    local byte = i % SENDS * 4
    local text = call('GETRANGE', key .. kind .. floor(i / SENDS), byte, byte + 3)
    return #text == 4 and unpack_struct('<I4', text) or 0
  end

  -- Whether a send is still in some window, so that cancelling it makes room.
  local function takes_room(i)
    local sent_at = send_time(i, 'room')
    for w = 1, requests + sums do
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
      if leaves(i, sent_at, period, calendar[w - requests]) > now then return true end
    end
    return false
  end

  -- Replaces the reserved tokens or money of a send by what was used, in the windows that still contain it.
  local function correct(i, used, money)
    local kind = money and ':c:' or ':t:'
    local delta = used - amount_of(i, kind)
    if delta == 0 then return false end
    call('SETRANGE', key .. kind .. floor(i / SENDS), i % SENDS * 4, pack('<I4', used))
    for w = money and token_windows + 1 or 1, money and sums or token_windows do
      local k = 3 * w - 2
      if tail[k] and tail[k] <= i then tail[k + 1] = tail[k + 1] + delta end
      local at = 2 * w - 1
      if reach[at] and reach[at] <= i then reach[at + 1], reach_changed = reach[at + 1] + delta, true end
    end
    return delta < 0
  end

  local function make_hole(i)
    call('ZADD', key .. ':holes', i, i)
    holes = holes + 1
    if due > 0 then due = due - step end  -- its share of the window is free again
    if i == head - 1 and i > oldest * SENDS then  -- it was the latest: pacing continues from the send before
      sent = send_time(i - 1, 'hole')
      call('SETRANGE', key .. ':m:' .. floor(i / SENDS), BITMAP + i % SENDS * 8, pack('<d', sent))
      for w = 1, building == 0 and sums or 0 do  -- the next send may be earlier: what had left counts again
        local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
        local k, kind = 3 * w - 2, w > token_windows and ':c:' or ':t:'
        if tail[k] == i then tail[k + 2] = leaves(i, sent, period, calendar[w]) end
        local n = tail[k] - 1
        while n >= oldest * SENDS do
          local ends = leaves(n, send_time(n, 'hole'), period, calendar[w])
          if ends <= max(clock, sent) then break end
          tail[k], tail[k + 1], tail[k + 2] = n, tail[k + 1] + amount_of(n, kind), ends
          n = n - 1
        end
      end
    end
  end

  local function free_probe()
    probe, probe_end = NEVER, 0
    call('HSET', key, 'probe', pack('<ddd', probe, probe_end, opened))
  end

  -- Takes a call out of the rebuilt ones; returns its send, or NEVER if it is not among them.
  local function rebuilt_send(id)
    local i = rebuilt > 0 and call('HGET', key .. ':rebuilt', id)
    if not i then return NEVER end
    call('HDEL', key .. ':rebuilt', id)
    rebuilt = rebuilt - 1
    return tonumber(i)
  end

  -- Ends the call of a send; returns whether that made room.
  local function end_call(i, used, spent, unused)
    local freed = false
    if concurrency >= 0 and call('ZREM', key .. ':holders', i) == 1 then
      in_flight, freed = in_flight - 1, true
    end
    if trips > 0 and i == probe then
      free_probe()
      freed, denied = true, 1
    end
    if i >= oldest * SENDS and i < head
        and call('SETBIT', key .. ':m:' .. floor(i / SENDS), i % SENDS, 1) == 0 then
      if unused == 1 then used, spent = 0, 0 end
      if used >= 0 then freed = correct(i, min(used, MAX_AMOUNT), false) or freed end
      if spent >= 0 then freed = correct(i, min(spent, MAX_AMOUNT), true) or freed end
      if unused == 1 then
        if takes_room(i) then freed, denied = true, 1 end
        make_hole(i)
      end
    end
    return freed
  end

  -- Request, per permit: generation, send, tokens and money used (or NEVER), 1 if it was not used, call id.
  local function release()
    if not live then return pack('<dd', LOST, 0) end
    local freed, of, i, used, spent, unused, id = false, nil, nil, nil, nil, nil, nil
    position = 1
    while position <= #request do
      of, i, used, spent, unused, id, position = unpack_struct('<dddddc16', request, position)
      local open = rebuilt_send(id)
      if of == gen then
        freed = end_call(i, used, spent, unused) or freed
        if open >= 0 then freed = end_call(open, 0, 0, 1) or freed end  -- logged before the rebuild, and sent after it
      elseif open >= 0 then
        freed = end_call(open, used, spent, unused) or freed
      end
    end
    local notify = freed and denied == 1
    if notify then
      denied = 0
      publish(ARGV[3])
    end
    changed = true
    return pack('<dd', OK, notify and 1 or 0)
  end

  -- A target that starts to limit concurrency counts the calls that are in flight already: those not released.
  local function find_holders(longest)
    for chunk = floor((head - 1) / SENDS), oldest, -1 do
      local log = call('GET', key .. ':m:' .. chunk) or ''
      if #log < BITMAP + 8 then broken = true end
      if broken or unpack_struct('<d', log, BITMAP + 1) == 0 then broken = true break end
      local byte = string.find(log, '[^\255]')
      while byte and byte <= BITMAP do
        local bits = string.byte(log, byte)
        for bit = 0, 7 do
          local slot = byte * 8 - 8 + bit
          local i = chunk * SENDS + slot
          if bits % 2 ^ (8 - bit) < 2 ^ (7 - bit) and i < head then
            local sent_at = unpack_struct('<d', log, BITMAP + slot * 8 + 1)
            if sent_at + longest > clock then call('ZADD', key .. ':holders', 'NX', sent_at + longest, i) end
          end
        end
        byte = string.find(log, '[^\255]', byte + 1)
      end
      if unpack_struct('<d', log, BITMAP + 1) + longest <= clock then break end
    end
    in_flight = call('ZCARD', key .. ':holders')
  end

  -- Request: version, or 0 for one newer than the applied one; maximum duration of a call; 1 if the sender has a
  -- call log; ARGV[3] the target, packed; ARGV[4] the target as a line. The request has no clock bound: the time of
  -- the last grant takes its place.
  local function set_target()
    local new_version, longest, has_log = unpack_struct('<ddd', request)
    if new_version == 0 then new_version = max(wall, spec and version + 1 or 0) end
    if spec and version > new_version then return pack('<dd', 0, version) end
    local limited, slack_was, known = spec and concurrency >= 0, slack, {}
    local function name(w)
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
      return (w > token_windows and 'c' or 't') .. (calendar[w] or '') .. ':' .. period
    end
    for w = 1, live and sums or 0 do known[name(w)] = { tail[3 * w - 2], tail[3 * w - 1], tail[3 * w] } end
    spec = pack('<d', new_version) .. string.sub(ARGV[3], 9)
    read_spec()
    call('HSET', key, SPEC_FIELD, spec, 'target', ARGV[4])
    if live and not (stored[3] and string.sub(stored[3], 9) == string.sub(spec, 9)) then
      if slack_was > slack and head > 0 then late, late_head, late_sent = max(late, slack_was), head, sent end
      extra, yield_until, due, short = max(0, late - slack), 0, 0, 0
      if #reach > 0 then reach, reach_changed = {}, true end
      tail, building = {}, 1
      for w = 1, sums do
        local same = known[name(w)] or { head, 0, 0 }
        for k = 1, 3 do tail[3 * w - 3 + k] = same[k] end
      end
      build()
      for w = 1, has_log == 1 and since > 0 and requests + sums or 0 do
        local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
        -- Sends before the log count: it is rebuilt with them.
        if closes(since + period, calendar[w - requests]) > now then broken = true end
      end
      if concurrency < 0 then
        call('DEL', key .. ':holders')
        in_flight = 0
      elseif not limited then
        find_holders(longest)
      end
      changed = true
    end
    if spec ~= stored[3] then publish(ARGV[5]) end
    return pack('<dd', 1, version)
  end

  -- Records that state was lost, and replies since when and which generation, as the clock may stand still.
  -- Request: 1 if the sender had seen the state; maximum duration of a call.
  local function record_loss()
    local sender_knew, longest = unpack_struct('<dd', request)
    if live then return pack('<dddddd', 1, 0, now, 0, 0, gen) end
    if sender_knew == 1 or stored[2] then call('HSET', key, 'known', '1') end
    call('HSETNX', key, 'lost', now)
    local lost_at = tonumber(call('HGET', key, 'lost'))
    if concurrency < 0 then longest = 0 end
    for w = 1, requests + sums do
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
      local kind = calendar[w - requests]
      longest = max(longest, kind and period - LONGEST[kind] + now - calendar_period(kind, now) + 1e6 or period)
    end
    changed = false
    return pack('<dddddd', 0, now - lost_at, now, longest, call('HEXISTS', key, 'known'), gen)
  end

  -- Rebuilds the log from past calls. Request: blind, since, maximum duration of a call, generation seen, cool-down,
  -- trips; ARGV[3] send times, ascending; ARGV[4] tokens; ARGV[5] money; ARGV[6] a bit per call, 0 if it is open;
  -- ARGV[7] id and send of each open call.
  local function rebuild()
    local is_blind, from, longest, seen_gen, cooldown, known_trips = unpack_struct('<dddddd', request)
    if live or not spec then return pack('<d', live and 1 or 0) end
    if is_blind == 1 and call('HEXISTS', key, 'known') == 1 then return pack('<d', 0) end
    for chunk = oldest, floor(head / SENDS) do
      call('DEL', key .. ':m:' .. chunk, key .. ':t:' .. chunk, key .. ':c:' .. chunk)
    end
    call('DEL', key .. ':holders', key .. ':holes', key .. ':rebuilt')
    gen = max(now, gen + 1, seen_gen + 1)
    clock, head, oldest, sent, since, denied, holes, in_flight, blind = now, 0, 0, 0, from, 0, 0, 0, is_blind
    cooldown_until, trips, failures = cooldown > 0 and now + cooldown or 0, known_trips, 0
    late, late_head, late_sent, extra = 0, 0, 0, 0
    asked, asks_until, credit, batch_at, yield_until, due, short, short_until = 0, 0, 0, 0, 0, 0, 0, 0
    local send_times, tokens, money, released, open = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
    local function part(text, chunk, bytes)
      local found = string.sub(text, chunk * bytes + 1, (chunk + 1) * bytes)
      return found .. string.rep('\0', bytes - #found)
    end
    local count = #send_times / 8
    for chunk = 0, floor((count - 1) / SENDS) do
      call('SET', key .. ':m:' .. chunk, part(released, chunk, BITMAP) .. part(send_times, chunk, 8 * SENDS))
      call('SET', key .. ':t:' .. chunk, string.sub(tokens, chunk * SENDS * 4 + 1, (chunk + 1) * SENDS * 4))
      call('SET', key .. ':c:' .. chunk, string.sub(money, chunk * SENDS * 4 + 1, (chunk + 1) * SENDS * 4))
    end
    for at = 1, #open, 24 do
      local number = string.format('%.0f', (unpack_struct('<d', open, at + 16)))
      call('HSET', key .. ':rebuilt', string.sub(open, at, at + 15), number)
    end
    head, rebuilt, rebuilt_until = count, #open / 24, now + longest
    if count > 0 then sent = send_time(count - 1, 'rebuild') end
    tail, building = {}, 1
    for k = 1, 3 * sums, 3 do tail[k], tail[k + 1], tail[k + 2] = head, 0, 0 end
    build()
    if concurrency >= 0 then find_holders(longest) end
    call('HSET', key, 'run', RUN, 'rest_reason', ARGV[9])
    call('HDEL', key, 'lost', 'known', 'probe', 'reach', 'turns', 'asks')
    reach = {}
    changed = true
    publish(ARGV[8])
    return pack('<d', 1)
  end

  local function count_refusal()
    local fields = call('HMGET', key, 'refused', 'refused_at')
    if not fields[1] or wall - number_of(fields[2]) > REFUSALS_KEPT then
      call('HSET', key, 'refused', 0, 'refused_since', wall)
    end
    call('HINCRBY', key, 'refused', 1)
    call('HSET', key, 'refused_at', wall)
  end

  -- Records the outcome of a call. Request: generation seen, clock bound, signal, cool-down, generation and number of
  -- the send (or NEVER), failure threshold, initial and maximum cool-down, trips known to the sender; ARGV[3] reason.
  local function record_outcome()
    local signal, seconds, of, i, threshold, first, longest, known_trips = unpack_struct('<dddddddd', request, position)
    if signal == RATE_LIMITED then count_refusal() end
    if not live then return pack('<dddd', LOST, 0, 0, 0) end
    if of ~= gen then i = NEVER end
    local cooldown_was, trips_was, failures_were = cooldown_until, trips, failures
    -- Calls sent before the breaker opened say nothing about the time since.
    local stale = trips > 0 and ((i >= 0 and i < opened) or (i < 0 and cooldown_until > now))
    local freed = trips > 0 and i >= 0 and i == probe
    if signal == COOL_DOWN and seconds <= 0 then
      cooldown_until, trips, failures = 0, 0, 0
    elseif signal == RESTORE then
      trips = max(trips, known_trips)
    elseif signal == SUCCESS and not stale then
      trips, failures = 0, 0
    elseif signal == FAILURE and not stale then
      failures = failures + 1
      if trips > 0 or failures >= threshold then
        trips, failures, opened, freed = trips + 1, 0, head, true
        cooldown_until = max(cooldown_until, now + min(longest, first * 2 ^ (trips - 1)))
      end
    end
    if seconds > 0 then cooldown_until = max(cooldown_until, now + seconds) end
    if freed then free_probe() end
    if cooldown_until > cooldown_was then call('HSET', key, 'rest_reason', ARGV[3]) end
    if cooldown_until ~= cooldown_was or trips ~= trips_was or failures ~= failures_were then changed = true end
    if freed or cooldown_until ~= cooldown_was or trips ~= trips_was then publish(ARGV[4]) end
    return pack('<dddd', OK, failures, trips, max(0, cooldown_until - now))
  end

  local function snapshot()
    changed = false
    local fields = call('HMGET', key, 'target', 'rest_reason', 'refused', 'refused_since', 'refused_at')
    -- Writes nothing new, and fails where a decision could not be written.
    if live then call('HSET', key, 'run', RUN) else call('HDEL', key, '') end
    if not live or not spec then
      return { fields[1] or '', fields[2] or '', pack('<dd', live and OK or LOST, version) }
    end
    local refused, refused_at = number_of(fields[3]), wall - number_of(fields[5])
    if refused_at > REFUSALS_KEPT then refused = 0 end
    local parts = { pack('<ddddddddddd', OK, version, t == NEVER and NEVER or max(0, t - now), reason, in_flight,
                         max(0, cooldown_until - now), trips, failures, refused, wall - number_of(fields[4]),
                         refused_at) }
    -- Counts what is in each window itself, without its slacks: sends after `now - window` and until now.
    local function first_after(time)
      local low, high = oldest * SENDS, head
      while low < high do
        local middle = floor((low + high) / 2)
        if send_time(middle, 'snapshot') <= time then low = middle + 1 else high = middle end
      end
      return low
    end
    local function sum(kind, from, upto)
      local total = 0
      while from < upto do
        local chunk, last = floor(from / SENDS), min(upto, (floor(from / SENDS) + 1) * SENDS)
        local first = from % SENDS * 4
        local text = call('GETRANGE', key .. kind .. chunk, first, first + (last - from) * 4 - 1)
        for byte = 1, #text - 3, 4 do total = total + unpack_struct('<I4', text, byte) end
        from = last
      end
      return total
    end
    local upto = first_after(now)
    for w = 1, requests + sums do
      local window = unpack_struct('<d', spec, WINDOWS + 16 * (requests + sums + 1) + 8 * (w - 1))
      local own = calendar[w - requests]
      local first = first_after(own and calendar_period(own, now) - 0.5 or now - window)
      local count = upto - first
      if w <= requests and holes > 0 then
        count = count - call('ZCOUNT', key .. ':holes', first, upto - 1)
      elseif w > requests then  -- the tail's sum without the few sends outside, unless more of them left than stayed
        local k, kind = 3 * (w - requests) - 2, w - requests > token_windows and ':c:' or ':t:'
        if first - tail[k] > upto - first then
          count = sum(kind, first, upto)
        else
          count = tail[k + 1] + sum(kind, first, tail[k]) - sum(kind, tail[k], first) - sum(kind, upto, head)
        end
      end
      parts[#parts + 1] = pack('<d', max(0, count))
    end
    for w = requests + token_windows + 1, requests + sums do  -- the pace of budgets
      local window = unpack_struct('<d', spec, WINDOWS + 16 * (requests + sums + 1) + 8 * (w - 1))
      parts[#parts + 1] = pack('<d', sum(':c:', first_after(now - floor(window / 24)), upto))
    end
    return { fields[1], fields[2] or '', table.concat(parts) }
  end

  if verb == 'release' then reply = release()
  elseif verb == 'outcome' then reply = record_outcome()
  elseif verb == 'target' then reply = set_target()
  elseif verb == 'loss' then reply = record_loss()
  elseif verb == 'rebuild' then reply = rebuild()
  elseif verb == 'snapshot' then reply = snapshot()
  else return redis.error_reply('no such verb') end
end

if broken and live and verb ~= 'snapshot' then  -- must be rebuilt before anything is granted
  call('HDEL', key, 'lost')
  call('HSET', key, 'known', '1', 'run', FORMAT)
elseif changed then
  local text = pack(HEADER, gen, clock, offset, head, oldest, sent, since, cooldown_until, denied, holes, in_flight,
                    blind, failures, trips, late, late_head, late_sent, building, rebuilt, rebuilt_until, asked)
  if asked ~= 0 then text = text .. pack(PRIORITIES, asks_until, credit, batch_at, yield_until, due) end
  for k = 1, #tail, 3 do text = text .. pack('<ddd', tail[k], tail[k + 1], tail[k + 2]) end
  if short > 0 then text = text .. pack('<dd', short, short_until) end
  call('HSET', key, 'state', text)
end
if reach_changed and #reach == 0 then
  call('HDEL', key, 'reach')
elseif reach_changed then
  local text = {}
  for k = 1, #reach do text[k] = pack('<d', reach[k]) end
  call('HSET', key, 'reach', table.concat(text))
end
return reply

end

return run(KEYS[1], ARGV[1], ARGV[2])
