-- Give an open hold's quota back, without an event. KEYS: shard, account, open holds of the account.
local DUE = KEYS[3]

local nothing = not_open()
if nothing then
    return nothing
end
local holds = of_holds()
local hold = holds.find(said.hold)
if not hold then
    return answer('forgotten')
end
if hold.state ~= 'open' then
    return answer(hold.state)
end
holds.give_back(DUE, said.hold, hold, 'released')
return answer('given_back')
