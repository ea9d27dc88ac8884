"""Where a key may be sent: https to public addresses, and what is allowed by name."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
from concurrent.futures import Future
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from metering.errors import AddressRefused, ConnectionFailed, HostNotFound

__all__ = ["check_address", "check_url"]

HOST = re.compile(r"[a-z0-9._-]{1,253}|[0-9a-f:.]{2,45}(?:%[a-z0-9]+)?")
"""A name, or an address of IPv6."""
PORTS = {"https": 443, "http": 80}

WITH_IPV4 = (IPv6Network("::/96"), IPv6Network("64:ff9b::/96"))
"""Whose last 32 bits are an address of IPv4: RFC 4291, 2.5.5.1, and RFC 6052, 2.1."""
LOCAL = (IPv6Network("fec0::/10"), IPv6Network("64:ff9b:1::/48"))
"""Of a site, which Python takes for global: RFC 3879, and RFC 8215."""

_LOOK_UPS: dict[tuple[str, int], Future[set[str]]] = {}
"""Those under way."""
os.register_at_fork(after_in_child=_LOOK_UPS.clear)


def check_url(provider: str, url: str, allowed_hosts: tuple[str, ...]) -> tuple[str, int]:
    """Host and port of a base URL that may be asked. Raises `AddressRefused`, which shows no more than the host."""
    if not url:
        raise AddressRefused(provider, "no base URL is configured, and every account has its own")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or PORTS.get(parts.scheme, 0)
    except ValueError:
        raise AddressRefused(provider, "the base URL is no URL") from None
    if parts.scheme not in PORTS or not HOST.fullmatch(host):
        raise AddressRefused(provider, "the base URL is not one of https:// with a host")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise AddressRefused(provider, f"the base URL of {host} has more than scheme, host, port and path")
    if parts.scheme == "http" and not _is_loopback(host) and host not in allowed_hosts:
        raise AddressRefused(provider, f"{host} is to be asked by http, and is not in allowed_hosts")
    return host, port


async def check_address(provider: str, host: str, port: int, allowed_hosts: tuple[str, ...]) -> None:
    """Look a host up. Raises `HostNotFound`, and `AddressRefused` where one of its addresses is not public.

    Raises `ConnectionFailed` where there is no thread to look it up on.

    Who answers may say something else a moment later; then TLS holds, because no other host has the certificate.
    """
    if host in allowed_hosts:
        return
    try:
        found = await asyncio.wrap_future(_look_up(host, port))
    except RuntimeError:  # no more threads
        raise ConnectionFailed(provider, f"{host} cannot be looked up: no thread can be started") from None
    if not found:
        raise HostNotFound(provider, f"{host} has no address")
    for address in found:
        ip = _plain(address)
        if not (ip.is_loopback if _is_loopback(host) else _is_public(ip)):
            raise AddressRefused(provider, f"{host} is at {ip}, which is not public, and not in allowed_hosts")


def _look_up(host: str, port: int) -> Future[set[str]]:
    """The addresses of a host, none where it has none.

    A look-up cannot be given up, and a resolver that does not answer is asked for half a minute. So each has a thread
    of its own, that neither the loop's end nor the process's waits for: in the loop's own few threads such hosts would
    keep all others waiting. One look-up serves all who ask for a host meanwhile, so there are no more than hosts.
    """
    mine: Future[set[str]] = Future()
    mine.set_running_or_notify_cancel()  # so that one who waits can be cancelled without the others
    under_way = _LOOK_UPS.setdefault((host, port), mine)
    if under_way is mine:

        def run() -> None:
            found: set[str] = set()
            try:
                found = {str(each[4][0]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
            except (OSError, UnicodeError):
                pass
            finally:
                _LOOK_UPS.pop((host, port), None)
                mine.set_result(found)

        try:
            threading.Thread(target=run, name=f"look-up of {host}", daemon=True).start()
        except RuntimeError as exc:
            _LOOK_UPS.pop((host, port), None)
            mine.set_exception(exc)
    return under_way


def _is_loopback(host: str) -> bool:
    try:
        return _plain(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_public(ip: IPv4Address | IPv6Address) -> bool:
    if isinstance(ip, IPv6Address):
        inside = ip.sixtofour  # RFC 3056
        if any(ip in network for network in WITH_IPV4):
            inside = IPv4Address(int(ip) & 0xFFFF_FFFF)
        if any(ip in network for network in LOCAL):
            return False
        if inside is not None:
            return _is_public(inside)  # what stands around it is told apart differently by versions of Python
    return ip.is_global and not ip.is_multicast


def _plain(address: str) -> IPv4Address | IPv6Address:
    ip = ip_address(address.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip
