"""`fides audit run`: judge recorded predictions with the same pipeline that serves, part by part.

Every finished part is a file in `OUT.partial/`, made in one step; when all are there they become `OUT`.
A run that was killed therefore goes on where it stopped and gives the same output. Memory holds a few
batches, however long the recording is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fides_plugins import __version__
from fides_plugins.batch.output import verdict_table, with_faults
from fides_plugins.batch.records import (
    ID_COLUMN,
    INPUT_COLUMN,
    PART_ROWS,
    Part,
    Recording,
    matrix,
    open_recording,
    read_part,
    tensor,
)
from fides_plugins.bundle import Bundle, ServiceSpec, VerificationSpec
from fides_plugins.codec import OutputCodec
from fides_plugins.errors import InputError
from fides_plugins.pipeline import Pipeline, VerifyOutcome
from fides_plugins.settings import Settings
from fides_plugins.types import BoolArray, IntArray, Query, Verification

PLAN_NAME = "plan.json"
#: A batch after the fact may take its time; this only ends a plug-in that hangs.
BATCH_TIMEOUT_MS = 600_000.0

#: Told the number of rows judged since the last call.
OnRows = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs, on whatever machine it runs."""

    recording: Recording
    settings: Settings
    bundle: str
    folder: str
    probabilities: bool

    def part_path(self, part: Part) -> Path:
        """File of one part's verdicts."""
        return Path(self.folder) / f"part-{part.index:06d}.parquet"

    def missing(self) -> list[Part]:
        """Parts that no run has finished."""
        return [p for p in self.recording.parts if not self.part_path(p).is_file()]


class Auditor:
    """Judges batches of a recording: the pipeline, and how columns become its arguments.

    Raises
    ------
    FidesError
        If the bundle or a plug-in cannot be loaded, or there is nothing that could verify.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pipeline = Pipeline.from_settings(job.settings.model_copy(update={"bundle": job.bundle}))
        assert self._pipeline.bundle is not None
        manifest = self._manifest = self._pipeline.bundle.manifest
        if job.recording.reference == INPUT_COLUMN:
            if not self._pipeline.manager.hook.fides_verify.get_hookimpls():
                raise InputError(
                    "The recording has inputs but no reference, and the bundle has no verification model.",
                    "Record verification_probabilities, or use a bundle with a verification model.",
                )
            if manifest.input is None:
                raise InputError(
                    "The bundle does not say what its input looks like.", "Make it again with `fides fit`."
                )

    def judge(self, table: pa.Table, start: int) -> pa.Table:
        """Verdicts of one batch whose first row is row `start` of the recording."""
        recording = self._job.recording
        claimed, lengths = matrix(table.column(recording.service), self._pipeline.n_classes)
        codec = _codec(recording.service, self._manifest.service)
        service = codec.read(claimed)
        query, outcome, faults = self._reference(table)
        if codec.kind == "probabilities":
            logits = np.isfinite(claimed).all(axis=1) & ~service.valid
            faults[f"{recording.service} does not hold probabilities; are these logits?"] = logits
        faults |= self._wrong_lengths(recording.service, lengths)
        verdict = with_faults(self._pipeline.validate(query, service, outcome), faults)
        ids = table.column(ID_COLUMN) if recording.request_ids else None
        return verdict_table(verdict, start, ids, self._job.probabilities)

    def close(self) -> None:
        """Close the plug-ins."""
        self._pipeline.close()

    def _wrong_lengths(self, name: str, lengths: IntArray) -> dict[str, BoolArray]:
        k = self._pipeline.n_classes
        found = np.unique(lengths[(lengths >= 0) & (lengths != k)])
        return {f"{name} has {n} numbers, but the bundle has {k} classes": lengths == n for n in found}

    def _reference(self, table: pa.Table) -> tuple[Query, VerifyOutcome, dict[str, BoolArray]]:
        """What a batch is judged by, and what is wrong with rows of it."""
        name, k = self._job.recording.reference, self._pipeline.n_classes
        service_name = self._job.settings.service_name
        if name != INPUT_COLUMN:
            values, lengths = matrix(table.column(name), k)
            reference = _codec(name, self._manifest.verification).read(values)
            mask = reference.valid & (lengths == k)
            verification = Verification.single(reference.probabilities, "recording", mask)
            rows_only = np.empty((table.num_rows, 0), dtype=np.float32)
            query = Query({"recorded": rows_only}, model_name=service_name)
            faults = {f"{name} holds numbers that are not finite": (lengths == k) & ~np.isfinite(values).all(axis=1)}
            return query, VerifyOutcome(verification), faults | self._wrong_lengths(name, lengths)
        spec = self._manifest.input
        assert spec is not None
        inputs, good = tensor(table.column(name), spec.shape[1:], np.dtype(spec.dtype))
        query = Query({spec.name: inputs}, model_name=service_name)
        outcome = self._pipeline.verify(query)
        found = outcome.verification
        if found is not None and not good.all():
            # Rows without a usable input were verified on zeros, which gives no reference.
            found = Verification(found.references, found.available & good[:, None], found.sources, found.evidence)
        shape = tuple(s or "any" for s in spec.shape[1:])
        return query, VerifyOutcome(found, outcome.failures), {f"{name} does not fit the shape {shape}": ~good}


def _codec(column: str, spec: ServiceSpec | VerificationSpec | None) -> OutputCodec:
    """Reads a column: its name says what it holds, the bundle at what temperature."""
    return OutputCodec("logits" if column.endswith("logits") else "probabilities", spec.temperature if spec else 1.0)


def prepare(
    bundle: str | Path,
    source: str | Path,
    target: str | Path,
    settings: Settings | None = None,
    probabilities: bool = True,
    part_rows: int = PART_ROWS,
) -> Job:
    """Plan a run, or continue the one that was stopped.

    Raises
    ------
    InputError
        If the output exists, or what was left behind belongs to another input, bundle or settings.
    FidesError
        If the recording or the bundle cannot be used.
    """
    out = Path(target).resolve()
    if out.exists():
        raise InputError(f"{out.name} exists.", "Remove it or choose another output.")
    recording = open_recording(Path(source).resolve(), part_rows)
    digest = Bundle.load(bundle).digest
    used = _after_the_fact(settings or Settings())
    folder = out.with_name(out.name + ".partial")
    job = Job(recording, used, str(Path(bundle).resolve()), str(folder), probabilities)
    plan = {
        "version": __version__,
        "bundle": digest,
        "fingerprint": recording.fingerprint,
        "settings": used.model_dump(mode="json", exclude={"bundle"}),
        "recording": {k: v for k, v in asdict(recording).items() if k not in ("path", "parts", "fingerprint")},
        "part_rows": part_rows,
        "probabilities": probabilities,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN_NAME
    text = json.dumps(plan, indent=1, sort_keys=True)
    begun = any(folder.glob("part-*.parquet"))
    if begun and path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{folder.name} was left by a run with another input, bundle, settings or release.",
            "Remove that folder to begin anew.",
        )
    staging = path.with_suffix(".tmp")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
    return job


def _after_the_fact(settings: Settings) -> Settings:
    """The settings without what belongs to serving: the audit log must not record old rows as new ones."""
    plugins = settings.plugins
    names = [t for t in plugins.load if t.rpartition(":")[2] != "audit"]
    kept = plugins.model_copy(
        update={"load": tuple(names), "required": tuple(r for r in plugins.required if r != "audit")}
    )
    return settings.model_copy(update={"plugins": kept, "timeout_ms": max(settings.timeout_ms, BATCH_TIMEOUT_MS)})


def judge_parts(job: Job, parts: Sequence[Part], on_rows: OnRows = lambda n: None) -> None:
    """Judge neighbouring parts in this process; each becomes a file when it is complete."""

    def verdicts(part: Part, batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
        done = 0
        for batch in batches:
            yield auditor.judge(batch, part.start + done)
            done += batch.num_rows
            on_rows(batch.num_rows)

    with closing(Auditor(job)) as auditor:
        for part, pairs in groupby(read_part(job.recording, parts), key=itemgetter(0)):
            write_tables(job.part_path(part), verdicts(part, (batch for _, batch in pairs)))


def write_tables(path: Path, tables: Iterator[pa.Table]) -> None:
    """Write tables of one schema, at least one, to a Parquet file that is there when it is complete."""
    # The process's id: two workers that were both handed a part must not write into one file.
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    first = next(tables)
    try:
        with pq.ParquetWriter(staging, first.schema) as writer:
            for table in chain([first], tables):
                writer.write_table(table)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def judge_here(job: Job, on_rows: OnRows = lambda n: None) -> None:
    """Judge all missing parts on this machine; runs of neighbours are read in one pass."""
    for parts in neighbours(job.missing()):
        judge_parts(job, parts, on_rows)


def neighbours(parts: Sequence[Part], at_most: int = 0) -> Iterator[list[Part]]:
    """Parts in runs of neighbours, of at most `at_most` parts (0: any number)."""
    group: list[Part] = []
    for part in parts:
        if group and (part.index != group[-1].index + 1 or len(group) == at_most):
            yield group
            group = []
        group.append(part)
    if group:
        yield group
