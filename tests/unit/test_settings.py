from __future__ import annotations

from pathlib import Path

import pytest

from fides_plugins.errors import SettingsError
from fides_plugins.settings import Settings, nest


def test_every_host_gives_the_same_settings(tmp_path: Path):
    expected = Settings.from_mapping(
        {
            "bundle": "b",
            "mode": "reject",
            "false_alarm_rate": 0.02,
            "plugins": {"blocked": ["x", "y"], "options": {"webhook": {"url": "u"}}},
        }
    )
    flat = {
        "fides.bundle": "b",
        "fides.mode": "reject",
        "fides.false_alarm_rate": "0.02",
        "fides.plugins.blocked": "x, y",
        "fides.plugins.options.webhook.url": "u",
        "EXECUTION_ENV_PATH": "not ours",
    }
    environment = {
        "FIDES_BUNDLE": "b",
        "FIDES_MODE": "reject",
        "FIDES_FALSE_ALARM_RATE": "0.02",
        "FIDES_PLUGINS__BLOCKED": "x,y",
        "FIDES_PLUGINS__OPTIONS__WEBHOOK__URL": "u",
        "HOME": "/",
    }
    toml = tmp_path / "fides.toml"
    toml.write_text(
        '[fides]\nbundle = "b"\nmode = "reject"\nfalse_alarm_rate = 0.02\n'
        '[fides.plugins]\nblocked = ["x", "y"]\noptions.webhook.url = "u"\n'
    )
    assert Settings.from_mapping(nest(flat)) == expected
    assert Settings.for_host({}, environment) == expected
    assert Settings.from_toml(toml) == expected


def test_the_environment_wins_over_the_file():
    settings = Settings.for_host(
        {"mode": "flag", "plugins": {"blocked": ["a"], "required": ["b"]}},
        {"FIDES_MODE": "reject", "FIDES_PLUGINS__BLOCKED": "c"},
    )
    assert settings.mode == "reject"
    assert settings.plugins.blocked == ("c",)
    assert settings.plugins.required == ("b",)


def test_the_default_changes_nothing_visible():
    assert Settings().mode == "observe"
    assert Settings().on_error == "open"


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"mod": "flag"}, "Did you mean 'mode'"),
        ({"plugins": {"block": "a"}}, "Did you mean 'plugins.blocked'"),
        ({"mode": "warn"}, "'observe', 'flag', 'correct' or 'reject'"),
        ({"false_alarm_rate": "high"}, "false_alarm_rate"),
        ({"false_alarm_rate": 0}, "greater than 0"),
        ({"timeout_ms": -1}, "timeout_ms"),
    ],
)
def test_a_wrong_setting_is_named_with_the_remedy(values: dict[str, object], hint: str):
    with pytest.raises(SettingsError) as caught:
        Settings.from_mapping(values)
    assert hint in str(caught.value)


def test_a_broken_toml_file_is_named(tmp_path: Path):
    (tmp_path / "bad.toml").write_text("mode = ")
    with pytest.raises(SettingsError, match=r"bad\.toml is not valid TOML"):
        Settings.from_toml(tmp_path / "bad.toml")
    with pytest.raises(SettingsError, match=r"none\.toml"):
        Settings.from_toml(tmp_path / "none.toml")
