-- Undo a call whose outcome its caller never learned, unless somebody was answered with it meanwhile.
-- KEYS: shard, events, account, open holds of the account, id. ARGV: what is undone, the event.
local EVENTS, ACCOUNT, DUE, ID = KEYS[2], KEYS[3], KEYS[4], KEYS[5]

local nothing = not_open()
if nothing then
    return nothing
end
local holds = of_holds()
if said.hold then
    local hold = holds.find(said.hold)
    if not hold or hold.state ~= 'open' then
        return answer('nothing')
    end
    holds.give_back(DUE, said.hold, hold, 'released')
    return answer('undone')
end
local known = find_id(ID)
if said.keyed and (not known or known.nonce ~= said.nonce or known.state == 'replayed') then
    return answer(known and known.state == 'replayed' and 'replayed' or 'nothing')
end
redis.call('DEL', ID)
recount(ACCOUNT)
append(EVENTS, 'cancel', plain(now), said.event_id, false, false, ARGV[7])
return answer('undone')
