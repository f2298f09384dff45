"""Why a receipt or a piece of evidence was refused: a short stable code beside the sentence for people."""

from __future__ import annotations

from fides_plugins.errors import EvidenceError


class Refusal(EvidenceError):
    """A check failed. Nothing that was refused may be used.

    Attributes
    ----------
    code:
        Which check failed, such as `receipt-nonce`; stable, so that records and tests can name it.
    """

    def __init__(self, code: str, message: str, remedy: str = "") -> None:
        self.code = code
        super().__init__(message, remedy)

    @property
    def reason(self) -> str:
        """Code and sentence, as they appear in a verdict's reason."""
        return f"{self.code}: {self.cause_text}"
