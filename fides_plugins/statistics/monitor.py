"""Is the service as a whole under attack? An anytime-valid test over the sequence of p-values.

One row tells little where the two models often disagree; a sequence tells a lot. The test is an
*e-process*: a wealth that starts at 1 and, on benign traffic, never has an expected value above 1 at any
time. By Ville's inequality the chance that it *ever* reaches 1 / error is at most `error`, no matter how
often one looks, so the alarm needs no horizon and no correction for looking.

Three things make it exact and useful:

- **Ranks among calibration and past rows.** P-values against one fixed calibration set share that set's
  own error, of about 1 / sqrt(n), and a long sequence turns it into a false alarm. Here the n calibration
  scores only cut the line into n + 1 cells. Under exchangeability the cells of successive rows follow a
  Polya urn: the next row falls into a cell with probability (1 + rows already there) / (n + 1 + rows
  seen). Betting against these probabilities is fair at every step, for any score distribution (online
  conformal prediction: Vovk, Gammerman, Shafer, "Algorithmic Learning in a Random World", 2005, ch. 8).
- **Power bets**, k p^(k-1) for several k at once (Vovk and Wang, "E-values", Annals of Statistics 2021),
  averaged over the cell that the row fell into, so no randomness enters.
- **Every start time.** A share of the wealth is put aside and starts betting at each later row, so a long
  quiet time does not spend what is needed when an attack begins.

What the urn learns becomes permanent only while nothing is suspicious: a checkpoint is made only while the wealth
is at most 1, and `reset` forgets the rows since the last one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fides_plugins.errors import InputError
from fides_plugins.types import Float64Array

DEFAULT_ERROR = 1e-6
#: Exponents k of the bets; a bet with k near 1 would be moved by the smallest drift, and is left out.
BETS: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
#: Cells kept one by one, most suspicious first; further down they are joined in growing groups.
FINE_CELLS = 128
GROWTH = 1.05
#: Rows between two checkpoints.
CHECKPOINT_ROWS = 256
_PUT_ASIDE = 0.5


class EProcess:
    """The test itself, over several independent streams side by side.

    Parameters
    ----------
    n_calibration:
        n, the benign calibration rows behind the p-values.
    streams:
        S, how many sequences are followed at once; a server has one, a study thousands.
    """

    def __init__(self, n_calibration: int, streams: int = 1) -> None:
        if n_calibration < 1:
            raise InputError("A monitor needs at least one calibration row.", "Calibrate the detector first.")
        self.n_calibration = n_calibration
        self._edges = _cell_edges(n_calibration + 1)
        self._urn = np.repeat(np.diff(self._edges).astype(np.float64)[None], streams, axis=0)
        self._bets = np.asarray(BETS)
        self._rows = np.arange(streams)
        self.restart()

    def restart(self) -> None:
        """Wealth back to 1; what the urn has learned stays."""
        self.time = 0
        self._betting = np.zeros((len(self._rows), len(self._bets)))
        self._put_aside = 1.0

    @property
    def e_values(self) -> Float64Array:
        """(S,) wealth of each stream."""
        return np.asarray(self._betting.mean(axis=1) + self._put_aside)

    def step(self, p_values: Float64Array) -> Float64Array:
        """Take one p-value per stream, (S,) in [0, 1], and return the wealth, (S,)."""
        self._start_bets()
        cell = self._cell(p_values)
        below = np.cumsum(self._urn, axis=1)
        total = below[:, -1]
        inside = self._urn[self._rows, cell]
        high = below[self._rows, cell] / total
        low = (below[self._rows, cell] - inside) / total
        # The bet's mean over the cell: its integral p^k between the cell's ends, over the cell's width.
        gain = (high[:, None] ** self._bets - low[:, None] ** self._bets) / (high - low)[:, None]
        self._betting *= gain
        self._urn[self._rows, cell] += 1.0
        self.time += 1
        return self.e_values

    def learned(self) -> NDArray[np.float64]:
        """A copy of the urns, (S, cells)."""
        return self._urn.copy()

    def unlearn(self, urn: NDArray[np.float64]) -> None:
        """Put urns from `learned` back."""
        self._urn[:] = urn

    def _cell(self, p_values: Float64Array) -> NDArray[np.int64]:
        unit = np.asarray(p_values, np.float64) * (self.n_calibration + 1)
        # A p-value that went through float32 is a hair beside its cell; between cells it rounds up: cautious.
        # Below 1 / (n + 1), where no conformal p-value lies, the first cell takes it.
        index = np.ceil(unit * (1 - 2e-7) - 1e-6) - 1
        index = np.clip(index, 0, self.n_calibration)
        return np.asarray(np.searchsorted(self._edges, index, side="right") - 1, dtype=np.int64)

    def _start_bets(self) -> None:
        """Move the share of this start time from what is put aside to every bet.

        Half starts at once; of the other half, 1 / log(t + e) is still put aside after t rows: a share of
        about 1 / (t log^2 t) per row, almost the slowest decrease that has a finite sum.
        """
        left = _PUT_ASIDE / math.log(self.time + math.e)
        self._betting += self._put_aside - left
        self._put_aside = left


@dataclass(frozen=True)
class Alarm:
    """The service was found to be under attack.

    Attributes
    ----------
    index:
        Rows seen since the monitor was made, before the alarming one; skipped rows count.
    request_id:
        Name of the alarming request, if it has one.
    e_value:
        The wealth at that moment; at least 1 / error.
    rows_since_reset:
        Rows tested since the last reset, the alarming one included.
    """

    index: int
    request_id: str
    e_value: float
    rows_since_reset: int


class SequenceMonitor:
    """Follows one service; one per worker. Not thread-safe: call it under the worker's lock.

    Parameters
    ----------
    n_calibration:
        Benign rows behind the p-values: `Calibration.n`.
    error:
        Chance of ever raising an alarm on benign traffic, between two resets.
    """

    def __init__(self, n_calibration: int, error: float = DEFAULT_ERROR) -> None:
        if not 0.0 < error < 1.0:
            raise InputError(f"The monitor's error is {error!r}; it must lie between 0 and 1.")
        self.error = error
        self.seen = 0
        self.skipped = 0
        self.alarm: Alarm | None = None
        self._process = EProcess(n_calibration)
        self._checkpoint = self._process.learned()
        self._since_checkpoint = 0
        self._e_value = 1.0

    @property
    def e_value(self) -> float:
        """Evidence against benign traffic, 1 at the start; frozen once alarmed."""
        return self._e_value

    def update(self, p_values: ArrayLike, request_ids: Sequence[str] = ()) -> Alarm | None:
        """Take the rows of one batch in order.

        Parameters
        ----------
        p_values:
            (N,) p-values in [0, 1], small is suspicious. A conformal p-value cannot be below 1 / (n + 1), so
            a smaller one (a plug-in may give 0) counts as that: raising a p-value keeps the test valid. NaN
            (no opinion) is skipped and counted.
        request_ids:
            N names, or none.

        Returns
        -------
        The alarm if it was raised within this batch, else None. After an alarm rows are counted but not
        tested, until `reset`.

        Raises
        ------
        InputError
            If a p-value lies outside [0, 1].
        """
        values = np.asarray(p_values, dtype=np.float64).ravel()
        known = ~np.isnan(values)
        if np.any((values[known] < 0.0) | (values[known] > 1.0)):
            raise InputError("A p-value lies outside [0, 1].", "Give the p-values of a calibrated detector.")
        raised = None
        for row, (value, usable) in enumerate(zip(values, known, strict=True)):
            index, self.seen = self.seen, self.seen + 1
            if not usable:
                self.skipped += 1
            elif self.alarm is None:
                self._e_value = float(self._process.step(np.array([value]))[0])
                self._consider_checkpoint()
                if self._e_value >= 1.0 / self.error:
                    name = request_ids[row] if row < len(request_ids) else ""
                    raised = self.alarm = Alarm(index, name, self._e_value, self._process.time)
        return raised

    def reset(self) -> None:
        """After an incident: no alarm, evidence back to 1, and nothing learned since the last checkpoint."""
        self.alarm = None
        self._e_value = 1.0
        self._process.unlearn(self._checkpoint)
        self._process.restart()
        self._since_checkpoint = 0

    def _consider_checkpoint(self) -> None:
        self._since_checkpoint += 1
        if self._since_checkpoint >= CHECKPOINT_ROWS and self._e_value <= 1.0:
            self._checkpoint = self._process.learned()
            self._since_checkpoint = 0


def _cell_edges(cells: int) -> NDArray[np.int64]:
    """First cell of each group, and the number of cells at the end."""
    edges = list(range(min(FINE_CELLS, cells) + 1))
    while edges[-1] < cells:
        edges.append(min(cells, max(edges[-1] + 1, math.ceil(edges[-1] * GROWTH))))
    return np.asarray(edges, dtype=np.int64)
