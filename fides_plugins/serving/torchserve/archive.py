"""Read and rewrite model archives: `.mar` (zip), `.tar.gz` and unpacked folders.

Entries that are not changed are copied as they are, with their place, time and mode, so that an archive
can be changed and changed back. Nothing is written before everything is known to be sound.
"""

from __future__ import annotations

import copy
import gzip
import io
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from fides_plugins.errors import InputError

#: The entry that makes a zip a model archive.
MANIFEST = "MAR-INF/MANIFEST.json"
#: The entry that makes a zip a workflow archive.
_WORKFLOW = "WAR-INF/MANIFEST.json"
#: Archives are reproducible: every new entry has the earliest time that a zip can hold.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
Form = Literal["mar", "tar.gz", "folder"]

_ENDINGS: dict[str, Form] = {".mar": "mar", ".tar.gz": "tar.gz", ".tgz": "tar.gz"}
_FILE_MODE = 0o644
_LIMIT = "Check that the file is a whole model archive."
#: Bytes of a manifest or another document that is read whole.
MAX_DOCUMENT_BYTES = 4 * 1024**2
#: How many times its size an archive may unpack to, and how many bytes are allowed in any case.
MAX_RATIO = 200
ALWAYS_ALLOWED_BYTES = 1024**3


@dataclass(frozen=True)
class Entry:
    """One file (or folder) of an archive.

    Attributes
    ----------
    name:
        Path inside the archive, without the folder that a `.tar.gz` has around everything.
    open:
        Opens the contents for reading; None for a folder or a link.
    info:
        What the container says about it: `ZipInfo`, `TarInfo`, or the path of a file on disk; None for
        an entry that is new.
    """

    name: str
    open: Callable[[], IO[bytes]] | None
    info: Any = None

    def read(self) -> bytes:
        """Whole contents; empty for a folder."""
        if self.open is None:
            return b""
        with self.open() as stream:
            return stream.read()

    def document(self, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
        """Whole contents of an entry that is short; `InputError` for a longer one."""
        if self.open is None:
            return b""
        with self.open() as stream:
            content = stream.read(limit + 1)
        if len(content) > limit:
            raise InputError(f"{self.name} has more than {limit:,} bytes.", "Build the archive again.")
        return content

    def with_content(self, content: bytes) -> Entry:
        """The same entry with other contents."""
        return Entry(self.name, lambda: io.BytesIO(content), self.info)

    @classmethod
    def new(cls, name: str, content: bytes) -> Entry:
        """An entry that the archive did not have."""
        return cls(name, lambda: io.BytesIO(content))


@dataclass(frozen=True)
class ModelArchive:
    """An opened archive.

    Attributes
    ----------
    form:
        How it is packed.
    prefix:
        Folder around everything, with its slash; empty for most.
    entries:
        In the archive's order.
    comment:
        Comment of a zip.
    """

    form: Form
    prefix: str
    entries: tuple[Entry, ...]
    comment: bytes = b""

    def get(self, name: str) -> Entry | None:
        """The entry with this name."""
        return next((e for e in self.entries if e.name == name), None)

    @property
    def names(self) -> set[str]:
        """Names of all entries, folders without their slash."""
        return {e.name.rstrip("/") for e in self.entries if e.name}


@contextmanager
def open_archive(path: str | Path) -> Iterator[ModelArchive]:
    """Open an archive; entries can be read while the context is open.

    Raises
    ------
    InputError
        If it is no model archive, or holds entries that are unsafe or cannot be copied.
    """
    source = Path(path)
    if source.is_dir():
        files = sorted(p for p in source.rglob("*") if not p.is_dir() or p.is_symlink())
        yield _checked(source, "folder", [_folder_entry(source, p) for p in files])
    elif not source.is_file():
        raise InputError(f"There is no archive {source.name}.")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as zipped:
            if any(i.flag_bits & 1 for i in zipped.infolist()):
                raise InputError(f"{source.name} holds encrypted entries.", "Remove the encryption first.")
            _check_unpacked(source, sum(i.file_size for i in zipped.infolist()))
            entries = [_zip_entry(zipped, info) for info in zipped.infolist()]
            yield _checked(source, "mar", entries, zipped.comment)
    elif tarfile.is_tarfile(source):
        with tarfile.open(source, "r:*") as tar:
            members, unpacked = [], 0
            for info in tar:
                # As they are met: what follows need not be unpacked to be refused.
                unpacked += info.size
                _check_unpacked(source, unpacked)
                members.append(_tar_entry(tar, info))
            yield _checked(source, "tar.gz", members)
    else:
        raise InputError(f"{source.name} is neither a zip, nor a tar, nor a folder.", _LIMIT)


def write_archive(target: str | Path, archive: ModelArchive, force: bool = False) -> None:
    """Write an archive in one step: it is there completely or not at all.

    Raises
    ------
    InputError
        If something is there already and `force` is not set.
    """
    path = Path(target)
    named = next((f for end, f in _ENDINGS.items() if path.name.endswith(end)), archive.form)
    if named != archive.form:
        # TorchServe goes by the name, and answers 404 for a model whose contents are of the other form.
        raise InputError(
            f"{path.name} is named like a {named}, and the archive is a {archive.form}.",
            "Name the output like the source; attach and detach do not change the form.",
        )
    if path.exists() and not force:
        raise InputError(f"{path.name} exists already.", "Choose another name, or add --force.")
    if not path.parent.is_dir():
        raise InputError(f"There is no folder for {path.name}.", "Make it first.")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        staging = Path(folder) / "archive"
        {"folder": write_folder, "mar": _write_zip, "tar.gz": _write_tar}[archive.form](staging, archive)
        if path.is_dir() and not path.is_symlink():
            # A folder cannot be replaced in one step; the old one steps aside first.
            os.replace(path, Path(folder) / "before")
        os.replace(staging, path)


def write_folder(root: Path, archive: ModelArchive) -> None:
    """Unpack an archive into a new folder."""
    root.mkdir(parents=True)
    for entry in archive.entries:
        path = root / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.open is not None:
            with entry.open() as source, path.open("wb") as out:
                shutil.copyfileobj(source, out)
            if isinstance(entry.info, Path):
                shutil.copystat(entry.info, path)
        elif isinstance(entry.info, Path):
            path.symlink_to(os.readlink(entry.info))
        else:
            path.mkdir(exist_ok=True)


def _check_unpacked(source: Path, n_bytes: int) -> None:
    if n_bytes > max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * source.stat().st_size):
        raise InputError(
            f"{source.name} unpacks to {n_bytes:,} bytes or more.", f"At most {MAX_RATIO} times its own size are read."
        )


def _checked(source: Path, form: Form, entries: Sequence[Entry], comment: bytes = b"") -> ModelArchive:
    if any(e.name == _WORKFLOW for e in entries):
        raise InputError(
            f"{source.name} is a workflow and holds no model.",
            "Attach to the archive of each of its models that classifies; its functions cannot be protected.",
        )
    manifests = [e.name for e in entries if e.name == MANIFEST or e.name.endswith(f"/{MANIFEST}")]
    prefix = manifests[0][: -len(MANIFEST)] if len(manifests) == 1 else ""
    # The folder around everything, where there is one, is an entry itself in some archives.
    outside = [e for e in entries if not e.name.startswith(prefix) and e.name.rstrip("/") + "/" != prefix]
    if not manifests or outside:
        raise InputError(f"{source.name} is no model archive: it has no {MANIFEST} at its top.", _LIMIT)
    # It becomes the entry with the empty name.
    plain = [Entry(e.name[len(prefix) :], e.open, e.info) for e in entries]
    for entry in plain:
        parts = PurePosixPath(entry.name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in entry.name:
            raise InputError(f"{source.name} holds the unsafe entry {entry.name!r}.", "Build the archive again.")
    twice = [name for name, count in Counter(e.name for e in plain).items() if count > 1]
    if twice:
        raise InputError(f"{source.name} holds {twice[0]!r} twice.", "Build the archive again.")
    return ModelArchive(form, prefix, tuple(plain), comment)


def _zip_entry(zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    return Entry(info.filename, None if info.is_dir() else lambda: zipped.open(info), info)


def _tar_entry(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Entry:
    if not info.isfile():
        return Entry(info.name, None, info)

    def contents() -> IO[bytes]:
        stream = tar.extractfile(info)
        assert stream is not None  # extractfile gives None only for what is no file
        return stream

    return Entry(info.name, contents, info)


def _folder_entry(root: Path, path: Path) -> Entry:
    name = path.relative_to(root).as_posix()
    if not stat.S_ISREG(path.lstat().st_mode) and not path.is_symlink():
        raise InputError(f"{name} is neither a file nor a folder.", "Take it out of the archive's folder.")
    return Entry(name, None if path.is_symlink() else lambda: path.open("rb"), path)


def _write_zip(target: Path, archive: ModelArchive) -> None:
    with zipfile.ZipFile(target, "w") as out:
        out.comment = archive.comment
        for entry in archive.entries:
            if entry.info is None:
                info = zipfile.ZipInfo(archive.prefix + entry.name, _ZIP_EPOCH)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = _FILE_MODE << 16
            else:
                info = copy.copy(entry.info)
            if entry.open is None:
                out.writestr(info, b"")
                continue
            # Sizes may have changed, so a large entry must be allowed to need zip64.
            with entry.open() as source, out.open(info, "w", force_zip64=info.file_size >= 1 << 31) as sink:
                shutil.copyfileobj(source, sink)


def _write_tar(target: Path, archive: ModelArchive) -> None:
    # Time 0 in the gzip header: the same archive gives the same bytes.
    with (
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as out,
    ):
        for entry in archive.entries:
            if entry.open is None:
                out.addfile(copy.copy(entry.info))
                continue
            info = copy.copy(entry.info) if entry.info is not None else tarfile.TarInfo(archive.prefix + entry.name)
            if entry.info is None:
                info.mode = _FILE_MODE
            with entry.open() as source:
                if isinstance(source, io.BytesIO):
                    info.size = len(source.getbuffer())
                out.addfile(info, source)
