"""What a client may ask how often, and that no nonce is answered twice."""

from __future__ import annotations

from fides_plugins.attestation.refusal import Refusal
from fides_plugins.enclave.limits import RateLimit, SpentNonces
from tests.support.refusals import code


def number(n: int) -> bytes:
    return n.to_bytes(32, "big")


def free() -> None:
    """What a nonce costs where nothing is counted."""


def test_nonces_are_spent_once_however_many_others_spend_and_fast_the_clock_runs() -> None:
    now = [0.0]
    table = SpentNonces(lifetime_s=10, clock=lambda: now[0])
    table.spend(b"honest", number(0), free)
    for n in range(20_000):
        table.spend(b"greedy", number(n), free)
    for client, n in ((b"honest", 0), (b"greedy", 0), (b"greedy", 19_999)):
        assert code(lambda: table.spend(client, number(n), free)) == "request-replay"  # noqa: B023
    now[0] = 1e9  # a host may let an enclave's clock run
    table.spend(b"greedy", number(20_000), free)
    assert code(lambda: table.spend(b"honest", number(0), free)) == "request-replay"
    assert code(lambda: table.spend(b"greedy", number(19_999), free)) == "request-replay"
    assert len(table) == 4096 + 1


def test_what_cannot_be_paid_is_not_spent() -> None:
    def refuse() -> None:
        raise Refusal("request-rate", "too many")

    table = SpentNonces(lifetime_s=10)
    assert code(lambda: table.spend(b"a", number(1), refuse)) == "request-rate"
    table.spend(b"a", number(1), free)


def test_strangers_are_forgotten_before_the_table_grows() -> None:
    table = SpentNonces(lifetime_s=10, capacity=100)
    for n in range(1000):
        table.spend(number(n % 50), number(n), free)
    assert len(table) <= 100


def test_buckets_refill_and_unknown_keys_do_not_pile_up() -> None:
    now = [0.0]
    limit = RateLimit(per_second=2, burst=4, keys=10, clock=lambda: now[0])
    limit.take(b"a", 4)
    assert code(lambda: limit.take(b"a")) == "request-rate"
    now[0] = 0.5
    limit.take(b"a")
    limit.take(b"b", 1000)  # more than the bucket holds: takes it all, once
    for n in range(1000):
        limit.take(n.to_bytes(2, "big"))
    assert len(limit._buckets) == 10
