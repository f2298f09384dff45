from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fides_plugins.bundle import Bundle, GraphSpec, VerificationSpec
from fides_plugins.errors import BundleError, SettingsError
from fides_plugins.testing import make_bundle


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "fides.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_bundle_comes_back_as_it_was_written(bundle_folder: Path):
    bundle = Bundle.load(bundle_folder)
    assert bundle.n_classes == 10
    assert set(bundle.file_names) == {"verification.onnx", "detector.onnx", "reclassifier.onnx", "calibration.json"}
    assert bundle.calibrations()["learned"].n == 999
    assert Bundle.load(bundle_folder).digest == bundle.digest


@pytest.mark.parametrize("name", ["verification.onnx", "detector.onnx", "reclassifier.onnx", "calibration.json"])
def test_every_changed_byte_is_found_in_every_file(bundle_folder: Path, name: str):
    path = bundle_folder / name
    original = path.read_bytes()
    for position in np.linspace(0, len(original) - 1, 25).astype(int):
        changed = bytearray(original)
        changed[position] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(BundleError, match=rf"{name} was changed.*fides fit"):
            Bundle.load(bundle_folder)
    for other in (original[:-1], original + b"x", b""):
        path.write_bytes(other)
        with pytest.raises(BundleError, match=rf"{name} was changed"):
            Bundle.load(bundle_folder)


@pytest.mark.parametrize("name", ["fides.json", "detector.onnx"])
def test_a_missing_file_is_named(bundle_folder: Path, name: str):
    (bundle_folder / name).unlink()
    with pytest.raises(BundleError, match=rf"{name} is missing.*fides fit"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_format_version_is_refused(bundle_folder: Path, version: object):
    edit_manifest(bundle_folder, format_version=version)
    with pytest.raises(BundleError, match=r"format version .* reads 1.*Install a release"):
        Bundle.load(bundle_folder)


def test_a_wrong_class_count_is_refused(bundle_folder: Path):
    edit_manifest(bundle_folder, class_names=[f"c{i}" for i in range(10)] + ["one too many"])
    # The fake's graph has a fixed width of 10, so the names must agree with it.
    with pytest.raises(BundleError, match=r"verification.onnx gives 10 classes, but fides.json names 11"):
        Bundle.load(bundle_folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../b", "fides.json"])
def test_a_manifest_cannot_point_outside_the_bundle(bundle_folder: Path, name: str):
    edit_manifest(bundle_folder, files={name: {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(BundleError, match="not a file inside the bundle"):
        Bundle.load(bundle_folder)


def test_a_part_without_a_digest_is_refused(bundle_folder: Path):
    files = json.loads((bundle_folder / "fides.json").read_text())["files"]
    files.pop("detector.onnx")
    edit_manifest(bundle_folder, files=files)
    with pytest.raises(BundleError, match=r"detector.onnx, but lists no digest"):
        Bundle.load(bundle_folder)


def test_unknown_fields_are_refused(bundle_folder: Path):
    edit_manifest(bundle_folder, surprise=1)
    with pytest.raises(BundleError, match="surprise"):
        Bundle.load(bundle_folder)


def test_broken_json_is_refused(bundle_folder: Path):
    (bundle_folder / "fides.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.load(bundle_folder)


def test_graphs_must_have_the_declared_tensors(tmp_path: Path):
    with pytest.raises(BundleError, match="has no output 'scores_of_nothing'"):
        make_bundle(tmp_path / "a", verification=VerificationSpec(input_name="pixels", output_name="scores_of_nothing"))
    with pytest.raises(BundleError, match="has no input 'service'"):
        make_bundle(tmp_path / "b", detector=GraphSpec(file="verification.onnx"))
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob(".*"))


def test_writing_replaces_a_bundle_but_nothing_else(tmp_path: Path, bundle_folder: Path):
    assert make_bundle(bundle_folder, n_classes=4).n_classes == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        make_bundle(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_calibration_says_what_it_cannot_support(bundle_folder: Path):
    bundle = Bundle.load(bundle_folder)
    with pytest.raises(SettingsError, match=r"needs at least 9999 calibration rows; there are 999"):
        bundle.calibration("learned", 1e-4)
    with pytest.raises(SettingsError, match="no calibration for the detector 'psychic'"):
        bundle.calibration("psychic", 0.01)


def test_the_same_content_has_the_same_digest(tmp_path: Path):
    assert make_bundle(tmp_path / "a").digest == make_bundle(tmp_path / "b").digest


def test_what_is_no_regular_file_is_refused_at_once(bundle_folder: Path):
    for name in ("fides.json", "detector.onnx"):
        path = bundle_folder / name
        kept = path.read_bytes()
        for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero"), Path.mkdir):
            path.unlink()
            make(path)
            with pytest.raises(BundleError, match=rf"{name} (is no regular file|cannot be read)"):
                Bundle.load(bundle_folder)
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(kept)
    Bundle.load(bundle_folder)


def test_json_of_a_hundred_thousand_levels_is_refused(bundle_folder: Path):
    (bundle_folder / "fides.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="not valid JSON"):
        Bundle.load(bundle_folder)
    deep = make_bundle(bundle_folder.parent / "deep")
    files = {name: deep.file(name) for name in deep.file_names}
    with pytest.raises(BundleError, match="does not hold calibration scores"):
        Bundle.in_memory(deep.manifest, {**files, "calibration.json": b"[" * 100_000})


def test_a_file_larger_than_an_onnx_file_can_be_is_refused(bundle_folder: Path):
    files = json.loads((bundle_folder / "fides.json").read_text())["files"]
    files["detector.onnx"]["size"] = 10**15
    edit_manifest(bundle_folder, files=files)
    with pytest.raises(BundleError, match=r"files.detector.onnx.size"):
        Bundle.load(bundle_folder)
