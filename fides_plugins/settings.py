"""One validated settings object for every host.

The same keys are read from TorchServe's model-config.yaml (section `fides:`), from Triton's model
parameters (`fides.mode`), from a TOML file and from the environment (`FIDES_MODE`,
`FIDES_PLUGINS__BLOCKED`). The environment wins over the file, so that an operator can change a mode
without touching an artefact. Unknown keys are refused with the nearest valid one.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fides_plugins.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENVIRONMENT_PREFIX = "FIDES_"
PARAMETER_PREFIX = "fides."

Mode = Literal["observe", "flag", "correct", "reject"]
OnError = Literal["open", "closed"]
Combine = Literal["bonferroni", "any", "all", "majority"]
DetectorChoice = Literal["learned", "divergence", "both"]


def _split_names(value: Any) -> Any:
    """Let "a, b" stand for ["a", "b"], because Triton parameters and the environment know only text."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split_names)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PluginSettings(_Section):
    """Which plug-ins run, and their own options."""

    load: Names = Field((), description="Plug-ins to import, as `package.module` or `package.module:attribute`.")
    required: Names = Field((), description="Names without which start-up fails.")
    blocked: Names = Field((), description="Names never loaded, entry points and built-ins included.")
    entry_points: bool = Field(True, description="Load installed plug-ins of the group `fides_plugins`.")
    options: dict[str, dict[str, Any]] = Field({}, description="Options of each plug-in, by its name.")


class Settings(_Section):
    """Everything that can be configured, with its default."""

    bundle: str = Field("", description="Folder of the bundle; relative to the model folder in a server.")
    mode: Mode = Field("observe", description="What a verdict changes: nothing, marks, corrects or refuses.")
    on_error: OnError = Field("open", description="Rows without a verdict: pass marked, or are refused.")
    false_alarm_rate: float = Field(0.01, gt=0, lt=0.5, description="Share of benign rows that may be called attacked.")
    timeout_ms: float = Field(1000.0, gt=0, description="Time for each stage's plug-ins, in milliseconds.")
    input: str = Field("", description="Name of the tensor that the verification model takes.")
    output: str = Field("", description="Name of the service's class output.")
    output_kind: Literal["", "logits", "probabilities"] = Field(
        "", description="What the class output holds; empty: as the bundle says."
    )
    detector: DetectorChoice = Field("learned", description="Built-in detectors to use.")
    divergence: str = Field("js", description="Divergence of the built-in divergence detector.")
    combine: Combine = Field("bonferroni", description="How several detectors' opinions become one.")
    breaker_failures: int = Field(5, ge=1, description="Failures in a row after which a plug-in is left alone.")
    breaker_reset_s: float = Field(30.0, gt=0, description="Seconds until a plug-in left alone is tried again.")
    monitor_error: float = Field(1e-6, gt=0, lt=1, description="Chance of ever raising a false service alarm.")
    threads: int = Field(1, ge=1, description="Threads of each ONNX Runtime session.")
    service_name: str = Field("", description="Name of the protected model, for records and metrics.")
    plugins: PluginSettings = Field(PluginSettings(), description="Plug-ins and their options.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> Settings:
        """Settings from a nested mapping, such as a yaml section.

        Raises
        ------
        SettingsError
            Naming every unknown key with its nearest valid one, and every value of the wrong kind.
        """
        try:
            return cls.model_validate(dict(values or {}))
        except ValidationError as error:
            raise SettingsError(_explain(error), "See docs/reference/settings.md for all keys.") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Settings:
        """Settings from a TOML file: its table `fides` if there is one, else its top level."""
        return cls.from_mapping(read_toml(path))

    @classmethod
    def for_host(cls, values: Mapping[str, Any] | None, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings of a server: its own configuration, overridden by the environment."""
        given = os.environ if environ is None else environ
        ours = {k.lower(): v for k, v in given.items() if k.startswith(ENVIRONMENT_PREFIX)}
        over = nest(ours, ENVIRONMENT_PREFIX.lower(), "__")
        return cls.from_mapping(_merge(dict(values or {}), over))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The `fides` table of a TOML file, or its top level where there is none."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"Cannot read the settings file {Path(path).name}: {error.strerror}.") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{Path(path).name} is not valid TOML: {error}.") from None
    table = data.get("fides", data)
    return table if isinstance(table, dict) else {}


def nest(values: Mapping[str, Any], prefix: str = PARAMETER_PREFIX, separator: str = ".") -> dict[str, Any]:
    """{"fides.plugins.blocked": "a"} as {"plugins": {"blocked": "a"}}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if not key.startswith(prefix):
            continue
        *parents, last = key[len(prefix) :].split(separator)
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise SettingsError(f"{key!r} needs {parent!r} to be a section, but it has a value.")
        node[last] = value
    return result


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        base[key] = _merge(dict(base[key]), value) if both else value
    return base


def _explain(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        location = [str(p) for p in item["loc"]]
        key = ".".join(location)
        if item["type"] == "extra_forbidden":
            model = PluginSettings if location[0] == "plugins" and len(location) > 1 else Settings
            near = difflib.get_close_matches(location[-1], list(model.model_fields), n=1, cutoff=0.5)
            hint = f" Did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
            parts.append(f"Unknown setting {key!r}.{hint}")
        else:
            parts.append(f"Setting {key!r} has the value {item.get('input')!r}: {item['msg']}.")
    return " ".join(parts)
