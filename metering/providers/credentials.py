"""Which credentials there are to probe: a TOML file, or the environment variables that providers' own SDKs read."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from metering.errors import InvalidFile, InvalidSetting
from metering.providers.probes import Credential
from metering.providers.registry import PROBE_RULES
from metering.toml_lines import line_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["credentials_of_environment", "read_credentials"]

_PROBLEM = re.compile(r"(?P<problem>.*?)(?: - at `\$\.?(?P<where>.*)`)?", re.DOTALL)
_PORT = re.compile(r":\d+$")
_AT_LINE = re.compile(r"\(at line (\d+),")

_T = TypeVar("_T")


class _Table(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`[credentials.ID]`. A key is a text, in an environment variable, or in a Secret block of Prefect."""

    provider: str
    key: str | None = None
    key_env: str | None = None
    key_block: str | None = None
    admin_key: str | None = None
    admin_key_env: str | None = None
    admin_key_block: str | None = None
    project: str | None = None
    base_url: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    paid_probes_per_day: int = 0


class _Document(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    credentials: dict[str, dict[str, Any]] = {}


def read_credentials(
    path: Path, environ: Mapping[str, str], *, block: Callable[[str], str | None] | None = None
) -> list[Credential]:
    """The credentials of a credentials.toml, in its order.

    `block` gives the secret of a Prefect block, which only the flows can. A secret that is not to be had leaves its
    credential without a key, and the probe says so. Raises `InvalidFile` with the line and the place of what is wrong,
    and shows no secret.
    """
    return _Reading(path).credentials(environ, block)


def credentials_of_environment(environ: Mapping[str, str]) -> list[Credential]:
    """A credential for each provider whose variable is set, such as OPENAI_API_KEY; its id is the provider's name."""
    found = []
    for provider, rule in PROBE_RULES.items():
        key = environ.get(rule.key_variable or "", "").strip() or None
        url = environ.get(rule.url_variable or "", "").strip()
        if key or url:
            found.append(Credential(id=provider, provider=provider, key=key, base_url=_whole(url, rule.url) or None))
    return found


def _whole(url: str, usual: str) -> str:
    """A URL as SDKs read it: scheme and port are those of the usual one where it has no scheme."""
    if not url or "://" in url:
        return url
    parts = urlsplit(usual or "https://")
    return (
        f"{parts.scheme}://{url}" if _PORT.search(url) or parts.port is None else f"{parts.scheme}://{url}:{parts.port}"
    )


class _Reading:
    """One file being read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise InvalidFile(path, "is not UTF-8") from None

    def credentials(self, environ: Mapping[str, str], block: Callable[[str], str | None] | None) -> list[Credential]:
        try:
            parsed = tomllib.loads(self._text)
        except (tomllib.TOMLDecodeError, RecursionError) as exc:
            line = _AT_LINE.search(str(exc))  # and no more of the message, which may quote what stands there
            raise InvalidFile(self._path, f"is not TOML{f' at line {line[1]}' if line else ''}") from None
        found = []
        for name, given in self._as(_Document, parsed, "").credentials.items():
            where = f"credentials.{name}"
            table = self._as(_Table, given, where)
            for name_of_key in ("key", "admin_key"):
                said = [option for option in _options(name_of_key) if getattr(table, option) is not None]
                if len(said) > 1:
                    raise self._refused(f"{where}.{said[1]}", f"there is {said[0]} already, expected one of them")
            try:
                credential = Credential(
                    id=name,
                    provider=table.provider,
                    key=_key(table, "key", environ, block),
                    admin_key=_key(table, "admin_key", environ, block),
                    project=table.project,
                    base_url=table.base_url,
                    allowed_hosts=table.allowed_hosts,
                    paid_probes_per_day=table.paid_probes_per_day,
                )
            except InvalidSetting as exc:
                raise self._refused(where, str(exc)) from None
            found.append(credential)
        return found

    def _as(self, shape: type[_T], given: object, where: str) -> _T:
        try:
            return msgspec.convert(given, shape)
        except msgspec.ValidationError as exc:
            said = _PROBLEM.fullmatch(str(exc))
            assert said is not None
            raise self._refused(".".join(filter(None, (where, said["where"]))), said["problem"]) from None

    def _refused(self, where: str, problem: str) -> InvalidFile:
        line = line_of(self._text, where)
        return InvalidFile(self._path, f"{f'line {line}, ' if line else ''}{where or 'the file'}: {problem}")


def _options(key: str) -> tuple[str, str, str]:
    return key, f"{key}_env", f"{key}_block"


def _key(table: _Table, name: str, environ: Mapping[str, str], block: Callable[[str], str | None] | None) -> str | None:
    text, variable, block_name = (getattr(table, option) for option in _options(name))
    if variable is not None:
        text = environ.get(variable)
    elif block_name is not None:
        text = None if block is None else block(block_name)
    return (text or "").strip() or None
