"""Settings: `METERING_*` variables and providers' keys, or the same names in a `.env` file of the working folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dotenv import dotenv_values

from metering.errors import InvalidSetting
from metering.providers import PROVIDERS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Settings", "environment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where things are. With nothing set, everything lies in one folder and no server is needed."""

    home: Path = Path(".tallystick")
    """METERING_HOME: the folder for what is local: ledger, warehouse, rejects, and `out/` with the reports."""
    ledger_url: str = "sqlite:///.tallystick/ledger.db"
    """METERING_LEDGER_URL: `sqlite:///FILE`, or `postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE`."""
    warehouse: Path = Path(".tallystick/warehouse.duckdb")
    """METERING_WAREHOUSE: the DuckDB file."""
    plans: Path = Path("plans.toml")
    """METERING_PLANS: plans and rates. Not set and no `plans.toml` in the working folder: the four default plans."""
    credentials: Path | None = None
    """METERING_CREDENTIALS: whom to probe. Not set: `credentials.toml` in the working folder, if it is there.

    Whether the file is there is seen when it is read: an app that probes nobody needs none.
    """
    issuer: str = "INV"
    """METERING_ISSUER: what final documents are numbered under, such as `INV-000001`."""
    quota_url: str | None = None
    """METERING_QUOTA_URL: `redis://`, `rediss://` or `redis+cluster://` puts admissions on Redis."""
    timeout_s: float = 5.0
    """METERING_TIMEOUT_MS: how long an admission may wait for the ledger, in milliseconds."""
    quota_timeout_s: float = 0.25
    """METERING_TIMEOUT_MS: how long an admission may wait for Redis, where quotas are there."""
    allow_eviction: bool = False
    """METERING_ALLOW_EVICTION: 1 accepts a Redis that may throw counters away when its memory is full."""
    key_pepper: str | None = None
    """METERING_KEY_PEPPER: a secret mixed into the digests of API keys. Changing it makes every key unknown."""
    provider_keys: Mapping[str, str] = field(default_factory=dict)
    """OPENAI_ADMIN_KEY, ANTHROPIC_ADMIN_KEY, OPENROUTER_MANAGEMENT_KEY: what providers give their reports for."""
    provider_urls: Mapping[str, str] = field(default_factory=dict)
    """METERING_OPENAI_URL, METERING_ANTHROPIC_URL, METERING_OPENROUTER_URL: where a provider's API is instead."""

    def __repr__(self) -> str:
        return f"Settings(home={str(self.home)!r}, ledger_url={self.ledger_url!r}, warehouse={str(self.warehouse)!r})"

    @property
    def out(self) -> Path:
        """The folder of generated reports."""
        return self.home / "out"

    @property
    def archives(self) -> Path:
        """The folder of events that have left the ledger: to be backed up with it."""
        return self.home / "archives"

    @property
    def spool(self) -> Path:
        """The folder of what could not be told to its store yet."""
        return self.home / "spool"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the environment, and `.env` for what it does not set. Raises `InvalidSetting`."""
        environ = environment() if environ is None else environ
        home = Path(environ.get("METERING_HOME") or ".tallystick")
        quota_url = environ.get("METERING_QUOTA_URL") or None
        timeout_ms = _milliseconds("METERING_TIMEOUT_MS", environ.get("METERING_TIMEOUT_MS") or None)
        allow_eviction = environ.get("METERING_ALLOW_EVICTION") or "0"
        if allow_eviction not in ("0", "1"):
            raise InvalidSetting("METERING_ALLOW_EVICTION", allow_eviction, "0 or 1")
        plans = environ.get("METERING_PLANS")
        if plans and not Path(plans).is_file():
            raise InvalidSetting("METERING_PLANS", plans, "a file that is there")
        credentials = environ.get("METERING_CREDENTIALS")
        if not credentials and Path("credentials.toml").is_file():
            credentials = "credentials.toml"
        return cls(
            home=home,
            ledger_url=environ.get("METERING_LEDGER_URL") or f"sqlite:///{home / 'ledger.db'}",
            warehouse=Path(environ.get("METERING_WAREHOUSE") or home / "warehouse.duckdb"),
            plans=Path(plans or "plans.toml"),
            credentials=Path(credentials) if credentials else None,
            issuer=environ.get("METERING_ISSUER") or "INV",
            quota_url=quota_url,
            timeout_s=5.0 if quota_url is not None or timeout_ms is None else timeout_ms / 1000,
            quota_timeout_s=0.25 if timeout_ms is None else timeout_ms / 1000,
            allow_eviction=allow_eviction == "1",
            key_pepper=environ.get("METERING_KEY_PEPPER") or None,
            provider_keys=_provider_keys(environ),
            provider_urls=_provider_urls(environ),
        )


def environment() -> dict[str, str]:
    """The environment, and what `.env` sets besides. Raises `InvalidSetting`."""
    try:
        in_file = {name: value for name, value in dotenv_values(".env").items() if value is not None}
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidSetting("settings", ".env", f"a readable file in UTF-8 ({exc})") from exc
    return {**in_file, **os.environ}


def _provider_keys(environ: Mapping[str, str]) -> dict[str, str]:
    keys = {name: environ.get(provider.key_variable, "").strip() for name, provider in PROVIDERS.items()}
    for name, key in keys.items():
        if not key.isascii() or not key.isprintable() or " " in key:
            # A header cannot hold it, and the error that says so would show it.
            raise InvalidSetting(PROVIDERS[name].key_variable, "(not shown)", "a key: ASCII without blanks")
    return {name: key for name, key in keys.items() if key}


def _provider_urls(environ: Mapping[str, str]) -> dict[str, str]:
    urls = {}
    for name in PROVIDERS:
        variable = f"METERING_{name.upper()}_URL"
        url = environ.get(variable)
        if url and not url.startswith(("http://", "https://")):
            raise InvalidSetting(variable, url.rpartition("@")[2], "http:// or https://")  # without a password
        if url:
            urls[name] = url
    return urls


def _milliseconds(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 600_000:
        raise InvalidSetting(name, value, "milliseconds, 1 to 600000")
    return int(value)
