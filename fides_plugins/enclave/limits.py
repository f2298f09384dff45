"""Bounds that keep a verifier's memory flat: bytes of bodies, spent nonces and requests per client."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from fides_plugins.attestation.refusal import Refusal

#: After so many bytes of bodies, what the allocator keeps of them goes back to the system.
_TRIM_BYTES = 16 << 20
#: Nonces of one client that outlast any clock: an enclave's may be the host's, who could let it run fast.
_KEPT = 4096
#: glibc keeps freed memory for each of its threads' arenas, in holes between small objects; others have no such call.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


class ByteBudget:
    """Bytes of all bodies that are held at once, at most half of them one peer's. Belongs to one event loop."""

    def __init__(self, capacity: int) -> None:
        self._left = capacity
        self._share = capacity // 2
        self._held: Counter[bytes] = Counter()
        self._given = 0

    def take(self, size: int, peer: bytes) -> None:
        """Hold some more.

        Raises
        ------
        Refusal
            `request-memory`.
        """
        if size > min(self._left, self._share - self._held[peer]):
            raise Refusal("request-memory", "The verifier holds too many bodies.", "Try again later.")
        self._left -= size
        self._held[peer] += size

    def give(self, size: int, peer: bytes) -> None:
        """Hold less again."""
        self._left += size
        self._held[peer] -= size
        if not self._held[peer]:
            del self._held[peer]
        self._given += size
        if self._given >= _TRIM_BYTES:
            self._given = 0
            if _trim is not None:
                _trim(0)


class SpentNonces:
    """Nonces that were used, each client's for itself: nobody's requests make the table forget another's.

    A nonce costs its client at least one row of its rate, which bounds how many are remembered.

    Parameters
    ----------
    lifetime_s:
        Time for which a nonce is remembered; the last few of each client are, whatever the host's clock says.
    capacity:
        Most nonces of all clients together; beyond it those of the client that was seen least recently are forgotten.
        None where the clients are known: forgetting a nonce lets its request be answered twice.
    """

    def __init__(
        self, lifetime_s: float, capacity: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime_s = lifetime_s
        self._capacity = capacity
        self._clock = clock
        self._lock = threading.Lock()
        self._clients: OrderedDict[bytes, OrderedDict[bytes, float]] = OrderedDict()
        self._held = 0

    def spend(self, client: bytes, nonce: bytes, pay: Callable[[], None]) -> None:
        """Use a nonce, unless `pay` refuses.

        Raises
        ------
        Refusal
            `request-replay`, or that of `pay`.
        """
        now = self._clock()
        with self._lock:
            spent = self._clients.setdefault(client, OrderedDict())
            self._clients.move_to_end(client)
            if nonce in spent:
                raise Refusal("request-replay", "This nonce was used before.", "Draw 32 random bytes per request.")
            pay()
            spent[nonce] = now + self._lifetime_s
            self._held += 1
            while len(spent) > _KEPT and next(iter(spent.values())) <= now:
                spent.popitem(last=False)
                self._held -= 1
            while self._capacity is not None and self._held > self._capacity and len(self._clients) > 1:
                self._held -= len(self._clients.popitem(last=False)[1])

    def __len__(self) -> int:
        return self._held


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
            raise Refusal(
                "request-rate",
                "This client asks too often.",
                "Wait a while. For rows, --rate on the verifier allows more.",
            )
