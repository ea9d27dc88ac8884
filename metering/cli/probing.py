"""`tallystick probe`: how much of the providers' rate limits is left."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metering.console import progress_bar, show, show_line, table_of
from metering.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from metering.ledger import Ledger
    from metering.providers.forecast import Reading, Watched, WindowState
    from metering.providers.probes import Credential, ProviderStatus
    from metering.settings import Settings

__all__ = ["probe"]

MIN_EVERY_S = 5
MAX_EVERY_S = 86_400


def probe(
    only: Annotated[
        list[str] | None, typer.Argument(metavar="CREDENTIAL", help="Only these; all that are configured unless said.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="With METERING_QUOTA_URL, through which processes share what they find for a minute: ask all the same."
            " Without it, each run asks.",
        ),
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Ask again and again, until interrupted.")] = False,
    every: Annotated[
        int, typer.Option(min=MIN_EVERY_S, max=MAX_EVERY_S, help="With --watch: seconds between two times.")
    ] = 60,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for scripts; with --watch a line for each credential each time.")
    ] = False,
) -> None:
    """How much of the providers' rate limits is left, by their own word.

    Exit status 1: one could not be asked. One that answers 429 was asked.

    Nothing is kept: the job `probe-providers` does that, and the trend it kept is used here. A call that costs is made
    only where a credential allows it, and there is a ledger to count it in.
    """
    from metering.providers.credentials import nothing_to_probe
    from metering.settings import Settings

    settings = Settings.from_env()
    credentials = _chosen(settings, only or [])
    if not credentials:
        typer.echo(nothing_to_probe(settings.credentials), err=True)
        sys.exit(1)
    with _ledger(settings) as ledger:
        asked = _Asked(settings, ledger, credentials)
        if watch:
            with suppress(KeyboardInterrupt):
                _watch(asked, every, as_json)
            return
        with progress_bar("probing") as told:
            statuses, states = asked.once(force=force, told=told)
    if as_json:
        show(_documents(statuses, states), as_json)
    else:
        _show(statuses, states)
    if any(status.failed for status in statuses):
        sys.exit(1)


def _chosen(settings: Settings, only: list[str]) -> list[Credential]:
    from metering.providers.credentials import credentials_of_environment, read_credentials
    from metering.settings import environment

    if settings.credentials is None:
        found = credentials_of_environment(environment())
    else:
        found = read_credentials(settings.credentials, environment())
    ids = [credential.id for credential in found]
    for name in only:
        if name not in ids:
            raise InvalidSetting("CREDENTIAL", name, f"one of {', '.join(ids) or 'none: no credential is configured'}")
    return [credential for credential in found if not only or credential.id in only]


@contextmanager
def _ledger(settings: Settings) -> Iterator[Ledger | None]:
    """The ledger, where there is one: a provider's limits are there to be seen without."""
    from metering.errors import LedgerError
    from metering.ledger import Ledger

    try:
        ledger = Ledger(settings.ledger_url, timeout_s=settings.timeout_s)
    except LedgerError as exc:
        typer.echo(f"without the ledger there is no trend, and no call that costs: {exc}", err=True)
        yield None
        return
    try:
        yield ledger
    finally:
        ledger.close()


class _Asked:
    """Probes of the same credentials, and what was read before."""

    def __init__(self, settings: Settings, ledger: Ledger | None, credentials: list[Credential]) -> None:
        from metering.ledger.paid_probes import LedgerPaidProbes
        from metering.providers.probing import Memory

        if ledger is None:
            credentials = [replace(credential, paid_probes_per_day=0) for credential in credentials]
        paid = None if ledger is None else LedgerPaidProbes(ledger)
        self._memory = Memory(redis_url=settings.quota_url, redis_timeout_s=settings.quota_timeout_s, paid=paid)
        self._credentials = credentials
        self._history = {} if ledger is None else _history(ledger)

    def once(
        self, *, force: bool, told: Callable[[float], None] | None = None
    ) -> tuple[list[ProviderStatus], list[WindowState]]:
        from metering.clock import utc_now
        from metering.providers.forecast import TREND, since, window_states
        from metering.providers.probing import probe_all_sync

        done = 0

        def arrived(_: ProviderStatus) -> None:
            nonlocal done
            done += 1
            if told is not None:
                told(done / len(self._credentials))

        statuses = probe_all_sync(self._credentials, memory=self._memory, force_refresh=force, on_status=arrived)
        states = window_states(statuses, self._history)
        self._history = since(utc_now() - TREND, states, self._history)
        return statuses, states


def _history(ledger: Ledger) -> dict[Watched, list[Reading]]:
    from metering.clock import utc_now
    from metering.ledger.observations import readings_since
    from metering.providers.forecast import TREND

    with ledger.read() as connection:
        return readings_since(connection, utc_now() - TREND)


def _watch(asked: _Asked, every: int, as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from metering.providers.showing import status_rows

    console = Console()
    # What has more rows than the screen scrolls, once each time, and no row is left out.
    live: Any = Live(console=console, auto_refresh=False, vertical_overflow="visible")
    live = live if console.is_terminal and not as_json else nullcontext()
    with live as shown:
        while True:
            statuses, states = asked.once(force=True)
            if as_json:
                for document in _documents(statuses, states):
                    show_line(document)
            elif shown is None:
                _show(statuses, states)
            else:
                shown.update(table_of(status_rows(statuses, states)), refresh=True)
            time.sleep(every)  # the pause between two times; nothing depends on its length


def _show(statuses: list[ProviderStatus], states: list[WindowState]) -> None:
    from metering.providers.showing import status_rows

    show(status_rows(statuses, states), as_json=False)


def _documents(statuses: list[ProviderStatus], states: list[WindowState]) -> list[dict[str, Any]]:
    """Each status as JSON, its windows with when they will be used up."""
    ends = {(each.credential, each.provider, each.window): each.exhausted_at for each in states}
    documents = []
    for status in statuses:
        document = status.to_dict()
        for name, window in document["windows"].items():
            at = ends[status.account_key, status.provider, name]
            window["exhausted_at"] = at and at.isoformat()
        documents.append(document)
    return documents
