-- What a count of an account's counters needs from here: which of them are current, and the open holds.
-- KEYS: shard, account, open holds of the account.
local ACCOUNT, DUE = KEYS[2], KEYS[3]

local nothing = not_open()
if nothing then
    return nothing
end
local found = {}
for _, hold_id in ipairs(redis.call('ZRANGE', DUE, 0, -1)) do
    local packed = redis.call('GET', key_of('hold:', hold_id))
    if packed then
        found[#found + 1] = {hold_id, packed}
    end
end
return answer('seen', tonumber(redis.call('HGET', ACCOUNT, 'gen') or 0), found)
