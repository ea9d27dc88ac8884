"""What the Redis store promises where Redis loses data: it is noticed before one admission too many, and rebuilt.

The ledger keeps how far each shard was drained, each process how far it saw it come. A server that has less admits
nothing, and says so, until `tallystick quota rebuild` has counted anew from the ledger and the open holds.
"""

from __future__ import annotations

import itertools
import os
import shutil
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from metering.admission.redis.keys import shard_of
from metering.admission.redis.link import Link
from metering.admission.redis.shards import rebuild
from metering.admission.redis.stream import events_key
from metering.clock import utc_now
from metering.errors import RevokedKey, StoreUnavailable
from tests.faults.redis_place import PATIENT_S, Place, per, tokens
from tests.proxy import Proxy
from tests.servers import RedisServer, flavours, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

FEW = 3
ROUNDS = int(os.environ.get("TALLYSTICK_FAULT_ROUNDS", FEW))
SHARD = shard_of("acme")
SAYS_SO = "`tallystick quota rebuild`"
FIRST, *_, LAST = flavours()


class Forgetful:
    """A Redis that falls back to how it was when it was told to remember; a flushed one to nothing."""

    def __init__(self, flavour: str, **options: Any) -> None:
        self._stack = ExitStack()
        self.server = self._stack.enter_context(RedisServer(flavour, **options))

    @property
    def url(self) -> str:
        return self.server.url

    def remember(self) -> None:
        """This is what it will have."""

    def lose(self) -> None:
        """Lose all that came after, or everything."""
        with self.server.client() as client:
            client.flushall()

    def __enter__(self) -> Forgetful:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Restored(Forgetful):
    """Somebody puts an old copy of its files in place and starts it again."""

    def remember(self) -> None:
        if not any(self.server.folder.glob("appendonly*")):
            with self.server.client() as client:
                client.save()
        self._copy = self.server.folder.with_suffix(".copy")
        self._stack.callback(shutil.rmtree, self._copy, ignore_errors=True)
        shutil.copytree(self.server.folder, self._copy)

    def lose(self) -> None:
        self.server.kill()
        shutil.rmtree(self.server.folder)
        shutil.copytree(self._copy, self.server.folder)
        self.server.start()


class Promoted(Forgetful):
    """A replica that had stopped following takes over from its master, at the same address."""

    def __init__(self, flavour: str) -> None:
        super().__init__(flavour)
        self._replica = self._stack.enter_context(RedisServer(flavour, replica_of=self.server))
        self._address = self._stack.enter_context(Proxy(self.server.port))

    @property
    def url(self) -> str:
        return self._address.url

    def remember(self) -> None:
        with self.server.client() as master, self._replica.client() as replica:
            wait_until(lambda: master.wait(1, 100) == 1, "the replica")
            replica.replicaof("NO", "ONE")

    def lose(self) -> None:
        self.server.kill()
        self._address.refuse()
        self._address.server_port = self._replica.port
        self._address.resume()


WAYS: dict[str, Callable[[], Forgetful]] = {
    "flushed": partial(Forgetful, FIRST),
    "an old dump": partial(Restored, LAST),
    "an old log": partial(Restored, FIRST, appendonly=True),
    "a stale replica": partial(Promoted, LAST),
}


def each_way_with(others: Iterable[str]) -> list[tuple[str, str]]:
    """Every pair; with few rounds every second one, like the black squares of a board."""
    board = itertools.product(enumerate(WAYS), enumerate(others))
    return [(way, other) for (row, way), (column, other) in board if ROUNDS > FEW or (row + column) % 2 == 0]


@pytest.fixture(params=list(WAYS))
def redis(request: pytest.FixtureRequest) -> Iterator[Forgetful]:
    with WAYS[request.param]() as forgetful:
        yield forgetful


@pytest.fixture
def place(tmp_path: Path, empty_ledger: Path, redis: Forgetful) -> Iterator[Place]:
    with Place(tmp_path, empty_ledger, redis.url) as opened:
        yield opened


def use(meter: Any, secret: str, count: int) -> None:
    for _ in range(count):
        assert meter.consume(secret, line="a", usage=tokens(1)).allowed


def settle(meter: Any, secret: str, count: int) -> None:
    for _ in range(count):
        meter.reserve(secret, line="a", estimate=tokens(9)).settle(tokens(1))


def admitted(meters: list[Any], secret: str, tries: int) -> int:
    """How many of so many calls are admitted, made by each of the meters in turn."""
    calls = (meter.consume(secret, line="a", usage=tokens(1)) for meter in itertools.cycle(meters))
    return sum(decision.allowed for decision in itertools.islice(calls, tries))


def assert_closed(meter: Any, secret: str) -> None:
    for key in (None, "new"):
        with pytest.raises(StoreUnavailable, match=SAYS_SO):
            meter.consume(secret, line="a", usage=tokens(1), idempotency_key=key)
    with pytest.raises(StoreUnavailable, match=SAYS_SO):
        meter.reserve(secret, line="a", estimate=tokens(1))
    with pytest.raises(StoreUnavailable, match=SAYS_SO):
        meter.quota("acme")


# Whoever looks first notices.

NOTICED_BY: dict[str, Callable[[Place, list[Any], str], object]] = {
    "a process that was there": lambda place, were_there, secret: assert_closed(were_there[0], secret),
    "a loop that was there": lambda place, were_there, secret: assert_closed(were_there[1], secret),
    "a process that starts then": lambda place, were_there, secret: assert_closed(place.open_meter(), secret),
    "a loop that starts then": lambda place, were_there, secret: assert_closed(place.open_async_meter(), secret),
    "the drain": lambda place, were_there, secret: place.drain(),
    "the rebuild": lambda place, were_there, secret: None,
}


@pytest.mark.parametrize(("redis", "first"), each_way_with(NOTICED_BY), indirect=["redis"])
def test_lost_data_is_noticed_before_one_admission_too_many_and_rebuilt(
    redis: Forgetful, place: Place, first: str
) -> None:
    secret = place.open_account(per("month", 12), per("month", 1_000, "input_tokens"))
    were_there = [place.open_meter(), place.open_async_meter()]
    settle(were_there[0], secret, 3)
    place.drain()
    settle(were_there[1], secret, 2)
    redis.remember()
    assert admitted(were_there, secret, 5) == 5
    place.drain()
    redis.lose()

    NOTICED_BY[first](place, were_there, secret)
    if first != "the rebuild":
        assert place.states()[SHARD] in ("lost", "fenced")
        for meter in (*were_there, place.open_meter(), place.open_async_meter()):
            assert_closed(meter, secret)
        assert place.billed() == 10, "what was drained before is only acknowledged"

    assert place.rebuild() == [SHARD]
    assert place.states() == {SHARD: "open"}
    assert place.used() == [10, 10]
    assert admitted([*were_there, place.open_meter(), place.open_async_meter()], secret, 9) == 2
    place.deliver()
    assert (place.billed(), place.used()) == (12, [12, 12])
    place.assert_sound()
    assert place.rebuild() == []


@pytest.mark.parametrize(("redis", "what"), each_way_with(["holds", "events"]), indirect=["redis"])
def test_what_no_ledger_knows_is_noticed_by_whoever_saw_it(redis: Forgetful, place: Place, what: str) -> None:
    """The limit is kept for what the ledger knows: what was lost before it was drained can be used again."""
    secret = place.open_account(per("month", 10))
    was_there = place.open_async_meter()
    use(was_there, secret, 3)
    place.drain()
    redis.remember()
    if what == "events":
        use(was_there, secret, 5)
    else:
        assert [was_there.reserve(secret, line="a").settled for _ in range(5)] == [None] * 5
    redis.lose()
    assert_closed(was_there, secret)
    assert_closed(place.open_meter(), secret)
    assert place.rebuild() == [SHARD]
    assert admitted([was_there, place.open_meter()], secret, 10) == 7
    place.deliver()
    assert (place.billed(), place.used()) == (10, [10])
    place.assert_sound()


def test_a_rebuild_that_is_killed_is_finished_by_the_next_one(redis: Forgetful, place: Place) -> None:
    """Killed before each of its commands, in turn."""

    class Killed(BaseException):
        pass

    class Mortal(Link):
        left = 0

        def call(self, *args: Any, **options: Any) -> Any:
            if not self.left:
                raise Killed
            self.left -= 1
            return super().call(*args, **options)

    secret = place.open_account(per("month", 10))
    meter = place.open_meter()
    use(meter, secret, 3)
    redis.remember()
    use(meter, secret, 5)
    place.drain()
    redis.lose()
    assert_closed(meter, secret)
    for kills in itertools.count():
        link = Mortal(place.redis_url, timeout_s=PATIENT_S)
        # The look at each of the shards that are well costs a command, and is of no interest.
        link.left = kills + SHARD
        try:
            rebuild(place.ledger, link, clock=utc_now)
        except Killed:
            if place.states()[SHARD] != "open":
                assert_closed(meter, secret)
                assert_closed(place.open_meter(), secret)
                continue
        finally:
            link.close()
        break
    assert kills > 3
    place.rebuild()
    assert place.states() == {SHARD: "open"}
    assert admitted([meter, place.open_meter()], secret, 5) == 2
    place.deliver()
    assert (place.billed(), place.used()) == (10, [10])
    place.assert_sound()


# What was under way, and what was changed.


def test_open_holds_are_settled_across_a_rebuild_and_billed_once(redis: Forgetful, place: Place) -> None:
    secret = place.open_account(per("month", 10), per("month", 100, "input_tokens"))
    meters = [place.open_meter(), place.open_async_meter()]

    def reserve(name: str) -> list[Any]:
        return [
            meter.reserve(secret, line="a", estimate=tokens(9), request_id=f"{name}-{index}")
            for index, meter in enumerate(meters)
        ]

    kept = reserve("kept")
    use(meters[0], secret, 1)
    redis.remember()
    lost = reserve("lost")
    use(meters[1], secret, 1)
    place.drain()
    redis.lose()
    # One of each is settled while nothing is admitted, the other one afterwards.
    for hold in (kept[0], lost[1]):
        hold.settle(tokens(7))
    assert_closed(meters[0], secret)
    assert place.rebuild() == [SHARD]
    for hold in (kept[1], lost[0]):
        assert not hold.settle(tokens(7)).pending
    place.deliver()
    bill = place.bill()
    assert [bill[f"{name}-{index}"] for name in ("kept", "lost") for index in (0, 1)] == [(1, 7, 1)] * 4
    assert place.rows("SELECT DISTINCT late FROM events WHERE request_id LIKE 'lost-%'") == [(1,)]
    assert (place.billed(), place.used()) == (6, [6, 30])
    for hold in (*kept, *lost):
        assert hold.settle(tokens(7)).repeated
    assert admitted(meters, secret, 10) == 4
    place.assert_sound()


def test_lost_data_brings_back_no_revoked_key_and_no_old_plan(redis: Forgetful, place: Place) -> None:
    """Also where nothing but the news of it was lost, and a process had not heard it before."""
    secret = place.open_account(per("month", 10))
    stolen = place.meter.keys.create("acme")
    meters = [place.open_meter(), place.open_async_meter()]
    for meter in meters:
        use(meter, secret, 1)
        use(meter, stolen.secret, 1)
    place.drain()
    redis.remember()
    place.meter.keys.revoke(stolen.key_id)
    place.set_plan("acme", per("month", 5), per("day", 100))
    redis.lose()

    def consume(meter: Any, api_key: str) -> Any:
        """What is answered; there may be nothing to say until the shard is rebuilt."""
        with suppress(StoreUnavailable):
            return meter.consume(api_key, line="a", usage=tokens(1))
        assert place.rebuild() == [SHARD]
        return meter.consume(api_key, line="a", usage=tokens(1))

    # The first asks by the old plan, the second with the revoked key; then each does both.
    assert consume(meters[0], secret).allowed
    meters += [place.open_meter(), place.open_async_meter()]
    for meter in meters[1:] + meters[:1]:
        with pytest.raises(RevokedKey):
            consume(meter, stolen.secret)
    assert [consume(meter, secret).allowed for meter in meters] == [False] * 4
    place.deliver()
    assert (place.billed(), place.used()) == (5, [5, 5])
    place.assert_sound()


# What is lost and can be told.


@pytest.mark.parametrize("flavour", list(flavours()))
def test_a_gap_in_a_stream_is_counted_as_lost(tmp_path: Path, empty_ledger: Path, flavour: str) -> None:
    with RedisServer(flavour) as server, Place(tmp_path, empty_ledger, server.url) as place, server.client() as client:
        secret = place.open_account(per("month", 20))
        use(place.meter, secret, 3)
        place.drain()
        use(place.meter, secret, 9)
        entries = client.xrange(events_key(SHARD))
        client.xdel(events_key(SHARD), entries[0][0], *(entry_id for entry_id, _ in entries[4:7]))
        drained = place.drain()
        assert (drained.inserted, drained.lost) == (5, 4)
        assert (place.billed(), place.lost()) == (8, 4)
        # Nobody is admitted for it, until somebody decides to count anew.
        assert place.used() == [12]
        assert place.rebuild([SHARD]) == [SHARD]
        assert place.used() == [8]
        assert admitted([place.meter], secret, 20) == 12
        place.assert_sound(lost=4)
        assert place.billed() == 20
