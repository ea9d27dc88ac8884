-- One call: who calls, whether it is known, whether every limit has room; then all of it at once, or nothing.
-- KEYS: shard, events, account, open holds of the account, accounts with holds, id, reply, counters..., rates...
-- What is said: the frame, the amounts that counters and rates move by, what tells this call from another under the same
-- key, the event, its fingerprint, whether it has a key, `look` or `known` where that is all that is asked, the hold; then
-- the event, and the reply.
local EVENTS, ACCOUNT, DUE, DUE_ACCOUNTS, ID, REPLY = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local FIRST = 7
local MOST_EVENTS = 100000
local KEPT_UNKEYED_MS = 60000

local frame, deltas, increments, nonce, event_id, fingerprint, keyed, only, new_hold = unpack(said)
local key_id, version, plan, at_epoch, gen, opens, closes, windows, limits, rates = unpack(frame)

local shard, nothing = opened_shard()
if not shard then
    return nothing
end
if shard.fenced then
    return answer('fenced', shard.fenced)
end

local kept = redis.call('HMGET', ACCOUNT, 'version', 'epoch', 'gen', 'plan', 'since', 'notice', 'key:' .. key_id)
local needed = math.max(tonumber(kept[6] or 0), shard.notice)
if kept[1] ~= version or kept[2] ~= at_epoch or kept[3] ~= gen or kept[4] ~= plan or epoch ~= tonumber(at_epoch)
    or tonumber(version) < needed or not (kept[7] or only == 'look') then
    return answer('stale', tonumber(kept[1] or -1), needed, tonumber(kept[3] or 0), tonumber(kept[4] or 0),
        tonumber(kept[2] or 0))
end
local known = only ~= 'look' and find_id(ID) or nil
-- Whether this very call was admitted before, and its answer lost.
local own = known and known.nonce == nonce
if only ~= 'look' and not own and kept[7] ~= '' and (kept[7] == 'revoked' or tonumber(kept[7]) <= now) then
    return answer('revoked')
end
if now < opens or now >= closes then
    return answer('moved_on')
end

if only ~= 'look' then
    local hold = known and not own and known.hold and find_hold(known.hold)
    if hold and hold.state == 'open' and hold.expires <= now then
        give_back(DUE, known.hold, hold, 'expired')
    end
    if known and not own and known.state == 'held' and not (hold and hold.state == 'open') then
        known, hold = nil, nil
    end
    if known and not own and known.fingerprint ~= fingerprint then
        return answer('conflict')
    end
    if known and not own and known.state == 'held' then
        return answer('in_progress', hold.expires - now)
    end
    if not own then
        expire_some(DUE, EXPIRED_PER_ADMISSION)
    end
    if known and not own then
        if known.state ~= 'replayed' then
            known.state = 'replayed'
            keep_id(ID, known)
        end
        local reply = known.at + KEPT_REPLY_MS * 1000 > now and redis.call('GET', REPLY)
        return answer('replayed', reply or false)
    end
    if only == 'known' then
        return answer('unknown')
    end
    -- Every sixteenth event looks: a refused one leaves the number as it is, so all are refused until there is room.
    if not own and come % 16 == 0 and redis.call('XLEN', EVENTS) >= MOST_EVENTS then
        return answer('full')
    end
end

local used = #deltas > 0 and redis.call('MGET', unpack(KEYS, FIRST + 1, FIRST + #deltas)) or {}
local is_new, missing = {}, {}
for at = 1, #deltas do
    if not used[at] then
        used[at], is_new[at] = '0', true
        -- In a window that began before the counting did, one that is missing is not 0.
        if windows[2 * at - 1] <= tonumber(kept[5] or 0) then
            missing[#missing + 1] = at
        end
    end
end
if #missing > 0 then
    return answer('uncounted', missing)
end
local refused = false
for at = 1, #limits, 2 do
    local counter = limits[at]
    if compare(add(used[counter], deltas[counter]), limits[at + 1]) > 0 then
        refused = true
    end
end
local arrivals, next_arrivals = {}, {}
for at = 1, #increments do
    local arrival = redis.call('GET', KEYS[FIRST + #deltas + at]) or '0'
    local scaled = multiply(plain(now), rates[2 * at - 1])
    local after = add(greater(arrival, scaled), increments[at])
    if compare(after, add(scaled, rates[2 * at])) > 0 then
        refused = true
    end
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

for at, delta in ipairs(deltas) do
    -- Every sixteenth time it is written with its time to live, which heals one that has lost it.
    if not is_new[at] and come % 16 ~= 0 and is_small(used[at]) and is_small(delta) then
        redis.call('INCRBY', KEYS[FIRST + at], delta)
    else
        redis.call('SET', KEYS[FIRST + at], add(used[at], delta), 'PX',
            math.ceil((windows[2 * at] - now) / 1000) + KEPT_COUNTER_MS)
    end
end
for at, arrival in ipairs(next_arrivals) do
    set_arrival(KEYS[FIRST + #deltas + at], arrival, tonumber(rates[2 * at - 1]))
end

local known = {state = 'billed', nonce = nonce, at = now, hold = '', fingerprint = fingerprint}
if new_hold then
    local hold_id, ttl, line, metrics, reserved, account = unpack(new_hold)
    local hold = {
        state = 'open', event_id = event_id, line = line, key = key_id, reserved = reserved,
        admitted = now, expires = now + ttl, counters = {}, rates = {},
    }
    for at, delta in ipairs(deltas) do
        hold.counters[at] = {KEYS[FIRST + at], delta, metrics[at]}
    end
    for at, increment in ipairs(increments) do
        hold.rates[at] = {KEYS[FIRST + #deltas + at], rates[2 * at - 1], increment, next_arrivals[at]}
    end
    keep_hold(hold_id, hold)
    -- No event says that it was made: a server that has lost it is known by this number.
    redis.call('HINCRBY', SHARD, 'held', 1)
    come = come + 1
    redis.call('ZADD', DUE, hold.expires, hold_id)
    redis.call('ZADD', DUE_ACCOUNTS, 'LT', hold.expires, account)
    known.state, known.hold = 'held', hold_id
else
    append(EVENTS, {'event', 0, 0, now, event_id, true, false}, ARGV[7])
    if ARGV[8] ~= '' then
        redis.call('SET', REPLY, ARGV[8], 'PX', KEPT_REPLY_MS)
    end
end
keep_id(ID, known, (keyed or new_hold) and KEPT_ID_MS or KEPT_UNKEYED_MS)
return answer('admitted', used, arrivals)
