-- Begin an epoch, unless one as new has begun. KEYS: shard.
epoch = tonumber(redis.call('HGET', SHARD, 'epoch') or 0)
if epoch < said.epoch then
    epoch = said.epoch
    redis.call('HSET', SHARD, 'epoch', epoch, 'seq', 0)
    redis.call('HDEL', SHARD, 'fenced', 'held')
end
come = tonumber(redis.call('HGET', SHARD, 'seq'))
return answer('open')
