-- Keep a copy of an account as the ledger has it, unless a newer one is here. KEYS: shard, account.
local ACCOUNT = KEYS[2]

local nothing = not_open()
if nothing then
    return nothing
end
local kept = redis.call('HMGET', ACCOUNT, 'version', 'epoch', 'plan', 'placed', 'gen')
local version, placed = tonumber(kept[1] or -1), tonumber(kept[4] or -1)
local anew = tonumber(kept[2]) ~= epoch
if anew or said.version > version or (said.version == version and said.placed > placed) then
    if anew or tonumber(kept[3]) ~= said.plan then
        recount(ACCOUNT)
    end
    redis.call('HSET', ACCOUNT, 'version', said.version, 'epoch', epoch, 'plan', said.plan, 'placed', said.placed)
    for key_id, state in pairs(said.keys) do
        redis.call('HSET', ACCOUNT, 'key:' .. key_id, state)
    end
end
kept = redis.call('HMGET', ACCOUNT, 'version', 'gen', 'plan')
return answer('loaded', tonumber(kept[1]), tonumber(kept[2]), tonumber(kept[3]))
