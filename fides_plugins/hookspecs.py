"""The hooks. Read this first.

A plug-in is a module or an object with functions named as below and marked with `hookimpl`. It takes
only the arguments it needs: leave out what you do not use, and your plug-in keeps working when a hook
gains an argument.

    from fides_plugins import hookimpl

Order of a request: `fides_verify` -> `fides_detect` -> policy -> `fides_reclassify` (attacked rows
only) -> `fides_record`. Policy is no hook: `policy.py` turns detections and failures into one status per
row. `pipeline.py` makes the calls, each plug-in alone, from several threads at once; the plug-ins of one
hook share `timeout_ms`. Every argument is read-only, arrays included: nothing may be mutated. Rows (N)
and classes (K) are the same in every argument of one call. A batch may have zero rows.

One process does not always call every hook of your plug-in. Each TorchServe worker and each Triton step
has an object of its own; on Triton `fides_verify` runs in one process and the rest in another. A client
whose reference comes with a receipt never calls `fides_verify`.

An exception, a time-out, an answer of the wrong shape or a score that is no number never reaches the
client and never passes as trust: the plug-in is named and counted, and rows that would have been trusted
become `error`. Each hook says below where it differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

from fides_plugins.types import Detection, Prediction, Query, Reclassification, Verdict, Verification

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fides_plugins.bundle import Bundle
    from fides_plugins.settings import Settings
    from fides_plugins.types import Attack

PROJECT_NAME = "fides"
ENTRY_POINT_GROUP = "fides_plugins"

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def fides_configure(settings: Settings, bundle: Bundle | None) -> None:
    """Called once per process, after all plug-ins are loaded and before the first request.

    Take what you need from `settings` (your own options are `settings.plugins.options["your name"]`)
    and from `bundle` (None only in commands that have none, such as `fides plugins`; a server always has
    one). A constructor sees neither, so load models and open connections here. All plug-ins are called,
    last loaded first. Return value: none. An exception stops start-up, because a plug-in that could not
    set itself up cannot be relied on.

    Example
    -------
    >>> from fides_plugins import hookimpl
    >>> class Greeter:
    ...     @hookimpl
    ...     def fides_configure(self, settings):
    ...         self.mode = settings.mode
    """


@hookspec
def fides_unconfigure() -> None:
    """Called once per process, at shutdown: flush queues, close connections. Exceptions are logged and ignored.

    Example
    -------
    >>> from fides_plugins import hookimpl
    >>> class Alerts:
    ...     @hookimpl
    ...     def fides_unconfigure(self):
    ...         self.queue = []
    """


@hookspec
def fides_verify(query: Query) -> Verification | None:
    """Give a reference distribution for every row of `query`.

    All implementations are asked, at the same time, each within `timeout_ms`; the answers are joined
    along the verifier axis, so order does not matter.

    Parameters
    ----------
    query:
        The inputs of N rows as the service model gets them; on Triton decoded or converted first, where `fides
        attach` set that up.

    Returns
    -------
    `Verification.single(probabilities, source)` with probabilities (N, K) float32 whose rows sum to
    one, or None for "I cannot judge this query". If nobody answers, the rows are `indeterminate`.
    Rows you cannot answer: pass `available`, (N,) bool. An exception or a time-out makes rows that
    would be trusted `error`.

    Example
    -------
    >>> import numpy as np
    >>> from fides_plugins import Verification, hookimpl
    >>> class Uniform:
    ...     @hookimpl
    ...     def fides_verify(self, query):
    ...         return Verification.single(np.full((query.n_rows, 10), 0.1), source="uniform")
    """


@hookspec
def fides_detect(query: Query, service: Prediction, verification: Verification) -> Detection | None:
    """Judge the service's answer against the references.

    All implementations are asked at the same time; policy combines them without regard to order. Nobody is
    asked where no verifier answered: such rows are `indeterminate`.

    Parameters
    ----------
    query:
        The inputs of N rows. Triton hands them to this step only with `--pass-inputs`; otherwise the one
        tensor is empty and called `ROWS_ONLY`.
    service:
        The claimed answer, probabilities (N, K). Rows with `service.valid` False are uniform and will
        be `error` whatever you say.
    verification:
        References (N, M, K) of all verifiers; `verification.probabilities` is their mean, (N, K). Rows with
        `verification.valid` False have none; they are uniform and will be `indeterminate`.

    Returns
    -------
    `Detection` with `score` (N,) in [0, 1], higher more suspicious, your own decision `attacked` (N,)
    bool, and if you are calibrated `p_value` (N,) in [0, 1]. None means "no opinion on this batch"; if
    nobody has one, the rows are `indeterminate`. Rows you have no opinion on: pass `valid`, (N,) bool,
    False there. A score that is not a finite number where `valid` is True is a failure in those rows, not
    an opinion withheld: it makes rows that would be trusted `error`, and so does an exception.

    Example
    -------
    >>> from fides_plugins import Detection, hookimpl
    >>> class Disagreement:
    ...     @hookimpl
    ...     def fides_detect(self, service, verification):
    ...         differs = service.label != verification.label
    ...         return Detection(score=differs, attacked=differs, source="disagreement")
    """


@hookspec
def fides_reclassify(
    query: Query, service: Prediction, verification: Verification, detection: Detection
) -> Reclassification | None:
    """Recover the answer that the service would have given had it not been attacked.

    Called only when policy found attacked rows, and only *with* those rows (N counts them alone).
    Implementations are asked one after the other within one `timeout_ms`, last loaded first and the built-in
    last; the first answer that is not None wins. An exception or an answer of the wrong shape is counted, named in the
    reason, and the next implementation is asked; the rows stay `attacked`.

    Parameters
    ----------
    query, service, verification:
        As for `fides_detect`, attacked rows only.
    detection:
        The combined detection that policy decided on.

    Returns
    -------
    `Reclassification(probabilities, source)` with probabilities (N, K), or None for "ask the next".

    Example
    -------
    >>> from fides_plugins import Reclassification, hookimpl
    >>> class TrustTheVerifier:
    ...     @hookimpl
    ...     def fides_reclassify(self, verification):
    ...         return Reclassification(verification.probabilities, source="verifier")
    """


@hookspec
def fides_record(query: Query, verdict: Verdict) -> None:
    """Observe a finished verdict: audit log, alerts.

    All implementations are called at the same time once the verdict is final; they cannot change it, and
    their return value is ignored. An exception is counted and logged, nothing more. The answer waits for
    them, so do slow work elsewhere: put it on a bounded queue and return.

    Parameters
    ----------
    query:
        As for `fides_detect`.
    verdict:
        The verdict for the same N rows.

    Example
    -------
    >>> from fides_plugins import hookimpl
    >>> class Counter:
    ...     attacked = 0
    ...     @hookimpl
    ...     def fides_record(self, verdict):
    ...         self.attacked += verdict.counts()["attacked"]
    """


@hookspec
def fides_attacks() -> Sequence[Attack] | None:
    """Give attacks for `fides evaluate --plugin` to try, beside the built-in ones. Never called in a server.

    All implementations are asked, last loaded first; their attacks are put together. A name that exists
    already, or an object that is no attack, stops the command with a `PluginError`.

    Returns
    -------
    `training.attacks.OutputAttack` objects, or None for none. An attack's function takes clean service
    probabilities (N, K) float32 and a numpy generator, and returns attacked ones (N, K); every random
    choice must come from that generator, so that a seed repeats it. The clean array must not be changed.

    Example
    -------
    >>> from fides_plugins import hookimpl
    >>> class Shrug:
    ...     @hookimpl
    ...     def fides_attacks(self):
    ...         from fides_plugins.training.attacks import OutputAttack
    ...         return [OutputAttack("shrug", "every class alike", lambda p, rng: p * 0 + 1, changes_label=False)]
    """
