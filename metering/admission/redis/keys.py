"""Names of keys. All of a shard share a hash tag, so that one script on a cluster finds them in one slot."""

from __future__ import annotations

import zlib

__all__ = ["SHARDS", "account_key", "account_keys", "counter_key", "counter_parts", "rate_key", "shard_key", "shard_of"]

SHARDS = 64
_SEPARATOR = "\x1f"
"""Names of accounts, lines and keys are printable, so it is in none of them."""


def shard_of(account: str) -> int:
    """The shard that has an account's keys."""
    return zlib.crc32(account.encode()) % SHARDS


def shard_key(shard: int, name: str) -> str:
    """A key of a shard: `shard` (its state), `events`, `due`, or one that begins with `id:`, `reply:`, `hold:`."""
    return f"tally:{{m{shard}}}:{name}"


def account_key(shard: int, kind: str, account: str) -> str:
    """A key of an account: `account` (what is kept of it) or `due` (its open holds)."""
    return f"tally:{{m{shard}}}:{kind}:{account}"


def account_keys(shard: int, account: str, *of_shard: str) -> tuple[str, ...]:
    """Keys of the shard, then what is kept of the account and its open holds."""
    return (
        *(shard_key(shard, name) for name in of_shard),
        account_key(shard, "account", account),
        account_key(shard, "due", account),
    )


def counter_key(
    shard: int, account: str, generation: str, metric: str, line: str, key_id: str, start_us: int, end_us: int
) -> str:
    """The counter of one window, as counted since one generation of its account began."""
    parts = (account, generation, metric, line, key_id, str(start_us), str(end_us))
    return f"tally:{{m{shard}}}:counter:{_SEPARATOR.join(parts)}"


def counter_parts(key: str) -> tuple[str, str, str, str, str, int, int]:
    """What `counter_key` was told, without the shard."""
    account, generation, metric, line, key_id, start_us, end_us = key.split(":counter:", 1)[1].split(_SEPARATOR)
    return account, generation, metric, line, key_id, int(start_us), int(end_us)


def rate_key(shard: int, account: str, metric: str, line: str, key_id: str, units: int, period_us: int) -> str:
    """The arrival time of one rate."""
    parts = (account, metric, line, key_id, str(units), str(period_us))
    return f"tally:{{m{shard}}}:rate:{_SEPARATOR.join(parts)}"
