"""Bounds that keep a verifier's memory flat: bytes of bodies, spent nonces and requests per client."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from fides_plugins.attestation.refusal import Refusal

#: After so many bytes of bodies, what the allocator keeps of them goes back to the system.
_TRIM_BYTES = 16 << 20
#: glibc keeps freed memory for each of its threads' arenas, in holes between small objects; others have no such call.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class ByteBudget:
    """Bytes of all bodies that are held at once. Belongs to one event loop."""

    def __init__(self, capacity: int) -> None:
        self._left = capacity
        self._given = 0

    def take(self, size: int) -> None:
        """Hold some more.

        Raises
        ------
        Refusal
            `request-memory`.
        """
        if size > self._left:
            raise Refusal("request-memory", "The verifier holds too many bodies.", "Try again later.")
        self._left -= size

    def give(self, size: int) -> None:
        """Hold less again."""
        self._left += size
        self._given += size
        if self._given >= _TRIM_BYTES:
            self._given = 0
            if _trim is not None:
                _trim(0)


class SpentNonces:
    """Nonces that were used, for a while.

    When the table is full of nonces that have not expired, requests are refused: forgetting one would let
    its request be answered twice.
    """

    def __init__(self, capacity: int, lifetime_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._lock = threading.Lock()
        self._expiry: OrderedDict[bytes, float] = OrderedDict()

    def spend(self, nonce: bytes) -> None:
        """Use a nonce.

        Raises
        ------
        Refusal
            `request-replay` or `request-busy`.
        """
        now = self._clock()
        with self._lock:
            while self._expiry and next(iter(self._expiry.values())) <= now:
                self._expiry.popitem(last=False)
            if nonce in self._expiry:
                raise Refusal("request-replay", "This nonce was used before.", "Draw 32 random bytes per request.")
            if len(self._expiry) >= self._capacity:
                raise Refusal("request-busy", "The verifier remembers too many requests.", "Try again later.")
            self._expiry[nonce] = now + self._lifetime_s

    def __len__(self) -> int:
        return len(self._expiry)


class RateLimit:
    """A token bucket per key; the least recently seen keys are forgotten, which only makes them full again."""

    def __init__(
        self, per_second: float, burst: float, keys: int = 4096, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = per_second
        self._burst = burst
        self._keys = keys
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def take(self, key: bytes, rows: int = 1) -> None:
        """Take a token per row, but at least one.

        Raises
        ------
        Refusal
            `request-rate`.
        """
        now = self._clock()
        with self._lock:
            tokens, seen = self._buckets.pop(key, (self._burst, now))
            tokens = min(self._burst, tokens + (now - seen) * self._rate)
            wanted = min(float(max(rows, 1)), self._burst)
            allowed = tokens >= wanted
            self._buckets[key] = (tokens - wanted if allowed else tokens, now)
            if len(self._buckets) > self._keys:
                self._buckets.popitem(last=False)
        if not allowed:
            raise Refusal("request-rate", "This client asks too often.", "Wait, or raise --rate on the verifier.")
