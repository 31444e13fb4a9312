"""Clipping, noise and the account: against formulas, another sampler and published closed forms."""

import importlib.util
import json
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from pilot_flwr.client.privacy import change_norm, release, system_normal
from pilot_flwr.client.privacy_accountant import PrivacyAccount, epsilon
from pilot_flwr.config.schema import LEAST_NOISE, MOST_NOISE, PrivacyConfig
from pilot_flwr.errors import ConfigError, StateError, TrainingError
from pilot_flwr.protocol import Spent

CONFIG = PrivacyConfig(enabled=True, clip_norm=2.0, noise_multiplier=3.0)


def vectors(*lists, dtype=torch.float64):
    """Two groups, the second of two tensors in two dimensions."""
    a, b, c = (torch.tensor(values, dtype=dtype) for values in lists)
    return {"lora": {"A": a}, "adapter": {"w": b.reshape(1, -1), "v": c}}


def flat(states):
    return torch.cat([t.double().flatten() for state in states.values() for t in state.values()])


def silent(count):
    return np.zeros(count)


numbers = st.floats(-100, 100, allow_subnormal=False)
lists = st.lists(numbers, min_size=1, max_size=4)


@given(lists, lists, lists, st.randoms(use_true_random=False), st.floats(0.01, 50))
def test_the_whole_upload_is_clipped_as_one_vector(a, b, c, random, clip):
    sent = vectors(a, b, c)
    trained = vectors(*([x + random.uniform(-9, 9) for x in values] for values in (a, b, c)))
    change = [t - s for t, s in zip(flat(trained).tolist(), flat(sent).tolist(), strict=True)]
    norm = math.sqrt(math.fsum(x * x for x in change))
    out, clipping = release(trained, sent, clip_norm=clip, noise_multiplier=1, normal=silent)
    assert clipping.norm == pytest.approx(norm, rel=1e-9)
    wanted = [
        s + x * min(1, clip / max(norm, clip)) for s, x in zip(flat(sent), change, strict=True)
    ]
    np.testing.assert_allclose(flat(out), wanted, rtol=1e-9, atol=1e-9)
    assert change_norm(out, sent) <= clip * (1 + 1e-9) + 1e-12
    assert {g: {n: t.shape for n, t in s.items()} for g, s in out.items()} == {
        g: {n: t.shape for n, t in s.items()} for g, s in trained.items()
    }


@given(lists, lists, st.floats(0.01, 50))
def test_two_data_sets_differ_by_twice_the_norm_at_most(one, other, clip):
    """The sensitivity that the account is made for, tight for opposite changes."""
    size = min(len(one), len(other))
    sent = {"g": {"w": torch.zeros(size, dtype=torch.float64)}}
    outs = [
        release(
            {"g": {"w": torch.tensor(values[:size], dtype=torch.float64)}},
            sent,
            clip_norm=clip,
            noise_multiplier=1,
            normal=silent,
        )[0]
        for values in (one, other)
    ]
    assert change_norm(*outs) <= 2 * clip


def test_opposite_changes_reach_twice_the_norm():
    sent = {"g": {"w": torch.zeros(2, dtype=torch.float64)}}
    outs = [
        release(
            {"g": {"w": torch.tensor([value, 0.0], dtype=torch.float64)}},
            sent,
            clip_norm=0.5,
            noise_multiplier=1,
            normal=silent,
        )[0]
        for value in (7.0, -7.0)
    ]
    assert change_norm(*outs) == pytest.approx(1.0, rel=1e-9)


def test_the_noise_is_normal_and_of_the_size_asked_for():
    sample = system_normal(200_001)
    assert len(sample) == 200_001
    assert stats.kstest(sample, "norm").pvalue > 1e-6
    halves = sample[:100_000], sample[100_000:200_000]
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.02
    sent = {"g": {"w": torch.zeros(100_000)}}
    out, _ = release(sent, sent, clip_norm=0.25, noise_multiplier=8.0)
    assert stats.kstest(out["g"]["w"].numpy() / 2.0, "norm").pvalue > 1e-6


def test_no_seed_repeats_the_noise():
    sent = {"g": {"w": torch.zeros(100)}}
    outs = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        outs.append(release(sent, sent, clip_norm=1, noise_multiplier=1)[0]["g"]["w"])
    assert not torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_change_and_noise_are_added_before_anything_is_rounded(dtype):
    """Both are 0.3 of the type's step at `large`: one by one, each would vanish."""
    large, step = {torch.float16: (2048.0, 2.0), torch.bfloat16: (256.0, 2.0)}[dtype]
    sent = {"g": {"w": torch.full((2,), large, dtype=dtype)}}
    trained = {"g": {"w": torch.full((2,), large + step, dtype=dtype)}}
    out, _ = release(
        trained,
        sent,
        clip_norm=0.3 * step * math.sqrt(2),
        noise_multiplier=1,
        normal=lambda count: np.full(count, math.sqrt(0.5)),
    )
    assert out["g"]["w"].dtype == dtype
    assert out["g"]["w"].tolist() == [large + step] * 2


@pytest.mark.parametrize("clip", [1.0, 0.3, 1e-100, 7e12])
@pytest.mark.parametrize("kind", ["stagnating", "tiny", "underflowing", "huge", "random"])
def test_no_rounding_exceeds_the_clipping_norm(kind, clip):
    """Against exact fractions; the first kind exceeds a fixed margin of 1e-12.

    Squares of just under half a unit in the last place of 1 are lost when they are added to it, in
    each lane of a vectorized sum: 2^23 of them are 3e-12 of the whole.
    """
    numbers = 2**23 if kind == "stagnating" else 10_000
    x = {
        "stagnating": torch.full((numbers,), math.sqrt(0.98 * 2**-53), dtype=torch.float64),
        "tiny": torch.full((numbers,), 1e-160, dtype=torch.float64),
        "underflowing": torch.full((numbers,), 5e-324, dtype=torch.float64),
        "huge": torch.full((numbers,), 1e150, dtype=torch.float64),
        "random": torch.randn(numbers, dtype=torch.float64).pow(9),
    }[kind]
    if kind == "stagnating":
        x[:64] = 1.0
    sent = {"g": {"w": torch.zeros(numbers, dtype=torch.float64)}}
    out, clipping = release(
        {"g": {"w": x}}, sent, clip_norm=clip, noise_multiplier=1, normal=silent
    )
    released = out["g"]["w"]
    assert torch.equal(released, x * clipping.factor)
    assert _squares(released) <= Fraction(clip) ** 2
    if clipping.factor < 1 and kind != "underflowing":  # and no more is cut than is needed
        assert _squares(released) >= Fraction(clip) ** 2 * (1 - Fraction(numbers, 2**49) * 2)


def _squares(vector):
    values, counts = torch.unique(vector, return_counts=True)
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return sum(Fraction(value) ** 2 * count for value, count in pairs)


def test_a_change_without_a_norm_is_no_release():
    sent = {"g": {"w": torch.zeros(2)}}
    for bad in (math.nan, math.inf):
        with pytest.raises(TrainingError, match="not finite"):
            release({"g": {"w": torch.tensor([0, bad])}}, sent, clip_norm=1, noise_multiplier=1)


def analytic_epsilon(sigma, delta):
    """Balle & Wang 2018, theorem 8: the exact ε of a Gaussian of deviation σ, sensitivity 1."""

    def excess(eps):
        a, b = 1 / (2 * sigma), eps * sigma
        return stats.norm.cdf(a - b) - math.exp(eps + stats.norm.logcdf(-a - b)) - delta

    return optimize.brentq(excess, 0, 1e4) if excess(0) > 0 else 0.0


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 200), st.floats(1e-9, 1e-3), st.integers(1, 50))
def test_the_account_is_an_upper_bound_of_the_closed_form_and_a_close_one(z, delta, count):
    """k releases of multiplier z are one of z/√k (Dong et al. 2019), of sensitivity 2 C."""
    exact = analytic_epsilon(z / 2 / math.sqrt(count), delta)
    kept = epsilon([z] * count, delta)
    assert exact <= kept <= 1.35 * exact + 0.02


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=6), st.floats(1e-9, 1e-3))
def test_renyi_orders_add_up(multipliers, delta):
    """ε(α) of a Gaussian is α Δ²/2σ² (Mironov 2017); its plain conversion bounds the account."""
    rho = sum((2 / z) ** 2 / 2 for z in multipliers)
    plain = rho + 2 * math.sqrt(rho * math.log(1 / delta))  # the best real order, Bun & Steinke
    kept = epsilon(multipliers, delta)
    assert kept <= plain * 1.01 + 0.02  # orders are a grid
    assert kept >= epsilon(multipliers[:-1], delta)
    assert kept == pytest.approx(epsilon(multipliers[::-1], delta))


def test_the_documentations_table_is_the_accounts():
    text = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "privacy.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 32]
    for z, *told in rows:
        kept = [epsilon([float(z)] * uploads, 1e-5) for uploads in (1, 4, 20)]
        assert told == [f"{value:.3g}" for value in kept]


def test_nothing_released_costs_nothing():
    assert epsilon([], 1e-5) == 0


def test_the_account_goes_on_where_it_was(tmp_path):
    path = tmp_path / "a" / "c.privacy.json"
    first, in_total = PrivacyAccount(path, "c").spend(CONFIG, run="one", server_round=1)
    assert first == in_total == Spent(epsilon([3.0], CONFIG.delta), CONFIG.delta, 1)
    # The same exchange once more, as after a resume, is one more release.
    again, _ = PrivacyAccount(path, "c").spend(CONFIG, run="one", server_round=1)
    assert again.epsilon == epsilon([3.0, 3.0], 1e-5)
    expected = PrivacyAccount(path, "c").epsilon_after(CONFIG, 1e-5)
    other, in_total = PrivacyAccount(path, "c").spend(CONFIG, run="two", server_round=1)
    assert in_total.epsilon == expected
    assert (other.releases, in_total.releases) == (1, 3)
    assert other.epsilon == first.epsilon < again.epsilon < in_total.epsilon
    assert [e["run"] for e in PrivacyAccount(path, "c").releases()] == ["one", "one", "two"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "[" * 50_000, '{"format": 1, "client": "c", "releases": [{}]}']
    + [
        json.dumps({"format": "f", "client": "c", "releases": [{"run": "r"} | bad]})
        for bad in (
            {},
            {"noise_multiplier": 0},
            {"noise_multiplier": True},
            {"noise_multiplier": 1e200},
        )
    ]
    + ['{"format": 1, "client": "c", "releases": [{"run": "r", "noise_multiplier": Infinity}]}'],
)
def test_an_unreadable_account_is_never_begun_anew(text, tmp_path):
    path = tmp_path / "c.privacy.json"
    path.write_text(text)
    for act in (
        lambda a: a.spend(CONFIG, run="r", server_round=1),
        lambda a: a.epsilon_after(CONFIG, 1e-5),
    ):
        with pytest.raises(StateError, match="is not a privacy account.*releases nothing"):
            act(PrivacyAccount(path, "c"))
    assert path.read_text() == text


@pytest.mark.parametrize("multiplier", [LEAST_NOISE, MOST_NOISE])
def test_every_multiplier_that_is_allowed_can_be_counted(multiplier):
    spent = epsilon([multiplier] * 100, 1e-5)
    assert 0 <= spent < math.inf


def test_another_clients_account_is_refused(tmp_path):
    path = tmp_path / "c.privacy.json"
    PrivacyAccount(path, "c").spend(CONFIG, run="r", server_round=1)
    with pytest.raises(StateError, match="client 'c' but must have .* 'd'"):
        PrivacyAccount(path, "d").releases()


def test_a_missing_package_is_told_before_anything_is_spent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    assert importlib.util.find_spec("pilot_flwr.client.privacy_accountant")
    account = PrivacyAccount(tmp_path / "c", "c")
    with pytest.raises(ConfigError, match=r"not installed here: pip install \"pilot-flwr\[privacy"):
        account.spend(CONFIG, run="r", server_round=1)
    assert not account.path.exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"clip_norm": 0}, "`privacy.clip_norm` is 0 but must be above 0"),
        ({"noise_multiplier": 0}, "`privacy.noise_multiplier` is 0 but must be at least 1e-06"),
        ({"noise_multiplier": math.inf}, "`privacy.noise_multiplier` is inf"),
        ({"noise_multiplier": 1e200}, r"`privacy.noise_multiplier` is 1e\+200 but must be at most"),
        ({"noise_multiplier": 1e-300}, "`privacy.noise_multiplier` is 1e-300 but must be at least"),
        ({"delta": 0}, "`privacy.delta` is 0 but must be above 0"),
        ({"delta": 1}, "`privacy.delta` is 1 but must be at least 0 and below 1"),
    ],
)
def test_settings_are_checked(change, text):
    with pytest.raises(ConfigError, match=text):
        PrivacyConfig(**change)
