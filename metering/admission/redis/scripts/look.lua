-- What a count of an account's counters needs from here: its open holds, and a number that tells whether anything moved
-- since. KEYS: shard, account, open holds of the account.
local ACCOUNT, DUE = KEYS[2], KEYS[3]

local shard, nothing = opened_shard()
if not shard then
    return nothing
end
local holds = {}
for _, hold_id in ipairs(redis.call('ZRANGE', DUE, 0, -1)) do
    local packed = redis.call('GET', hold_key(hold_id))
    if packed then
        holds[#holds + 1] = {hold_id, packed}
    end
end
local kept = redis.call('HMGET', ACCOUNT, 'moves', 'gen')
return answer('seen', tonumber(kept[1] or 0), tonumber(kept[2] or 0), holds)
