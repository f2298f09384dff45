"""Protect an existing model archive, and undo it.

Attaching changes two entries, the manifest (its handler) and the config file (a section `fides:`), and
adds others: the handler, the bundle, a record of what was there before, and with `vendor` the package.
Detaching puts the two back and takes the others out.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fides_plugins.bundle import Bundle
from fides_plugins.errors import InputError, SettingsError
from fides_plugins.serving.torchserve.archive import MANIFEST, Entry, ModelArchive, open_archive, write_archive
from fides_plugins.serving.torchserve.build import CONFIG_NAME, SHIM_NAME, bundle_files, shim
from fides_plugins.serving.torchserve.options import BUNDLE_FOLDER, SECTION, AnswerFormat, read_section
from fides_plugins.serving.torchserve.probe import probe_archive
from fides_plugins.serving.torchserve.vendor import vendor_files

RECORD = "fides_attach.json"
RECORD_VERSION = 1
#: Where TorchServe's own handlers read the names of classes.
NAMES = "index_to_name.json"
#: Measured on 0.12.0: with any config file in the archive these two no longer come from config.properties.
NEW_CONFIG = (
    "The archive had no config file, so {name} was made. TorchServe then ignores default_response_timeout and "
    "default_startup_timeout of config.properties and takes 120 s for both; set responseTimeout and startupTimeout "
    "in a config file of your own if you need others."
)
NOT_CONFINED = (
    "The handler was not imported: this kernel cannot keep an archive's code from writing (it has no Landlock). "
    "Whether a worker can load it shows when TorchServe starts."
)
#: Of a config file; and of its values, with each alias counted as what it stands for.
MAX_CONFIG_BYTES = 64 * 1024
MAX_CONFIG_VALUES = 10_000


@dataclass(frozen=True)
class Attachment:
    """What an attach did, for people and for `--json`.

    Attributes
    ----------
    original_handler:
        As the manifest named it.
    handler:
        What the import check found it to be; empty where there was none.
    added:
        Names of new entries.
    changed:
        Names of entries whose contents changed.
    notes:
        What else will differ when the archive is served.
    """

    original_handler: str
    handler: str
    added: Sequence[str] = ()
    changed: Sequence[str] = ()
    notes: Sequence[str] = ()


def attach(
    source: str | Path,
    bundle: str | Path,
    target: str | Path,
    section: Mapping[str, Any] | None = None,
    *,
    vendor: bool = False,
    force: bool = False,
    python: str | None = None,
    check_import: bool = True,
) -> Attachment:
    """Write a protected copy of a model archive.

    Attaching to an archive that is attached already starts from its original, so doing it twice gives
    the same bytes as doing it once.

    Parameters
    ----------
    source, target:
        `.mar`, `.tar.gz` or a folder; the target gets the source's form.
    bundle:
        Folder that `fides fit` wrote.
    section:
        Settings and options for the section `fides:`, without `handler` and `bundle`.
    vendor:
        Put the package and its dependencies into the archive.
    force:
        Replace `target` if it exists.
    python:
        Interpreter that imports the handler, when the server's is not this one.
    check_import:
        Whether to import the handler at all, which runs code of the archive: in a process that can write into a
        scratch folder only, and open no TCP connection. Where the kernel cannot see to that, it is not imported.

    Raises
    ------
    FidesError
        If the archive cannot be protected; nothing is written then.
    """
    _different(source, target)
    class_names = Bundle.load(bundle).class_names
    with open_archive(source) as opened:
        original = _without_attachment(opened)
        manifest, model = _manifest(original)
        handler = model["handler"]
        files = {SHIM_NAME: shim().encode(), **bundle_files(bundle)}
        if vendor:
            files.update(vendor_files())
        config_name, config, config_entry = _config(original, model)
        ours = {"handler": handler, "bundle": BUNDLE_FOLDER, **(section or {})}
        text = _with_section(config, ours)
        if read_section(yaml.safe_load(text), ".")[1].bundle != BUNDLE_FOLDER:
            raise SettingsError("`bundle` is not for attach to set.", "Leave it out; attach puts it into the archive.")
        served = {**model, "handler": SHIM_NAME, "configFile": config_name}
        changed = {MANIFEST: json.dumps({**manifest, "model": served}, indent=2).encode()}
        if config_entry is None:
            files[config_name] = text.encode()
        else:
            changed[config_name] = text.encode()
        files[RECORD] = _record(original, changed, files)
        taken = sorted(original.names & files.keys())
        if taken:
            raise InputError(f"The archive already holds {', '.join(taken)}.", "Rename these entries first.")
        entries = [e.with_content(changed[e.name]) if e.name in changed else e for e in original.entries]
        entries += [Entry.new(name, content) for name, content in sorted(files.items())]
        protected = replace(original, entries=tuple(entries))
        notes = [] if config_entry is not None else [NEW_CONFIG.format(name=config_name)]
        notes += _naming(original, class_names, read_section(yaml.safe_load(text), ".")[0].answer)
        found, tried = probe_archive(protected, python) if check_import else ("", ())
        write_archive(target, protected, force)
    if check_import and not found:
        notes.append(NOT_CONFINED)
    return Attachment(handler, found, tuple(sorted(files)), tuple(sorted(changed)), (*notes, *tried))


def detach(source: str | Path, target: str | Path, *, force: bool = False) -> tuple[str, ...]:
    """Write the archive that was there before `attach`; returns the names that were taken out.

    Raises
    ------
    InputError
        If the archive was not attached by this command, or was changed since.
    """
    _different(source, target)
    with open_archive(source) as opened:
        if opened.get(RECORD) is None:
            raise InputError(f"{Path(source).name} was not protected by `fides attach`.", "There is nothing to undo.")
        original = _without_attachment(opened)
        write_archive(target, original, force)
        return tuple(sorted(opened.names - original.names))


def _different(source: str | Path, target: str | Path) -> None:
    if Path(source).resolve() == Path(target).resolve():
        raise InputError("Source and target are the same file.", "Write to a new file; the original stays as it is.")


def _without_attachment(archive: ModelArchive) -> ModelArchive:
    entry = archive.get(RECORD)
    if entry is None:
        return archive
    try:
        record = json.loads(entry.document())
        if record["version"] != RECORD_VERSION:
            raise InputError(f"{RECORD} has version {record['version']!r}.", "Detach with the release that attached.")
        added = set(record["added"])
        before = {name: base64.b64decode(text) for name, text in record["before"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{RECORD} is damaged.", "Take the original archive from where it was published.") from None
    missing = sorted((added | before.keys()) - archive.names)
    if missing:
        raise InputError(
            f"The archive was changed after it was attached: {', '.join(missing)} is missing.",
            "Take the original archive from where it was published.",
        )
    kept = [e for e in archive.entries if e.name not in added]
    return replace(archive, entries=tuple(e.with_content(before[e.name]) if e.name in before else e for e in kept))


def _manifest(archive: ModelArchive) -> tuple[dict[str, Any], dict[str, Any]]:
    entry = archive.get(MANIFEST)
    assert entry is not None  # open_archive checked it
    try:
        manifest = json.loads(entry.document())
        model = manifest["model"]
        handler = model.get("handler")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{MANIFEST} is not valid.", "Build the archive again with torch-model-archiver.") from None
    if manifest.get("runtime", "python") not in ("python", "python3"):
        raise InputError(
            f"The archive's runtime is {manifest['runtime']!r}; only Python handlers can be protected.",
            "Serve the model with a Python handler.",
        )
    if not isinstance(handler, str) or not handler:
        raise InputError("The manifest names no handler.", "Build the archive with --handler.")
    return manifest, model


def _naming(archive: ModelArchive, class_names: Sequence[str], answer: AnswerFormat) -> list[str]:
    """Compare the names that TorchServe's own handlers give the classes with those that the verdicts go by."""
    entry = archive.get(NAMES)
    try:
        mapping = json.loads(entry.read()) if entry is not None else {}
        listed = mapping.get("object_type_names")
        named = listed if isinstance(listed, list) else [v[-1] if isinstance(v, list) else v for v in mapping.values()]
    except (ValueError, AttributeError, IndexError):
        return [f"{NAMES} is not valid, so the classes were not compared with the bundle's."]
    if entry is not None and len(named) != len(class_names):
        raise InputError(
            f"{NAMES} names {len(named)} classes, and the bundle is for {len(class_names)}.",
            "Attach a bundle that was fitted for this model.",
        )
    if not named or not answer.compare or set(named) <= set(answer.names or class_names):
        return []
    return [f"{NAMES} calls the classes otherwise than the bundle: answers are compared once `answer.names` has them."]


def _config(archive: ModelArchive, model: Mapping[str, Any]) -> tuple[str, str, Entry | None]:
    """Name and text of the config file, and its entry if the archive has one."""
    name = model.get("configFile")
    if not name:
        # A file of that name which the manifest does not mention is not a config file; it stays as it is.
        return (CONFIG_NAME if CONFIG_NAME not in archive.names else f"fides-{CONFIG_NAME}"), "", None
    entry = archive.get(str(name))
    if entry is None:
        raise InputError(f"The manifest names the config file {name}, which the archive lacks.", "Build it again.")
    try:
        text = entry.document(MAX_CONFIG_BYTES).decode("utf-8")
        parsed = yaml.safe_load(text)
        n_values = _n_values(parsed, {})
    except InputError as error:
        raise InputError(f"The config file is too long: {error.cause_text}", "Shorten it.") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError):
        raise InputError(f"The config file {name} is not valid yaml.", "Fix it first.") from None
    if n_values > MAX_CONFIG_VALUES:
        raise InputError(
            f"The config file {name} has more than {MAX_CONFIG_VALUES:,} values, its aliases written out.",
            "Shorten it.",
        )
    if parsed is not None and not isinstance(parsed, dict):
        raise InputError(f"The config file {name} holds no mapping.", "Fix it first.")
    if parsed and SECTION in parsed:
        raise InputError(
            f"The config file {name} has a section `{SECTION}:` already, written by hand.",
            "Change that section, or take it and the handler out and attach again.",
        )
    return str(name), text, entry


def _n_values(value: Any, known: dict[int, int]) -> int:
    """Values in a document, with what an alias stands for counted each time; `RecursionError` for a cycle."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        children = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_n_values(child, known) for child in children)
    return known[id(value)]


def _with_section(config: str, section: Mapping[str, Any]) -> str:
    """The user's file, comments and all, with our section after it."""
    ours = yaml.safe_dump({SECTION: dict(section)}, sort_keys=False, allow_unicode=True)
    expected = {**(yaml.safe_load(config) or {}), SECTION: dict(section)}
    appended = f"{config.rstrip()}\n\n{ours}" if config.strip() else ours
    try:
        if yaml.safe_load(appended) == expected:
            return appended
    except yaml.YAMLError:
        pass
    # Flow style or an explicit end of the document: nothing can be appended, so the whole file is rewritten.
    return str(yaml.safe_dump(expected, sort_keys=False, allow_unicode=True))


def _record(original: ModelArchive, changed: Mapping[str, bytes], files: Mapping[str, bytes]) -> bytes:
    before = {e.name: base64.b64encode(e.document()).decode("ascii") for e in original.entries if e.name in changed}
    record = {"version": RECORD_VERSION, "added": sorted([*files, RECORD]), "before": before}
    return json.dumps(record, indent=2).encode()
