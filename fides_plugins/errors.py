"""The package's errors: one root, few children.

A message names the cause and the remedy, because the command line prints it and nothing else. Only
`FidesError` and its children are ever shown to people; anything else that escapes is a bug.
"""

from __future__ import annotations


class FidesError(Exception):
    """Root of every error this package raises on purpose.

    Parameters
    ----------
    message:
        What went wrong, in one sentence.
    remedy:
        What the reader can do about it, in one sentence. Appended to the message.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        self.cause_text = message
        self.remedy = remedy
        super().__init__(f"{message} {remedy}".strip())


class InputError(FidesError):
    """A tensor, a prediction or a file given by the caller cannot be used."""


class SettingsError(FidesError):
    """A setting is unknown, has the wrong type or contradicts another."""


class BundleError(FidesError):
    """A bundle is missing, changed, of an unknown version or inconsistent."""


class PluginError(FidesError):
    """A plug-in cannot be loaded, or broke the contract of its hook."""


class ServerError(FidesError):
    """A model server did not start, or answered with an error."""


class TrainingError(FidesError):
    """Data or models given to training cannot be used."""


class EvidenceError(FidesError):
    """Attestation evidence or a receipt was refused."""
