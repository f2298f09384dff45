"""Options of every command that asks a service for its answers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fides_plugins.training.service.teacher import Teacher

#: An option in the panel of these options in `--help`.
service_option = partial(typer.Option, rich_help_panel="The service and the data")

InputName = Annotated[str, service_option(help="Name of the service's input tensor.")]
Encoding = Annotated[str, service_option(help="How a row is sent to TorchServe: json, npy or png.")]
RequestKey = Annotated[str, service_option(help="Key of the row in TorchServe's JSON requests.")]
ResponseKey = Annotated[str, service_option(help="Key of the class values in its answers.")]


def ask(service: str, given: Mapping[str, Any]) -> AbstractContextManager[Teacher]:
    """The teacher that `--service` and the options among a command's arguments mean, closed after the block."""
    from fides_plugins.training.service.teachers import load_teacher

    access = ("input_name", "output_name", "encoding", "request_key", "response_key")
    return closing(load_teacher(service, **{option: given[option] for option in access}))
