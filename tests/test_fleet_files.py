"""What a fleet is run by: the compose file, the image and the runbook agree with the code, and their commands work."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import typer.main
import uvicorn
import yaml
from typer.core import TyperGroup
from typer.exceptions import TyperException

import flows.__main__
import metering.settings
from metering import Meter
from metering.cli import app
from metering.history import histories_of
from metering.providers import PROVIDERS
from metering.settings import Settings
from tests.servers import HOST, PostgresServer, RedisServer, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
PREFECT: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)

TALLYSTICK: Any = typer.main.get_command(app)
JOBS: Any = typer.main.get_command(flows.__main__.app)
PASSED_ON = ("sh", "curl", "df", "psql")
"""Programs that are not ours."""
COMPOSE_COMMANDS = ("exec", "logs", "ps", "restart", "up")


def filled(value: Any) -> Any:
    """With the defaults of variables that are not set, as compose does it."""
    if isinstance(value, dict):
        return {name: filled(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner) for inner in value]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


def check_command(words: Sequence[str]) -> None:
    """That a command is one there is, with options and arguments it takes."""
    program, *rest = words
    if program == "tallystick":
        check_parsed(TALLYSTICK, rest)
    elif [program, *rest[:2]] == ["python", "-m", "flows"]:
        check_parsed(JOBS, rest[2:])
    elif program == "uvicorn":
        module, _, name = rest[0].partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        check_parsed(uvicorn.main, rest)
    elif [program, *rest[:1]] == ["docker", "compose"]:
        check_compose(rest[1:])
    else:
        assert program in PASSED_ON, program


def check_parsed(command: Any, words: Sequence[str]) -> None:
    left = list(words)
    while left and left[0] in getattr(command, "commands", {}):
        command = command.commands[left.pop(0)]
    if type(command) is not TyperGroup and "show" in getattr(command, "commands", {}):
        command = command.commands["show"]  # what such a group does with anything else
    assert not hasattr(command, "commands"), f"{' '.join(words)}: there is no such command"
    command.make_context(command.name, left)


def check_compose(words: Sequence[str]) -> None:
    command, *rest = words
    assert command in COMPOSE_COMMANDS
    named = [word for word in rest if not word.startswith("-") and not word.isdigit()]
    if command == "exec":
        assert rest[0] in SERVICES
        check_command(rest[1:])
    else:
        assert set(named) <= set(SERVICES)


def console_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def documented() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("\n## Run it on a fleet\n")[2].partition("\n## ")[0]
    found = console_lines(section) + console_lines((ROOT / "RUNBOOK.md").read_text())
    assert len(found) > 30
    return sorted(set(found))


@pytest.mark.parametrize("line", documented())
def test_what_is_documented_can_be_typed(line: str) -> None:
    check_command(shlex.split(line, comments=True))


@pytest.mark.parametrize(
    "line",
    ["tallystick tracing KEY", "tallystick trace KEY --all", "tallystick trace", "docker compose exec nobody sh"],
)
def test_what_cannot_be_typed_would_be_noticed(line: str) -> None:
    with pytest.raises((AssertionError, TyperException)):
        check_command(shlex.split(line))


def test_every_service_runs_a_command_there_is() -> None:
    for name in ("migrate", "drain", "app"):
        check_command(filled(SERVICES[name]["command"]))
    assert [SERVICES[name]["command"][0] for name in OURS] == ["uvicorn", "tallystick", "tallystick", "prefect", "sh"]
    assert COMPOSE["configs"]["prefect_database"]["content"] == "CREATE DATABASE prefect;"
    shell = SERVICES["worker"]["command"][2]
    assert all(part.strip().removeprefix("exec ").startswith("prefect ") for part in shell.split("&&"))
    pools = set(re.findall(r"(?:create|--pool) (\w+)", shell))
    assert pools == {deployment["work_pool"]["name"] for deployment in PREFECT["deployments"]}


def test_images_are_pinned() -> None:
    assert DOCKERFILE.count("FROM ") == 2
    images = [SERVICES[name]["image"] for name in SERVICES if name not in OURS] + re.findall(
        r"^FROM (\S+)", DOCKERFILE, re.M
    )
    assert all(re.search(r":\d+\.\d+[.\w-]*$", image) for image in images), images
    assert re.search(r"\buv==\d+\.\d+\.\d+\n", DOCKERFILE)


def test_settings_are_known_and_name_the_services() -> None:
    known = set(re.findall(r"METERING_[A-Z_]+", Path(metering.settings.__file__).read_text()))
    for name in OURS:
        environment = filled(SERVICES[name]["environment"])
        assert {key for key in environment if key.startswith("METERING_")} <= known
        own = {"PWD", *(provider.key_variable for provider in PROVIDERS.values())} if name == "worker" else set()
        assert {key for key in environment if not key.startswith(("METERING_", "PREFECT_"))} == own
        hosts = re.findall(r"[@/](\w+):\d+", " ".join(environment.values()))
        assert hosts
        assert set(hosts) <= set(SERVICES)
    settings = Settings.from_env(filled(SERVICES["app"]["environment"]))
    assert settings.ledger_url == "postgresql+psycopg://tallystick:local-only@postgres:5432/ledger"
    assert (settings.quota_url, settings.key_pepper) == ("redis://:local-only@redis:6379/0", None)
    assert set(re.findall(r"METERING_[A-Z_]+", DOCKERFILE)) <= known


def test_services_wait_for_what_they_need() -> None:
    for service in SERVICES.values():
        for name, wanted in service.get("depends_on", {}).items():
            if wanted["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[name]
            else:
                assert (wanted["condition"], SERVICES[name]["restart"]) == ("service_completed_successfully", "no")
    volumes = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())}
    assert volumes == set(COMPOSE["volumes"])
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_redis_keeps_what_it_acknowledges() -> None:
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert (options["--appendonly"], options["--appendfsync"]) == ("yes", "always")
    assert options["--maxmemory-policy"] == "noeviction"


def test_the_image_has_what_it_copies_and_all_that_is_run() -> None:
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = [
        source for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE) for source in line.split()
    ]
    assert set(copied) == sent
    assert all((ROOT / source).exists() for source in copied)
    assert {"metering", "flows", "tasks", "reports", "examples", "prefect.yaml", "pyproject.toml"} <= set(copied)
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["tallystick"]
    home = SERVICES["app"]["environment"]["METERING_HOME"]
    assert f"--group tallystick {home}\n" in DOCKERFILE
    assert f"PREFECT_HOME={home}/" in DOCKERFILE
    assert all(f"home:{home}" in SERVICES[name]["volumes"] for name in OURS)
    assert f"WORKDIR {SERVICES['worker']['environment']['PWD']}\n" in DOCKERFILE


def test_deployments_are_of_flows_that_are_there() -> None:
    for deployment in PREFECT["deployments"]:
        file, _, name = deployment["entrypoint"].partition(":")
        functions = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        [found] = [node for node in functions if node.name == name]
        assert [ast.unparse(decorator) for decorator in found.decorator_list] == ["flow"]


class Fleet:
    """Services of compose.yaml as processes of this machine, on servers of the tests."""

    def __init__(self, home: Path, postgres: PostgresServer, redis: RedisServer) -> None:
        self.port = free_port()
        self._home = home
        self._here = {"postgres:5432": f"{HOST}:{postgres.port}", "redis:6379": f"{HOST}:{redis.port}"}

    def environment(self, name: str) -> dict[str, str]:
        found: dict[str, str] = filled(SERVICES[name]["environment"]) | {"METERING_HOME": str(self._home)}
        for there, here in self._here.items():
            found = {key: value.replace(there, here) for key, value in found.items()}
        return found

    @contextmanager
    def running(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """The service's command; in the end it is told to stop, and does."""
        at = {"0.0.0.0": HOST, "8000": str(self.port)}
        program, *words = (at.get(word, word) for word in filled(SERVICES[name]["command"]))
        log = self._home / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [Path(sys.executable).with_name(program), *words],
                cwd=ROOT,
                env=os.environ | self.environment(name),
                stdout=out,
                stderr=out,
                process_group=0,
            )
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) in (0, -signal.SIGTERM), log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_its_commands_bring_a_call_into_the_ledger(tmp_path: Path) -> None:
    with ExitStack() as stack:
        postgres = stack.enter_context(PostgresServer(fsync=False, password="local-only"))
        redis = stack.enter_context(RedisServer("valkey-9", appendonly=True, password="local-only"))
        with postgres.client() as client:
            client.execute("CREATE ROLE tallystick LOGIN SUPERUSER PASSWORD 'local-only'")
            client.execute("CREATE DATABASE ledger OWNER tallystick")
            client.execute(COMPOSE["configs"]["prefect_database"]["content"])
        fleet = Fleet(tmp_path, postgres, redis)
        with fleet.running("migrate") as migrate:
            assert migrate.wait(60) == 0, (tmp_path / "migrate.log").read_text()
        stack.enter_context(fleet.running("drain"))
        stack.enter_context(fleet.running("app"))
        settings = Settings.from_env(fleet.environment("app"))
        options: Mapping[str, Any] = {"quota_url": settings.quota_url, "spool": settings.spool}
        meter = stack.enter_context(Meter(settings.ledger_url, quota_timeout_s=5, **options))
        secret = meter.keys.create("acme", plan="pro").secret
        http = stack.enter_context(httpx.Client(base_url=f"http://{HOST}:{fleet.port}", timeout=20))
        wait_until(lambda: is_there(http), "the app")
        headers = {"authorization": f"Bearer {secret}", "idempotency-key": "req-1"}

        def ask() -> httpx.Response:
            return http.post("/answer", json={"prompt": "say this again"}, headers=headers)

        # Quarter of a second is little for the first call of a busy machine: then it is 503, and to be sent again.
        wait_until(lambda: ask().status_code == 200, "an answer")
        assert ask().json() == {"answer": "say this again "}
        wait_until(lambda: sum(total.requests for total in meter.usage("acme")) > 0, "the drain")
        assert meter._redis is not None
        [history] = histories_of(meter.ledger, "req-1", out=settings.out, link=meter._redis.link)
        [event] = history.events
        assert (event.tokens, event.line) == ({"input_tokens": 3, "output_tokens": 3}, "application")
        assert (event.position or "").count("/") == 2
        assert [(held.where, held.state) for held in history.holds] == [("redis", "settled")]
        assert [histories_of(meter.ledger, str(event.event_id), out=settings.out)[0].events] == [history.events]


def is_there(client: httpx.Client) -> bool:
    try:
        return client.get("/openapi.json").status_code == 200
    except httpx.TransportError:
        return False
