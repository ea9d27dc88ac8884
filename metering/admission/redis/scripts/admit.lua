-- One call: who calls, whether it is known, whether every limit has room; then all of it at once, or nothing.
-- KEYS: shard, events, account, open holds of the account, counters..., rates...
-- What is said: the frame, the amounts that counters and rates move by, what tells this call from another under the same
-- key, the event, its fingerprint, whether it has a key, `look` or `known` where that is all that is asked, the hold; then
-- the event, and the reply.
local EVENTS, ACCOUNT, DUE = KEYS[2], KEYS[3], KEYS[4]
local FIRST = 4
local MOST_EVENTS = 100000
local KEPT_UNKEYED_MS = 60000
local EXPIRED_PER_ADMISSION = 16

local frame, deltas, increments, nonce, event_id, fingerprint, keyed, only, new_hold = unpack(said)
local key_id, version, plan, at_epoch, gen, opens, closes, windows, limits, rates = unpack(frame)

local nothing = not_open()
if nothing then
    return nothing
end
if fenced then
    return answer('fenced', fenced)
end

local kept = redis.call('HMGET', ACCOUNT, 'version', 'epoch', 'gen', 'plan', 'since', 'notice', 'key:' .. key_id)
local needed = math.max(tonumber(kept[6] or 0), notice)
if kept[1] ~= version or kept[2] ~= at_epoch or kept[3] ~= gen or kept[4] ~= plan or epoch ~= tonumber(at_epoch)
    or tonumber(version) < needed or not (kept[7] or only == 'look') then
    return answer('stale', tonumber(kept[1] or -1), needed, tonumber(kept[3] or 0), tonumber(kept[4] or 0),
        tonumber(kept[2] or 0))
end
local id = key_of('id:', event_id)
local known = only ~= 'look' and find_id(id) or nil
-- Whether this very call was admitted before, and its answer lost.
local own = known and known.nonce == nonce
if only ~= 'look' and not own and kept[7] ~= '' and (kept[7] == 'revoked' or tonumber(kept[7]) <= now) then
    return answer('revoked')
end
if now < opens or now >= closes then
    return answer('moved_on')
end

if known and not own then
    local hold = known.hold and of_holds().find(known.hold)
    if hold and hold.state == 'open' and hold.expires <= now then
        of_holds().give_back(DUE, known.hold, hold, 'expired')
    end
    if known.state == 'held' and not (hold and hold.state == 'open') then
        known = nil
    elseif known.fingerprint ~= fingerprint then
        return answer('conflict')
    elseif known.state == 'held' then
        return answer('in_progress', hold.expires - now)
    end
end
if only ~= 'look' and not own then
    if redis.call('EXISTS', DUE) == 1 then
        of_holds().expire_some(DUE, EXPIRED_PER_ADMISSION)
    end
    if known then
        if known.state ~= 'replayed' then
            local line = id_line('replayed', known.at, known.nonce, known.hold or '', known.fingerprint)
            redis.call('SET', id, line, 'KEEPTTL')
        end
        local reply = known.at + KEPT_REPLY_MS * 1000 > now and redis.call('GET', key_of('reply:', event_id))
        return answer('replayed', reply or false)
    end
    if only == 'known' then
        return answer('unknown')
    end
    -- Every sixteenth event looks: a refused one leaves the number as it is, so all are refused until there is room.
    if come % 16 == 0 and redis.call('XLEN', EVENTS) >= MOST_EVENTS then
        return answer('full')
    end
end

local used = #deltas > 0 and redis.call('MGET', unpack(KEYS, FIRST + 1, FIRST + #deltas)) or {}
local is_new, missing
for at = 1, #deltas do
    if not used[at] then
        used[at], is_new = '0', is_new or {}
        is_new[at] = true
        -- In a window that began before the counting did, one that is missing is not 0.
        if windows[2 * at - 1] <= tonumber(kept[5] or 0) then
            missing = missing or {}
            missing[#missing + 1] = at
        end
    end
end
if missing then
    return answer('uncounted', missing)
end
local refused = false
for at = 1, #limits, 2 do
    local counter = limits[at]
    refused = exceeds(used[counter], deltas[counter], limits[at + 1]) or refused
end
local arrivals, next_arrivals = {}, {}
for at = 1, #increments do
    local arrival = redis.call('GET', KEYS[FIRST + #deltas + at]) or '0'
    local scaled = multiply(plain(now), rates[2 * at - 1])
    local after = add(greater(arrival, scaled), increments[at])
    refused = compare(after, add(scaled, rates[2 * at])) > 0 or refused
    arrivals[at], next_arrivals[at] = arrival, after
end

if only == 'look' then
    return answer('standing', used, arrivals)
end
if own then
    -- Answer as then.
    for at, delta in ipairs(deltas) do
        used[at] = subtract(used[at], delta)
    end
    for at, increment in ipairs(increments) do
        arrivals[at] = subtract(arrivals[at], increment)
    end
    return answer('admitted', used, arrivals)
end
if refused then
    return answer('refused', used, arrivals)
end

for at = 1, #deltas do
    local key, before, delta = KEYS[FIRST + at], used[at], deltas[at]
    -- Every sixteenth time it is written with its time to live, which heals one that has lost it.
    if come % 16 ~= 0 and not (is_new and is_new[at]) and is_small(before) and is_small(delta) then
        redis.call('INCRBY', key, delta)
    else
        redis.call('SET', key, add(before, delta), 'PX', math.ceil((windows[2 * at] - now) / 1000) + KEPT_COUNTER_MS)
    end
end
for at, arrival in ipairs(next_arrivals) do
    set_arrival(KEYS[FIRST + #deltas + at], arrival, tonumber(rates[2 * at - 1]))
end

local at, state, hold_id, kept_ms = plain(now), 'billed', '', keyed and KEPT_ID_MS or KEPT_UNKEYED_MS
if new_hold then
    local ttl, line, metrics, reserved, account
    hold_id, ttl, line, metrics, reserved, account = unpack(new_hold)
    state, kept_ms = 'held', KEPT_ID_MS
    local hold = {
        state = 'open', event_id = event_id, line = line, key = key_id, reserved = reserved,
        admitted = now, expires = now + ttl, counters = {}, rates = {},
    }
    for place, delta in ipairs(deltas) do
        hold.counters[place] = {KEYS[FIRST + place], delta, metrics[place]}
    end
    for place, increment in ipairs(increments) do
        hold.rates[place] = {KEYS[FIRST + #deltas + place], rates[2 * place - 1], increment, next_arrivals[place]}
    end
    of_holds().keep(hold_id, hold)
    -- No event says that it was made: a server that has lost it is known by this number.
    redis.call('HINCRBY', SHARD, 'held', 1)
    come = come + 1
    redis.call('ZADD', DUE, hold.expires, hold_id)
    redis.call('ZADD', key_of('due', ''), 'LT', hold.expires, account)
else
    append(EVENTS, 'event', at, event_id, true, false, ARGV[7])
    if ARGV[8] ~= '' then
        redis.call('SET', key_of('reply:', event_id), ARGV[8], 'PX', KEPT_REPLY_MS)
    end
end
redis.call('SET', id, id_line(state, at, nonce, hold_id, fingerprint), 'PX', kept_ms)
return answer('admitted', used, arrivals)
