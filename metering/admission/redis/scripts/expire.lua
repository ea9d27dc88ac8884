-- Give back what open holds past their time reserved, a batch of them. KEYS: shard, accounts with holds.
local DUE_ACCOUNTS = KEYS[2]

local nothing = not_open()
if nothing then
    return nothing
end
local holds = of_holds()
local expired = 0
for _, account in ipairs(redis.call('ZRANGEBYSCORE', DUE_ACCOUNTS, '-inf', now, 'LIMIT', 0, said.most)) do
    local due = key_of('due:', account)
    expired = expired + holds.expire_some(due, said.most)
    local first = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
    if first[2] then
        redis.call('ZADD', DUE_ACCOUNTS, first[2], account)
    else
        redis.call('ZREM', DUE_ACCOUNTS, account)
    end
    if expired >= said.most then
        break
    end
end
return answer('expired', expired)
