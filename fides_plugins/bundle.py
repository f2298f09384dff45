"""The artefact: a folder with `fides.json` and the files it lists.

`fides.json` names every file with its size and SHA-256. Loading reads each file once, checks the
digest of exactly the bytes that are then used, and refuses what does not fit; there is no pickle.
`Bundle.digest`, the SHA-256 of `fides.json`, therefore stands for the whole bundle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fides_plugins.codec import OutputCodec
from fides_plugins.errors import BundleError, InputError, SettingsError
from fides_plugins.onnx_graph import CONTROL_FLOW, JUDGING_OPERATORS
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.statistics.conformal import Calibration
from fides_plugins.types import OutputKind

FORMAT_VERSION = 1
MANIFEST_NAME = "fides.json"
#: A manifest is a few kilobytes; a larger file is not one and is not read into memory.
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
#: An ONNX file cannot be larger than protobuf's limit of 2 GiB.
MAX_FILE_BYTES = 2**31

_REFIT = "Make the bundle again with `fides fit`, or restore it from where it was published."


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class InputSpec(_Part):
    """The tensor that the service and the verification model take."""

    name: str
    dtype: str = Field(description="numpy name, such as float32")
    shape: tuple[int | None, ...] = Field(description="None for a free axis; the first axis is the row")


class ServiceSpec(_Part):
    """How a class output is read."""

    output_kind: OutputKind = "logits"
    temperature: float = Field(1.0, gt=0)

    @property
    def codec(self) -> OutputCodec:
        """Reads and writes this output."""
        return OutputCodec(self.output_kind, self.temperature)


class VerificationSpec(ServiceSpec):
    """The distilled model that gives the reference distribution, whose output is read as a service's is."""

    file: str = "verification.onnx"
    input_name: str = "input"
    output_name: str = "logits"


class GraphSpec(_Part):
    """An ONNX graph from (service, verification), both (N, K) float32: detector or re-classifier."""

    file: str


class CalibrationSpec(_Part):
    """Benign scores per detector, as JSON: name -> sorted list of numbers."""

    file: str = "calibration.json"
    n_rows: int = Field(ge=1)
    false_alarm_rate: float = Field(description="Budget behind `thresholds`; settings may ask for another.")
    thresholds: dict[str, float] = {}


class FileSpec(_Part):
    """Digest and size of one file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0, le=MAX_FILE_BYTES)


class Manifest(_Part):
    """Contents of `fides.json`."""

    format_version: Literal[1] = 1
    name: str = "fides"
    bundle_version: int = Field(1, ge=1, description="Grows with each release; clients can ask for a minimum.")
    class_names: tuple[str, ...]
    input: InputSpec | None = None
    service: ServiceSpec = ServiceSpec()
    verification: VerificationSpec | None = None
    detector: GraphSpec | None = None
    reclassifier: GraphSpec | None = None
    calibration: CalibrationSpec | None = None
    provenance: dict[str, Any] = {}
    files: dict[str, FileSpec] = {}

    @field_validator("class_names")
    @classmethod
    def _two_classes(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(names) < 2:
            raise ValueError("at least two class names are needed")
        return names

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileSpec]) -> dict[str, FileSpec]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or name in ("", MANIFEST_NAME):
                raise ValueError(f"{name!r} is not a file inside the bundle")
        return files


class Bundle:
    """A loaded, checked bundle. Make one with `Bundle.load` or `write_bundle`.

    Attributes
    ----------
    manifest:
        The parsed `fides.json`.
    digest:
        SHA-256 of `fides.json`, hex; stands for every byte of the bundle.
    manifest_bytes:
        The exact bytes of `fides.json`, which `digest` is taken over.
    """

    def __init__(self, manifest: Manifest, manifest_bytes: bytes, files: Mapping[str, bytes]) -> None:
        self.manifest = manifest
        self.digest = hashlib.sha256(manifest_bytes).hexdigest()
        self.manifest_bytes = manifest_bytes
        self._files = MappingProxyType(dict(files))
        self._check_parts()

    @classmethod
    def load(cls, folder: str | Path) -> Bundle:
        """Read a bundle and check every digest.

        Raises
        ------
        BundleError
            Naming the file that is missing, changed or unreadable, and what to do.
        """
        root = Path(folder)
        manifest_bytes = _read(root / MANIFEST_NAME, MANIFEST_NAME, MAX_MANIFEST_BYTES)
        manifest = _parse_manifest(manifest_bytes)
        files: dict[str, bytes] = {}
        for name, spec in manifest.files.items():
            data = _read(root / name, name, spec.size)
            if len(data) != spec.size or hashlib.sha256(data).hexdigest() != spec.sha256:
                raise BundleError(f"Bundle file {name} was changed: its SHA-256 is not the one in fides.json.", _REFIT)
            files[name] = data
        return cls(manifest, manifest_bytes, files)

    @classmethod
    def in_memory(cls, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
        """A checked bundle without a folder: `manifest` with the digests of `files` filled in.

        Raises
        ------
        BundleError
            If the parts do not fit together.
        """
        digests = {n: FileSpec(sha256=hashlib.sha256(d).hexdigest(), size=len(d)) for n, d in sorted(files.items())}
        fields = {**manifest.model_dump(), "files": {n: d.model_dump() for n, d in digests.items()}}
        complete = Manifest.model_validate(fields)
        text = json.dumps(complete.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        bundle = cls(complete, text.encode(), files)
        bundle.calibrations()
        return bundle

    @property
    def n_classes(self) -> int:
        """K, the number of classes."""
        return len(self.manifest.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """K class names, by label."""
        return self.manifest.class_names

    def file(self, name: str) -> bytes:
        """The checked bytes of one file.

        Raises
        ------
        BundleError
            If the bundle has no such file.
        """
        try:
            return self._files[name]
        except KeyError:
            raise BundleError(f"The bundle has no file {name}; it has {sorted(self._files)}.", _REFIT) from None

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of all files besides fides.json."""
        return tuple(self._files)

    def model(self, part: VerificationSpec | GraphSpec, threads: int = 1) -> OnnxModel:
        """An onnxruntime session over one of the bundle's graphs.

        Raises
        ------
        BundleError
            If it is no usable graph, keeps weights elsewhere, or has operators by which it might run for ever.
        """
        judging = isinstance(part, GraphSpec)

        def allows(operator: str) -> bool:
            return operator in JUDGING_OPERATORS if judging else operator not in CONTROL_FLOW

        return OnnxModel(self.file(part.file), threads, part.file, allows)

    def calibrations(self) -> dict[str, Calibration]:
        """Calibration of each detector, by its name; empty when the bundle has none.

        Raises
        ------
        BundleError
            If the file does not hold a list of numbers per detector.
        """
        spec = self.manifest.calibration
        if spec is None:
            return {}
        try:
            table = json.loads(self.file(spec.file))
            return {str(name): Calibration(np.asarray(values, np.float64)) for name, values in table.items()}
        except (ValueError, TypeError, AttributeError, RecursionError, InputError) as error:
            raise BundleError(f"{spec.file} does not hold calibration scores: {error}", _REFIT) from None

    def calibration(self, detector: str, false_alarm_rate: float) -> Calibration:
        """Calibration of one detector, checked to support a false-alarm rate.

        Raises
        ------
        SettingsError
            If the bundle has no such calibration, or too few rows for the rate.
        """
        known = self.calibrations()
        if detector not in known:
            raise SettingsError(
                f"The bundle has no calibration for the detector {detector!r}; it has {sorted(known)}.",
                "Choose one of these, or make the bundle again with `fides fit`.",
            )
        try:
            known[detector].require(false_alarm_rate)
        except InputError as error:
            raise SettingsError(str(error)) from None
        return known[detector]

    def _check_parts(self) -> None:
        k, spec = self.n_classes, self.manifest.verification
        for named in (spec, self.manifest.detector, self.manifest.reclassifier, self.manifest.calibration):
            if named is not None and named.file not in self.manifest.files:
                raise BundleError(f"fides.json refers to {named.file}, but lists no digest for it.", _REFIT)
        if spec is not None:
            graph = self.model(spec)
            _check_tensor(spec.file, "input", spec.input_name, [i.name for i in graph.inputs])
            _check_tensor(spec.file, "output", spec.output_name, [o.name for o in graph.outputs])
            output = next(o for o in graph.outputs if o.name == spec.output_name)
            width = output.shape[-1] if output.shape else None
            if width is not None and width != k:
                raise BundleError(f"{spec.file} gives {width} classes, but fides.json names {k}.", _REFIT)
        for part, result in ((self.manifest.detector, "score"), (self.manifest.reclassifier, "probabilities")):
            if part is None:
                continue
            graph = self.model(part)
            for wanted in ("service", "verification"):
                _check_tensor(part.file, "input", wanted, [i.name for i in graph.inputs])
            _check_tensor(part.file, "output", result, [o.name for o in graph.outputs])
            widths = {i.shape[-1] for i in graph.inputs if i.shape} - {None, k}
            if widths:
                raise BundleError(f"{part.file} takes {widths.pop()} classes, but fides.json names {k}.", _REFIT)


def write_bundle(folder: str | Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write a bundle in one step and load it back.

    Parameters
    ----------
    folder:
        Where it goes. An existing bundle is replaced; anything else is refused.
    manifest:
        Everything but `files`, which is filled in here.
    files:
        Name to bytes.

    Raises
    ------
    BundleError
        If the folder holds something that is not a bundle, or the parts do not fit together.
    """
    target = Path(folder)
    check_target(target)
    bundle = Bundle.in_memory(manifest, files)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, data in {**files, MANIFEST_NAME: bundle.manifest_bytes}.items():
            path = staging / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        staging.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return bundle


def check_target(folder: str | Path) -> None:
    """Refuse a place where `write_bundle` would not write; ask before long work.

    Raises
    ------
    BundleError
        If something that is not a bundle is in the way.
    """
    target = Path(folder)
    if target.exists() and not (target / MANIFEST_NAME).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"{target.name} exists and is not a bundle.", "Choose another folder or empty it.")


def calibration_file(scores: Mapping[str, Any]) -> bytes:
    """JSON of sorted benign scores by detector, each as the shortest text that gives the same float32."""
    table = {name: [float(str(v)) for v in np.sort(np.asarray(s, np.float32))] for name, s in scores.items()}
    if any(not math.isfinite(v) for values in table.values() for v in values):
        raise BundleError("Calibration scores must be finite.")
    return json.dumps(table, separators=(",", ":")).encode()


def _check_tensor(file: str, what: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise BundleError(f"{file} has no {what} {name!r}; it has {known}.", _REFIT)


def _read(path: Path, name: str, limit: int) -> bytes:
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for somebody to write into it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise BundleError(f"Bundle file {name} is no regular file.", _REFIT)
            # One byte more than allowed is enough to see that a file has grown.
            return stream.read(limit + 1)
    except FileNotFoundError:
        raise BundleError(f"Bundle file {name} is missing.", _REFIT) from None
    except OSError as error:
        raise BundleError(f"Bundle file {name} cannot be read: {error.strerror}.", "Check its permissions.") from None


def _parse_manifest(data: bytes) -> Manifest:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise BundleError(f"{MANIFEST_NAME} is not valid JSON.", _REFIT) from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{MANIFEST_NAME} has format version {version!r}; this release reads {FORMAT_VERSION}.",
            "Install a release of fides-plugins that knows this version, or make the bundle again.",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise BundleError(f"{MANIFEST_NAME} is not valid at {where!r}: {first['msg']}.", _REFIT) from None
