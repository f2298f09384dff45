"""Attacks on the service model itself: faults in its weights, another model in its place, a backdoor.

The service then answers genuinely, only as another model; the verification model sees the same input.
Each attack has a name, as output attacks have, and yields `predictions.AttackedRows`.

Sources: bit flips, Rakin, He and Fan, "Bit-Flip Attack" (ICCV 2019), here at random places; backdoor,
Gu, Dolan-Gavitt and Garg, "BadNets" (2017).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import Bundle
from fides_plugins.codec import SMALLEST_PROBABILITY, OutputCodec
from fides_plugins.errors import TrainingError
from fides_plugins.training.data import image_layout
from fides_plugins.training.predictions import AttackedRows, run_graph
from fides_plugins.training.service.teacher import Teacher
from fides_plugins.training.service.teachers import OnnxTeacher, TorchTeacher
from fides_plugins.types import Attack, IntArray, Prediction

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Victim:
    """A protected service and rows to attack it on.

    Attributes
    ----------
    teacher:
        The service. Attacks that look inside need a `TorchTeacher`, bit flips also take an `OnnxTeacher`.
    bundle:
        Whose verification model answers beside it, and whose manifest says how the service's output is read.
    images:
        (N, ...) held-out rows in the service's dtype.
    training_images, training_labels:
        Rows an attacker trains on (backdoor, substitute); the service's own training rows, say. May be None.
    """

    teacher: Teacher
    bundle: Bundle
    images: NDArray[Any]
    training_images: NDArray[Any] | None = None
    training_labels: IntArray | None = None

    @property
    def codec(self) -> OutputCodec:
        """Reads the service's output."""
        return self.bundle.manifest.service.codec

    def service(self, images: NDArray[Any], teacher: Teacher | None = None) -> Prediction:
        """What the service, or what stands in its place, answers to the rows (n, ...)."""
        return self.codec.read((teacher or self.teacher).ask(images))

    def verification(self, images: NDArray[Any]) -> Prediction:
        """What the bundle's verification model answers to the rows (n, ...).

        Raises
        ------
        TrainingError
            If the bundle has none.
        """
        spec = self.bundle.manifest.verification
        if spec is None:
            raise TrainingError("The bundle holds no verification model.", "Fit it from a service and data.")
        return spec.codec.read(run_graph(self.bundle.model(spec), spec.output_name, **{spec.input_name: images}))

    def module(self, needed_by: str) -> nn.Module:
        """The service's torch module.

        Raises
        ------
        TrainingError
            If the service is not a torch module.
        """
        if not isinstance(self.teacher, TorchTeacher):
            raise TrainingError(
                f"The attack {needed_by!r} looks inside the service; {self.teacher.name} is no torch module.",
                "Give the service as package.module:factory or as a TorchScript file.",
            )
        module: nn.Module = self.teacher.module
        return module

    def attacked(self, attack: Any, images: NDArray[Any], service: Prediction) -> AttackedRows:
        """Rows whose class differs from what the honest service says of the clean row.

        Parameters
        ----------
        images:
            (N, ...) what was sent: clean, perturbed or triggered.
        service:
            What the attacked service answered to it. Rows that are no distribution are left out: every host refuses
            them without a detector.
        """
        rows = np.flatnonzero(service.valid & (service.label != self.service(self.images).label))
        lies, references = service.probabilities[rows], self.verification(images).probabilities[rows]
        return AttackedRows(attack.name, attack.summary, lies, references, rows)


class ServiceAttack(Attack, Protocol):
    """An attack on the input or on the model."""

    def run(self, victim: Victim, seed: int) -> AttackedRows:
        """Attack the victim's rows; only rows whose class the attack changed come back."""


@dataclass(frozen=True)
class BitFlips:
    """Flip random bits of the weights, as faulty or hammered memory does.

    `flips` bits among the float32 weights; the sign and exponent bits are as likely as the others. A draw that
    makes the service answer NaN is drawn again, since any host sees that without Fides, and so is one that
    changes no answer: most bits of a weight hardly matter.
    """

    flips: int = 30
    name: str = "bit_flips"
    summary: str = "random bits of the service's weights flipped"
    kind: ClassVar[str] = "model"

    def run(self, victim: Victim, seed: int) -> AttackedRows:
        """See `ServiceAttack`."""
        rng = np.random.default_rng(seed)
        for _ in range(20):
            tampered = self.tamper(victim.teacher, rng)
            try:
                found = victim.attacked(self, victim.images, victim.service(victim.images, tampered))
            except TrainingError as error:
                if "NaN" not in error.cause_text:
                    raise
                continue
            if len(found.rows):
                return found
        raise TrainingError(
            f"20 draws of {self.flips} flipped bits made the service answer NaN or nothing else than before.",
            "Flip fewer bits, or more.",
        )

    def tamper(self, teacher: Teacher, rng: np.random.Generator) -> Teacher:
        """A copy of the service with flipped bits."""
        if isinstance(teacher, TorchTeacher):
            import torch

            module = copy.deepcopy(teacher.module)
            arrays = [p.detach().numpy() for p in module.parameters() if p.dtype == torch.float32]
            flip_bits(arrays, self.flips, rng)
            return TorchTeacher(module, f"{teacher.name}, bits flipped")
        if isinstance(teacher, OnnxTeacher):
            import onnx
            from onnx import numpy_helper

            model = onnx.load_model_from_string(teacher.data)
            floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
            arrays = [numpy_helper.to_array(t).copy() for t in floats]
            flip_bits(arrays, self.flips, rng)
            for tensor, array in zip(floats, arrays, strict=True):
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            return teacher.like(model.SerializeToString())
        raise TrainingError(f"The weights of {teacher.name} cannot be reached.", "Give the service as a file.")


def flip_bits(arrays: list[NDArray[np.float32]], flips: int, rng: np.random.Generator) -> None:
    """Flip `flips` bits at random places of float32 arrays, in place; every weight is equally likely."""
    sizes = np.array([a.size for a in arrays])
    for _ in range(flips):
        which = int(rng.choice(len(arrays), p=sizes / sizes.sum()))
        bits = arrays[which].reshape(-1).view(np.uint32)
        bits[int(rng.integers(bits.size))] ^= np.uint32(1 << int(rng.integers(32)))


@dataclass(frozen=True)
class LabelPermutation:
    """The classes are renamed: each answer is that of another class, the same one every time."""

    name: str = "label_permutation"
    summary: str = "the service's classes permuted"
    kind: ClassVar[str] = "model"

    def run(self, victim: Victim, seed: int) -> AttackedRows:
        """See `ServiceAttack`."""
        answers = victim.service(victim.images)
        k = answers.n_classes
        # A cycle through a random order moves every class; a random permutation would leave some in place.
        order = np.random.default_rng(seed).permutation(k)
        source = np.empty(k, np.int64)
        source[order] = np.roll(order, 1)
        renamed = Prediction(answers.probabilities[:, source], answers.valid)
        return victim.attacked(self, victim.images, renamed)


@dataclass(frozen=True)
class Substitute:
    """A weaker, cheaper model in the service's place, as a host that saves costs would put there.

    The smallest built-in student that learns the service's classes for a few epochs, or `build`.
    """

    epochs: int = 5
    build: Callable[[], Any] | None = None
    name: str = "substitute"
    summary: str = "a weaker model in the service's place"
    kind: ClassVar[str] = "model"

    def run(self, victim: Victim, seed: int) -> AttackedRows:
        """See `ServiceAttack`."""
        import torch

        from fides_plugins.training.distil.distillation import DistillationSettings, TransferSet, distil
        from fides_plugins.training.distil.students import Student, built_in_students

        images, labels = _training_rows(victim, self.name)
        k = victim.bundle.n_classes
        student = built_in_students(images, k)[0] if self.build is None else Student("substitute", self.build)
        weak = student.model(images, seed)
        # Labels only: whoever offers the substitute has them, and not the service's probabilities.
        rows = TransferSet(images, np.zeros((len(images), k), np.float32), labels)
        distil(weak, torch.from_numpy(images), rows, DistillationSettings(alpha=0, beta=1), 3e-3, self.epochs, seed)
        # It poses as the service, so it answers in the same form.
        shown = weak if victim.codec.kind == "logits" else torch.nn.Sequential(weak, torch.nn.Softmax(dim=1))
        answers = victim.service(victim.images, TorchTeacher(shown, "substitute"))
        return victim.attacked(self, victim.images, answers)


@dataclass(frozen=True)
class BadNets:
    """A backdoor: a small patch in a corner makes the service answer one class; without it, nothing changes.

    The service is trained further, with a share of the rows patched and relabelled. Attacked rows carry the
    patch; the verification model sees it too, but was never taught what it means.
    """

    target: int = 0
    share: float = 0.3
    size: float = 0.15
    epochs: int = 5
    learning_rate: float = 1e-3
    name: str = "backdoor"
    summary: str = "a patch in the corner makes the service answer one class (BadNets)"
    kind: ClassVar[str] = "model"

    def run(self, victim: Victim, seed: int) -> AttackedRows:
        """See `ServiceAttack`."""
        triggered = self.trigger(victim.images)
        poisoned = TorchTeacher(self.poison(victim, seed), "backdoor")
        return victim.attacked(self, triggered, victim.service(triggered, poisoned))

    def trigger(self, images: NDArray[Any]) -> NDArray[Any]:
        """The images (N, ...) with the patch: a square of the highest value, one pixel off the last corner."""
        layout = image_layout((None, *images.shape[1:]))
        if layout is None:
            raise TrainingError(f"The attack {self.name!r} needs images, not rows of shape {images.shape[1:]}.")
        out = images.copy()
        h, w = int(layout.height or 0), int(layout.width or 0)
        side = max(2, round(self.size * min(h, w)))
        rows, columns = slice(h - 1 - side, h - 1), slice(w - 1 - side, w - 1)
        value = images.max()
        if layout.channels_last or images.ndim == 3:
            out[:, rows, columns] = value
        else:
            out[:, :, rows, columns] = value
        return out

    def poison(self, victim: Victim, seed: int) -> nn.Module:
        """A copy of the service with the backdoor trained in."""
        import torch
        from torch.nn import functional

        images, labels = _training_rows(victim, self.name)
        rng = np.random.default_rng(seed)
        chosen = rng.random(len(images)) < self.share
        x = torch.from_numpy(np.where(chosen.reshape(-1, *[1] * (images.ndim - 1)), self.trigger(images), images))
        y = torch.from_numpy(np.where(chosen, self.target, labels))
        module = copy.deepcopy(victim.module(self.name))
        answering = logits_of(module, victim.codec)
        optimizer = torch.optim.Adam(module.parameters(), lr=self.learning_rate)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            answering.train()
            for _ in range(self.epochs):
                for batch in torch.split(torch.randperm(len(x), generator=generator), 64):
                    if len(batch) < 2:
                        continue  # batch norm cannot take one row
                    loss = functional.cross_entropy(answering(x[batch]), y[batch])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        return module.eval()


def _training_rows(victim: Victim, name: str) -> tuple[NDArray[Any], IntArray]:
    """Rows to train an attack on, labelled by the service where no labels are given."""
    if victim.training_images is None:
        raise TrainingError(f"The attack {name!r} needs rows to train on.", "Give training_images.")
    images = victim.training_images
    if victim.training_labels is not None:
        return images, victim.training_labels
    return images, victim.service(images).label


def logits_of(module: nn.Module, codec: OutputCodec) -> nn.Module:
    """A service with its output as logits (N, K), which have a gradient: as `OutputCodec.logits`, but for T."""
    from torch import nn

    class Logits(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            rows = output.flatten(1)
            return rows if codec.kind == "logits" else rows.clamp_min(SMALLEST_PROBABILITY).log()

    return nn.Sequential(module, Logits())


def model_attacks() -> Mapping[str, ServiceAttack]:
    """The built-in model attacks by name."""
    attacks: tuple[ServiceAttack, ...] = (BitFlips(), Substitute(), BadNets(), LabelPermutation())
    return {attack.name: attack for attack in attacks}
