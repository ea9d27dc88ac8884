"""Which credentials there are to probe: a TOML file, or the environment variables that providers' own SDKs read."""

from __future__ import annotations

import re
import tomllib
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from metering.errors import InvalidFile, InvalidSetting
from metering.providers.probes import Credential, is_key
from metering.providers.registry import PROBE_RULES
from metering.toml_lines import line_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["credentials_of_environment", "nothing_to_probe", "read_credentials"]

_PROBLEM = re.compile(r"(?P<problem>.*?)(?: - at `\$\.?(?P<where>.*)`)?", re.DOTALL)
_HOST_AND_PORT = re.compile(r"(?P<host>\[.*\]|[^:]*)(?P<port>:\d*)?")
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
    credentials: dict[str, Any] = {}


def read_credentials(
    path: Path, environ: Mapping[str, str], *, block: Callable[[str], str | None] | None = None
) -> list[Credential]:
    """The credentials of a credentials.toml, in its order.

    `block` gives the secret of a Prefect block, which only the flows can. A secret that is not to be had, or is none
    that a header can hold, leaves its credential without a key, and the status says why. Raises `InvalidFile` with the
    line and the place of what is wrong, and shows no secret.
    """
    return _Reading(path).credentials(environ, block)


def credentials_of_environment(environ: Mapping[str, str]) -> list[Credential]:
    """A credential for each provider whose variable is set, such as OPENAI_API_KEY; its id is the provider's name.

    A key that no header can hold leaves its credential without one, and the status says why. Raises `InvalidSetting`
    for a base URL that cannot be, because without it the key would be sent elsewhere.
    """
    found = []
    for provider, rule in PROBE_RULES.items():
        key, problem = _of_variable(rule.key_variable or "", environ)
        url = environ.get(rule.url_variable or "", "").strip()
        if not (key or problem or url):
            continue
        try:
            credential = Credential(
                id=provider,
                provider=provider,
                key=key,
                base_url=_whole(url, rule.url) if url else None,
                warnings=(problem,) if problem else (),
            )
        except InvalidSetting as exc:
            raise InvalidSetting(str(rule.url_variable), exc.value, exc.expected) from None
        found.append(credential)
    return found


def nothing_to_probe(path: Path | None) -> str:
    """Why there is no credential: what to do, where `path` is the file that was read, and None where there is none."""
    if path is not None:
        return f"nothing to probe: there is no [credentials.NAME] in {path}"
    variables = ", ".join(sorted(filter(None, (rule.key_variable for rule in PROBE_RULES.values()))))
    return f"nothing to probe: there is no credentials.toml, and none of {variables} is set"


def _of_variable(name: str, environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The key in a variable, and what is wrong with it."""
    key = environ.get(name, "").strip() or None
    return (key, None) if key is None or is_key(key) else (None, f"{name} holds no key: expected ASCII without blanks")


def _whole(url: str, usual: str) -> str:
    """A URL as SDKs read it: without a scheme, what it leaves out of scheme, host and port is as in the usual one.

    Where a server listens on all its addresses (`0.0.0.0`, as OLLAMA_HOST says it to the server, too), it is asked on
    the loopback.
    """
    parts = urlsplit(usual or "https://")
    scheme, has_scheme, rest = url.partition("://") if "://" in url else ("", "", url)
    authority, slash, path = rest.partition("/")
    match = _HOST_AND_PORT.fullmatch(_bracketed(authority))
    if match is None:
        return url
    host, port = match["host"] or parts.hostname or "", match["port"] or ""
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104  nobody listens here
    if not has_scheme:
        scheme, port = parts.scheme, port or (f":{parts.port}" if parts.port else "")
    return f"{scheme}://{host}{port}{slash}{path}"


def _bracketed(host: str) -> str:
    try:
        return f"[{host}]" if ip_address(host).version == 6 else host
    except ValueError:
        return host


class _Reading:
    """One file being read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise InvalidFile(path, "is not UTF-8") from None
        except OSError as exc:
            raise InvalidFile(path, f"cannot be read ({exc.strerror})") from None

    def credentials(self, environ: Mapping[str, str], block: Callable[[str], str | None] | None) -> list[Credential]:
        try:
            parsed = tomllib.loads(self._text)
        except (tomllib.TOMLDecodeError, RecursionError) as exc:
            line = _AT_LINE.search(str(exc))  # and no more of the message, which may quote what stands there
            raise InvalidFile(self._path, f"is not TOML{f' at line {line[1]}' if line else ''}") from None
        found = []
        for name, given in self._as(_Document, parsed, "").credentials.items():
            where = f"credentials.{name}"
            if not isinstance(given, dict):
                raise self._refused(where, "expected a table such as [credentials.NAME]")
            table = self._as(_Table, given, where)
            for name_of_key in ("key", "admin_key"):
                said = [option for option in _options(name_of_key) if getattr(table, option) is not None]
                if len(said) > 1:
                    raise self._refused(f"{where}.{said[1]}", f"there is {said[0]} already, expected one of them")
            key, problem = _key(table, "key", environ, block)
            admin_key, admin_problem = _key(table, "admin_key", environ, block)
            try:
                credential = Credential(
                    id=name,
                    provider=table.provider,
                    key=key,
                    admin_key=admin_key,
                    project=table.project,
                    base_url=table.base_url,
                    allowed_hosts=table.allowed_hosts,
                    paid_probes_per_day=table.paid_probes_per_day,
                    warnings=tuple(filter(None, (problem, admin_problem))),
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
        where = where if where.isprintable() else ascii(where)
        return InvalidFile(self._path, f"{f'line {line}, ' if line else ''}{where or 'the file'}: {problem}")


def _options(key: str) -> tuple[str, str, str]:
    return key, f"{key}_env", f"{key}_block"


def _key(
    table: _Table, name: str, environ: Mapping[str, str], block: Callable[[str], str | None] | None
) -> tuple[str | None, str | None]:
    """A key, and why there is none where one is meant to be."""
    text, variable, block_name = (getattr(table, option) for option in _options(name))
    if variable is not None:
        key, problem = _of_variable(variable, environ)
        return key, problem or (None if key else f"{name}_env: {variable} is not set")
    if block_name is None:
        return (text or "").strip() or None, None
    if block is None:
        return None, f"{name}_block: Secret blocks of Prefect are read by the job probe-providers alone"
    key = (block(block_name) or "").strip()
    if not key:
        return None, f"{name}_block: there is no Secret block {block_name!r}, or nothing in it"
    return (
        (key, None)
        if is_key(key)
        else (None, f"{name}_block: {block_name!r} holds no key: expected ASCII without blanks")
    )
