"""Every five minutes: how much of the providers' rate limits is left, and until when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event
from prefect.states import Completed

from flows.command import run
from flows.places import Places
from metering.providers.registry import PROBE_RULES
from metering.providers.showing import plain_number, status_rows
from tasks.errors import JobError
from tasks.probes import keep_statuses, probe_credentials, write_headroom

if TYPE_CHECKING:
    from metering.providers.forecast import WindowState

__all__ = ["probe_providers"]

NO_CREDENTIALS = (
    "there is no credentials.toml, and none of "
    f"{', '.join(sorted(filter(None, (rule.key_variable for rule in PROBE_RULES.values()))))} is set: "
    "there is no provider to ask"
)


@flow
def probe_providers() -> Any:
    """Probe every credential, keep what was found, and publish a table and a page.

    An event `tallystick.provider-limit.80` or `.95` is emitted when so much of a window is used, once until it is less
    again. Returns how many were asked, and the `page`. A credential that cannot be probed is in the table, and fails
    nothing else; `JobError` where none could be.
    """
    places = Places.from_env()
    probed = probe_credentials(places.ledger_url)
    if not probed.statuses:
        return Completed(message=NO_CREDENTIALS, data={"skipped": NO_CREDENTIALS})
    # Before they are kept: whoever is killed in between tells it again, rather than never.
    for state in probed.states:
        for level in state.crossed:
            _tell(state, level)
    keep_statuses(places.ledger_url, probed.statuses)
    page = write_headroom(places.out, probed)
    create_table_artifact(
        status_rows(probed.statuses, probed.states), key="provider-limits", description="The providers' limits"
    )
    counts = probed.counts()
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
