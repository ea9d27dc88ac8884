"""Providers that report over HTTP on the loopback: pages, refusals, buckets that change, connections that break."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from tests.metering.providers.pages import anthropic_bucket, openai_bucket, paged
from tests.servers import HOST

KEY = "sk-admin-0123456789abcdef"

PATHS = {
    "/v1/organization/usage/completions": ("openai", "usage"),
    "/v1/organization/usage/embeddings": ("openai", "embeddings"),
    "/v1/organization/costs": ("openai", "cost"),
    "/v1/organizations/usage_report/messages": ("anthropic", "usage"),
    "/v1/organizations/cost_report": ("anthropic", "cost"),
    "/api/v1/activity": ("openrouter", "usage"),
}

Fault = Callable[["_Handler"], None]


def status(code: int, *, body: str = "", **headers: str) -> Fault:
    """Answer so, instead."""

    def answer(handler: _Handler) -> None:
        handler.send_response(code)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    return answer


def saying(page: Any) -> Fault:
    """Answer this page."""
    return status(200, body=page if isinstance(page, str) else json.dumps(page))


def cut(handler: _Handler) -> None:
    """Break the connection in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"data": [')


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self.server.answer(self)

    def log_message(self, *_: Any) -> None:
        pass


class ReportServer(ThreadingHTTPServer):
    """All three providers, at one URL. `with` runs it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Handler)
        self.url = f"http://{HOST}:{self.server_port}"
        self.results: dict[tuple[str, str], dict[date, list[Any]]] = {what: {} for what in PATHS.values()}
        """What each report has of a day."""
        self.days_per_page = 31
        self.faults: deque[Fault | None] = deque()
        """What becomes of the next requests; None: they are answered."""
        self.broken: Fault | None = None
        """What becomes of every request that no fault is for."""
        self.asked: list[tuple[str, str, dict[str, list[str]]]] = []
        """(provider, report, parameters) of each request."""

    def days_asked(self) -> list[str]:
        """Of each request the first day and, behind it, the token of its page."""
        return [_first(params) + "".join(params.get("page", [])) for _, _, params in self.asked]

    def answer(self, handler: _Handler) -> None:
        url = urlsplit(handler.path)
        provider, report = PATHS[url.path]
        params = parse_qs(url.query)
        self.asked.append((provider, report, params))
        fault = self.faults.popleft() if self.faults else self.broken
        shown = handler.headers.get("x-api-key") or handler.headers.get("authorization", "").removeprefix("Bearer ")
        if fault is not None:
            fault(handler)
        elif shown != KEY:
            status(401, body=f'{{"error": "Incorrect key provided: {shown}"}}')(handler)
        else:
            saying(self._page(provider, report, params))(handler)

    def _page(self, provider: str, report: str, params: dict[str, list[str]]) -> Any:
        results = self.results[provider, report]
        if provider == "openrouter":
            return {"data": [item for day in sorted(results) for item in results[day]]}
        assert params["bucket_width"] == ["1d"]
        name = "end_time" if provider == "openai" else "ending_at"
        bucket = openai_bucket if provider == "openai" else anthropic_bucket
        [token] = params.get("page", ["page_" + _first(params)])
        first, end = date.fromisoformat(token.removeprefix("page_")), _day(params[name][0])
        many = min(int(params["limit"][0]), self.days_per_page, (end - first).days)
        days = [first + timedelta(days=number) for number in range(many)]
        after = first + timedelta(days=many)
        next_page = f"page_{after}" if after < end else None
        return paged(*(bucket(*results.get(day, []), day=day) for day in days), next_page=next_page)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def _first(params: dict[str, list[str]]) -> str:
    [said] = params.get("start_time") or params.get("starting_at") or [""]
    return str(_day(said)) if said else ""


def _day(said: str) -> date:
    return datetime.fromtimestamp(int(said), UTC).date() if said.isdigit() else date.fromisoformat(said[:10])
