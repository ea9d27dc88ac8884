-- Let an open hold live on. KEYS: shard, open holds of the account.
local DUE = KEYS[2]

local shard, nothing = opened_shard()
if not shard then
    return nothing
end
local hold = find_hold(said.hold)
if not hold or hold.state ~= 'open' then
    return answer('gone')
end
hold.expires = now + said.ttl
keep_hold(said.hold, hold)
redis.call('ZADD', DUE, hold.expires, said.hold)
redis.call('PEXPIRE', key_of('id:', hold.event_id), KEPT_ID_MS)
return answer('renewed')
