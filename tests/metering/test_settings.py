"""Settings: the environment first, then `.env`, then what needs no setting at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from metering.errors import InvalidSetting
from metering.settings import Settings


def test_with_nothing_set_all_lies_in_one_folder() -> None:
    settings = Settings.from_env()
    assert settings == Settings()
    assert (settings.home, settings.ledger_url) == (Path(".tallystick"), "sqlite:///.tallystick/ledger.db")
    assert (settings.warehouse, settings.out) == (Path(".tallystick/warehouse.duckdb"), Path(".tallystick/out"))
    assert (settings.plans, settings.timeout_s, settings.key_pepper) == (Path("plans.toml"), 5.0, None)
    assert (settings.quota_url, settings.spool) == (None, Path(".tallystick/spool"))
    assert list(Path().iterdir()) == []


def test_what_is_local_follows_its_home() -> None:
    settings = Settings.from_env({"METERING_HOME": "/srv/usage"})
    assert settings.ledger_url == "sqlite:////srv/usage/ledger.db"
    assert (settings.warehouse, settings.out) == (Path("/srv/usage/warehouse.duckdb"), Path("/srv/usage/out"))


def test_every_setting_is_read() -> None:
    Path("p.toml").touch()
    settings = Settings.from_env(
        {
            "METERING_HOME": "home",
            "METERING_LEDGER_URL": "sqlite:///other.db",
            "METERING_WAREHOUSE": "w.duckdb",
            "METERING_PLANS": "p.toml",
            "METERING_TIMEOUT_MS": "250",
            "METERING_KEY_PEPPER": "salt",
            "METERING_QUOTA_URL": "",
            "METERING_ALLOW_EVICTION": "0",
            "ANTHROPIC_ADMIN_KEY": "sk-ant-admin",
            "OPENAI_ADMIN_KEY": "",
            "METERING_OPENROUTER_URL": "http://localhost:8080",
        }
    )
    assert settings == Settings(
        home=Path("home"),
        ledger_url="sqlite:///other.db",
        warehouse=Path("w.duckdb"),
        plans=Path("p.toml"),
        timeout_s=0.25,
        quota_timeout_s=0.25,
        key_pepper="salt",
        provider_keys={"anthropic": "sk-ant-admin"},
        provider_urls={"openrouter": "http://localhost:8080"},
    )


def test_the_environment_goes_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("METERING_HOME=of-the-file\nMETERING_PLANS='mine.toml'\nMETERING_KEY_PEPPER\n# a note\n")
    Path("mine.toml").touch()
    monkeypatch.setenv("METERING_HOME", "of-the-environment")
    settings = Settings.from_env()
    assert (settings.home, settings.plans) == (Path("of-the-environment"), Path("mine.toml"))
    assert settings.key_pepper is None


def test_an_empty_setting_is_none() -> None:
    names = ("HOME", "LEDGER_URL", "WAREHOUSE", "PLANS", "TIMEOUT_MS", "KEY_PEPPER", "QUOTA_URL")
    assert Settings.from_env({f"METERING_{name}": "" for name in names}) == Settings()


@pytest.mark.parametrize("value", ["0", "-1", "600001", "1.5", "soon", "٣", " 5", "1_000"])
def test_a_timeout_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(InvalidSetting, match=r"METERING_TIMEOUT_MS: got .*, expected milliseconds, 1 to 600000"):
        Settings.from_env({"METERING_TIMEOUT_MS": value})


def test_plans_that_were_asked_for_must_be_there() -> None:
    with pytest.raises(InvalidSetting, match=r"METERING_PLANS: got 'prod\.toml', expected a file that is there"):
        Settings.from_env({"METERING_PLANS": "prod.toml"})


def test_the_timeout_is_that_of_the_store_that_decides() -> None:
    on_redis = Settings.from_env({"METERING_QUOTA_URL": "redis://localhost"})
    assert (on_redis.timeout_s, on_redis.quota_timeout_s) == (5.0, 0.25)
    told = Settings.from_env({"METERING_QUOTA_URL": "redis://localhost", "METERING_TIMEOUT_MS": "100"})
    assert (told.timeout_s, told.quota_timeout_s) == (5.0, 0.1)
    assert Settings.from_env({"METERING_TIMEOUT_MS": "100"}).timeout_s == 0.1


def test_eviction_is_allowed_by_1_alone() -> None:
    assert Settings.from_env({"METERING_ALLOW_EVICTION": "1"}).allow_eviction
    with pytest.raises(InvalidSetting, match="METERING_ALLOW_EVICTION: got 'yes', expected 0 or 1"):
        Settings.from_env({"METERING_ALLOW_EVICTION": "yes"})


def test_the_password_of_a_url_is_not_shown() -> None:
    settings = Settings.from_env({"METERING_QUOTA_URL": "redis://user:password@localhost"})
    assert "password" not in repr(settings)


def test_a_file_that_cannot_be_read_is_named() -> None:
    Path(".env").write_bytes(b"METERING_HOME=\xff")
    with pytest.raises(InvalidSetting, match=r"settings: got '\.env', expected a readable file in UTF-8"):
        Settings.from_env()


def test_the_pepper_is_not_shown() -> None:
    assert "salt" not in repr(Settings(key_pepper="salt"))


def test_a_providers_key_is_not_shown_nor_one_that_no_header_can_hold() -> None:
    assert "sk-admin" not in repr(Settings(provider_keys={"openai": "sk-admin"}))
    assert Settings.from_env({"OPENAI_ADMIN_KEY": " sk-admin\n"}).provider_keys == {"openai": "sk-admin"}
    for key in ("sk-\n-admin", "sk-schlüssel", "sk admin"):
        with pytest.raises(InvalidSetting, match=r"OPENAI_ADMIN_KEY: got '\(not shown\)', expected a key") as caught:
            Settings.from_env({"OPENAI_ADMIN_KEY": key})
        assert key not in str(caught.value)


def test_the_address_of_a_provider_is_a_url() -> None:
    with pytest.raises(InvalidSetting, match="METERING_OPENAI_URL: got 'localhost', expected http:// or https://"):
        Settings.from_env({"METERING_OPENAI_URL": "localhost"})
