-- Admit nothing until the shard is rebuilt. KEYS: shard.
fence(said.reason)
return answer('fenced')
