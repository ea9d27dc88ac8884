-- Set counters that were counted from the ledger, unless something moved meanwhile. The open holds that are in a count
-- note it, so that they give back to it too. KEYS: shard, account, counters...
local ACCOUNT = KEYS[2]
local FIRST = 2

local shard, nothing = opened_shard()
if not shard then
    return nothing
end
local kept = redis.call('HMGET', ACCOUNT, 'moves', 'gen')
if tonumber(kept[1] or 0) ~= said.moves or tonumber(kept[2] or 0) ~= said.gen then
    return answer('moved')
end
for at, counter in ipairs(said.counters) do
    local key = KEYS[FIRST + at]
    if redis.call('EXISTS', key) == 0 then
        redis.call('SET', key, counter[1], 'PX', math.max(1, math.ceil((counter[2] - now) / 1000)) + KEPT_COUNTER_MS)
        for _, share in ipairs(counter[4]) do
            local hold = find_hold(share[1])
            local is_noted = false
            for _, noted in ipairs(hold.counters) do
                is_noted = is_noted or noted[1] == key
            end
            if not is_noted then
                table.insert(hold.counters, {key, share[2], counter[3]})
                keep_hold(share[1], hold)
            end
        end
    end
end
return answer('counted')
