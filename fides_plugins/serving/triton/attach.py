"""Protect a model of an existing Triton repository by new files alone, and undo it.

Nothing that exists is edited, moved or deleted. What is written is listed in a manifest, and detach
removes exactly that. See `plan` for what is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from fides_plugins.errors import ServerError
from fides_plugins.serving.triton.config import (
    CONFIG_FILE,
    local_versions,
    model_info,
    parse_json,
    parse_text,
    queue_problem,
    to_json,
    to_text,
    without_name,
)
from fides_plugins.serving.triton.operator.api import TritonApi
from fides_plugins.serving.triton.plan import CONFIG_NAME, AttachOptions, Plan, make_plan

MANIFEST_FILE = "fides-attach.json"
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
#: What the manifest takes over from the plan.
_OF_PLAN = ("model", "public", "verdict_model", "base", "steps", "ensembles", "notes")
_OWN_FOLDERS = ("__base", "__fides", "__fides_verify", "__fides_validate", "__fides_fallback")


class Attached(BaseModel):
    """What attach did, or what a manifest says it did.

    Attributes
    ----------
    model, public, verdict_model, base, steps:
        The names involved: the model, the protected one, the one with the verdict, the bare one, the
        python models.
    files, links, folders:
        Paths relative to the repository; files with their SHA-256. Folders are those that were made.
    original_config:
        The model's own configuration as JSON, for switching a live server back.
    ensembles:
        Name to configuration text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    public: str
    verdict_model: str
    base: str
    steps: tuple[str, ...]
    files: dict[str, str]
    links: tuple[str, ...]
    folders: tuple[str, ...]
    original_config: dict[str, Any]
    ensembles: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def takeover(self) -> bool:
        """Whether the protected model answers under the model's own name."""
        return self.model == self.public

    @property
    def flag(self) -> str:
        """The start-up flag of `tritonserver` that puts the protected model in place; empty if none is needed."""
        return f"--model-config-name={CONFIG_NAME}" if self.takeover else ""


def attach(
    repository: str | Path, model: str, options: AttachOptions, *, from_server: str = "", live: str = ""
) -> Attached:
    """Write what protects `model`, and with `live` switch a running server.

    Parameters
    ----------
    repository:
        The model repository; `repository/model` must exist.
    from_server:
        Address of a running server to take the model's full configuration from.
    live:
        Address of a running server in explicit mode that serves this repository; it is switched to the
        protected model without a failed request.

    Raises
    ------
    FidesError
        If the model cannot be protected. Nothing is left behind.
    """
    root = Path(repository)
    folder = root / model
    _check_names(root, model, options.serve_as)
    config, text = _read_config(folder, model, from_server or live)
    problem, remedy = queue_problem(config)
    if problem:
        raise ServerError(f"{model!r} {problem}", remedy)
    info = model_info(model, config, local_versions(folder), options.version)
    plan = make_plan(info, options)
    if plan.takeover:
        plan.files[f"{plan.base}/{CONFIG_FILE}"] = without_name(text).encode()
        for entry in sorted(folder.iterdir()):
            if entry.name not in (CONFIG_FILE, "configs", "__pycache__"):
                plan.links[f"{plan.base}/{entry.name}"] = f"../{model}/{entry.name}"
    if live:
        # Asked before anything is written: a server that cannot be switched leaves nothing behind.
        TritonApi(live).index()
    with ExitStack() as undo:
        attached = _write(root, plan, to_json(config), undo)
        if live:
            _switch_on(TritonApi(live), attached)
        undo.pop_all()
    return attached


def detach(repository: str | Path, model: str, *, live: str = "", force: bool = False) -> tuple[Attached, list[str]]:
    """Remove exactly what attach wrote; return its manifest, and the folders that stay because they hold other files.

    Parameters
    ----------
    force:
        Remove files that were changed since attach, too.

    Raises
    ------
    ServerError
        If `model` is not attached, files were changed since, or the live server cannot be switched back
        (then nothing is removed).
    """
    root = Path(repository)
    attached = find_attached(root, model)
    changed = [] if force else _changed(root, attached)
    if changed:
        raise ServerError(
            f"Changed since attach: {', '.join(changed)}.",
            "Copy what you want to keep, then detach with --force.",
        )
    if live:
        _switch_off(TritonApi(live), attached)
    for path in [*attached.links, *attached.files]:
        with contextlib.suppress(FileNotFoundError):
            (root / path).unlink()
    (root / attached.verdict_model / MANIFEST_FILE).unlink()
    left = []
    for name in sorted(attached.folders, key=len, reverse=True):
        folder = root / name
        _drop_caches(folder)
        try:
            folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError:
            # Somebody put a file there; it is theirs.
            left.append(name)
    return attached, left


def _changed(root: Path, attached: Attached) -> list[str]:
    """Paths that attach wrote and that hold something else now; those that are gone are not among them."""
    files = [
        path
        for path, digest in attached.files.items()
        if (root / path).is_file() and hashlib.sha256((root / path).read_bytes()).hexdigest() != digest
    ]
    return files + [path for path in attached.links if (root / path).exists() and not (root / path).is_symlink()]


def find_attached(root: Path, model: str) -> Attached:
    """The manifest of the protected model that is called `model` or protects it."""
    for candidate in sorted(root.glob(f"*/{MANIFEST_FILE}")):
        attached = _read_manifest(candidate)
        if model in (attached.public, attached.model):
            return attached
    found = _own_paths(root, model)
    if found:
        raise ServerError(
            f"{model!r} cannot be detached: {model}__fides/{MANIFEST_FILE}, the list of what attach wrote, is missing.",
            f"Restore it from a backup, or remove by hand what attach wrote: {', '.join(found)}.",
        )
    raise ServerError(
        f"{model!r} is not attached in this repository.",
        "List what is with: ls REPOSITORY/*__fides. Restart a server that still serves it protected.",
    )


def _own_paths(root: Path, public: str) -> list[str]:
    """What attach would write for a protected model of this name, and is there already."""
    names = [public + suffix for suffix in _OWN_FOLDERS] + [f"{public}/configs/{CONFIG_NAME}.pbtxt"]
    return [name for name in names if (root / name).exists()]


def _check_names(root: Path, model: str, serve_as: str) -> None:
    if not root.is_dir():
        raise ServerError(f"There is no model repository {str(root)!r}.")
    for name in filter(None, (model, serve_as)):
        if not _NAME.match(name):
            raise ServerError(f"{name!r} is not a model name.", "Use letters, digits, '_', '-' and '.'.")
    if not (root / model).is_dir():
        known = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:20])
        raise ServerError(f"The repository has no model {model!r}.", f"It has: {known}.")
    public = serve_as or model
    taken = _own_paths(root, public)
    taken += [public] if serve_as and (root / serve_as).exists() else []
    if taken:
        raise ServerError(
            f"The repository already has {', '.join(taken)}.",
            f"If attach wrote that, undo it first: fides detach triton REPOSITORY {public}.",
        )


def _read_config(folder: Path, model: str, server: str) -> tuple[Any, str]:
    """The configuration as a message and as text."""
    file = folder / CONFIG_FILE
    local = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not server:
        if not local:
            raise ServerError(
                f"{model!r} has no {CONFIG_FILE}; Triton completes its configuration at start.",
                "Take it from the running server with --from-server URL.",
            )
        return parse_text(local, f"{model}/{CONFIG_FILE}"), local
    config = parse_json(TritonApi(server).config(model))
    if config.platform == "ensemble" and any(
        s.model_name.startswith(f"{model}__") for s in config.ensemble_scheduling.step
    ):
        raise ServerError(
            f"The server already serves {model!r} protected.",
            f"Detach it first: fides detach triton REPOSITORY {model} --live {server}. Where that finds nothing, "
            "restart the server: it then serves what the repository holds.",
        )
    # The user's own text is kept where it says everything; what the server completed is written out otherwise.
    own = parse_text(local, f"{model}/{CONFIG_FILE}")
    return config, local if own.input and own.output else to_text(config)


def _write(root: Path, plan: Plan, original: dict[str, Any], undo: ExitStack) -> Attached:
    """Write the plan; `undo` gets what removes it again, if it is closed."""
    made: list[str] = []

    def folder_for(path: str) -> None:
        missing = [p for p in PurePosixPath(path).parents if p.name and not (root / p).exists()]
        for parent in reversed(missing):
            (root / parent).mkdir()
            undo.callback(_remove, root / parent)
            made.append(parent.as_posix())

    manifest = root / plan.verdict_model / MANIFEST_FILE
    try:
        for path, data in plan.files.items():
            folder_for(path)
            undo.callback(_remove, root / path)
            with (root / path).open("xb") as stream:
                stream.write(data)
        for path, target in plan.links.items():
            folder_for(path)
            os.symlink(target, root / path)
            undo.callback(_remove, root / path)
        for path in plan.folders:
            folder_for(f"{path}/any file")
        attached = Attached(
            files={path: hashlib.sha256(data).hexdigest() for path, data in plan.files.items()},
            links=tuple(plan.links),
            folders=tuple(made),
            original_config=original,
            **{name: getattr(plan, name) for name in _OF_PLAN},
        )
        undo.callback(_remove, manifest)
        manifest.write_text(json.dumps({"format_version": 1, **attached.model_dump()}, indent=2) + "\n")
    except OSError as error:
        raise ServerError(f"The repository cannot be written: {error.strerror} ({error.filename}).") from error
    return attached


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            _drop_caches(path)
            path.rmdir()
        else:
            path.unlink()


def _read_manifest(path: Path) -> Attached:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format_version") != 1:
            raise ServerError(f"{path.parent.name}/{path.name} was written by another release.", "Use that release.")
        attached = Attached.model_validate(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ServerError(f"{path.parent.name}/{path.name} cannot be read.", "Restore it from a backup.") from None
    for name in (*attached.files, *attached.links, *attached.folders):
        # A manifest may have been tampered with; it must not make detach remove anything elsewhere.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ServerError(f"{path.parent.name}/{path.name} names a path outside the repository.")
    return attached


def _drop_caches(folder: Path) -> None:
    """Remove the byte code that Python left beside the steps' model.py."""
    cache = folder / "__pycache__"
    if cache.is_dir() and not folder.is_symlink():
        for file in cache.glob("*.pyc"):
            file.unlink()
        with contextlib.suppress(OSError):
            cache.rmdir()


def _switch_on(api: TritonApi, attached: Attached) -> None:
    def unload(name: str) -> None:
        with contextlib.suppress(ServerError):
            api.unload(name)

    with ExitStack() as undo:
        for name in (*([attached.base] if attached.takeover else []), *attached.steps, attached.verdict_model):
            api.load(name)
            undo.callback(unload, name)
        public = attached.public
        config = to_json(parse_text(attached.ensembles[public], public)) if attached.takeover else None
        api.load(public, config)
        undo.pop_all()


def _switch_off(api: TritonApi, attached: Attached) -> None:
    if attached.takeover:
        # A plain load would keep the ensemble until the file's time changes, so the original is given whole.
        api.load(attached.model, attached.original_config)
    else:
        api.unload(attached.public)
    known = {str(entry.get("name")) for entry in api.index()}
    for name in (attached.verdict_model, *reversed(attached.steps), *([attached.base] if attached.takeover else [])):
        if name in known:
            api.unload(name)
