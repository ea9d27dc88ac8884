-- Let an open hold live on. KEYS: shard, open holds of the account.
local DUE = KEYS[2]

local nothing = not_open()
if nothing then
    return nothing
end
local holds = of_holds()
local hold = holds.find(said.hold)
if not hold or hold.state ~= 'open' then
    return answer('gone')
end
hold.expires = now + said.ttl
holds.keep(said.hold, hold)
redis.call('ZADD', DUE, hold.expires, said.hold)
redis.call('PEXPIRE', key_of('id:', hold.event_id), KEPT_ID_MS)
return answer('renewed')
