"""A TCP proxy that loses, delays and cuts what a server answers: no pytest in here."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import ssl
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.servers import DEADLINE_S, HOST, free_port

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path
    from typing import Self

CHUNK = 65_536


class Proxy:
    """Stands between clients and the server on `server_port`, in a thread of this process; `with` starts and ends it.

    It does not understand what it carries. A reply here is a chunk as it came from the server: one reply of a caller
    who waits for each, several of one who pipelines, a part of a large one; what a client says when it connects is
    answered too. What happens to a reply is drawn from `seed`. The shares are 0 to 1, 1 together at most, and may be
    set at any time:

    - `drop_replies`: swallowed, with all that follows on that connection, for a byte stream has no holes. Of these
      connections the share `silent` is never heard of again, the others are cut at once. `drop_next`: so many of the
      next replies are dropped for certain.
    - `cut_replies`: the connection is cut before, within or after the reply.
    - `delay_replies`: held back for `delay_s` seconds (from, to), with those that follow on that connection.

    Requests always reach the server, unless paused. `counts` says what was done: connections, replies (that the server
    sent), of them dropped, cut, delayed and passed. tls: what certificate() made; the server still speaks plainly.
    """

    def __init__(
        self,
        server_port: int,
        *,
        seed: int = 0,
        drop_replies: float = 0.0,
        silent: float = 0.5,
        cut_replies: float = 0.0,
        delay_replies: float = 0.0,
        delay_s: tuple[float, float] = (0.0, 0.05),
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        self.server_port = server_port
        self.port = 0
        self.drop_next = 0
        self.drop_replies = drop_replies
        self.silent = silent
        self.cut_replies = cut_replies
        self.delay_replies = delay_replies
        self.delay_s = delay_s
        self.counts: Counter[str] = Counter()
        self._chance = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._flowing = asyncio.Event()
        self._listening: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._tls: ssl.SSLContext | None = None
        if tls is not None:
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(*tls)

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:port` of the proxy, or `rediss://`."""
        return f"redis{'s' if self._tls else ''}://{HOST}:{self.port}"

    def pause(self) -> None:
        """A black hole: clients can connect and send, nothing is passed on in either direction until resume()."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def refuse(self) -> None:
        """Cut every connection, and refuse new ones until resume()."""
        self._do(self._refuse())

    def resume(self) -> None:
        """End pause() and refuse(): what was held back is passed on, what was cut is not."""
        self._do(self._resume())

    def __enter__(self) -> Self:
        self._thread.start()
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    def _do(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(DEADLINE_S)

    async def _resume(self) -> None:
        self._flowing.set()
        while self._listening is None:
            port = self.port or free_port()
            try:
                self._listening = await asyncio.start_server(self._accept, HOST, port, ssl=self._tls)
            except OSError:
                if self.port:
                    raise
            else:
                self.port = port

    async def _refuse(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = self._loop.create_task(self._connection(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        ends = [writer]
        try:
            from_server, to_server = await asyncio.open_connection(HOST, self.server_port)
            ends.append(to_server)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._requests(reader, to_server))
                both.create_task(self._replies(from_server, writer))
        except* OSError:
            pass
        finally:
            for end in ends:
                end.transport.abort()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            await self._pass_on(data, writer)
        raise ConnectionResetError

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            fate = self._fate()
            self.counts["replies"] += 1
            self.counts[fate] += 1
            if fate == "dropped":
                if self._chance.random() < self.silent:
                    await self._swallow(reader)
                break
            if fate == "cut":
                await self._pass_on(data[: self._chance.randint(0, len(data))], writer)
                break
            if fate == "delayed":
                await asyncio.sleep(self._chance.uniform(*self.delay_s))
            await self._pass_on(data, writer)
        raise ConnectionResetError

    def _fate(self) -> str:
        if self.drop_next:
            self.drop_next -= 1
            return "dropped"
        drawn = self._chance.random()
        for fate, share in (
            ("dropped", self.drop_replies),
            ("cut", self.cut_replies),
            ("delayed", self.delay_replies),
        ):
            if drawn < share:
                return fate
            drawn -= share
        return "passed"

    async def _swallow(self, reader: asyncio.StreamReader) -> None:
        while await reader.read(CHUNK):
            self.counts["replies"] += 1

    async def _pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        writer.write(data)
        await writer.drain()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A new certificate for 127.0.0.1, which is its own authority, and its key: PEM files in the folder."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test server")])
    now, day = datetime.now(UTC), timedelta(days=1)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"), False
    )
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True, key_cert_sign=True, encipher_only=False, decipher_only=False, **usage
            ),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = folder / "certificate.pem", folder / "key.pem"
    certificate_path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_path, key_path
