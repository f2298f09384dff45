"""Archives rewritten and restored; what cannot be protected is refused before anything is written."""

from __future__ import annotations

import json
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from fides_plugins.cli import app
from fides_plugins.errors import BundleError, FidesError, InputError, SettingsError
from fides_plugins.serving.torchserve import probe
from fides_plugins.serving.torchserve.archive import MANIFEST, open_archive, write_archive
from fides_plugins.serving.torchserve.attach import RECORD, attach, detach
from fides_plugins.serving.torchserve.build import CONFIG_NAME, SHIM_NAME, build_archive, shim
from fides_plugins.serving.torchserve.check import check

HANDLER = """
class Handler:
    def initialize(self, context): ...
    def handle(self, data, context): return self.inference(data)
    def inference(self, data): return data
"""
REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    config = "# the user's comment\nminWorkers: 2\nhandler:\n  profile: true\n"
    return build_archive(
        tmp_path / "model.mar", "mine.py", {"mine.py": HANDLER, "weights.bin": b"\0" * 99}, config=config
    )


def repack(archive: Path, form: str) -> Path:
    target = archive.parent / f"repacked.{form}"
    with zipfile.ZipFile(archive) as zipped:
        if form == "folder":
            zipped.extractall(target)
            return target
        zipped.extractall(archive.parent / "unpacked" / "model")
    with tarfile.open(target, "w:gz") as tar:
        tar.add(archive.parent / "unpacked" / "model", arcname="model")
    return target


def contents(path: Path) -> dict[str, bytes]:
    with open_archive(path) as opened:
        return {e.name: e.read() for e in opened.entries}


def metadata(path: Path) -> list[Any]:
    if path.is_dir():
        return sorted((p.relative_to(path).as_posix(), p.stat().st_mode) for p in path.rglob("*"))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as zipped:
            return [(i.filename, i.date_time, i.compress_type, i.external_attr) for i in zipped.infolist()]
    with tarfile.open(path) as tar:
        return [(m.name, m.mtime, m.mode, m.type, m.size) for m in tar.getmembers()]


def rewritten(path: Path, **entries: bytes) -> Path:
    """The archive with some entries exchanged or added."""
    target = path.with_name("rewritten.mar")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for info in source.infolist():
            out.writestr(info, entries.pop(info.filename, source.read(info)))
        for name, data in entries.items():
            out.writestr(name, data)
    return target


@pytest.mark.parametrize("form", ["mar", "tar.gz", "folder"])
def test_attach_and_detach_give_back_an_equal_archive(archive: Path, bundle_folder: Path, form: str) -> None:
    source = archive if form == "mar" else repack(archive, form)
    before, described = contents(source), metadata(source)
    protected, back = archive.parent / f"protected.{form}", archive.parent / f"back.{form}"
    done = attach(source, bundle_folder, protected, {"mode": "flag"})
    assert done.handler == "mine: class Handler"
    assert done.notes == ()
    after = contents(protected)
    model = json.loads(after[MANIFEST])["model"]
    assert model["handler"] == SHIM_NAME
    assert after[SHIM_NAME] == shim().encode()
    assert set(done.added) == after.keys() - before.keys()
    unchanged = before.keys() - {MANIFEST, CONFIG_NAME}
    assert {n: after[n] for n in unchanged} == {n: before[n] for n in unchanged}
    detach(protected, back)
    assert contents(back) == before
    assert list(contents(back)) == list(before)
    assert metadata(back) == described
    # The source was only read.
    assert (contents(source), metadata(source)) == (before, described)


def test_config_keeps_the_users_keys_and_comments(archive: Path, bundle_folder: Path) -> None:
    attach(archive, bundle_folder, archive.parent / "out.mar", {"mode": "reject", "rows": "any"})
    text = contents(archive.parent / "out.mar")[CONFIG_NAME].decode()
    assert text.startswith("# the user's comment\nminWorkers: 2\n")
    config = yaml.safe_load(text)
    assert config["handler"] == {"profile": True}
    assert config["fides"] == {"handler": "mine.py", "bundle": "fides_bundle", "mode": "reject", "rows": "any"}


@pytest.mark.parametrize("config", ["{minWorkers: 1, batchSize: 4}\n", "minWorkers: 1\nbatchSize: 4\n...\n"])
def test_config_that_cannot_be_appended_to_is_written_anew(tmp_path: Path, bundle_folder: Path, config: str) -> None:
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": HANDLER}, config=config)
    attach(plain, bundle_folder, tmp_path / "b.mar")
    made = yaml.safe_load(contents(tmp_path / "b.mar")[CONFIG_NAME])
    assert (made["minWorkers"], made["batchSize"], made["fides"]["handler"]) == (1, 4, "mine.py")


def test_config_is_made_when_absent(tmp_path: Path, bundle_folder: Path) -> None:
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": HANDLER})
    done = attach(plain, bundle_folder, tmp_path / "b.mar")
    assert "responseTimeout" in done.notes[0]
    after = contents(tmp_path / "b.mar")
    assert json.loads(after[MANIFEST])["model"]["configFile"] == CONFIG_NAME
    assert yaml.safe_load(after[CONFIG_NAME])["fides"]["handler"] == "mine.py"


def test_a_file_that_only_looks_like_the_config_stays(tmp_path: Path, bundle_folder: Path) -> None:
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": HANDLER, CONFIG_NAME: "unused: true\n"})
    attach(plain, bundle_folder, tmp_path / "b.mar")
    after = contents(tmp_path / "b.mar")
    assert after[CONFIG_NAME] == b"unused: true\n"
    assert json.loads(after[MANIFEST])["model"]["configFile"] == f"fides-{CONFIG_NAME}"


def test_attaching_twice_is_attaching_once(archive: Path, bundle_folder: Path) -> None:
    once, twice, changed = (archive.parent / f"{n}.mar" for n in ("once", "twice", "changed"))
    attach(archive, bundle_folder, once, {"mode": "flag"})
    attach(once, bundle_folder, twice, {"mode": "flag"})
    assert once.read_bytes() == twice.read_bytes()
    attach(twice, bundle_folder, changed, {"mode": "reject"})
    detach(changed, archive.parent / "back.mar")
    assert contents(archive.parent / "back.mar") == contents(archive)


BROKEN = {
    "a syntax error": "class Handler:\n  def",
    "a missing package": "import a_package_that_is_not_there\n" + HANDLER,
    "two classes": HANDLER + "class Other: ...\n",
    "no handle": "class Handler:\n    def inference(self, data): return data\n    def initialize(self, context): ...\n",
    "nothing to wrap": "def handle(data, context):\n    return data\n",
    "an exception at import": "raise ValueError('no weights')\n" + HANDLER,
    "a static inference": HANDLER.replace("    def inference(self", "    @staticmethod\n    def inference(self"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_handler_that_cannot_work_is_refused_before_writing(tmp_path: Path, bundle_folder: Path, what: str) -> None:
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": BROKEN[what]})
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        attach(plain, bundle_folder, tmp_path / "b.mar")
    assert "Traceback" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_missing_package_is_named(tmp_path: Path, bundle_folder: Path) -> None:
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": BROKEN["a missing package"]})
    with pytest.raises(InputError, match="needs the package 'a_package_that_is_not_there'"):
        attach(plain, bundle_folder, tmp_path / "b.mar")
    attach(plain, bundle_folder, tmp_path / "b.mar", check_import=False)
    assert (tmp_path / "b.mar").exists()


FOUR = HANDLER.replace("def inference(self, data): return data", "def inference(self, data): return data[:, :4]")
WORDS = HANDLER.replace(
    "def inference(self, data): return data", "def inference(self, data):\n        text, _ = data\n        return text"
)
NESTED = HANDLER.replace("inference(self, data): return data", 'inference(self, data): return {"a": data, "b": data}')
HEAVY = HANDLER.replace("def initialize(self, context): ...", "def initialize(self, context): raise OSError('no gpu')")


def test_a_bundle_for_other_classes_is_refused(tmp_path: Path, bundle_folder: Path) -> None:
    """Attached, every row of it would be `error`, at run time."""
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": FOUR})
    with pytest.raises(InputError, match=r"answers with 4 classes, and the bundle is for 10"):
        attach(plain, bundle_folder, tmp_path / "b.mar")
    names = json.dumps({str(i): f"word {i}" for i in range(4)})
    text = build_archive(tmp_path / "t.mar", "mine.py", {"mine.py": WORDS, "index_to_name.json": names})
    for check_import in (True, False):
        with pytest.raises(InputError, match=r"names 4 classes, and the bundle is for 10"):
            attach(text, bundle_folder, tmp_path / "b.mar", check_import=check_import)
    assert not (tmp_path / "b.mar").exists()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (WORDS, r"inference\(\) of float32 \(1, 10\)"),
        (HEAVY, r"initialize\(\) raised OSError"),
        (NESTED, "Set `output`"),
    ],
)
def test_a_handler_that_cannot_be_tried_is_noted(tmp_path: Path, bundle_folder: Path, source: str, says: str) -> None:
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": source}, config="minWorkers: 1\n")
    (note,) = attach(plain, bundle_folder, tmp_path / "b.mar").notes
    assert re.search(says, note)
    assert str(tmp_path) not in note


def test_a_model_that_takes_long_to_load_is_attached_all_the_same(
    tmp_path: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_TIMEOUT_S", 8.0)
    source = "import time\n" + HEAVY.replace("raise OSError('no gpu')", "time.sleep(60)")
    plain = build_archive(tmp_path / "a.mar", "mine.py", {"mine.py": source}, config="minWorkers: 1\n")
    done = attach(plain, bundle_folder, tmp_path / "b.mar")
    assert done.handler == "mine: class Handler"
    assert "did not end" in done.notes[0]


@pytest.mark.parametrize(
    ("names", "section", "noted"),
    [
        ({str(i): f"class {i}" for i in range(10)}, {}, ""),
        ({str(i): ["n0", f"class {i}"] for i in range(10)}, {}, ""),
        ({"object_type_names": [f"class {i}" for i in range(10)]}, {}, ""),
        ({str(i): f"name {i}" for i in range(10)}, {}, "answer.names"),
        ({str(i): f"name {i}" for i in range(10)}, {"answer": {"names": [f"name {i}" for i in range(10)]}}, ""),
        ({str(i): f"name {i}" for i in range(10)}, {"answer": {"compare": False}}, ""),
        ([], {}, "not valid"),
    ],
)
def test_names_are_compared_with_the_bundles(
    tmp_path: Path, bundle_folder: Path, names: Any, section: dict[str, Any], noted: str
) -> None:
    files = {"mine.py": HANDLER, "index_to_name.json": json.dumps(names)}
    plain = build_archive(tmp_path / "a.mar", "mine.py", files, config="minWorkers: 1\n")
    notes = attach(plain, bundle_folder, tmp_path / "b.mar", section, check_import=False).notes
    assert len(notes) == bool(noted)
    assert noted in "".join(notes)


def test_unusable_archives_are_refused(archive: Path, bundle_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.mar"
    manifest = json.loads(contents(archive)[MANIFEST])
    lsp = json.dumps({**manifest, "runtime": "LSP"}).encode()
    nameless = json.dumps({**manifest, "model": {"modelName": "m"}}).encode()
    (tmp_path / "text.mar").write_text("not an archive")
    with zipfile.ZipFile(tmp_path / "empty.mar", "w") as zipped:
        zipped.writestr("a", "b")
    unsafe = rewritten(archive, **{"../outside": b""}).rename(tmp_path / "unsafe.mar")
    by_hand = rewritten(archive, **{CONFIG_NAME: b"fides: {handler: a}\n"}).rename(tmp_path / "by_hand.mar")
    for source in (
        tmp_path / "absent.mar",
        tmp_path / "text.mar",
        tmp_path / "empty.mar",
        unsafe,
        by_hand,
        rewritten(archive, **{MANIFEST: lsp}).rename(tmp_path / "lsp.mar"),
        rewritten(archive, **{MANIFEST: nameless}).rename(tmp_path / "nameless.mar"),
        rewritten(archive, **{MANIFEST: b"{"}).rename(tmp_path / "damaged.mar"),
        rewritten(archive, **{CONFIG_NAME: b"a: [\n"}).rename(tmp_path / "yaml.mar"),
        rewritten(archive, **{SHIM_NAME: b""}).rename(tmp_path / "taken.mar"),
    ):
        with pytest.raises(InputError):
            attach(source, bundle_folder, target)
        assert not target.exists()


def test_wrong_settings_and_bundles_are_refused(archive: Path, bundle_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.mar"
    for section in ({"mode": "loud"}, {"moed": "flag"}, {"rows": "maybe"}, {"rows_per_request": 2}, {"bundle": "else"}):
        with pytest.raises(SettingsError):
            attach(archive, bundle_folder, target, section)
    (bundle_folder / "verification.onnx").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"verification\.onnx"):
        attach(archive, bundle_folder, target)
    assert not target.exists()


def test_nothing_is_overwritten_by_accident(archive: Path, bundle_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.mar"
    target.write_text("precious")
    with pytest.raises(InputError, match="exists"):
        attach(archive, bundle_folder, target)
    assert target.read_text() == "precious"
    attach(archive, bundle_folder, target, force=True)
    with pytest.raises(InputError, match="same file"):
        attach(archive, bundle_folder, archive, force=True)
    with pytest.raises(InputError, match="not protected"):
        detach(archive, tmp_path / "c.mar")


def test_a_name_of_the_other_form_is_refused(archive: Path, bundle_folder: Path, tmp_path: Path) -> None:
    for source, target in ((archive, "x.tar.gz"), (repack(archive, "tar.gz"), "x.mar")):
        with pytest.raises(InputError, match="named like"):
            attach(source, bundle_folder, tmp_path / target, check_import=False)
        assert not (tmp_path / target).exists()


def test_the_mode_in_force_is_printed(archive: Path, bundle_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    arguments = ["attach", "torchserve", str(archive), "-b", str(bundle_folder), "-o", str(tmp_path / "set.mar")]
    result = CliRunner().invoke(app, [*arguments, "--skip-import-check", "--set", "mode=reject"])
    assert "in mode reject" in result.output


def test_check_names_a_bad_port_and_an_unknown_model() -> None:
    for port in ("abc", "99999"):
        with pytest.raises(InputError, match="is no URL"):
            check(f"http://127.0.0.1:{port}", "digits", b"{}")

    class Nothing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(404)

        def log_message(self, *arguments: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        closed = "http://127.0.0.1:1"
        url = f"http://127.0.0.1:{server.server_port}"
        findings = check(url, "absent", b"{}", management_url=closed, metrics_url=closed)
        server.shutdown()
    assert [(f.what, f.good) for f in findings] == [("workers", None), ("inference", False)]
    assert findings[1].detail == "HTTP 404: there is no such model"


def test_a_changed_protected_archive_is_not_detached(archive: Path, bundle_folder: Path, tmp_path: Path) -> None:
    attach(archive, bundle_folder, tmp_path / "b.mar")
    with open_archive(tmp_path / "b.mar") as opened:
        kept = tuple(e for e in opened.entries if e.name != "fides_bundle/fides.json")
        write_archive(tmp_path / "c.mar", type(opened)(opened.form, opened.prefix, kept, opened.comment))
    with pytest.raises(InputError, match=r"fides\.json is missing"):
        detach(tmp_path / "c.mar", tmp_path / "d.mar")
    damaged = rewritten(tmp_path / "b.mar", **{RECORD: b"{}"})
    with pytest.raises(InputError, match="damaged"):
        detach(damaged, tmp_path / "d.mar")


def test_vendored_archive_holds_the_package_and_can_be_detached(
    archive: Path, bundle_folder: Path, tmp_path: Path
) -> None:
    attach(archive, bundle_folder, tmp_path / "b.mar", vendor=True)
    names = contents(tmp_path / "b.mar")
    assert "fides_vendor/package/fides_plugins/pipeline.py" in names
    assert "fides_vendor/dependencies/pluggy/__init__.py" in names
    assert not any(n.startswith("fides_vendor/dependencies/numpy/") for n in names)
    detach(tmp_path / "b.mar", tmp_path / "c.mar")
    assert contents(tmp_path / "c.mar") == contents(archive)


def test_shim_in_the_package_is_the_one_in_handlers() -> None:
    assert (REPOSITORY / "handlers" / "fides_handler.py").read_text() == shim()


def test_commands(archive: Path, bundle_folder: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    out, back = tmp_path / "b.mar", tmp_path / "c.mar"
    arguments = ["attach", "torchserve", str(archive), "--bundle", str(bundle_folder), "-o", str(out), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--mode", "correct", "--set", "plugins.blocked=[a, b]"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["original_handler"] == "mine.py"
    section = yaml.safe_load(contents(out)[CONFIG_NAME])["fides"]
    assert (section["mode"], section["plugins"]) == ("correct", {"blocked": ["a", "b"]})
    result = CliRunner().invoke(app, ["detach", "torchserve", str(out), "-o", str(back)])
    assert result.exit_code == 0, result.output
    assert contents(back) == contents(archive)
    # `main` turns these into exit status 2.
    assert isinstance(CliRunner().invoke(app, arguments).exception, FidesError)
