"""Records one attacked request in each mode, through a real Triton, as docs/assets/modes.svg.

`python docs/record_modes.py FOLDER`, where FOLDER is that of the tutorial after its step 6: the bundle and
a repository whose service lies. Nothing in the picture is typed by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import tritonclient.http
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fides_plugins.launch.triton import TritonServer
from fides_plugins.types import softmax

MODES = ("observe", "flag", "correct", "reject")
OUTPUT = Path(__file__).resolve().parent / "assets" / "modes.svg"
COLOURS = {"attacked": "bold red", "trusted": "green"}


def ask(server: TritonServer, image: np.ndarray) -> tuple[str, str, str]:
    """What the client of `digits` gets, and status and p-value from `digits__fides`."""
    with tritonclient.http.InferenceServerClient(server.http_address) as client:
        tensor = tritonclient.http.InferInput("image", list(image.shape), "FP32")
        tensor.set_data_from_numpy(image)
        try:
            logits = client.infer("digits", [tensor]).as_numpy("logits")
            answer = f"{logits.argmax()}, with {softmax(logits).max():.0%}"
            verdict = client.infer("digits__fides", [tensor])
        except tritonclient.http.InferenceServerException as error:
            # The refusal itself says what the row was: "attacked: refused 1 of 1 row(s) ...".
            reason = error.message().partition("fides: ")[2]
            return f"refused ({error.status()}) {reason.partition(': ')[2]}", reason.partition(":")[0], ""
        status = verdict.as_numpy("FIDES_STATUS").ravel()[0].decode()
        return answer, status, f"{verdict.as_numpy('FIDES_P_VALUE').ravel()[0]:.4f}"


def picture(image: np.ndarray) -> Text:
    """An 8x8 digit in two columns a pixel."""
    text = Text()
    for row in image.reshape(8, 8):
        for value in row:
            grey = int(255 * (1 - value))
            text.append("  ", style=f"on rgb({grey},{grey},{grey})")
        text.append("\n")
    return text


def main() -> None:
    """Ask in every mode and save the picture."""
    folder = Path(sys.argv[1]).resolve()
    data = np.load(folder / "held_out.npz")
    image, label = data["images"][:1], int(data["labels"][0])
    console = Console(record=True, width=104, file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the process
    console.print(Text(f"A digit that no training saw: a {label}. The service lies about it.\n"))
    console.print(picture(image))
    table = Table("mode", "the client of `digits` gets", "FIDES_STATUS", "FIDES_P_VALUE")
    for mode in MODES:
        attach = ["attach", "triton", "models", "digits", "--bundle", "bundle", "--mode", mode]
        subprocess.run([sys.executable, "-m", "fides_plugins.cli", *attach], cwd=folder, check=True, timeout=120)
        try:
            with TritonServer(folder / "models", config_name="fides") as server:
                answer, status, p_value = ask(server, image)
        finally:
            detach = ["detach", "triton", "models", "digits"]
            subprocess.run([sys.executable, "-m", "fides_plugins.cli", *detach], cwd=folder, check=True, timeout=120)
        right = answer.startswith(f"{label},")
        table.add_row(mode, Text(answer, "green" if right else "red"), Text(status, COLOURS.get(status, "")), p_value)
    console.print(table)
    svg = console.export_svg(title="one attacked request in each mode")
    # No font from elsewhere: the picture works offline.
    OUTPUT.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
