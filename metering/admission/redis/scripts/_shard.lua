-- What every verb does first, and what several of them do to a hold.
-- KEYS[1] is the shard. ARGV: the time (empty: the server's own); the server's time past which nothing may be done (or
-- empty); what the shard has reached for certain: its epoch, the events in it, and how far it had come; what the caller
-- says; then what is handed on as it is.

local SHARD = KEYS[1]
local TAG = #SHARD - #'shard'
local EXPIRED_PER_ADMISSION = 16
local KEPT_ID_MS = 7 * 86400 * 1000
local KEPT_REPLY_MS = 86400 * 1000
local KEPT_HOLD_MS = 7 * 86400 * 1000
local KEPT_COUNTER_MS = 60 * 1000

local said = cmsgpack.unpack(ARGV[6])
local clock = redis.call('TIME')
local server_now = clock[1] * 1000000 + clock[2]
local now = tonumber(ARGV[1]) or server_now
-- How far the shard has come: its epoch, and how many events it took and holds it made in that.
local epoch, come = 0, 0

-- A key of this shard: all begin with its hash tag, so that they are in one slot.
local function key_of(kind, name)
    return string.sub(SHARD, 1, TAG) .. kind .. name
end

-- Every reply begins with what became of it, when it was decided, and how far the shard has come.
local function answer(status, ...)
    return {status, now, epoch, come, ...}
end

local function fence(reason)
    redis.call('HSET', SHARD, 'fenced', reason)
end

-- The state of the shard, or why nothing may be done. A server that has not come as far as it did before has lost data.
local function opened_shard()
    if ARGV[2] ~= '' and server_now > tonumber(ARGV[2]) then
        return nil, {'late', server_now, 0, 0}
    end
    local shard = redis.call('HMGET', SHARD, 'epoch', 'seq', 'fenced', 'notice', 'held')
    if not shard[1] then
        return nil, answer('lost')
    end
    local seq, floor = tonumber(shard[2]), tonumber(ARGV[3])
    epoch, come = tonumber(shard[1]), seq + tonumber(shard[5] or 0)
    if epoch < floor or (epoch == floor and (seq < tonumber(ARGV[4]) or come < tonumber(ARGV[5]))) then
        fence('behind')
        shard[3] = 'behind'
    end
    return {fenced = shard[3], notice = tonumber(shard[4] or 0)}
end

local function recount(account)
    redis.call('HINCRBY', account, 'gen', 1)
    redis.call('HSET', account, 'since', now)
end

local function set_arrival(key, arrival, units)
    local left_ms = (tonumber(arrival) / units - now) / 1000
    redis.call('SET', key, arrival, 'PX', math.max(1000, math.min(math.ceil(left_ms) + 60000, 9e15)))
end

local function append(events, header, body)
    header[2], header[3] = epoch, redis.call('HINCRBY', SHARD, 'seq', 1)
    come = come + 1
    redis.call('XADD', events, '*', 'h', cmsgpack.pack(header), 'e', body)
end

local function hold_key(hold_id)
    return key_of('hold:', hold_id)
end

local function keep_hold(hold_id, hold)
    redis.call('SET', hold_key(hold_id), cmsgpack.pack(hold), 'PX', KEPT_HOLD_MS)
end

local function find_hold(hold_id)
    local packed = redis.call('GET', hold_key(hold_id))
    return packed and cmsgpack.unpack(packed)
end

-- What is kept of an id is one line, because every call writes one and few read it.
local function find_id(key)
    local line = redis.call('GET', key)
    if not line then
        return nil
    end
    local state, at, nonce, hold, fingerprint = string.match(line, '^(%l+) (%d+) (%x+) (%x*) (.*)$')
    return {state = state, at = tonumber(at), nonce = nonce, hold = hold ~= '' and hold, fingerprint = fingerprint}
end

local function keep_id(key, known, kept_ms)
    local line = known.state .. ' ' .. plain(known.at) .. ' ' .. known.nonce .. ' ' .. (known.hold or '') .. ' '
        .. known.fingerprint
    if kept_ms then
        redis.call('SET', key, line, 'PX', kept_ms)
    else
        redis.call('SET', key, line, 'KEEPTTL')
    end
end

-- Close an open hold as `state`, and take its units back.
local function give_back(due, hold_id, hold, state)
    for _, counter in ipairs(hold.counters) do
        local used = redis.call('GET', counter[1])
        if used then
            redis.call('SET', counter[1], subtract(used, counter[2]), 'KEEPTTL')
        end
    end
    for _, rate in ipairs(hold.rates) do
        local arrival = redis.call('GET', rate[1])
        if arrival and compare(multiply(plain(now), rate[2]), rate[4]) < 0 then
            set_arrival(rate[1], subtract(arrival, rate[3]), tonumber(rate[2]))
        end
    end
    local id = key_of('id:', hold.event_id)
    local known = find_id(id)
    if known and known.hold == hold_id and known.state == 'held' then
        redis.call('DEL', id)
    end
    redis.call('ZREM', due, hold_id)
    hold.state = state
    keep_hold(hold_id, hold)
end

local function expire_some(due, most)
    local found = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, most)
    for _, hold_id in ipairs(found) do
        local hold = find_hold(hold_id)
        if hold then
            give_back(due, hold_id, hold, 'expired')
        else
            redis.call('ZREM', due, hold_id)
        end
    end
    return #found
end
