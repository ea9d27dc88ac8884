-- What every verb does first.
-- KEYS[1] is the shard. ARGV: the time (empty: the server's own); the server's time past which nothing may be done (or
-- empty); what the shard has reached for certain: its epoch, the events in it, and how far it had come; what the caller
-- says; then what is handed on as it is.

local SHARD = KEYS[1]
local TAG = #SHARD - #'shard'
local KEPT_ID_MS = 7 * 86400 * 1000
local KEPT_REPLY_MS = 86400 * 1000
local KEPT_COUNTER_MS = 60 * 1000

local said = cmsgpack.unpack(ARGV[6])
local clock = redis.call('TIME')
local server_now = clock[1] * 1000000 + clock[2]
local now = tonumber(ARGV[1]) or server_now
-- How far the shard has come: its epoch, and how many events it took and holds it made in that; why it is fenced, if it
-- is; the newest change of the ledger that everybody must know.
local epoch, come, fenced, notice = 0, 0, false, 0

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

-- Take in the state of the shard. Returns the answer where nothing may be done. A server that has not come as far as it
-- did before has lost data.
local function not_open()
    if ARGV[2] ~= '' and server_now > tonumber(ARGV[2]) then
        return {'late', server_now, 0, 0}
    end
    local shard = redis.call('HMGET', SHARD, 'epoch', 'seq', 'fenced', 'notice', 'held')
    if not shard[1] then
        return answer('lost')
    end
    local seq, floor = tonumber(shard[2]), tonumber(ARGV[3])
    epoch, come, fenced, notice = tonumber(shard[1]), seq + (shard[5] or 0), shard[3], tonumber(shard[4] or 0)
    if epoch < floor or (epoch == floor and (seq < tonumber(ARGV[4]) or come < tonumber(ARGV[5]))) then
        fence('behind')
        fenced = 'behind'
    end
end

local function recount(account)
    redis.call('HINCRBY', account, 'gen', 1)
    redis.call('HSET', account, 'since', now)
end

local function set_arrival(key, arrival, units)
    local left_ms = (tonumber(arrival) / units - now) / 1000
    redis.call('SET', key, arrival, 'PX', math.max(1000, math.min(math.ceil(left_ms) + 60000, 9e15)))
end

-- The header of an event is JSON, because that is soon written.
local function append(events, kind, at, event_id, billable, late, body)
    local seq = redis.call('HINCRBY', SHARD, 'seq', 1)
    come = come + 1
    local header = '["' .. kind .. '",' .. epoch .. ',' .. seq .. ',' .. at .. ',"' .. event_id .. '",'
        .. tostring(billable) .. ',' .. tostring(late) .. ']'
    redis.call('XADD', events, '*', 'h', header, 'e', body)
end

-- What is kept of an id is one line, because every call writes one and few read it.
local function find_id(key)
    local line = redis.call('GET', key)
    if not line then
        return nil
    end
    local state, at, nonce, hold, fingerprint = string.match(line, '^(%l+) (%d+) (%x+) (%x*) (.*)$')
    return {state = state, at = at, nonce = nonce, hold = hold ~= '' and hold, fingerprint = fingerprint}
end

local function id_line(state, at, nonce, hold, fingerprint)
    return state .. ' ' .. at .. ' ' .. nonce .. ' ' .. hold .. ' ' .. fingerprint
end
