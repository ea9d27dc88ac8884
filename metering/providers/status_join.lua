-- What is kept of a status, or else who asks for it: whoever finds nobody asking, asks.
-- KEYS: the status, who asks. ARGV: a token of one's own, how many milliseconds one asks at most, and what is good
-- enough: `any` status, `none`, or the token of the one who shall have found it.
-- Answers the status, '' for none, the milliseconds for which it is kept still, and the token of the one who asks.
local kept = redis.call('GET', KEYS[1])
if kept and (ARGV[3] == 'any' or string.sub(kept, 1, #ARGV[1]) == ARGV[3]) then
    return {kept, redis.call('PTTL', KEYS[1]), ''}
end
redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])
return {'', 0, redis.call('GET', KEYS[2])}
