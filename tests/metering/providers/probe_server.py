"""A provider on the loopback: real status lines, real headers, slow, cut and huge bodies."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.metering.providers import answers
from tests.servers import HOST

KEY = "sk-live-0123456789abcdef"
ADMIN_KEY = "sk-admin-fedcba9876543210"

Pairs = dict[str, str] | Iterable[tuple[str, str]]
Reply = Callable[["_Handler"], None]

ANTHROPIC_MODELS = {"data": [{"id": f"claude-{name}-4"} for name in ("opus", "sonnet", "haiku")], "has_more": False}
OPENAI_MODELS = {"object": "list", "data": [{"id": name} for name in ("whisper-1", "gpt-4o", "o4-mini", "gpt-4o-mini")]}
OLLAMA_MODELS = {"models": [{"name": "llama3.2:1b", "size": 1}, {"name": "qwen3:8b", "size": 2}]}
MESSAGE = {
    "type": "message",
    "model": "claude-haiku-4",
    "content": [],
    "usage": {"input_tokens": 8, "output_tokens": 1},
}
COMPLETION = {
    "object": "chat.completion",
    "model": "gpt-4o-mini",
    "choices": [],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
}
GENERATED = {
    "model": "llama3.2:1b",
    "response": "H",
    "done": True,
    "total_duration": 1_234_567_890,
    "prompt_eval_count": 26,
    "eval_count": 1,
}


def reply(body: Any = b"", headers: Pairs = (), *, status: int = 200, length: int | None = None) -> Reply:
    """Answer so; a `length` that is not the body's breaks the answer off."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    pairs = list(headers.items() if isinstance(headers, dict) else headers)

    def answer(handler: _Handler) -> None:
        handler.send_response_only(status)
        for name, value in (*pairs, ("content-length", str(len(sent) if length is None else length))):
            if name.lower() != "content-length" or value == str(len(sent) if length is None else length):
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(sent)

    return answer


def in_turn(*replies: Reply) -> Reply:
    """Answer the first question by the first one, and so on; whatever comes after them by the last one."""
    left = list(replies)

    def answer(handler: _Handler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(handler)

    return answer


def broken(handler: _Handler) -> None:
    """Hang up without a word."""


class _Handler(BaseHTTPRequestHandler):
    server: ProbeServer

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self.server.answer(self)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


MODELS = {"anthropic": "GET /v1/models?limit=1000", "openai": "GET /v1/models", "ollama": "GET /api/tags"}
"""What is asked of each provider first."""


class ProbeServer(ThreadingHTTPServer):
    """All three providers, at one URL; each answers as it does when nothing is wrong. `with` runs it."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__((HOST, 0), _Handler)
        self.url = f"http://{HOST}:{self.server_port}"
        self.replies: dict[str, Reply] = {
            "GET /v1/models?limit=1000": reply(ANTHROPIC_MODELS, answers.ANTHROPIC),
            "POST /v1/messages": reply(MESSAGE, answers.ANTHROPIC),
            "GET /v1/models": reply(OPENAI_MODELS, answers.OPENAI),
            "POST /v1/chat/completions": reply(COMPLETION, answers.OPENAI),
            "GET /api/tags": reply(OLLAMA_MODELS, answers.OLLAMA),
            "POST /api/generate": reply(GENERATED, answers.OLLAMA),
        }
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[Any] = []
        """Of each POST."""
        self.ended = threading.Event()
        """Slow answers end with it."""
        self.open = {"any": 0, "silent": 0}
        self.most_open = dict(self.open)
        """How many questions were open at the same time, and how many of these were never answered."""
        self._lock = threading.Lock()

    def slow(self, status: int = 200, headers: Pairs = ()) -> Reply:
        """Begin an answer, and go on when the server ends."""

        def answer(handler: _Handler) -> None:
            handler.send_response_only(status)
            for name, value in (*dict(headers).items(), ("content-length", "1000")):
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(b'{"data": [')
            self.ended.wait()

        return answer

    def silent(self, handler: _Handler) -> None:
        """Say nothing until the asker hangs up."""
        with self._counted("silent"):
            handler.connection.recv(1)

    @contextmanager
    def _counted(self, what: str) -> Iterator[None]:
        with self._lock:
            self.open[what] += 1
            self.most_open[what] = max(self.most_open[what], self.open[what])
        try:
            yield
        finally:
            with self._lock:
                self.open[what] -= 1

    def answer(self, handler: _Handler) -> None:
        self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        body = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        if body:
            self.bodies.append(json.loads(body))
        asked = f"{handler.command} {handler.path}"
        self.asked.append(asked)
        with self._counted("any"):
            self.replies[asked](handler)

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()
