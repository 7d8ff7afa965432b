"""Settings of trainings: the learning rate of each step, and bad values by name."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from itool_jax.training.losses import LossSettings
from itool_jax.training.settings import PreferenceSettings, WarmupSettings


@pytest.mark.parametrize("n_steps", [1, 2, 3, 10, 100, 1001])
@pytest.mark.parametrize("rise", [0.0, 0.1, 0.5])
def test_the_rate_rises_then_falls(n_steps: int, rise: float) -> None:
    settings = WarmupSettings(learning_rate=2e-3, warmup_ratio=rise)
    rates = np.array([settings.rate(step, n_steps) for step in range(n_steps)])
    assert (rates > 0).all()
    assert rates.max() <= 2e-3
    top = int(rates.argmax())
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert abs(top - rise * n_steps) <= 1
    if n_steps >= 100:
        assert rates.max() == pytest.approx(2e-3, rel=1e-3)
        assert rates[-1] < 1e-3 * 2e-3 * 2
        halfway = round((rise + 1) / 2 * n_steps)
        assert rates[halfway] == pytest.approx(1e-3, rel=0.03)
        if rise:
            assert np.diff(rates[:top]) == pytest.approx(2e-3 / (rise * n_steps + 1), rel=1e-6)


@pytest.mark.parametrize(("settings", "section"), [(WarmupSettings, "warmup"), (PreferenceSettings, "preference")])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", 0.0, "must be positive, got 0.0"),
        ("learning_rate", math.nan, "must be positive, got nan"),
        ("batch_size", 0, "must be positive, got 0"),
        ("micro_batch", 3, r"must divide \w+.batch_size=\d+, got 3"),
        ("clip_norm", 0.0, "must be positive, got 0.0"),
        ("warmup_ratio", 1.0, r"must be in \[0, 1\), got 1.0"),
        ("warmup_ratio", -0.1, r"must be in \[0, 1\), got -0.1"),
        ("weight_decay", -0.01, "must not be negative, got -0.01"),
    ],
)
def test_bad_settings_are_named(settings: Any, section: str, name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{section}.{name} {message}$"):
        settings(**{name: value})


@pytest.mark.parametrize(
    ("settings", "name", "value", "message"),
    [
        (WarmupSettings, "epochs", -1, "warmup.epochs must not be negative, got -1"),
        (WarmupSettings, "max_epochs", 0, "warmup.max_epochs must be positive, got 0"),
        (PreferenceSettings, "epochs", 0, "preference.epochs must be positive, got 0"),
    ],
)
def test_bad_numbers_of_passes_are_named(settings: Any, name: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        settings(**{name: value})


def test_the_rate_rises_and_falls_in_each_span() -> None:
    settings = WarmupSettings(learning_rate=1.0, warmup_ratio=0.25)
    four = [0.5, 1.0, 0.75, 0.25]  # a step of rise, then a cosine over three
    assert settings.rates([4]) == pytest.approx(four)
    assert settings.rates([4, 0, 1, 4]) == pytest.approx([*four, 0.8, *four])
    assert settings.rates([]) == settings.rates([0]) == []


def test_answers_cannot_be_swapped() -> None:
    with pytest.raises(ValueError, match=r"^preference.control=swapped swaps .* but .*raft has no pairs$"):
        PreferenceSettings(control="swapped", loss="raft")


def test_preference_settings_check_the_loss_too() -> None:
    with pytest.raises(ValueError, match=r"^preference.beta must be positive and finite, got 0.0$"):
        PreferenceSettings(beta=0.0)
    names = {field.name for field in dataclasses.fields(PreferenceSettings)}
    assert names >= {field.name for field in dataclasses.fields(LossSettings)}
