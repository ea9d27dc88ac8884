-- Give an open hold's quota back, without an event. KEYS: shard, account, open holds of the account.
local DUE = KEYS[3]

local shard, nothing = opened_shard()
if not shard then
    return nothing
end
local hold = find_hold(said.hold)
if not hold then
    return answer('forgotten')
end
if hold.state ~= 'open' then
    return answer(hold.state)
end
give_back(DUE, said.hold, hold, 'released')
return answer('given_back')
