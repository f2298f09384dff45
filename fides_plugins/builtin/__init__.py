"""The default implementations, one file per hook."""

from __future__ import annotations

from typing import Any

from fides_plugins.builtin.detect import DivergenceDetector, LearnedDetector
from fides_plugins.builtin.reclassify import LearnedReclassifier
from fides_plugins.builtin.remote import NAME as REMOTE
from fides_plugins.builtin.remote import RemoteVerifier
from fides_plugins.builtin.verify import OnnxVerifier
from fides_plugins.bundle import Bundle
from fides_plugins.settings import Settings


def builtin_plugins(settings: Settings, bundle: Bundle | None) -> dict[str, Any]:
    """Built-in plug-ins by name, in load order, for these settings and this bundle.

    Without a bundle there is nothing to verify or detect with, so there are none.
    """
    if bundle is None:
        return {}
    plugins: dict[str, Any] = {"reclassifier": LearnedReclassifier()}
    if settings.detector in ("divergence", "both"):
        plugins["divergence-detector"] = DivergenceDetector()
    if settings.detector in ("learned", "both"):
        plugins["detector"] = LearnedDetector()
    if REMOTE in settings.plugins.options:
        plugins[REMOTE] = RemoteVerifier()
    if bundle.manifest.verification is not None:
        plugins["verifier"] = OnnxVerifier()
    return plugins
