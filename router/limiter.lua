-- The traffic limiter's one script: who may send to a model, and at which moment.
--
-- Nouns. Time is in microseconds of Redis's clock, kept from going backwards (`offset`).
--   send      one granted permit; numbered from 0, and its number never changes
--   moment    when a send may leave; moments only grow with the number
--   period    a window and its slacks: two sends so many numbers apart must lie a period apart
--   chunk     1,000 sends: a released bit each (125 bytes), then a moment each (8 bytes)
--   hole      a send that was given back; it is not counted
--   holder    a call in flight and the end after which it no longer can be
-- Keys, all of one hash tag:
--   <key>            hash: run, now (the counters below), spec (the target, packed), target, version, ...
--   <key>:m:<chunk>  released bits and moments     <key>:t:<chunk>  tokens, 4 bytes a send
--   <key>:holders    sorted set: send -> end       <key>:holes      sorted set: send -> send
--
-- Send n is allowed N requests a period P from the moment of send n-N plus P on: one read, whatever N is.
-- Tokens keep for each window the first send still inside (`tail`) and the sum from there on.
-- The memory counts only in the run of Redis in which it was built: a restart may bring back an older one.

local RUN = '@RUN@'
local SENDS, BITMAP = 1000, 125       -- a chunk has 8,125 bytes: just inside the allocator's class of 8,192
local KEPT_CHUNKS = 4                 -- kept whatever their age, so that a new, longer window knows its past
local KEPT_AGE = 61e6                 -- kept whatever the target, for the same reason
local SCAN_STEPS = 20000              -- the most sends that one decision looks at
local MOST_TOKENS = 4294967295
local CHANNEL = 'router:traffic'

local OK, LOST, NO_TARGET = 0, 1, 2
local WINDOW, TOKENS, AT_ONCE, STOPPED, RESTING, TOO_LARGE = 1, 2, 3, 4, 5, 6
local NEVER = -1

local key, verb, ask = KEYS[1], ARGV[1], ARGV[2]
local stored = redis.call('HMGET', key, 'run', 'now', 'spec')
local wall = redis.call('TIME')
local now = wall[1] * 1000000 + wall[2]

local floor, min, max = math.floor, math.min, math.max
local pack, unpack_struct = struct.pack, struct.unpack
local HEADER = '<ddddddddddd'
local s
local spec = nil
local live = stored[1] == RUN and stored[2] and true or false

local function read_spec(text)
  local requests, tokens, at
  local read = { requests = {}, tokens = {}, longest = 0 }
  read.version, read.stopped, read.gap, read.slack, read.at_once, requests, tokens, at =
    unpack_struct('<ddddddd', text)
  for w = 1, requests + tokens do
    local limit, period
    limit, period, at = unpack_struct('<dd', text, at)
    local list = w <= requests and read.requests or read.tokens
    list[#list + 1] = { limit = limit, period = period }
    read.longest = max(read.longest, period)
  end
  return read
end

if stored[3] then spec = read_spec(stored[3]) end

if stored[2] then
  local gen, clock, offset, head, oldest, sent, since, rest, asked, holes, blind, at = unpack_struct(HEADER, stored[2])
  now = now + offset
  if now < clock then
    offset = offset + clock - now
    now = clock
  end
  s = { gen = gen, clock = now, offset = offset, head = head, oldest = oldest, sent = sent, since = since,
        rest = rest, asked = asked, holes = holes, blind = blind, tail = {}, sum = {} }
  for w = 1, (#stored[2] - at + 1) / 16 do
    s.tail[w], s.sum[w], at = unpack_struct('<dd', stored[2], at)
  end
else
  s = { gen = 0, clock = now, offset = 0, head = 0, oldest = 0, sent = 0, since = 0,
        rest = 0, asked = 0, holes = 0, blind = 0, tail = {}, sum = {} }
end

local function text_of(number) return string.format('%.0f', number) end
local function moments_key(chunk) return key .. ':m:' .. chunk end
local function tokens_key(chunk) return key .. ':t:' .. chunk end
local function say(what) redis.call('PUBLISH', CHANNEL, key .. ' ' .. what) end

local function save()
  local parts = { pack(HEADER, s.gen, s.clock, s.offset, s.head, s.oldest, s.sent, s.since, s.rest, s.asked,
                       s.holes, s.blind) }
  for w = 1, #s.tail do parts[w + 1] = pack('<dd', s.tail[w], s.sum[w]) end
  redis.call('HSET', key, 'now', table.concat(parts))
end

-- Reading sends: `who` names the reader, since each walks through the numbers at a place of its own.
local granted, granted_tokens, blocks = {}, {}, {}
local broken, ahead = false, 1

local function moment(i, who)
  if granted[i] then return granted[i] end
  local b = blocks[who]
  if not b or i < b.from or i >= b.to then
    local chunk, slot = floor(i / SENDS), i % SENDS
    local at = BITMAP + slot * 8
    local text = redis.call('GETRANGE', moments_key(chunk), at, at + min(ahead, SENDS - slot, s.head - i) * 8 - 1)
    if #text == 0 then broken = true return now end
    b = { from = i, to = i + #text / 8, text = text }
    blocks[who] = b
  end
  return (unpack_struct('<d', b.text, (i - b.from) * 8 + 1))
end

local function tokens_of(i)
  if granted_tokens[i] then return granted_tokens[i] end
  local chunk, slot = floor(i / SENDS), i % SENDS
  local b = blocks.tokens
  if not b or b.chunk ~= chunk then
    b = { chunk = chunk, text = redis.call('GET', tokens_key(chunk)) or '' }
    blocks.tokens = b
  end
  if #b.text < slot * 4 + 4 then return 0 end
  return (unpack_struct('<I4', b.text, slot * 4 + 1))
end

-- The number of the send that the next one must keep a period from: the limit-th latest that is no hole.
local function partner(limit)
  local i = s.head - limit
  while s.holes > 0 do
    local before = s.head - limit - redis.call('ZCOUNT', key .. ':holes', i, '+inf')
    if before == i then break end
    i = before
  end
  return i
end

local function after_requests(t)
  for w = 1, #spec.requests do
    local window = spec.requests[w]
    local i = partner(window.limit)
    if i >= s.oldest * SENDS then
      t = max(t, moment(i, w) + window.period)
    elseif s.since > 0 then
      t = max(t, s.since + window.period)
    end
  end
  return t
end

local tail, sum = {}, {}  -- what the tails become if the send under decision is granted

local function leave(w, period, t)
  if s.sent + period <= t then
    tail[w], sum[w] = s.head, 0
    return
  end
  local steps = 0
  while tail[w] < s.head and steps < SCAN_STEPS and moment(tail[w], -w) + period <= t do
    sum[w] = sum[w] - tokens_of(tail[w])
    tail[w] = tail[w] + 1
    steps = steps + 1
  end
end

local function after_tokens(t, need)
  for w, window in ipairs(spec.tokens) do
    if s.since > 0 then t = max(t, s.since + window.period) end
    tail[w], sum[w] = s.tail[w], s.sum[w]
    leave(w, window.period, t)
    local steps = 0
    while sum[w] + need > window.limit and tail[w] < s.head do
      t = max(t, moment(tail[w], -w) + window.period)
      sum[w] = sum[w] - tokens_of(tail[w])
      tail[w] = tail[w] + 1
      steps = steps + 1
      if steps >= SCAN_STEPS then return max(t, now + 1e9) end
    end
  end
  if #spec.tokens > 1 then
    for w, window in ipairs(spec.tokens) do leave(w, window.period, t) end
  end
  return t
end

local in_use = 0

-- The earliest moment for one more send of `need` tokens, or NEVER, and what it waits for.
local function earliest(need)
  if spec.stopped == 1 then return NEVER, STOPPED end
  for _, window in ipairs(spec.tokens) do
    if need > window.limit then return NEVER, TOO_LARGE end
  end
  if spec.at_once >= 0 and in_use >= spec.at_once then
    local first = redis.call('ZRANGE', key .. ':holders', 0, 0, 'WITHSCORES')
    return first[2] and tonumber(first[2]) or NEVER, AT_ONCE
  end
  local t, why = max(now, s.sent + spec.gap), WINDOW
  t = after_requests(t)
  if s.rest > t then t, why = s.rest, RESTING end
  if #spec.tokens > 0 then
    local before = t
    t = after_tokens(t, need)
    if t > before then why = TOKENS end
  end
  return t, why
end

-- As `earliest`, for a hint and not for a grant: it does not look at tokens.
local function soonest()
  if spec.at_once >= 0 and in_use >= spec.at_once then return NEVER, AT_ONCE end
  local t = after_requests(max(now, s.sent + spec.gap))
  if s.rest > t then return s.rest, RESTING end
  return t, WINDOW
end

local function grant(t, need)
  for w = 1, #spec.tokens do s.tail[w], s.sum[w] = tail[w], sum[w] + need end
  granted[s.head], granted_tokens[s.head] = t, need
  s.head, s.sent = s.head + 1, t
  in_use = in_use + 1
end

local function drop_old_chunks(current)
  local keep, before = max(spec.longest, KEPT_AGE), s.oldest
  while current - s.oldest > KEPT_CHUNKS and s.oldest < before + 8 do
    local last = s.oldest * SENDS + SENDS - 1
    local at = moment(last, 'old')
    if broken or at + keep > now then break end
    redis.call('DEL', moments_key(s.oldest), tokens_key(s.oldest))
    s.oldest, s.since = s.oldest + 1, at
  end
  if s.holes > 0 and s.oldest > before then
    redis.call('ZREMRANGEBYSCORE', key .. ':holes', '-inf', s.oldest * SENDS - 1)
    s.holes = redis.call('ZCARD', key .. ':holes')
  end
end

local function write(from, holder)
  local i = from
  while i < s.head do
    local chunk, slot = floor(i / SENDS), i % SENDS
    local upto = min(s.head, (chunk + 1) * SENDS)
    if slot == 0 then
      redis.call('SETRANGE', moments_key(chunk), BITMAP + SENDS * 8 - 1, '\0')  -- its whole size at once: no slack
      drop_old_chunks(chunk)
    end
    local parts = {}
    for n = i, upto - 1 do parts[#parts + 1] = pack('<d', granted[n]) end
    redis.call('SETRANGE', moments_key(chunk), BITMAP + slot * 8, table.concat(parts))
    i = upto
  end
  for n = from, s.head - 1 do
    if granted_tokens[n] > 0 then
      redis.call('SETRANGE', tokens_key(floor(n / SENDS)), n % SENDS * 4, pack('<I4', granted_tokens[n]))
    end
  end
  if spec.at_once >= 0 then
    for n = from, s.head - 1 do
      redis.call('ZADD', key .. ':holders', text_of(granted[n] + holder), text_of(n))
    end
  end
end

local function forget()  -- the memory is not to be trusted: somebody must rebuild it before anything is granted
  redis.call('HDEL', key, 'run', 'lost')
  redis.call('HSET', key, 'known', '1')
  return pack('<ddddddd', LOST, 0, 0, spec and spec.version or 0, NEVER, 0, 0)
end

local function reserve(commit)
  local seen, seen_head, look, holder, at = unpack_struct('<dddd', ask)
  local count = (#ask - at + 1) / 8
  if not spec then return pack('<ddddddd', NO_TARGET, 0, 0, 0, NEVER, 0, 0) end
  if not live then return pack('<ddddddd', LOST, 0, 0, spec.version, NEVER, 0, 0) end
  if seen > s.gen or (seen == s.gen and seen_head > s.head) or (seen > 0 and seen < s.gen and s.blind == 1) then
    return forget()
  end
  if spec.at_once >= 0 then
    in_use = redis.call('ZCARD', key .. ':holders')
    if in_use + count > spec.at_once or in_use % 64 == 0 then  -- the ended matter only where places are scarce
      redis.call('ZREMRANGEBYSCORE', key .. ':holders', '-inf', text_of(now))
      in_use = redis.call('ZCARD', key .. ':holders')
    end
  end
  ahead = max(count, #spec.tokens > 0 and 64 or 1)
  local from, t, why = s.head, NEVER, 0
  for n = 1, count do
    local need = unpack_struct('<d', ask, at + (n - 1) * 8)
    t, why = earliest(need)
    if not commit or t == NEVER or why == AT_ONCE or t > now + look then break end
    grant(t, need)
  end
  local all = commit and s.head - from == count
  if all then t, why = soonest() end
  local reply = { pack('<ddddddd', OK, s.gen, s.head, spec.version, t == NEVER and NEVER or max(0, t - now), why,
                       spec.slack) }
  for n = from, s.head - 1 do reply[#reply + 1] = pack('<dd', n, granted[n] - now) end
  if s.head > from then write(from, holder) end
  if broken then return forget() end
  local starved = not all and (why == TOKENS or why == AT_ONCE)
  if s.head > from or (starved and s.asked == 0) then
    if starved then s.asked = 1 end
    save()
  end
  return table.concat(reply)
end

-- The rest is not even defined for those who ask for a permit: a script is run from its top every time.
if verb == 'reserve' then return reserve(true) end
if verb == 'peek' then return reserve(false) end

-- Sets the tokens of a send to what they were, in the windows that still hold it.
local function correct(i, used)
  local chunk, at = tokens_key(floor(i / SENDS)), i % SENDS * 4
  local reserved = redis.call('GETRANGE', chunk, at, at + 3)
  local delta = used - (#reserved == 4 and unpack_struct('<I4', reserved) or 0)
  if delta == 0 then return false end
  redis.call('SETRANGE', chunk, at, pack('<I4', used))
  for w = 1, #s.tail do
    if s.tail[w] <= i then s.sum[w] = s.sum[w] + delta end
  end
  return delta < 0
end

local function make_hole(i)
  redis.call('ZADD', key .. ':holes', text_of(i), text_of(i))
  s.holes = s.holes + 1
  if i == s.head - 1 and i > s.oldest * SENDS then  -- nothing followed: the pace goes on from the send before it
    blocks = {}
    s.sent = moment(i - 1, 'hole')
    redis.call('SETRANGE', moments_key(floor(i / SENDS)), BITMAP + i % SENDS * 8, pack('<d', s.sent))
  end
end

-- Each item: generation, send, tokens used (or NEVER), 1 if it was never used.
local function give_back()
  if not live then return pack('<d', LOST) end
  local freed, at, gen, i, used, unused = false, 1, nil, nil, nil, nil
  while at <= #ask do
    gen, i, used, unused, at = unpack_struct('<dddd', ask, at)
    if gen == s.gen then
      freed = redis.call('ZREM', key .. ':holders', text_of(i)) == 1 or freed
      if i >= s.oldest * SENDS and i < s.head
          and redis.call('SETBIT', moments_key(floor(i / SENDS)), i % SENDS, 1) == 0 then
        if unused == 1 then used = 0 end
        if used >= 0 then freed = correct(i, min(used, MOST_TOKENS)) or freed end
        if unused == 1 then
          make_hole(i)
          freed, s.asked = true, 1
        end
      end
    end
  end
  if freed and s.asked == 1 then
    s.asked = 0
    say(ARGV[3])
  end
  save()
  return pack('<d', OK)
end

-- Walks from the latest send back while `inside(moment, send)`; returns the first number still inside.
local function walk_back(inside)
  local i, chunk, text = s.head - 1, nil, nil
  while i >= s.oldest * SENDS do
    if chunk ~= floor(i / SENDS) then
      chunk = floor(i / SENDS)
      text = redis.call('GETRANGE', moments_key(chunk), BITMAP, -1)
    end
    local at = i % SENDS * 8
    if #text < at + 8 or not inside((unpack_struct('<d', text, at + 1)), i) then break end
    i = i - 1
  end
  return i + 1
end

local function count_tokens()
  s.tail, s.sum = {}, {}
  for w, window in ipairs(spec.tokens) do
    local total = 0
    s.tail[w] = walk_back(function(at, i)
      if at + window.period <= now then return false end
      total = total + tokens_of(i)
      return true
    end)
    s.sum[w] = total
  end
end

-- A target that begins to limit calls at once counts those that are in flight already.
local function find_holders(longest)
  walk_back(function(at, i)
    if at + longest <= now then return false end
    if redis.call('GETBIT', moments_key(floor(i / SENDS)), i % SENDS) == 0 then
      redis.call('ZADD', key .. ':holders', 'NX', text_of(at + longest), text_of(i))
    end
    return true
  end)
end

local function set_target()
  local version, longest = unpack_struct('<dd', ask)
  local packed, line, old = ARGV[3], ARGV[4], spec
  if version == 0 then version = max(wall[1] * 1000000 + wall[2], old and old.version + 1 or 0) end
  if old and old.version > version then return pack('<dd', 0, old.version) end
  packed = pack('<d', version) .. string.sub(packed, 9)
  spec = read_spec(packed)
  redis.call('HSET', key, 'spec', packed, 'target', line)
  if live then
    count_tokens()
    if spec.at_once >= 0 and not (old and old.at_once >= 0) then find_holders(longest) end
    save()
  end
  if packed ~= stored[3] then say(ARGV[5]) end
  return pack('<dd', 1, version)
end

-- Says that the memory is gone, and since when; `knew` is 1 if the asker had seen it.
local function mark_lost()
  local knew, call_longest = unpack_struct('<dd', ask)
  if live then return pack('<ddddd', 1, 0, now, 0, 0) end
  if knew == 1 or stored[2] then redis.call('HSET', key, 'known', '1') end
  redis.call('HSETNX', key, 'lost', text_of(now))
  local since = tonumber(redis.call('HGET', key, 'lost'))
  if since > now then  -- written by another clock
    since = now
    redis.call('HSET', key, 'lost', text_of(now))
  end
  local known = redis.call('HEXISTS', key, 'known')
  local longest = spec and spec.longest or 0
  if spec and spec.at_once >= 0 then longest = max(longest, call_longest) end
  return pack('<ddddd', 0, now - since, now, longest, known)
end

-- Builds the memory anew from past calls: ask = blind, since, holders' end; ARGV[3] moments, ARGV[4] tokens,
-- ARGV[5] a byte a call: 1 if it is still open. Moments ascend.
local function rebuild()
  local blind, since, longest, seen = unpack_struct('<dddd', ask)
  if live or not spec then return pack('<d', live and 1 or 0) end
  if blind == 1 and redis.call('HEXISTS', key, 'known') == 1 then return pack('<d', 0) end
  for chunk = s.oldest, floor(s.head / SENDS) do redis.call('DEL', moments_key(chunk), tokens_key(chunk)) end
  redis.call('DEL', key .. ':holders', key .. ':holes')
  s.gen = max(now, s.gen + 1, seen + 1)
  s.head, s.oldest, s.sent, s.since, s.asked, s.holes, s.blind = 0, 0, 0, since, 0, 0, blind
  local moments, tokens, open = ARGV[3], ARGV[4], ARGV[5]
  local count = #open
  local bits = string.rep('\0', BITMAP)
  for i = 0, count - 1, SENDS do
    local last = min(i + SENDS, count)
    redis.call('SET', moments_key(i / SENDS), bits .. string.sub(moments, i * 8 + 1, last * 8)
               .. string.rep('\0', (i + SENDS - last) * 8))
    redis.call('SET', tokens_key(i / SENDS), string.sub(tokens, i * 4 + 1, last * 4))
  end
  for i = 0, count - 1 do
    if string.byte(open, i + 1) == 0 then
      redis.call('SETBIT', moments_key(floor(i / SENDS)), i % SENDS, 1)
    end
  end
  s.head = count
  if count > 0 then s.sent = moment(count - 1, 'rebuild') end
  count_tokens()
  if spec.at_once >= 0 then find_holders(longest) end
  redis.call('HSET', key, 'run', RUN)
  redis.call('HDEL', key, 'lost', 'known')
  save()
  say(ARGV[6])
  return pack('<d', 1)
end

local function rest()
  if not live then return pack('<d', LOST) end
  local seconds = unpack_struct('<d', ask)
  s.rest = seconds <= 0 and 0 or max(s.rest, now + seconds * 1000000)
  redis.call('HSET', key, 'rest_reason', ARGV[3])
  save()
  say(ARGV[4])
  return pack('<d', OK)
end

local function snapshot()
  local line = redis.call('HMGET', key, 'target', 'rest_reason')
  if not live or not spec then return { line[1] or '', line[2] or '', pack('<d', live and OK or LOST) } end
  in_use = redis.call('ZCOUNT', key .. ':holders', '(' .. text_of(now), '+inf')
  local t, why = earliest(0)
  local parts = { pack('<ddddd', OK, t == NEVER and NEVER or max(0, t - now), why, in_use, max(0, s.rest - now)) }
  for _, window in ipairs(spec.requests) do
    local low, high = s.oldest * SENDS, s.head
    while low < high do
      local middle = floor((low + high) / 2)
      if moment(middle, 'snapshot') + window.period <= now then low = middle + 1 else high = middle end
    end
    local holes = s.holes > 0 and redis.call('ZCOUNT', key .. ':holes', low, '+inf') or 0
    parts[#parts + 1] = pack('<d', s.head - low - holes)
  end
  for w, window in ipairs(spec.tokens) do
    tail[w], sum[w] = s.tail[w], s.sum[w]
    leave(w, window.period, now)
    parts[#parts + 1] = pack('<d', sum[w])
  end
  return { line[1], line[2] or '', table.concat(parts) }
end

if verb == 'back' then return give_back() end
if verb == 'target' then return set_target() end
if verb == 'lost' then return mark_lost() end
if verb == 'rebuild' then return rebuild() end
if verb == 'rest' then return rest() end
if verb == 'snapshot' then return snapshot() end
return redis.error_reply('no such verb')
