"""Options of every command that asks a service for its answers."""

from __future__ import annotations

from typing import Annotated

import typer

#: Their panel in `--help`.
SERVICE_PANEL = "The service and the data"

#: What `load_teacher` takes of these options.
ACCESS = ("input_name", "output_name", "encoding", "request_key", "response_key")

InputName = Annotated[str, typer.Option(help="Name of the service's input tensor.", rich_help_panel=SERVICE_PANEL)]
Encoding = Annotated[
    str, typer.Option(help="How a row is sent to TorchServe: json, npy or png.", rich_help_panel=SERVICE_PANEL)
]
RequestKey = Annotated[
    str, typer.Option(help="Key of the row in TorchServe's JSON requests.", rich_help_panel=SERVICE_PANEL)
]
ResponseKey = Annotated[
    str, typer.Option(help="Key of the class values in its answers.", rich_help_panel=SERVICE_PANEL)
]
