"""Attacks by name: what a compromised service does to its answers.

An *output attack* turns the clean class probabilities (N, K) into attacked ones. Attacks on the input and on the
model (`input.py`, `model.py`) need the service itself. A plug-in adds attacks through the hook `fides_attacks`;
a registry keeps all kinds, told apart by `kind`.

Sources: Kumar et al., "A Generative Framework for Low-Cost Result Validation of Machine
Learning-as-a-Service Inference", ASIA CCS 2024, for `switch`, `random` and `average`. The gap of
`average` is drawn at random: a constant one can be read off the attacked answer alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from fides_plugins.errors import PluginError, SettingsError
from fides_plugins.types import Attack, BoolArray, Float32Array

#: Output attacks that training uses unless it is told otherwise. `generator` joins while training.
DEFAULT_OUTPUT_ATTACKS: tuple[str, ...] = ("switch", "random", "average", "targeted", "confidence")
#: The learned attack; its network is trained together with the detector, see `adversarial.py`.
GENERATOR = "generator"

OutputFunction = Callable[[Float32Array, np.random.Generator], ArrayLike]


@dataclass(frozen=True)
class OutputAttack:
    """A change of the service's class probabilities.

    Attributes
    ----------
    name, summary:
        For tables.
    function:
        (probabilities (N, K) float32, generator) -> attacked (N, K); rows need not sum to exactly one.
    changes_label:
        Whether its purpose is another top class. Rows whose top class it cannot change (a targeted
        attack on a row that is already of the target) then count as not attacked.
    weight:
        How much it counts while a detector is trained; most attacks count 1. One that may claim any class does
        the most harm.
    """

    name: str
    summary: str
    function: OutputFunction
    changes_label: bool = True
    weight: float = 1.0
    kind: ClassVar[str] = "output"

    def stream(self, seed: int) -> np.random.Generator:
        """Its own source of random choices for a seed, so that adding an attack changes no other's."""
        return np.random.default_rng((seed, *self.name.encode()))

    def apply(self, probabilities: ArrayLike, rng: np.random.Generator) -> tuple[Float32Array, BoolArray]:
        """Attack a batch.

        Parameters
        ----------
        probabilities:
            (N, K) clean service probabilities.
        rng:
            Source of every random choice.

        Returns
        -------
        attacked:
            (N, K) float32, rows sum to one.
        changed:
            (N,) bool: rows that the attack really changed; the others must not be counted as attacked.

        Raises
        ------
        PluginError
            If the attack answers with another shape or with numbers that are no distribution.
        """
        clean = np.ascontiguousarray(probabilities, dtype=np.float32)
        attacked = np.asarray(self.function(clean, rng), dtype=np.float32)
        if attacked.shape != clean.shape or not np.isfinite(attacked).all() or (attacked < 0).any():
            raise PluginError(
                f"The attack {self.name!r} gave {attacked.shape} for {clean.shape}, or values below 0 or not finite.",
                "An output attack returns one distribution per row.",
            )
        attacked = attacked / np.maximum(attacked.sum(axis=1, keepdims=True), np.float32(1e-30))
        if self.changes_label:
            changed = attacked.argmax(axis=1) != clean.argmax(axis=1)
        else:
            changed = np.abs(attacked - clean).max(axis=1, initial=0) > 0
        return np.ascontiguousarray(attacked, dtype=np.float32), np.asarray(changed)


class AttackRegistry:
    """Attacks by name. `default_registry` makes one; there is no global registry."""

    def __init__(self, attacks: Iterable[Attack] = ()) -> None:
        self._attacks: dict[str, Attack] = {}
        for attack in attacks:
            self.add(attack)

    def add(self, attack: Attack) -> None:
        """Register an attack.

        Raises
        ------
        PluginError
            If it is no attack, or its name is taken.
        """
        if not isinstance(attack, Attack):
            raise PluginError(f"{attack!r} is no attack.", "Give an object with `name`, `kind` and `summary`.")
        if attack.name in self._attacks:
            raise PluginError(f"There are two attacks called {attack.name!r}.", "Rename one of them.")
        self._attacks[attack.name] = attack

    def get(self, name: str) -> Attack:
        """The attack called `name`.

        Raises
        ------
        SettingsError
            Listing the known names.
        """
        try:
            return self._attacks[name]
        except KeyError:
            raise SettingsError(f"Unknown attack {name!r}.", f"Known are: {', '.join(self._attacks)}.") from None

    def output(self, name: str) -> OutputAttack:
        """The output attack called `name`.

        Raises
        ------
        SettingsError
            If there is none, or it is of another kind.
        """
        attack = self.get(name)
        if not isinstance(attack, OutputAttack):
            raise SettingsError(
                f"{name!r} is a {attack.kind} attack, not an output attack.",
                f"Output attacks are: {', '.join(self.names('output'))}.",
            )
        return attack

    def names(self, kind: str | None = None) -> tuple[str, ...]:
        """Names in order of registration, of one kind or of all."""
        return tuple(n for n, a in self._attacks.items() if kind is None or a.kind == kind)

    def __iter__(self) -> Iterator[Attack]:
        return iter(self._attacks.values())


def default_registry(manager: Any = None) -> AttackRegistry:
    """The built-in output attacks, and those of plug-ins.

    Parameters
    ----------
    manager:
        A pluggy manager that knows the hook `fides_attacks`, or None for the built-ins alone.

    Raises
    ------
    PluginError
        If a plug-in's attack is none, or takes a name that exists.
    """
    registry = AttackRegistry(
        (
            OutputAttack("switch", "top-1 and top-2 probabilities exchanged", switch),
            OutputAttack("random", "top-1 exchanged with a random other class", random_class, weight=2.0),
            OutputAttack("average", "top-1 and top-2 near their mean, order reversed, gap at random", average),
            OutputAttack("targeted", "one chosen class wins, with a confidence drawn at random", targeted),
            OutputAttack("confidence", "the winning class scaled down, still winning", confidence, changes_label=False),
        )
    )
    for answer in manager.hook.fides_attacks() if manager is not None else ():
        for attack in answer or ():
            registry.add(attack)
    return registry


def top_two(p: Float32Array) -> tuple[Any, Any, Any]:
    """(N,) each: the numbers of the rows (N, K), their highest class, and the one after it."""
    rows = np.arange(len(p))
    first = p.argmax(axis=1)
    rest = p.copy()
    rest[rows, first] = -1.0
    return rows, first, rest.argmax(axis=1)


def _exchange(p: Float32Array, rows: Any, a: Any, b: Any) -> Float32Array:
    out = p.copy()
    out[rows, a], out[rows, b] = p[rows, b], p[rows, a]
    return out


def switch(probabilities: Float32Array, rng: np.random.Generator) -> Float32Array:
    """Exchange the two highest probabilities of each row. Nothing is random."""
    rows, first, second = top_two(probabilities)
    return _exchange(probabilities, rows, first, second)


def random_class(probabilities: Float32Array, rng: np.random.Generator) -> Float32Array:
    """Exchange the highest probability with that of another class, each equally likely."""
    n, k = probabilities.shape
    first = probabilities.argmax(axis=1)
    other = (first + rng.integers(1, k, size=n)) % k
    return _exchange(probabilities, np.arange(n), first, other)


def average(probabilities: Float32Array, rng: np.random.Generator) -> Float32Array:
    """Move the two highest to their mean and beyond: a share u of the gap, u uniform in (0, 1), reversed.

    u = 0 would be a tie, u = 1 is `switch`. The sum of the two is kept.
    """
    rows, first, second = top_two(probabilities)
    high, low = probabilities[rows, first], probabilities[rows, second]
    mean = (high + low) / 2
    half = (high - low) / 2 * rng.uniform(1e-3, 1.0, size=len(rows)).astype(np.float32)
    # A confident row halves to the same float twice when the share is tiny; one step keeps the order reversed.
    half = np.maximum(half, np.spacing(mean) * 2)
    out = probabilities.copy()
    out[rows, first], out[rows, second] = np.maximum(mean - half, 0), mean + half
    return out


def targeted(probabilities: Float32Array, rng: np.random.Generator) -> Float32Array:
    """Let one class, drawn for the whole batch, win with a confidence drawn uniformly from (0.5, 1).

    The other classes share the rest in their own proportions. Rows already of that class stay as they are.
    """
    n, k = probabilities.shape
    aim = int(rng.integers(k))
    wanted = rng.uniform(0.5, 1.0, size=n).astype(np.float32)
    rest = probabilities.copy()
    rest[:, aim] = 0
    # A row that gives the target everything has nothing to share; it is unchanged anyway.
    rest /= np.maximum(rest.sum(axis=1, keepdims=True), np.float32(1e-30))
    out = rest * (1 - wanted)[:, None]
    out[:, aim] = wanted
    return np.where((probabilities.argmax(axis=1) == aim)[:, None], probabilities, out)


def confidence(probabilities: Float32Array, rng: np.random.Generator) -> Float32Array:
    """Scale the winning probability by a factor drawn uniformly from (0.4, 0.9); the class stays the winner.

    What is taken away goes to the others in proportion, as far as the winner remains the winner. It makes
    a caller's confidence threshold drop good answers.
    """
    rows, first, second = top_two(probabilities)
    high, low = probabilities[rows, first].astype(np.float64), probabilities[rows, second].astype(np.float64)
    rest = np.maximum(1.0 - high, low)
    factor = rng.uniform(0.4, 0.9, size=len(rows))
    # The winner keeps w with w >= (1 - w) * low / rest, the runner-up's share after the change.
    least = low / np.maximum(low + rest, 1e-30)
    kept = np.minimum(np.maximum(high * factor, least * 1.001), high)
    out = probabilities * ((1.0 - kept) / np.maximum(rest, 1e-30))[:, None]
    out[rows, first] = kept
    # A row certain to the last bit has no proportions left: share evenly.
    certain = rest <= 1e-12
    if certain.any():
        k = probabilities.shape[1]
        even = np.repeat(((1.0 - kept[certain]) / (k - 1))[:, None], k, axis=1)
        even[np.arange(len(even)), first[certain]] = np.maximum(kept[certain], 1.0 / k)
        out[certain] = even
    return np.asarray(out, dtype=np.float32)
