"""What greedy transfer is worth: GDTL against the same student trained in other ways, at equal epochs.

`python -m benchmarks.gdtl_ablation --mnist build/mnist`, after `python -m examples.mnist`.

The student is a small CNN pre-trained here on drawn letters and symbols, never on a digit. It then learns
the MNIST service from few rows, four ways: from scratch on labels, plain distillation from scratch,
distillation of every pre-trained layer at once, and greedily (`gdtl.search`). The others get the sum of the
epochs that the greedy search used. Agreement is measured on rows that no arm and no step saw.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from examples.glyphs.__main__ import CHARACTERS, FONTS, draw
from examples.study import logits_of, train_network
from fides_plugins.training.data import Dataset
from fides_plugins.training.distil.augmentation import augment
from fides_plugins.training.distil.distillation import (
    DistillationSettings,
    TransferSet,
    agreement,
    distil,
    predict,
)
from fides_plugins.training.distil.gdtl import Search
from fides_plugins.training.distil.networks import small_cnn
from fides_plugins.training.distil.pretrained import PretrainedNetwork, without_last_linear
from fides_plugins.training.distil.students import Student
from fides_plugins.types import Float32Array

WIDTH = 12
#: The student sees every picture averaged down to this.
SIZE = (14, 14)
STEP_EPOCHS = 6
TRANSFER_ROWS = 1200


def letters(per_class: int, seed: int) -> Dataset:
    """Drawn characters that are no digits, cut to 28x28 and averaged to what the student sees."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng(seed)
    characters = [c for c in CHARACTERS if not c.isdigit()]
    pictures = [
        draw(c, folder / f"{FONTS[rng.integers(len(FONTS))]}.ttf", rng)[2:30, 2:30]
        for c in characters
        for _ in range(per_class)
    ]
    images = (np.stack(pictures)[:, None].reshape(-1, 1, 14, 2, 14, 2).mean((3, 5)) / 255.0).astype(np.float32)
    return Dataset(images, np.repeat(np.arange(len(characters)), per_class))


def pretrain(per_class: int, epochs: int) -> nn.Module:
    """The student's body, trained to read letters, without its last layer."""
    data = letters(per_class, 0)
    torch.manual_seed(0)
    network = train_network(small_cnn(1, SIZE, WIDTH, 90), data, epochs, rate=5e-3)
    fresh = letters(5, 1)
    accuracy = (predict(network, fresh.images).argmax(1) == fresh.labels).mean()
    print(f"pre-trained on letters: {accuracy:.3f} accurate on new drawings", flush=True)
    return without_last_linear(network)


class _Study:
    def __init__(self, folder: Path, body: nn.Module) -> None:
        service = (folder / "service.onnx").read_bytes()
        with np.load(folder / "fit.npz") as fit, np.load(folder / "test.npz") as test:
            self.images, self.labels, self.test = fit["images"], fit["labels"], test["images"]
        self.service = service
        self.test_logits = logits_of(service, self.test)
        self.body = body
        with torch.no_grad():
            self.features = int(body(torch.zeros(1, 1, *SIZE)).shape[1])

    def rows(self, n: int, seed: int) -> tuple[TransferSet, Any, Float32Array]:
        """A transfer set from `n` rows, and 300 rows that choose the steps."""
        order = np.random.default_rng(seed).permutation(len(self.images))
        chosen, held = order[:n], order[-300:]
        shown, labels, _ = augment(self.images[chosen], self.labels[chosen], TRANSFER_ROWS // n - 1, seed)
        held_images = self.images[held]
        return (
            TransferSet(shown, logits_of(self.service, shown), labels),
            held_images,
            logits_of(self.service, held_images),
        )

    def student(self, pretrained: bool) -> Student:
        def build() -> nn.Module:
            body = copy.deepcopy(self.body)
            if not pretrained:
                for module in body.modules():
                    if hasattr(module, "reset_parameters"):
                        module.reset_parameters()
            return PretrainedNetwork(body, self.features, 10)

        return Student("letters" if pretrained else "scratch", build, SIZE)

    def arms(self, n: int, seed: int) -> dict[str, float]:
        transfer, held, held_logits = self.rows(n, seed)
        settings = DistillationSettings(epochs=STEP_EPOCHS)
        search = Search(transfer, held, held_logits, agreement=0.999, distillation=settings, seed=seed)
        greedy = search.run([self.student(True)])
        epochs = STEP_EPOCHS * len(greedy.steps)
        result = {"epochs": float(epochs), "GDTL": agreement(predict(greedy.model, self.test), self.test_logits)}
        hard = np.full_like(transfer.logits, -20.0)
        known = transfer.labels >= 0
        hard[np.flatnonzero(known), transfer.labels[known]] = 20.0
        only = TransferSet(transfer.images[known], hard[known], transfer.labels[known])
        labels_only = DistillationSettings(temperature=1.0, alpha=1.0, beta=0.0)
        for name, pretrained, rows, how in (
            ("scratch, labels", False, only, labels_only),
            ("scratch, distilled", False, transfer, settings),
            ("pre-trained, distilled whole", True, transfer, settings),
        ):
            model = self.student(pretrained).model(transfer.images, seed)
            distil(model, torch.from_numpy(rows.images), rows, how, how.learning_rate, epochs, seed)
            result[name] = agreement(predict(model, self.test), self.test_logits)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, default=Path("build/mnist"), help="what examples.mnist left")
    parser.add_argument("--rows", type=int, nargs="+", default=[30, 100, 300])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=2, help="0 and 1 were looked at while rates were chosen")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began = time.perf_counter()
    study = _Study(arguments.mnist, pretrain(60, 10))
    table: dict[str, list[dict[str, float]]] = {}
    for n in arguments.rows:
        table[str(n)] = []
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            table[str(n)].append(study.arms(n, seed))
            print(n, seed, {k: round(v, 4) for k, v in table[str(n)][-1].items()}, flush=True)
        means = {k: np.mean([r[k] for r in table[str(n)]]) for k in table[str(n)][0]}
        print(f"{n} rows, mean of {arguments.seeds}:", {k: round(float(v), 4) for k, v in means.items()}, flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
