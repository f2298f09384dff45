"""The `fides:` section of model-config.yaml: what the handler needs besides the shared settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fides_plugins.bundle import MANIFEST_NAME
from fides_plugins.errors import SettingsError
from fides_plugins.serving.http import CallsRule, RowsRule
from fides_plugins.settings import Settings

SECTION = "fides"
#: Folder of the bundle inside an archive that `fides attach` wrote.
BUNDLE_FOLDER = "fides_bundle"

EnvelopeRule = Literal["request", "grpc", "always", "never"]


class BodyFormat(BaseModel):
    """Where a JSON request holds the input and a JSON response holds the class output."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    request: str = Field("", description="Dotted path to the input in a request's JSON body; empty: the whole body.")
    response: str = Field("", description="Dotted path to the class output in a response; empty: the whole response.")


class AnswerFormat(BaseModel):
    """Where a final response names its class, to compare it with the label that was judged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    compare: bool = Field(True, description="Compare the class that a response names with the judged label.")
    path: str = Field(
        "", description="Dotted path to the class in a response; if set, a response without it is an `error`."
    )
    names: tuple[str, ...] = Field(
        (), description="What responses call the classes, by label; empty: the bundle's names."
    )


class HostOptions(BaseModel):
    """Keys of the section that only TorchServe knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    handler: str = Field(min_length=1, description="The handler to protect, as the manifest named it before.")
    rows: RowsRule = Field("refuse", description="Verdict of a request when rows and requests are not one to one.")
    rows_per_request: int | None = Field(None, ge=1, description="Rows that every request makes, in request order.")
    calls: CallsRule | None = Field(
        None, description="Several inference() per batch: `parts` of it, or `passes` over it; unset: by their sizes."
    )
    envelope: EnvelopeRule = Field("request", description="When the verdict travels in the body.")
    parser: BodyFormat | str | None = Field(
        None, description="How to read bodies where there is no inference() to wrap: JSON paths, or a module."
    )
    answer: AnswerFormat = Field(AnswerFormat(), description="How responses name their class.")
    concurrent: bool = Field(True, description="Verify while inference() runs.")
    metrics: bool = Field(True, description="Report metrics through TorchServe.")

    @model_validator(mode="after")
    def _rows_need_a_rule(self) -> HostOptions:
        if self.rows_per_request not in (None, 1) and self.rows == "refuse":
            raise ValueError("rows_per_request needs `rows: any` or `rows: worst`")
        return self


def read_section(config: Mapping[str, Any] | None, model_dir: str | Path) -> tuple[HostOptions, Settings]:
    """Options and settings from a parsed model-config.yaml.

    Parameters
    ----------
    config:
        The whole file as TorchServe hands it to a handler.
    model_dir:
        Folder of the unpacked archive; a relative `bundle` is looked for there.

    Raises
    ------
    SettingsError
        If the section is absent, or a key is unknown or has a wrong value.
    """
    section = (config or {}).get(SECTION)
    if not isinstance(section, Mapping):
        raise SettingsError(
            f"model-config.yaml has no section `{SECTION}:`.",
            "Name the handler to protect and the bundle there; see docs/how-to/torchserve.md.",
        )
    own = {key: value for key, value in section.items() if key in HostOptions.model_fields}
    shared = {key: value for key, value in section.items() if key not in own}
    try:
        options = HostOptions.model_validate(own)
    except ValidationError as error:
        parts = [f"{'.'.join(str(p) for p in e['loc']) or SECTION}: {e['msg']}" for e in error.errors()]
        raise SettingsError(
            f"The section `{SECTION}:` of model-config.yaml is not valid: {'; '.join(parts)}.",
            "See docs/how-to/torchserve.md for its keys.",
        ) from None
    settings = Settings.for_host(shared)
    return options, settings.model_copy(update={"bundle": str(_find_bundle(settings.bundle, Path(model_dir)))})


def _find_bundle(name: str, model_dir: Path) -> Path:
    """Folder of the bundle.

    `torch-model-archiver --extra-files bundle` copies the *contents* of a folder to the top of the
    archive, so a bundle that is not where its name says may lie there.
    """
    folder = model_dir / (name or BUNDLE_FOLDER)
    if not (folder / MANIFEST_NAME).is_file() and (model_dir / MANIFEST_NAME).is_file():
        return model_dir
    return folder
