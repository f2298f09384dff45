"""`fides demo`: a protected service on a real server, attacked before your eyes."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fides_plugins.cli._output import AsJson, console, print_json, print_table, progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.text import Text

    from fides_plugins.demo.run import DemoFigures, Example, Share

FALSE_ALARM_RATE = 0.02


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    server: Annotated[str, typer.Option(help="triton, torchserve or inprocess. Default: triton where it runs.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the split, the training and the attacks.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Keep service model, bundle and repository here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a digits service, fit a bundle, serve both, attack the service, and count what was caught."""
    from fides_plugins.demo.run import SERVERS
    from fides_plugins.errors import SettingsError

    chosen = server or _default_server(quiet=as_json)
    if chosen not in SERVERS:
        raise SettingsError(f"Unknown server {chosen!r}.", f"Choose one of: {', '.join(SERVERS)}.")
    with tempfile.TemporaryDirectory(prefix="fides-demo-") as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = _run(chosen, seed, folder, as_json)
    if as_json:
        print_json(figures.as_json())
    else:
        _show(figures)


def _default_server(quiet: bool) -> str:
    from fides_plugins.errors import ServerError

    # Without the extra `triton` its launcher cannot even be imported.
    with contextlib.suppress(ServerError):
        from fides_plugins.launch.triton import is_available

        if is_available():
            return "triton"
    if not quiet:
        console(stderr=True).print("No Triton wheel for this platform, so the demo runs in this process.")
    return "inprocess"


def _run(server: str, seed: int, folder: Path, quiet: bool) -> DemoFigures:
    from fides_plugins.demo.compromised import ATTACKS
    from fides_plugins.demo.digits import load_digits_split, train_service
    from fides_plugins.demo.hosts import Deployment
    from fides_plugins.demo.run import fit_digits, make_host, measure

    with progress(quiet) as bar:
        split = load_digits_split(seed)
        task = bar.add_task("train the service on scanned digits", total=None)
        service = train_service(split.service, seed, on_epoch=lambda d, n: bar.update(task, completed=d, total=n))
        (folder / "service.onnx").write_bytes(service)
        fit_task = bar.add_task("fit the bundle", total=None)
        bundle = fit_digits(
            folder, split, seed, lambda text, d, n: bar.update(fit_task, description=text, completed=d, total=n)
        )
        deployment = Deployment(service, bundle, folder, FALSE_ALARM_RATE, seed)
        start = bar.add_task(f"start {server}", total=1)
        with make_host(server, deployment) as host:
            bar.update(start, completed=1)
            task = bar.add_task("send held-out digits, clean and attacked", total=len(ATTACKS) + 2)
            return measure(host, deployment, split, lambda _: bar.advance(task))


def _show(figures: DemoFigures) -> None:
    rate = f"{figures.false_alarm_rate:.0%}"
    shares = {"none (false alarms)": [figures.false_alarms, figures.disagreement_false_alarms]}
    for f in figures.attacks:
        shares[f.attack] = [f.caught, f.caught_by_disagreement, f.recovered, f.recovered_of_caught]
    rows = [
        (name, str(found[0].rows), *[_percent(share) for share in found], *[""] * (4 - len(found)))
        for name, found in shares.items()
    ]
    print_table(
        f"{figures.server}: held-out digits at a false-alarm budget of {rate} (95% intervals)",
        ("attack", "rows", "called attacked", "simple rule", "answers recovered", "... of those caught"),
        rows,
    )
    bare, protected = figures.latency_ms["bare"], figures.latency_ms["protected"]
    out = console()
    out.print(
        f"Simple rule: alarm when both models name different digits. The service is right on "
        f"{figures.service_accuracy.value:.1%} of these digits; the verification model names the same digit as the "
        f"service on {figures.agreement.value:.1%}."
    )
    if figures.unanswered:
        out.print(f"{figures.unanswered} clean rows got no verdict.")
    out.print(
        f"Latency of one request, median: bare {bare:.2f} ms, protected {protected:.2f} ms "
        f"(+{protected - bare:.2f} ms, side by side in one run)."
    )
    for example in figures.examples:
        _show_example(example)


def _percent(share: Share) -> str:
    low, high = share.interval
    return f"{share.value:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def _show_example(example: Example) -> None:
    from rich.table import Table
    from rich.text import Text

    side = Text.assemble(
        (f"attack: {example.attack}\n", "bold"),
        f"the service says  {example.claimed}\n",
        ("verdict           " + f"{example.status} (p = {example.p_value:.4f})\n", "red"),
        (f"corrected to      {example.corrected}\n", "green"),
        f"un-attacked it would have said {example.honest}; the label is {example.truth}",
    )
    grid = Table.grid(padding=(0, 3))
    grid.add_row(_picture(example.image), side)
    out = console()
    out.print()
    out.print(grid)


def _picture(image: NDArray[np.float32]) -> Text:
    """A grey-scale image as text: two characters a pixel, in colour, or in shades where there is none."""
    from rich.text import Text

    if not console().is_terminal:
        shades = " .:-=+*#%@"
        return Text("\n".join("".join(shades[round(float(v) * 9)] * 2 for v in row) for row in image))
    text = Text()
    for row in image:
        for value in row:
            grey = round(float(value) * 255)
            text.append("  ", style=f"on rgb({grey},{grey},{grey})")
        text.append("\n")
    return text
