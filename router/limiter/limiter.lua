-- The traffic limiter's one script: who may send to a model, and at which moment.
--
-- Nouns. Time is in microseconds of the kept clock: Redis's own, corrected by `offset`.
--   send      one granted permit; numbered from 0, and its number never changes
--   moment    when a send may leave; moments only grow with the number
--   period    a window and its slacks: two sends so many numbers apart must lie a period apart
--   chunk     1,000 sends: a released bit each (125 bytes), then a moment each (8 bytes)
--   hole      a send that was given back; it is not counted
--   holder    a call in flight and the end after which it no longer can be
--   reach     of a window of tokens: a send that a question walked to in vain, and the sum from there on
--   tail      of a window of tokens: the first send still inside, the sum from there on, and that send's moment
--   trip      how often in a row the breaker opened; 0 is closed
--   probe     the one call that a tripped model may have in flight
-- Keys, all of one hash tag:
--   <key>            hash: run, now (the counters below), spec (the target, packed), target, probe, reach, ...
--   <key>:m:<chunk>  released bits and moments     <key>:t:<chunk>  tokens, 4 bytes a send
--   <key>:holders    sorted set: send -> end       <key>:holes      sorted set: send -> send
--
-- Send n is allowed N requests a period P from the moment of send n-N plus P on: one read, whatever N is.
-- The memory counts only in the run of Redis in which it was built: a restart may bring back an older one.
-- A script is run from its top each time, and a function defined costs as much as a command: so what every
-- decision needs comes first and is written flat, and the rest is not even defined then.

local RUN = '@RUN@'
local SENDS, BITMAP = 1000, 125       -- a chunk has 8,125 bytes: just inside the allocator's class of 8,192
local KEPT_CHUNKS = 4                 -- kept whatever their age, so that a new, longer window knows its past
local KEPT_AGE = 61e6                 -- kept whatever the target, for the same reason
local SCAN_STEPS = 20000              -- the most sends that one decision looks at
local LONG_WALK = 64                  -- sends walked through in vain, from which on the next question begins there
local HEADER, REPLY = '<ddddddddddddddddd', '<dddddddddd'
local WINDOWS = 41                    -- window w (requests first) has limit and period at byte WINDOWS + 16 w

local OK, LOST, NO_TARGET = 0, 1, 2
local WINDOW, TOKENS, AT_ONCE, STOPPED, RESTING, TOO_LARGE, PROBING = 1, 2, 3, 4, 5, 6, 9
local NEVER = -1

local key, verb, ask = KEYS[1], ARGV[1], ARGV[2]
local call, pack, unpack_struct = redis.call, struct.pack, struct.unpack
local floor, min, max = math.floor, math.min, math.max
local stored = call('HMGET', key, 'run', 'now', 'spec', 'reach')
local spec = stored[3]
local live = stored[2] and stored[1] == RUN

local gen, clock, offset, head, oldest, sent, since, rest, asked, holes, held, blind, failures, trip =
  0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
local late, late_head, late_sent, at = 0, 0, 0, nil
local tail = {}  -- three numbers for each window of tokens
local reach, reach_changed = {}, false  -- two numbers for each
if stored[4] then
  for k = 1, #stored[4] / 8 do reach[k] = (unpack_struct('<d', stored[4], k * 8 - 7)) end
end
if stored[2] then
  gen, clock, offset, head, oldest, sent, since, rest, asked, holes, held, blind, failures, trip, late, late_head,
    late_sent, at = unpack_struct(HEADER, stored[2])
  for k = 1, (#stored[2] - at + 1) / 8, 3 do
    tail[k], tail[k + 1], tail[k + 2], at = unpack_struct('<ddd', stored[2], at)
  end
end
local version, stopped, gap, slack, at_once, requests, token_windows = 0, 0, 0, 0, NEVER, 0, 0
if spec then version, stopped, gap, slack, at_once, requests, token_windows = unpack_struct('<ddddddd', spec) end

-- A target with a shorter slack than the one before it does not make earlier permits die sooner: sends up to
-- `late_head` may be late by `late`, and none that follows counts for a shorter time than the last of them.
local extra = max(0, late - slack)

-- The clock never goes backwards. Where the asker says how late it can be by its own clock (`claim`, good in the
-- generation that it has `seen`), a clock ahead of that by more than a send slack is not believed: then it shows
-- the claim, or what it was when it was last kept.
local wall = redis.call('TIME')
wall = wall[1] * 1000000 + wall[2]
local now, seen, claim, place, changed = wall + offset, 0, 0, nil, false
if verb == 'reserve' or verb == 'peek' or verb == 'outcome' then seen, claim, place = unpack_struct('<dd', ask) end
if now < clock then
  offset, now, changed = offset + clock - now, clock, true
elseif claim > 0 and seen == gen and now > max(claim, clock) + slack then
  local latest = max(floor(claim), clock)
  offset, now, changed = offset - (now - latest), latest, true
end

local probe, probe_end, opened = NEVER, 0, 0
if trip > 0 then
  local text = call('HGET', key, 'probe')
  if text then probe, probe_end, opened = unpack_struct('<ddd', text) end
end

-- Reading sends: `who` names the reader, since each walks through the numbers at a place of its own.
local granted, granted_tokens, blocks = {}, {}, {}
local broken, ahead = false, 1

local function moment(i, who)
  if granted[i] then return granted[i] end
  local b = blocks[who]
  if not b or i < b.from or i >= b.to then
    local chunk, slot = floor(i / SENDS), i % SENDS
    local first = BITMAP + slot * 8
    local text = call('GETRANGE', key .. ':m:' .. chunk, first, first + min(ahead, SENDS - slot, head - i) * 8 - 1)
    if #text == 0 then broken = true return now end
    b = { from = i, to = i + #text / 8, text = text }
    blocks[who] = b
  end
  local sent_at = unpack_struct('<d', b.text, (i - b.from) * 8 + 1)
  if sent_at == 0 then broken = true return now end  -- a chunk that was lost, and made anew by what came later
  return sent_at
end

-- A decision: when the next send may leave (or NEVER), what it waits for, and whether that is only a moment to ask
-- again at. A peek grants nothing; neither does a snapshot, which goes on further down.
local t, why, only_again = NEVER, 0, true
local reply

if verb == 'reserve' or verb == 'peek' or (verb == 'snapshot' and live and spec) then
  -- ask: generation seen, claim, head seen, look-ahead, the longest that a call can take, and for each permit the
  -- tokens that it needs.
  local commit, seen_head, look, holder, count = verb == 'reserve', 0, 0, 0, 1
  if verb ~= 'snapshot' then
    seen_head, look, holder, place = unpack_struct('<ddd', ask, place)
    count = (#ask - place + 1) / 8
    if not spec then return pack(REPLY, NO_TARGET, 0, 0, 0, NEVER, 0, 0, 0, 0, 0) end
    if not live then return pack(REPLY, LOST, 0, 0, version, NEVER, 0, 0, 0, 0, 0) end
    broken = seen > gen or (seen == gen and seen_head > head) or (seen > 0 and seen < gen and blind == 1)
  end
  if verb == 'snapshot' then
    if at_once >= 0 then held = call('ZCOUNT', key .. ':holders', '(' .. string.format('%.0f', now), '+inf') end
  elseif at_once >= 0 and (held + count > at_once or held % 64 == 63) then
    local ended = call('ZREMRANGEBYSCORE', key .. ':holders', '-inf', now)  -- they matter where places are scarce
    local left = call('ZCARD', key .. ':holders')
    if ended + left ~= held then broken = true end  -- the set was lost
    held, changed = left, true
  end
  if count > 1 or token_windows > 0 then ahead = max(count, 64) end
  local from = head
  local tried, after_tokens = {}, nil  -- `tried` is what `tail` becomes if the send under decision is granted

  for n = 1, broken and 0 or count + 1 do  -- the last time round, if all were granted, is a hint without tokens
    local need = 0
    if n <= count and place then need, place = unpack_struct('<d', ask, place) end
    t, why, only_again = NEVER, STOPPED, true
    if stopped == 1 then break end
    for w = requests + 1, requests + token_windows do
      if need > unpack_struct('<d', spec, WINDOWS + 16 * w) then why = TOO_LARGE end
    end
    if why == TOO_LARGE then break end
    if at_once >= 0 and held >= at_once then
      local first = call('ZRANGE', key .. ':holders', 0, 0, 'WITHSCORES')
      t, why = first[2] and tonumber(first[2]) or NEVER, AT_ONCE
      break
    end
    if trip > 0 and probe_end > now then
      t, why = probe_end, PROBING
      break
    end

    t, why, only_again = max(now, sent + gap), WINDOW, false
    for w = 1, requests do
      local limit, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
      local i = head - limit
      while holes > 0 do  -- a hole is not counted: the limit-th latest send lies so much further back
        local before = head - limit - call('ZCOUNT', key .. ':holes', i, '+inf')
        if before == i then break end
        i = before
      end
      if i >= oldest * SENDS then
        t = max(t, moment(i, w) + period)
        if extra > 0 then t = max(t, (i < late_head and moment(i, w) or late_sent) + period + extra) end
      elseif since > 0 then
        t = max(t, since + period)
      end
    end
    if rest > t then t, why = rest, RESTING end
    if n > count then break end

    local easy = true
    for w = 1, token_windows do
      local limit, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
      local k = 3 * w - 2
      tried[k], tried[k + 1], tried[k + 2] = tail[k], tail[k + 1], tail[k + 2]
      easy = easy and since + period <= t and tail[k + 1] + need <= limit
        and (tail[k] == head or tail[k + 2] + period > t)
    end
    if token_windows > 0 and not easy then
      if not after_tokens then
        local function tokens_of(i)
          if granted_tokens[i] then return granted_tokens[i] end
          local chunk, byte = floor(i / SENDS), i % SENDS * 4
          local b = blocks.tokens
          if not b or b.chunk ~= chunk then
            b = { chunk = chunk, text = call('GET', key .. ':t:' .. chunk) or '' }
            blocks.tokens = b
          end
          if #b.text < byte + 4 then return 0 end
          return (unpack_struct('<I4', b.text, byte + 1))
        end

        -- Moves a tail behind its first send.
        local function pass(tails, k)
          local i = tails[k]
          tails[k], tails[k + 1] = i + 1, tails[k + 1] - tokens_of(i)
          tails[k + 2] = i + 1 < head and moment(i + 1, -k) or 0
        end

        -- Moves a tail behind all that is a period old by then; returns over how many.
        local function leave(tails, k, period, by)
          if tails[k] < head and sent + period <= by and (extra == 0 or late_sent + period + extra <= by) then
            tails[k], tails[k + 1], tails[k + 2] = head, 0, 0
          end
          local steps = 0
          while tails[k] < head and steps < SCAN_STEPS
              and tails[k + 2] + period + (tails[k] < late_head and extra or 0) <= by do
            pass(tails, k)
            steps = steps + 1
          end
          return steps
        end

        after_tokens = function(by, need_now)
          for w = 1, token_windows do
            local limit, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
            local k = 3 * w - 2
            leave(tail, k, period, now)
            tried[k], tried[k + 1], tried[k + 2] = tail[k], tail[k + 1], tail[k + 2]
            if since > 0 then by = max(by, since + period) end
            -- From where a question walked to before, back over what has not left by then and fits all the same.
            local i, total, steps = reach[2 * w - 1], reach[2 * w], 0
            if i and i > tried[k] and extra == 0 then
              while i > tried[k] and steps < SCAN_STEPS and moment(i - 1, -k) + period > by
                  and total + tokens_of(i - 1) + need_now <= limit do
                i, total, steps = i - 1, total + tokens_of(i - 1), steps + 1
              end
              if i > tried[k] then
                by = max(by, moment(i - 1, -k) + period)
                tried[k], tried[k + 1], tried[k + 2] = i, total, i < head and moment(i, -k) or 0
              end
            end
            steps = steps + leave(tried, k, period, by)
            while tried[k + 1] + need_now > limit and tried[k] < head do
              by = max(by, tried[k + 2] + period + (tried[k] < late_head and extra or 0))
              pass(tried, k)
              steps = steps + 1
              if steps >= SCAN_STEPS then break end
            end
            if steps >= LONG_WALK and commit then
              for n = #reach + 1, 2 * token_windows do reach[n] = 0 end
              reach[2 * w - 1], reach[2 * w], reach_changed = tried[k], tried[k + 1], true
            end
            if steps >= SCAN_STEPS then return max(by, now + 1e6), true end  -- go on from here in a second
          end
          for w = 1, token_windows > 1 and token_windows or 0 do
            local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
            leave(tried, 3 * w - 2, period, by)
          end
          return by, false
        end
      end
      local before = t
      t, only_again = after_tokens(t, need)
      if t > before then why = TOKENS end
    end
    if only_again or not commit or broken or t > now + look then break end

    for k = 1, 3 * token_windows, 3 do
      tail[k], tail[k + 1] = tried[k], tried[k + 1] + need
      tail[k + 2] = tried[k] == head and t or tried[k + 2]
    end
    if #reach > 0 then reach, reach_changed = {}, true end
    granted[head], granted_tokens[head] = t, need
    head, sent = head + 1, t
    if at_once >= 0 then held = held + 1 end
    if trip > 0 then probe, probe_end = head - 1, t + holder end
  end

  local i = from
  while i < head do
    local chunk, slot = floor(i / SENDS), i % SENDS
    local upto = min(head, (chunk + 1) * SENDS)
    if slot == 0 then
      call('DEL', key .. ':m:' .. chunk, key .. ':t:' .. chunk)  -- of a memory whose hash was lost
      call('SETRANGE', key .. ':m:' .. chunk, BITMAP + SENDS * 8 - 1, '\0')  -- its whole size at once: no slack
      local keep, before = KEPT_AGE, oldest
      for w = 1, requests + token_windows do
        local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
        keep = max(keep, period)
      end
      while chunk - oldest > KEPT_CHUNKS and oldest < before + 8 do
        local last = moment(oldest * SENDS + SENDS - 1, 'old')
        if broken or last + keep > now then break end
        call('DEL', key .. ':m:' .. oldest, key .. ':t:' .. oldest)
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
    if at_once >= 0 then call('ZADD', key .. ':holders', granted[n] + holder, n) end
  end
  if head > from then
    clock, changed = now, true
    if trip > 0 then call('HSET', key, 'probe', pack('<ddd', probe, probe_end, opened)) end
  end

  if verb ~= 'snapshot' and broken then
    reply = pack(REPLY, LOST, 0, 0, version, NEVER, 0, 0, 0, 0, 0)
  elseif verb ~= 'snapshot' then
    local all = commit and head - from == count
    if asked == 0 and not all and (why == TOKENS or why == AT_ONCE) then asked, changed = 1, true end
    reply = pack(REPLY, OK, gen, head, version, t == NEVER and NEVER or max(0, t - now), why, slack, now, failures,
                 trip)
    if head == from + 1 then
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
  local MOST_TOKENS = 4294967295
  local REFUSALS_KEPT = 3600e6  -- a refusal that follows no other within so long begins a new count
  local REST, GOOD, BAD, REFUSED, PUT_BACK = 0, 1, 2, 3, 4  -- any other sign does no more than free the probe

  local function say(what) call('PUBLISH', CHANNEL, key .. ' ' .. what) end
  local function number_of(text) return text and tonumber(text) or 0 end

  -- When a send of this moment counts no longer.
  local function ends(i, sent_at, period)
    if extra == 0 then return sent_at + period end
    return max(sent_at + period, (i < late_head and sent_at or late_sent) + period + extra)
  end

  local function tokens_of(i)
    local byte = i % SENDS * 4
    local text = call('GETRANGE', key .. ':t:' .. floor(i / SENDS), byte, byte + 3)
    return #text == 4 and unpack_struct('<I4', text) or 0
  end

  -- Whether a send still takes room: what left all windows makes none when it is given back.
  local function takes_room(i)
    local sent_at = moment(i, 'room')
    for w = 1, requests + token_windows do
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
      if ends(i, sent_at, period) > now then return true end
    end
    return false
  end

  -- Sets the tokens of a send to what they were, in the windows that still hold it.
  local function correct(i, used)
    local delta = used - tokens_of(i)
    if delta == 0 then return false end
    call('SETRANGE', key .. ':t:' .. floor(i / SENDS), i % SENDS * 4, pack('<I4', used))
    for k = 1, #tail, 3 do
      if tail[k] <= i then tail[k + 1] = tail[k + 1] + delta end
    end
    for k = 1, #reach, 2 do
      if reach[k] <= i then reach[k + 1], reach_changed = reach[k + 1] + delta, true end
    end
    return delta < 0
  end

  local function make_hole(i)
    call('ZADD', key .. ':holes', i, i)
    holes = holes + 1
    if i == head - 1 and i > oldest * SENDS then  -- nothing followed: the pace goes on from the send before it
      sent = moment(i - 1, 'hole')
      call('SETRANGE', key .. ':m:' .. floor(i / SENDS), BITMAP + i % SENDS * 8, pack('<d', sent))
      for w = 1, token_windows do  -- the next one may leave sooner than this one: what that meets counts again
        local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
        local k = 3 * w - 2
        if tail[k] == i then tail[k + 2] = sent end
        local n = tail[k] - 1
        while n >= oldest * SENDS and ends(n, moment(n, 'hole'), period) > max(clock, sent) do
          tail[k], tail[k + 1], tail[k + 2] = n, tail[k + 1] + tokens_of(n), moment(n, 'hole')
          n = n - 1
        end
      end
    end
  end

  local function free_probe()
    probe, probe_end = NEVER, 0
    call('HSET', key, 'probe', pack('<ddd', probe, probe_end, opened))
  end

  -- Each item: generation, send, tokens used (or NEVER), 1 if it was never used.
  local function release()
    if not live then return pack('<dd', LOST, 0) end
    local freed, of, i, used, unused = false, nil, nil, nil, nil
    place = 1
    while place <= #ask do
      of, i, used, unused, place = unpack_struct('<dddd', ask, place)
      if of == gen then
        if at_once >= 0 and call('ZREM', key .. ':holders', i) == 1 then
          held, freed = held - 1, true
        end
        if trip > 0 and i == probe then
          free_probe()
          freed, asked = true, 1
        end
        if i >= oldest * SENDS and i < head
            and call('SETBIT', key .. ':m:' .. floor(i / SENDS), i % SENDS, 1) == 0 then
          if unused == 1 then used = 0 end
          if used >= 0 then freed = correct(i, min(used, MOST_TOKENS)) or freed end
          if unused == 1 then
            if takes_room(i) then freed, asked = true, 1 end
            make_hole(i)
          end
        end
      end
    end
    local told = freed and asked == 1
    if told then
      asked = 0
      say(ARGV[3])
    end
    changed = true
    return pack('<dd', OK, told and 1 or 0)
  end

  -- Walks from the latest send back while `inside(moment, send)`; returns the first number still inside.
  local function walk_back(inside)
    local i, chunk, text = head - 1, nil, nil
    while i >= oldest * SENDS do
      if chunk ~= floor(i / SENDS) then
        chunk = floor(i / SENDS)
        text = call('GETRANGE', key .. ':m:' .. chunk, BITMAP, -1)
      end
      local byte = i % SENDS * 8
      local sent_at = #text >= byte + 8 and unpack_struct('<d', text, byte + 1) or 0
      if sent_at == 0 then broken = true end
      if broken or not inside(sent_at, i) then break end
      i = i - 1
    end
    return i + 1
  end

  -- Reads the tails from the sends themselves; `known` holds those of the target before, by their period.
  local function count_tokens(as_of, known)
    tail = {}
    for w = 1, token_windows do
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
      local k, same = 3 * w - 2, known[period]
      if same then
        tail[k], tail[k + 1], tail[k + 2] = same[1], same[2], same[3]
      else
        local total, first, chunk, text = 0, 0, nil, nil
        local i = walk_back(function(sent_at, send)
          if ends(send, sent_at, period) <= as_of then return false end
          if chunk ~= floor(send / SENDS) then
            chunk = floor(send / SENDS)
            text = call('GET', key .. ':t:' .. chunk) or ''
          end
          local byte = send % SENDS * 4
          if #text >= byte + 4 then total = total + unpack_struct('<I4', text, byte + 1) end
          first = sent_at
          return true
        end)
        tail[k], tail[k + 1], tail[k + 2] = i, total, first
      end
    end
  end

  -- A target that begins to limit calls at once counts those that are in flight already.
  local function find_holders(longest)
    walk_back(function(sent_at, send)
      if sent_at + longest <= clock then return false end
      if call('GETBIT', key .. ':m:' .. floor(send / SENDS), send % SENDS) == 0 then
        call('ZADD', key .. ':holders', 'NX', sent_at + longest, send)
      end
      return true
    end)
    held = call('ZCARD', key .. ':holders')
  end

  -- ask: version, or 0 for one that is newer than what is in force; the longest that a call can take; ARGV[3] the
  -- target, packed, ARGV[4] as a line. Nobody's claim is at hand, so what counts is the clock as it was kept.
  local function set_target()
    local new_version, longest = unpack_struct('<dd', ask)
    if new_version == 0 then new_version = max(wall, spec and version + 1 or 0) end
    if spec and version > new_version then return pack('<dd', 0, version) end
    local limited, slack_was, known = spec and at_once >= 0, slack, {}
    for w = 1, live and token_windows or 0 do
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
      known[period] = { tail[3 * w - 2], tail[3 * w - 1], tail[3 * w] }
    end
    spec = pack('<d', new_version) .. string.sub(ARGV[3], 9)
    version, stopped, gap, slack, at_once, requests, token_windows = unpack_struct('<ddddddd', spec)
    call('HSET', key, 'spec', spec, 'target', ARGV[4])
    if live and not (stored[3] and string.sub(stored[3], 9) == string.sub(spec, 9)) then
      if slack_was > slack and head > 0 then late, late_head, late_sent = max(late, slack_was), head, sent end
      extra = max(0, late - slack)
      if #reach > 0 then reach, reach_changed = {}, true end
      count_tokens(clock, known)  -- 26,000 sends take 12 ms, in which nobody is answered
      if at_once < 0 then
        call('DEL', key .. ':holders')
        held = 0
      elseif not limited then
        find_holders(longest)
      end
      changed = true
    end
    if spec ~= stored[3] then say(ARGV[5]) end
    return pack('<dd', 1, version)
  end

  -- Says that the memory is gone, since when, and which one: the clock may stand still. ask: 1 if the asker had seen it; the longest that a call takes.
  local function record_loss()
    local knew, longest = unpack_struct('<dd', ask)
    if live then return pack('<dddddd', 1, 0, now, 0, 0, gen) end
    if knew == 1 or stored[2] then call('HSET', key, 'known', '1') end
    call('HSETNX', key, 'lost', now)
    local lost_at = tonumber(call('HGET', key, 'lost'))
    if at_once < 0 then longest = 0 end
    for w = 1, requests + token_windows do
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
      longest = max(longest, period)
    end
    changed = false
    return pack('<dddddd', 0, now - lost_at, now, longest, call('HEXISTS', key, 'known'), gen)
  end

  -- Builds the memory anew from past calls. ask: blind, since, the longest that a call can take, generation seen,
  -- rest, trip; ARGV[3] moments, ARGV[4] tokens, ARGV[5] a byte a call: 1 if it is still open. Moments ascend.
  local function rebuild()
    local is_blind, from, longest, seen_gen, rests, trips = unpack_struct('<dddddd', ask)
    if live or not spec then return pack('<d', live and 1 or 0) end
    if is_blind == 1 and call('HEXISTS', key, 'known') == 1 then return pack('<d', 0) end
    for chunk = oldest, floor(head / SENDS) do call('DEL', key .. ':m:' .. chunk, key .. ':t:' .. chunk) end
    call('DEL', key .. ':holders', key .. ':holes')
    gen = max(now, gen + 1, seen_gen + 1)
    clock, head, oldest, sent, since, asked, holes, held, blind = now, 0, 0, 0, from, 0, 0, 0, is_blind
    rest, trip, failures = rests > 0 and now + rests or 0, trips, 0
    late, late_head, late_sent, extra = 0, 0, 0, 0
    local moments, tokens, open = ARGV[3], ARGV[4], ARGV[5]
    local count = #open
    local bits = string.rep('\0', BITMAP)
    for i = 0, count - 1, SENDS do
      local last = min(i + SENDS, count)
      call('SET', key .. ':m:' .. i / SENDS, bits .. string.sub(moments, i * 8 + 1, last * 8)
           .. string.rep('\0', (i + SENDS - last) * 8))
      call('SET', key .. ':t:' .. i / SENDS, string.sub(tokens, i * 4 + 1, last * 4))
    end
    for i = 0, count - 1 do
      if string.byte(open, i + 1) == 0 then call('SETBIT', key .. ':m:' .. floor(i / SENDS), i % SENDS, 1) end
    end
    head = count
    if count > 0 then sent = moment(count - 1, 'rebuild') end
    count_tokens(now, {})
    if at_once >= 0 then find_holders(longest) end
    call('HSET', key, 'run', RUN, 'rest_reason', ARGV[7])
    call('HDEL', key, 'lost', 'known', 'probe', 'reach')
    reach = {}
    changed = true
    say(ARGV[6])
    return pack('<d', 1)
  end

  local function count_refusal()
    local told = call('HMGET', key, 'refused', 'refused_at')
    if not told[1] or wall - number_of(told[2]) > REFUSALS_KEPT then
      call('HSET', key, 'refused', 0, 'refused_since', wall)
    end
    call('HINCRBY', key, 'refused', 1)
    call('HSET', key, 'refused_at', wall)
  end

  -- What a call came to. ask: generation seen, claim, sign, seconds to rest, generation and number of the send (or
  -- NEVER), failures borne, first and longest rest of the breaker, trips that the asker knows of; ARGV[3] reason.
  local function record_outcome()
    local sign, seconds, of, i, borne, first, longest, trips = unpack_struct('<dddddddd', ask, place)
    if sign == REFUSED then count_refusal() end
    if not live then return pack('<dddd', LOST, 0, 0, 0) end
    if of ~= gen then i = NEVER end
    local rest_was, trip_was, failures_were = rest, trip, failures
    -- What was sent before the breaker opened says nothing about the time since.
    local stale = trip > 0 and ((i >= 0 and i < opened) or (i < 0 and rest > now))
    local freed = trip > 0 and i >= 0 and i == probe
    if sign == REST and seconds <= 0 then
      rest, trip, failures = 0, 0, 0
    elseif sign == PUT_BACK then
      trip = max(trip, trips)
    elseif sign == GOOD and not stale then
      trip, failures = 0, 0
    elseif sign == BAD and not stale then
      failures = failures + 1
      if trip > 0 or failures >= borne then
        trip, failures, opened, freed = trip + 1, 0, head, true
        rest = max(rest, now + min(longest, first * 2 ^ (trip - 1)))
      end
    end
    if seconds > 0 then rest = max(rest, now + seconds) end
    if freed then free_probe() end
    if rest > rest_was then call('HSET', key, 'rest_reason', ARGV[3]) end
    if rest ~= rest_was or trip ~= trip_was or failures ~= failures_were then changed = true end
    if freed or rest ~= rest_was or trip ~= trip_was then say(ARGV[4]) end
    return pack('<dddd', OK, failures, trip, max(0, rest - now))
  end

  local function snapshot()
    changed = false
    local told = call('HMGET', key, 'target', 'rest_reason', 'refused', 'refused_since', 'refused_at')
    if not live or not spec then return { told[1] or '', told[2] or '', pack('<d', live and OK or LOST) } end
    local refused, refused_at = number_of(told[3]), wall - number_of(told[5])
    if refused_at > REFUSALS_KEPT then refused = 0 end
    local parts = { pack('<dddddddddd', OK, t == NEVER and NEVER or max(0, t - now), why, held, max(0, rest - now),
                         trip, failures, refused, wall - number_of(told[4]), refused_at) }
    for w = 1, requests do
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * w)
      local low, high = oldest * SENDS, head
      while low < high do
        local middle = floor((low + high) / 2)
        if ends(middle, moment(middle, 'snapshot'), period) <= now then low = middle + 1 else high = middle end
      end
      local unused = holes > 0 and call('ZCOUNT', key .. ':holes', low, '+inf') or 0
      parts[#parts + 1] = pack('<d', head - low - unused)
    end
    ahead = 64
    for w = 1, token_windows do
      local _, period = unpack_struct('<dd', spec, WINDOWS + 16 * (requests + w))
      local i, total, first = unpack(tail, 3 * w - 2, 3 * w)
      if i < head and ends(head - 1, sent, period) <= now then i, total = head, 0 end
      while i < head and ends(i, first, period) <= now do  -- what left since the last decision, hardly ever more
        i, total = i + 1, total - tokens_of(i)
        first = i < head and moment(i, -w) or 0
      end
      parts[#parts + 1] = pack('<d', total)
    end
    return { told[1], told[2] or '', table.concat(parts) }
  end

  if verb == 'release' then reply = release()
  elseif verb == 'outcome' then reply = record_outcome()
  elseif verb == 'target' then reply = set_target()
  elseif verb == 'loss' then reply = record_loss()
  elseif verb == 'rebuild' then reply = rebuild()
  elseif verb == 'snapshot' then reply = snapshot()
  else return redis.error_reply('no such verb') end
end

if broken and live and verb ~= 'snapshot' then  -- somebody must rebuild it before anything is granted
  call('HDEL', key, 'run', 'lost')
  call('HSET', key, 'known', '1')
elseif changed then
  local text = pack(HEADER, gen, clock, offset, head, oldest, sent, since, rest, asked, holes, held, blind, failures,
                    trip, late, late_head, late_sent)
  for k = 1, #tail, 3 do text = text .. pack('<ddd', tail[k], tail[k + 1], tail[k + 2]) end
  call('HSET', key, 'now', text)
end
if reach_changed and #reach == 0 then
  call('HDEL', key, 'reach')
elseif reach_changed then
  local text = {}
  for k = 1, #reach do text[k] = pack('<d', reach[k]) end
  call('HSET', key, 'reach', table.concat(text))
end
return reply
