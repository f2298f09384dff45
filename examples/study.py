"""What the image examples share: train a service, fit a bundle, evaluate it, end in a report.

Run one with `python -m examples.digits`, `python -m examples.mnist` or `python -m examples.glyphs`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fides_plugins.bundle import Bundle
from fides_plugins.cli._output import console, print_table, progress
from fides_plugins.cli.fit import show
from fides_plugins.codec import OutputCodec
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.attacks.model import Victim
from fides_plugins.training.data import Dataset
from fides_plugins.training.distil.augmentation import Augmentation, augment
from fides_plugins.training.evaluation.evaluate import evaluate
from fides_plugins.training.evaluation.report import render
from fides_plugins.training.evaluation.service_attacks import attack_from_inside
from fides_plugins.training.export import export_onnx
from fides_plugins.training.fit import FitOptions, fit_service
from fides_plugins.training.fit_report import FitReport
from fides_plugins.training.predictions import Predictions
from fides_plugins.training.service.teachers import TorchTeacher
from fides_plugins.types import Float32Array

INPUT_NAME = "image"
OUTPUT_NAME = "logits"
#: Held-out rows that input and model attacks are tried on; Carlini-Wagner takes its time.
ATTACKED_ROWS = 150
#: With fewer held-out rows, half of them could not train and calibrate a detector at a 1% budget again.
ROWS_FOR_UNSEEN = 1000


@dataclass(frozen=True)
class Split:
    """Three disjoint parts: for the service's training, for `fides fit`, and held out."""

    service: Dataset
    fit: Dataset
    test: Dataset


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes
    ----------
    name:
        Of the bundle.
    load:
        Seed to rows.
    build:
        The untrained service network.
    epochs, augmentation:
        Of the service's training.
    options:
        Of the fit.
    """

    name: str
    load: Callable[[int], Split]
    build: Callable[[], nn.Module]
    epochs: int
    options: FitOptions
    augmentation: Augmentation


def split_dataset(data: Dataset, service: int, fit: int, seed: int) -> Split:
    """`service` rows, `fit` rows, and the rest, at random."""
    order = np.random.default_rng(seed).permutation(data.n_rows)
    a, b, c = np.split(order, [service, service + fit])
    return Split(data.take(a), data.take(b), data.take(c))


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """3x3 convolution, batch norm, ReLU."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def train_network(
    network: nn.Module,
    rows: Dataset,
    epochs: int,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    on_epoch: Callable[[int, int], None] = lambda done, total: None,
    rate: float = 3e-3,
) -> nn.Module:
    """Train a classifier on labelled rows, each epoch on fresh changed copies; ends in evaluation mode."""
    assert rows.labels is not None
    chosen = augmentation or Augmentation(mix=0.0)
    n, size = rows.n_rows, min(64, rows.n_rows)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * (n // size) + 1, pct_start=0.2)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.from_numpy(rows.labels)
    network.train()
    for epoch in range(epochs):
        copies, _, _ = augment(rows.images, None, 1, seed * 100_003 + epoch, chosen)
        images = torch.from_numpy(copies[n:])
        order = torch.randperm(n, generator=generator)
        for start in range(0, n // size * size, size):
            batch = order[start : start + size]
            loss = functional.cross_entropy(network(images[batch]), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        on_epoch(epoch + 1, epochs)
    return network.eval()


def logits_of(graph: bytes | OnnxModel, images: Float32Array) -> Float32Array:
    """(N, K) logits of an ONNX graph with one input and one output."""
    model = graph if isinstance(graph, OnnxModel) else OnnxModel(graph)
    name = model.inputs[0].name
    return np.concatenate(
        [next(iter(model.run({name: images[i : i + 512]}).values())) for i in range(0, len(images), 512)]
    )


def pair(service: bytes, bundle: Bundle, rows: Dataset) -> Predictions:
    """Both models' answers on rows."""
    spec = bundle.manifest.verification
    assert spec is not None
    return Predictions.check(
        logits_of(service, rows.images),
        logits_of(bundle.model(spec), rows.images),
        rows.labels,
        service_codec=OutputCodec(),
        verification_codec=spec.codec,
    )


def run(example: Example, out: Path, seed: int, quiet: bool = False) -> dict[str, Any]:
    """Train, fit, evaluate; returns all numbers and writes them to `out`, with all that it made."""
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with progress(quiet) as bar:
        began = time.perf_counter()
        split = example.load(seed)
        task = bar.add_task("train the service", total=example.epochs)
        torch.manual_seed(seed)
        network = train_network(
            example.build(),
            split.service,
            example.epochs,
            seed,
            example.augmentation,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
        service = export_onnx(network, split.service.images, INPUT_NAME, OUTPUT_NAME)
        (out / "service.onnx").write_bytes(service)
        for part in ("fit", "test"):
            rows = getattr(split, part)
            np.savez_compressed(
                out / f"{part}.npz", images=rows.images, labels=rows.labels, class_names=rows.class_names
            )
        seconds["service"] = time.perf_counter() - began
        began = time.perf_counter()
        tasks: dict[str, Any] = {}

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        report = fit_service(
            str(out / "service.onnx"),
            replace(split.fit, labels=None),
            out / "bundle",
            seed=seed,
            options=example.options,
            name=example.name,
            progress=tick,
        )
        seconds["fit"] = time.perf_counter() - began
        began = time.perf_counter()
        bundle = Bundle.load(out / "bundle")
        rows = pair(service, bundle, split.test)
        task = bar.add_task("attack inputs and model", total=None)
        victim = Victim(
            TorchTeacher(network, example.name),
            bundle,
            split.test.images[:ATTACKED_ROWS],
            split.service.images,
            split.service.labels,
        )
        extra, skipped = attack_from_inside(
            victim, seed, tell=lambda what, share: bar.update(task, description=what, completed=share, total=1.0)
        )
        bar.update(task, completed=1.0, total=1.0)
        tasks["evaluate"] = bar.add_task("evaluate", total=None)
        found = evaluate(
            bundle,
            rows,
            registry=default_registry(),
            extra=extra,
            unseen=rows.n_rows >= ROWS_FOR_UNSEEN,
            seed=seed,
            progress=lambda what, done: bar.update(tasks["evaluate"], description=what),
        )
        seconds["evaluate"] = time.perf_counter() - began
    numbers = {**summary(report, rows, found.result, seconds), "skipped": skipped}
    (out / "result.json").write_text(json.dumps({"summary": numbers, "evaluation": found.result}, indent=1))
    (out / "report.html").write_text(render(bundle, rows, found, split.test.images), encoding="utf-8")
    if not quiet:
        show(report)
        tell(numbers)
        console().print(f"Report: {out / 'report.html'}")
    return numbers


def summary(
    report: FitReport, rows: Predictions, evaluation: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """The figures that the documentation quotes."""
    assert report.service_cost is not None
    assert rows.labels is not None
    return {
        "held_out_rows": rows.n_rows,
        "service_accuracy": float((rows.service.argmax(axis=1) == rows.labels).mean()),
        "verification_accuracy": float((rows.verification.argmax(axis=1) == rows.labels).mean()),
        "agreement": rows.agreement,
        "student": report.student,
        "parameters": [report.service_cost.parameters, report.verification_cost.parameters],
        "macs": [report.service_cost.macs, report.verification_cost.macs],
        "false_alarm_rate": evaluation["clean"]["false_alarm_rate"],
        "attacks": {
            name: {key: values[key] for key in ("rows", "tpr_at_fpr_0.01", "detected", "recovered_service")}
            for name, values in evaluation["attacks"].items()
        },
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
    }


def tell(numbers: dict[str, Any]) -> None:
    """Print the summary for people."""
    screen = console()
    (sp, vp), (sm, vm) = numbers["parameters"], numbers["macs"]
    screen.print(
        f"On {numbers['held_out_rows']:,} held-out rows: service {numbers['service_accuracy']:.4f} accurate, "
        f"verification model {numbers['verification_accuracy']:.4f}, agreement {numbers['agreement']:.4f}, "
        f"false alarms {numbers['false_alarm_rate']:.4f}."
    )
    screen.print(f"Cost: {vp / sp:.3f} of the service's parameters, {vm / sm:.3f} of its multiply-adds.")
    print_table(
        "Attacks on held-out rows",
        ("attack", "rows", "caught", "caught at 1% false alarms", "class recovered"),
        [
            (
                name,
                f"{v['rows']:,}",
                f"{v['detected']:.3f}",
                f"{v['tpr_at_fpr_0.01']:.3f}",
                f"{v['recovered_service']:.3f}",
            )
            for name, v in numbers["attacks"].items()
        ],
    )
    for name, reason in numbers["skipped"].items():
        screen.print(f"Not tried: {name}. {reason}")
    screen.print(f"Seconds: {numbers['seconds']}")


def main(example: Example) -> None:
    """The command line of an example."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{example.name}")
    parser.add_argument("--out", type=Path, default=Path("build") / example.name, help="folder for all that is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    numbers = run(example, arguments.out, arguments.seed, quiet=arguments.json)
    if arguments.json:
        print(json.dumps(numbers, indent=2))
