-- The ledger has these entries: they go. Of a moot one, which may not have been billed as it was counted, the account is
-- counted anew, once: by whoever deletes the entry. KEYS: shard, events, accounts...
local EVENTS = KEYS[2]
local FIRST = 2

-- Deleting comes first: a server whose memory is full lets no script begin with a write that takes memory.
local gone = 0
if #said.billed > 0 then
    gone = redis.call('XDEL', EVENTS, unpack(said.billed))
end
local anew = {}
for _, entry in ipairs(said.moot) do
    if redis.call('XDEL', EVENTS, entry[1]) == 1 then
        gone = gone + 1
        anew[KEYS[FIRST + entry[2]]] = true
    end
end
for account in pairs(anew) do
    recount(account)
end
return answer('drained', gone)
