"""Every five minutes: how much of the providers' rate limits is left, and until when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event
from prefect.states import Completed

from flows.command import run
from flows.places import Places
from metering.providers.credentials import nothing_to_probe
from metering.providers.showing import plain_number, status_rows
from metering.settings import Settings
from tasks.errors import JobError
from tasks.probes import keep_statuses, probe_credentials, write_headroom

if TYPE_CHECKING:
    from metering.providers.forecast import WindowState

__all__ = ["probe_providers"]


@flow
def probe_providers() -> Any:
    """Probe every credential, keep what was found, and publish a table and a page.

    An event `tallystick.provider-limit.80` or `.95` is emitted when so much of a window is used, once until it is less
    again, or was not read for a day. Returns how many were asked, and the `page`. A credential that cannot be probed is
    in the table, and fails nothing else; `JobError` where none could be, a 429 being an answer, and where the page
    cannot be written, all else being done.
    """
    places = Places.from_env()
    probed = probe_credentials(places.ledger_url)
    if not probed.statuses:
        why = nothing_to_probe(Settings.from_env().credentials)
        return Completed(message=why, data={"skipped": why})
    # Before they are kept: whoever is killed in between tells it again, rather than never.
    for state in probed.states:
        for level in state.crossed:
            _tell(state, level)
    recorded = keep_statuses(places.ledger_url, probed.statuses)
    create_table_artifact(
        status_rows(probed.statuses, probed.states), key="provider-limits", description="The providers' limits"
    )
    page = write_headroom(places.out, probed)
    counts = {**probed.counts(), "not_kept": recorded.refused}
    if counts["failed"] == counts["credentials"]:
        raise JobError("; ".join(dict.fromkeys(str(status.error) for status in probed.statuses)))
    return {**counts, "page": str(page.absolute())}


def _tell(state: WindowState, level: int) -> None:
    now = state.now
    emit_event(
        f"tallystick.provider-limit.{level}",
        resource={
            "prefect.resource.id": f"tallystick.credential.{state.credential}.{state.window}",
            "prefect.resource.name": f"{state.credential}: {state.window}",
            "tallystick.provider": state.provider,
        },
        payload={
            "credential": state.credential,
            "provider": state.provider,
            "window": state.window,
            "percent_used": plain_number(now.percent_used),
            "limit": plain_number(now.limit),
            "remaining": plain_number(now.remaining),
            "reset_at": None if now.reset_at is None else now.reset_at.isoformat(),
            "exhausted_at": None if state.exhausted_at is None else state.exhausted_at.isoformat(),
        },
    )


if __name__ == "__main__":
    run(probe_providers)
