-- The ledger has something new of an account, known as `seq`, or (without a second key) of all. KEYS: shard[, account].
local kept = KEYS[2] or SHARD
local notice = tonumber(redis.call('HGET', kept, 'notice') or 0)
if said.seq > notice then
    redis.call('HSET', kept, 'notice', said.seq)
end
if said.recount then
    recount(KEYS[2])
end
return answer('noticed')
