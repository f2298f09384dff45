"""Output attacks: what each does to a row, their registry, and attacks that plug-ins bring."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fides_plugins import hookimpl
from fides_plugins.errors import PluginError, SettingsError
from fides_plugins.manager import create_plugin_manager
from fides_plugins.settings import Settings
from fides_plugins.training.attacks import AttackRegistry, OutputAttack, default_registry
from fides_plugins.training.attacks import output as attacks

NAMES = default_registry().names("output")
CLASS_COUNTS = (2, 3, 10, 100, 1000)


def some_rows(n: int, k: int, seed: int, sharpness: float = 4.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    p = np.exp(sharpness * rng.standard_normal((n, k)))
    return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


def test_the_attacks_of_the_paper_and_ours_are_registered():
    assert NAMES == ("switch", "random", "average", "targeted", "confidence")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", CLASS_COUNTS)
def test_every_attack_gives_distributions_and_repeats_with_its_seed(name: str, k: int):
    clean = some_rows(64, k, seed=k)
    kept = clean.copy()
    attack = default_registry().output(name)
    attacked, changed = attack.apply(clean, np.random.default_rng(5))
    again, _ = attack.apply(clean, np.random.default_rng(5))
    np.testing.assert_array_equal(clean, kept)
    np.testing.assert_array_equal(attacked, again)
    assert attacked.dtype == np.float32
    assert attacked.shape == clean.shape
    np.testing.assert_allclose(attacked.sum(axis=1), 1.0, atol=1e-5)
    assert (attacked >= 0).all()
    same_top = attacked.argmax(axis=1) == clean.argmax(axis=1)
    if attack.changes_label:
        np.testing.assert_array_equal(changed, ~same_top)
        assert changed.any()
    else:
        assert same_top.all()


@pytest.mark.parametrize("name", ["switch", "random", "average"])
def test_a_label_attack_changes_every_row_even_one_that_is_certain(name: str):
    certain = np.zeros((50, 5), np.float32)
    certain[:, 2] = 1.0
    rows = np.concatenate([certain, some_rows(200, 5, seed=1)])
    attacked, changed = default_registry().output(name).apply(rows, np.random.default_rng(0))
    assert changed.all()
    assert (attacked.argmax(axis=1) != rows.argmax(axis=1)).all()


def test_switch_and_random_only_move_probabilities():
    clean = some_rows(200, 10, seed=2)
    for name in ("switch", "random"):
        attacked, _ = default_registry().output(name).apply(clean, np.random.default_rng(0))
        np.testing.assert_allclose(np.sort(attacked, axis=1), np.sort(clean, axis=1), atol=1e-6)
    order = np.argsort(-clean, axis=1)
    switched, _ = default_registry().output("switch").apply(clean, np.random.default_rng(0))
    np.testing.assert_array_equal(switched.argmax(axis=1), order[:, 1])


def test_random_reaches_every_other_class_alike():
    clean = np.tile(some_rows(1, 6, seed=3), (6000, 1))
    attacked, _ = default_registry().output("random").apply(clean, np.random.default_rng(0))
    counts = np.bincount(attacked.argmax(axis=1), minlength=6)
    top = clean[0].argmax()
    assert counts[top] == 0
    assert (np.abs(np.delete(counts, top) - 1200) < 5 * np.sqrt(1200)).all()


def test_the_gap_of_average_is_drawn_at_random_and_keeps_the_sum():
    clean = some_rows(2000, 10, seed=4)
    attacked, _ = default_registry().output("average").apply(clean, np.random.default_rng(0))
    before, after = -np.sort(-clean, axis=1)[:, :2], -np.sort(-attacked, axis=1)[:, :2]
    np.testing.assert_allclose(after.sum(axis=1), before.sum(axis=1), atol=1e-5)
    share = (after[:, 0] - after[:, 1]) / (before[:, 0] - before[:, 1])
    # Uniform between a tie and a full exchange: no constant to be read off.
    np.testing.assert_allclose(np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.05)


def test_targeted_claims_one_class_and_spares_rows_that_have_it():
    clean = some_rows(300, 10, seed=5)
    attacked = attacks.targeted(clean, np.random.default_rng(0))
    target = attacked[0].argmax()
    assert (attacked.argmax(axis=1) == target).all()
    already = clean.argmax(axis=1) == target
    np.testing.assert_array_equal(attacked[already], clean[already])
    lies = attacked[~already, target]
    assert lies.min() >= 0.5
    assert np.ptp(lies) > 0.4
    _, changed = default_registry().output("targeted").apply(clean, np.random.default_rng(0))
    assert 0 < (~changed).sum() < 100


def test_confidence_lowers_the_winner_and_keeps_the_order_of_the_others():
    clean = some_rows(300, 10, seed=6)
    attacked, _ = default_registry().output("confidence").apply(clean, np.random.default_rng(0))
    rows, top = np.arange(300), clean.argmax(axis=1)
    assert (attacked[rows, top] <= clean[rows, top] + 1e-6).all()
    assert np.median(attacked[rows, top] / clean[rows, top]) < 0.9
    np.testing.assert_array_equal(np.argsort(attacked[:, :], axis=1)[:, -1], top)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(2, 12),
    st.integers(0, 10_000),
    st.floats(0.0, 60.0),
)
def test_no_row_breaks_an_attack(name: str, k: int, seed: int, sharpness: float):
    """From uniform rows to rows certain to the last bit."""
    clean = some_rows(8, k, seed, sharpness)
    clean /= clean.sum(axis=1, keepdims=True)
    attacked, changed = default_registry().output(name).apply(clean, np.random.default_rng(seed))
    assert np.isfinite(attacked).all()
    np.testing.assert_allclose(attacked.sum(axis=1), 1.0, atol=1e-4)
    assert changed.shape == (8,)


def test_an_attack_that_gives_no_distribution_is_named():
    clean = some_rows(4, 3, seed=0)
    for function in (lambda p, rng: p[:, :2], lambda p, rng: p - 1.0, lambda p, rng: p * np.nan):
        with pytest.raises(PluginError, match="'bad'"):
            OutputAttack("bad", "", function).apply(clean, np.random.default_rng(0))


def test_the_registry_refuses_two_of_a_name_and_explains_unknown_ones():
    registry = default_registry()
    with pytest.raises(PluginError, match="two attacks called 'switch'"):
        registry.add(OutputAttack("switch", "", attacks.switch))
    with pytest.raises(SettingsError, match="Known are: switch, random"):
        registry.get("swich")
    with pytest.raises(PluginError, match="is no attack"):
        registry.add("switch")  # type: ignore[arg-type]


def test_other_kinds_of_attacks_live_beside_output_attacks():
    class Fault:
        name, kind, summary = "fault", "model", "a fault"

    registry = AttackRegistry([Fault(), OutputAttack("switch", "", attacks.switch)])
    assert registry.names() == ("fault", "switch")
    assert registry.names("output") == ("switch",)
    with pytest.raises(SettingsError, match="is a model attack"):
        registry.output("fault")


def test_a_plug_in_adds_its_attack():
    class Mine:
        @hookimpl
        def fides_attacks(self):
            return [OutputAttack("mine", "uniform", lambda p, rng: p * 0 + 1, changes_label=False)]

    class Nothing:
        @hookimpl
        def fides_attacks(self):
            return None

    manager = create_plugin_manager(Settings(), extra={"mine": Mine(), "nothing": Nothing()})
    registry = default_registry(manager)
    assert registry.names("output") == (*NAMES, "mine")
    attacked, changed = registry.output("mine").apply(some_rows(3, 4, seed=0), np.random.default_rng(0))
    np.testing.assert_allclose(attacked, 0.25)
    assert changed.all()
