-- The real cost of a hold, billed once, in the counters the hold was made in.
-- KEYS: shard, events, account, open holds of the account, id, reply. ARGV: what is settled, the event, the reply.
local EVENTS, ACCOUNT, DUE, ID, REPLY = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local nothing = not_open()
if nothing then
    return nothing
end
local holds = of_holds()
local hold = holds.find(said.hold)
if hold and hold.state == 'settled' then
    if hold.digest ~= said.digest then
        return answer('conflict')
    end
    return answer('settled', hold.settled_as, hold.billable, hold.late, true)
end

local late = not hold or hold.state ~= 'open'
local event_id, billable = said.event_id, true
local known = find_id(ID)
if known and known.state ~= 'held' and known.hold ~= said.hold then
    event_id, billable = said.attempt_id, false
end
if late then
    recount(ACCOUNT)
else
    for _, counter in ipairs(hold.counters) do
        local used = redis.call('GET', counter[1])
        if used then
            redis.call('SET', counter[1], add(subtract(used, counter[2]), said.given[counter[3]]), 'KEEPTTL')
        end
    end
end
for _, rate in ipairs(hold and hold.rates or {}) do
    local delta = subtract(said.rates[rate[1]] or (late and '0' or rate[3]), late and '0' or rate[3])
    local order = compare(delta, '0')
    local arrival = redis.call('GET', rate[1]) or '0'
    local scaled = multiply(plain(now), rate[2])
    if order > 0 then
        set_arrival(rate[1], add(greater(arrival, scaled), delta), tonumber(rate[2]))
    elseif order < 0 and compare(scaled, rate[4]) < 0 then
        set_arrival(rate[1], add(arrival, delta), tonumber(rate[2]))
    end
end

redis.call('ZREM', DUE, said.hold)
holds.keep(said.hold, {
    state = 'settled', event_id = said.event_id, digest = said.digest, settled_as = event_id, billable = billable,
    late = late,
})
if billable then
    if said.keyed then
        local line = id_line('billed', plain(now), said.hold, said.hold, said.fingerprint)
        redis.call('SET', ID, line, 'PX', KEPT_ID_MS)
        if ARGV[8] ~= '' then
            redis.call('SET', REPLY, ARGV[8], 'PX', KEPT_REPLY_MS)
        end
    else
        redis.call('DEL', ID)
    end
end
append(EVENTS, 'event', plain(said.admitted), event_id, billable, late, ARGV[7])
return answer('settled', event_id, billable, late, false)
