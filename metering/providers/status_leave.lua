-- Keep what was found, and let others ask.
-- KEYS: the status, who asks. ARGV: the token of the one who asked, the status, '' for none, and the milliseconds for
-- which it is kept.
if ARGV[2] ~= '' then
    redis.call('SET', KEYS[1], ARGV[1] .. ARGV[2], 'PX', ARGV[3])
end
if redis.call('GET', KEYS[2]) == ARGV[1] then
    redis.call('DEL', KEYS[2])
end
