"""Addresses that people give."""

from __future__ import annotations

from urllib.parse import urlsplit

from fides_plugins.errors import InputError


def checked_address(url: str, what: str) -> str:
    """`url` without a slash at its end.

    Raises
    ------
    InputError
        If it is not `http://host:port` or `https://host:port`; `what` says whose address it should be.
    """
    try:
        parts = urlsplit(url)
        # Reading the port checks it.
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise InputError(f"{url!r} is no address of {what}.", "Give it as http://host:port or https://host:port.")
    return url.rstrip("/")
