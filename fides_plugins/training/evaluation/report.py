"""The evaluation as one self-contained page: no script, no font, no image from anywhere else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins import __version__
from fides_plugins.bundle import Bundle
from fides_plugins.errors import TrainingError
from fides_plugins.training.evaluation.evaluate import MEASURES, Details, Evaluation
from fides_plugins.training.predictions import Predictions
from fides_plugins.types import Float64Array

TEMPLATE = "report.html.j2"
#: Up to this many classes the whole agreement matrix is drawn, beyond it the most frequent confusions.
MATRIX_CLASSES = 20
WORST_ROWS = 8
_BINS = 40
_TICKS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
_WIDTH, _HEIGHT = 260, 200
_HEADINGS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "auroc": "AUROC",
    "tpr_at_fpr_0.01": "caught at 1% false alarms",
    "tpr_at_fpr_0.05": "caught at 5% false alarms",
    "detected": "caught at the budget",
    "recovered_service": "service's class recovered",
    "recovered_truth": "truth recovered",
}


@dataclass(frozen=True)
class Cell:
    """A figure of a table, and its interval in small print."""

    text: str
    interval: str = ""


def render(bundle: Bundle, rows: Predictions, evaluation: Evaluation, images: NDArray[Any] | None = None) -> str:
    """The page as HTML.

    Parameters
    ----------
    bundle:
        What was evaluated.
    rows:
        The clean pairs of the evaluation.
    evaluation:
        From `evaluate`.
    images:
        (N, ...) inputs of the rows, shown where they are pictures; None for predictions alone.

    Raises
    ------
    TrainingError
        If jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise TrainingError("A report needs jinja2.", "Install `fides-plugins[train]`.") from None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        resources.files("fides_plugins.training").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    result = evaluation.result
    comparison = result["comparison"]
    return template.render(
        version=__version__,
        bundle=bundle,
        clean=result["clean"],
        notes=result["notes"],
        facts=_facts(bundle, result["clean"]),
        headings=[_HEADINGS[m] for m in MEASURES],
        seen=_measures(result["attacks"]),
        unseen=_measures(result["unseen"]),
        comparisons=[(title, _comparison(comparison[key])) for title, key in _SECTIONS if comparison[key]],
        escalation=_escalation(result),
        monitor=_monitor(result["monitor"]),
        monitor_facts=result["monitor"],
        charts=[_chart(name, d) for name, d in evaluation.details.items()],
        matrix=_matrix(rows, bundle.class_names),
        confusions=_confusions(rows, bundle.class_names),
        cost=_cost(bundle.manifest.provenance),
        worst=[_worst(name, d, rows, bundle.class_names, images) for name, d in evaluation.details.items()],
    )


_SECTIONS = (("Attacks that training saw", "seen"), ("The same attacks, each left out of training", "unseen"))


def _percent(value: float | None, digits: int = 1) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f}%"


def _cell(table: dict[str, Any], name: str, digits: int = 1) -> Cell:
    low, high = table[f"{name}_interval"]
    interval = "" if low is None or high is None else f"{100 * low:.{digits}f} to {100 * high:.{digits}f}"
    return Cell(_percent(table[name], digits), interval)


def _facts(bundle: Bundle, clean: dict[str, Any]) -> list[tuple[str, Cell]]:
    detection = bundle.manifest.provenance.get("detection", {})
    facts = [
        ("Rows evaluated", Cell(f"{clean['rows']:,}")),
        ("Classes", Cell(f"{clean['classes']:,}")),
        ("Both models agree", _cell(clean, "agreement")),
    ]
    for name, title in (("service_accuracy", "Service right"), ("verification_accuracy", "Verification model right")):
        if name in clean:
            facts.append((title, _cell(clean, name)))
    facts.append(("False-alarm budget", Cell(_percent(clean["budget"], 2))))
    facts.append(("False alarms measured", _cell(clean, "false_alarm_rate", 2)))
    if bundle.manifest.calibration is not None:
        facts.append(("Calibration rows", Cell(f"{bundle.manifest.calibration.n_rows:,}")))
    if "training_rows" in detection:
        facts.append(("Training rows of the detector", Cell(f"{detection['training_rows']:,}")))
    return facts


def _measures(table: dict[str, Any]) -> list[tuple[str, int, list[Cell]]]:
    return [(name, values["rows"], [_cell(values, m) for m in MEASURES]) for name, values in table.items()]


def _comparison(table: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    lines = []
    for name, rules in table.items():
        cells = []
        for rule in rules.values():
            cell = {"rate": _percent(rule["false_alarm_rate"]), "verdict": ""}
            if rule["no_worse"] is not None:
                low, high = rule["difference_interval"]
                cell |= {
                    "learned": _percent(rule["learned"]),
                    "rule": _percent(rule["rule"]),
                    "difference": f"{100 * rule['difference']:+.1f}",
                    "interval": f"{100 * low:+.1f} to {100 * high:+.1f}",
                    "verdict": "better" if low > 0 else "no worse" if rule["no_worse"] else "worse",
                }
            cells.append(cell)
        lines.append((name, cells))
    return lines


def _escalation(result: dict[str, Any]) -> dict[str, Any]:
    """Detection over the cost of a second look, by attack: lines from the first look (no cost beyond it) on."""
    clean = result["clean"]["escalation"]
    costs = [entry["cost"] for entry in clean.values()]
    right = max(costs)
    lines = []
    for name, values in result["attacks"].items():
        caught = [values["detected"], *(entry["detected"] for entry in values["escalation"].values())]
        places = zip([0.0, *costs], caught, strict=True)
        points = " ".join(f"{_WIDTH * cost / right:.1f},{_HEIGHT * (1 - share):.1f}" for cost, share in places)
        cells = [_cell(values, "detected"), *(_cell(entry, "detected") for entry in values["escalation"].values())]
        lines.append({"name": name, "points": points, "cells": cells})
    ticks = [(round(_WIDTH * cost / right, 1), _percent(cost, 0)) for cost in (0.0, 0.1, 0.2, 0.3) if cost <= right]
    return {
        "lines": lines,
        "ticks": ticks,
        "shares": [_percent(float(share), 0) for share in clean],
        "costs": [_cell(entry, "cost") for entry in clean.values()],
        "alarms": [_cell(result["clean"], "false_alarm_rate", 2)]
        + [_cell(entry, "false_alarm_rate", 2) for entry in clean.values()],
        "width": _WIDTH,
        "height": _HEIGHT,
    }


def _monitor(table: dict[str, Any]) -> list[tuple[str, list[Cell]]]:
    lines = []
    for fraction, values in table.items():
        if isinstance(values, dict):
            delays = [_delay(values[name], *values[f"{name}_interval"]) for name in ("median", "p95")]
            lines.append((_percent(float(fraction), 0), [*delays, _cell(values, "alarmed")]))
    return lines


def _delay(value: float | None, low: float | None, high: float | None) -> Cell:
    """Requests until the alarm; an end that some sequences never came to is not reached."""
    text, first, last = ("not reached" if x is None else f"{x:.0f}" for x in (value, low, high))
    return Cell(text, "" if low is None else f"{first} to {last}")


def _x(rate: float) -> float:
    """Place of a false-alarm rate: the root gives small rates the room they need."""
    return _WIDTH * float(np.sqrt(rate))


def _chart(name: str, details: Details) -> dict[str, Any]:
    lines = {}
    for rule, (fpr, tpr) in details.roc.items():
        lines[rule] = " ".join(f"{_x(f):.1f},{_HEIGHT * (1 - t):.1f}" for f, t in zip(fpr, tpr, strict=True))
    edges = np.linspace(0, 1, _BINS + 1)
    bars = {}
    highest = 1e-9
    for kind, scores in (("benign", details.benign), ("attacked", details.attacked)):
        share = np.histogram(scores, edges)[0] / max(len(scores), 1)
        # The root again: the few benign rows with high scores are what a budget is about.
        bars[kind] = np.sqrt(share)
        highest = max(highest, float(bars[kind].max()))
    width = _WIDTH / _BINS
    shapes = {
        kind: [
            {"x": round(i * width, 1), "h": round(_HEIGHT * float(v) / highest, 1), "w": round(width - 0.6, 1)}
            for i, v in enumerate(heights)
        ]
        for kind, heights in bars.items()
    }
    ticks = [(round(_x(t), 1), f"{100 * t:g}%") for t in _TICKS]
    return {"name": name, "lines": lines, "bars": shapes, "ticks": ticks, "width": _WIDTH, "height": _HEIGHT}


def _counts(rows: Predictions) -> Float64Array:
    k = rows.n_classes
    service, verification = rows.service.argmax(axis=1), rows.verification.argmax(axis=1)
    return np.bincount(service * k + verification, minlength=k * k).reshape(k, k).astype(np.float64)


def _matrix(rows: Predictions, names: Sequence[str]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Share of each service class (row) that the verification model calls each class; empty for many classes."""
    if rows.n_classes > MATRIX_CLASSES:
        return []
    counts = _counts(rows)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return [
        (names[i], [(f"{100 * v:.0f}" if v >= 0.005 else "", round(float(v), 3)) for v in line])
        for i, line in enumerate(shares)
    ]


def _confusions(rows: Predictions, names: Sequence[str]) -> list[tuple[str, str, int]]:
    """The most frequent disagreements: service class, verification class, rows."""
    counts = _counts(rows)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:10]
    pairs = [(int(i) // rows.n_classes, int(i) % rows.n_classes) for i in order]
    return [(names[s], names[v], int(counts[s, v])) for s, v in pairs if counts[s, v] > 0]


def _cost(provenance: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Service, verification model and their ratio, where the bundle's provenance knows them."""
    service = provenance.get("service", {}).get("cost")
    verification = provenance.get("verification", {}).get("cost")
    if not verification:
        return []
    lines = []
    for key, title in (("parameters", "Parameters"), ("macs", "Multiply-adds per row")):
        mine, theirs = verification.get(key), (service or {}).get(key)
        ratio = f"1/{theirs / mine:.1f}" if mine and theirs else "n/a"
        lines.append((title, f"{theirs:,}" if theirs else "unknown", f"{mine:,}" if mine else "unknown", ratio))
    return lines


def _worst(
    name: str, details: Details, rows: Predictions, names: Sequence[str], images: NDArray[Any] | None
) -> dict[str, Any]:
    """The lies that looked most benign."""
    order = np.argsort(details.attacked, kind="stable")[:WORST_ROWS]
    own = rows.service.argmax(axis=1)
    cards = []
    for i in order:
        row = int(details.rows[i])
        cards.append(
            {
                "row": row,
                "score": f"{details.attacked[i]:.3f}",
                "picture": None if images is None else picture(images[row]),
                "said": names[own[row]],
                "claimed": names[details.claimed[i]],
                "verified": names[details.verified[i]],
                "corrected": names[details.corrected[i]],
                "label": None if rows.labels is None else names[int(rows.labels[row])],
            }
        )
    return {"name": name, "cards": cards}


def picture(image: NDArray[Any]) -> str | None:
    """A row's input as a PNG data URI, or None where it has not the shape of a picture."""
    from PIL import Image

    array = np.asarray(image)
    array = array[0] if array.ndim == 3 and array.shape[0] == 1 else array
    if array.ndim == 3 and array.shape[0] in (3, 4) and array.shape[2] not in (3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or min(array.shape[:2]) < 4 or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        return None
    values = array.astype(np.float64)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    pixels = np.round(255 * (np.nan_to_num(values) - low) / max(high - low, 1e-9)).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = pixels[:, :, :3]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
