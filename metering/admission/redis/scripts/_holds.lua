-- What is done to holds. It is made when a call first needs it: most do not.
local KEPT_HOLD_MS = 7 * 86400 * 1000
local holds
local function of_holds()
    if holds then
        return holds
    end

    local function keep(hold_id, hold)
        redis.call('SET', key_of('hold:', hold_id), cmsgpack.pack(hold), 'PX', KEPT_HOLD_MS)
    end

    local function find(hold_id)
        local packed = redis.call('GET', key_of('hold:', hold_id))
        return packed and cmsgpack.unpack(packed)
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
        keep(hold_id, hold)
    end

    local function expire_some(due, most)
        local found = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, most)
        for _, hold_id in ipairs(found) do
            local hold = find(hold_id)
            if hold then
                give_back(due, hold_id, hold, 'expired')
            else
                redis.call('ZREM', due, hold_id)
            end
        end
        return #found
    end

    holds = {keep = keep, find = find, give_back = give_back, expire_some = expire_some}
    return holds
end
