"""What the providers say of their limits: asked, kept in the ledger, and shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from prefect import task

from metering.clock import utc_now
from metering.ledger import Ledger
from metering.ledger.observations import Recorded, readings_since, record_statuses
from metering.ledger.paid_probes import LedgerPaidProbes, cost_paid_probes
from metering.providers.credentials import credentials_of_environment, read_credentials
from metering.providers.forecast import TREND, window_states
from metering.providers.probing import Memory, probe_all_sync
from metering.settings import Settings, environment
from reports.files import write_atomically
from reports.headroom import headroom_html
from tasks.costs import provider_cost
from tasks.errors import ReportError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from decimal import Decimal
    from pathlib import Path

    from metering.providers.forecast import WindowState
    from metering.providers.paying import PaidProbe
    from metering.providers.probes import Credential, ProviderStatus

__all__ = ["Probed", "configured_credentials", "probe_credentials", "write_headroom"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What came of asking."""

    statuses: list[ProviderStatus]
    states: list[WindowState]
    start: datetime
    """From when on the readings are."""
    end: datetime

    def counts(self) -> dict[str, int]:
        """In numbers."""
        return {
            "credentials": len(self.statuses),
            "failed": sum(status.failed for status in self.statuses),
            "windows": len(self.states),
            "paid_probes": sum(status.sample_model is not None for status in self.statuses),
        }


def configured_credentials() -> list[Credential]:
    """Those of METERING_CREDENTIALS, else of the providers' own variables. Raises `InvalidFile`, `InvalidSetting`."""
    settings, environ = Settings.from_env(), environment()
    if settings.credentials is None:
        return credentials_of_environment(environ)
    return read_credentials(settings.credentials, environ, block=_secret_block)


@task
def probe_credentials(ledger_url: str, clock: Callable[[], datetime] = utc_now) -> Probed:
    """Ask all of them, about as long as one takes. Nothing is kept yet but what was paid for: see `keep_statuses`.

    What is wrong with a provider is in its status. Raises what reading the credentials and the ledger raises.
    """
    settings, credentials = Settings.from_env(), configured_credentials()
    ledger = Ledger(ledger_url)
    try:
        paid = LedgerPaidProbes(ledger)
        memory = Memory(redis_url=settings.quota_url, redis_timeout_s=settings.quota_timeout_s, paid=paid)
        statuses = probe_all_sync(credentials, memory=memory, clock=clock)
        end = clock()
        cost_paid_probes(ledger, end, _cost_of)
        with ledger.read() as connection:
            history = readings_since(connection, end - TREND)
    finally:
        ledger.close()
    return Probed(statuses=statuses, states=window_states(statuses, history), start=end - TREND, end=end)


@task
def keep_statuses(ledger_url: str, statuses: list[ProviderStatus]) -> Recorded:
    """Write statuses into the ledger; how many it did not have, and how many it cannot hold."""
    ledger = Ledger(ledger_url)
    try:
        with ledger.write() as connection:
            return record_statuses(connection, statuses)
    finally:
        ledger.close()


def write_headroom(out: Path, probed: Probed) -> Path:
    """Write the page; where it is. Raises `ReportError`."""
    path = out / "providers.html"
    page = headroom_html(probed.statuses, probed.states, start=probed.start, end=probed.end)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as exc:
        raise ReportError(path, exc) from exc
    return path


def _cost_of(paid: PaidProbe, input_tokens: int, output_tokens: int) -> Decimal | None:
    return provider_cost(
        {
            "platform_paid": True,
            "provider": paid.provider,
            "model": paid.model,
            "input_tokens": input_tokens,
            "cache_read_tokens": 0,
            "cache_write_tokens": 0,
            "input_audio_tokens": 0,
            "output_tokens": output_tokens,
            "output_audio_tokens": 0,
            "occurred_at": paid.at,
            "service_tier": None,
        }
    )


def _secret_block(name: str) -> str | None:
    """The text of a Secret block of Prefect; None where there is none."""
    from prefect.blocks.system import Secret  # noqa: PLC0415

    try:
        return str(cast("Secret[str]", Secret.load(name)).get())
    except ValueError:
        return None
