-- Set counters that were counted from the ledger, unless what is in them changed meanwhile. Nothing can have come in: what
-- a missing counter counts is not admitted. But open holds may have been settled or given back; those that are in a count
-- note it, so that they give back to it too. KEYS: shard, account, counters...
local ACCOUNT = KEYS[2]
local FIRST = 2

local nothing = not_open()
if nothing then
    return nothing
end
local holds = of_holds()
if tonumber(redis.call('HGET', ACCOUNT, 'gen') or 0) ~= said.gen then
    return answer('moved')
end
local shared = {}
for _, counter in ipairs(said.counters) do
    for _, share in ipairs(counter[4]) do
        local hold = shared[share[1]] or holds.find(share[1])
        if not hold or hold.state ~= 'open' then
            return answer('moved')
        end
        shared[share[1]] = hold
    end
end
for at, counter in ipairs(said.counters) do
    local key = KEYS[FIRST + at]
    if redis.call('EXISTS', key) == 0 then
        redis.call('SET', key, counter[1], 'PX', math.max(1, math.ceil((counter[2] - now) / 1000)) + KEPT_COUNTER_MS)
        for _, share in ipairs(counter[4]) do
            local hold = shared[share[1]]
            local is_noted = false
            for _, noted in ipairs(hold.counters) do
                is_noted = is_noted or noted[1] == key
            end
            if not is_noted then
                table.insert(hold.counters, {key, share[2], counter[3]})
                holds.keep(share[1], hold)
            end
        end
    end
end
return answer('counted')
