"""The policy text and its JSON form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError
from scalekd.views import (
    CenterCrop,
    ColorJitter,
    Erase,
    Flip,
    RandAugment,
    RandomCrop,
    ViewPolicy,
)

fractions = st.floats(0, 1)
scales = st.lists(st.floats(0, 1, exclude_min=True), min_size=2, max_size=2).map(
    lambda pair: RandomCrop((min(pair), max(pair)))
)
centers = st.floats(0, 1, exclude_min=True).map(CenterCrop)
rands = st.builds(
    RandAugment,
    magnitude=st.integers(0, 30),
    num_operations=st.integers(1, 16),
    probability=fractions,
    magnitude_std=st.floats(0, 1000),
    max_magnitude=st.integers(1, 30),
    increasing=st.booleans(),
)
strengths = st.floats(0, 7)
jitters = st.builds(ColorJitter, strengths, strengths, strengths, st.floats(0, 0.5))
components = st.tuples(fractions.map(Flip), rands, jitters, fractions.map(Erase))
policies = st.builds(
    ViewPolicy,
    geometry=scales | centers,
    components=components.flatmap(
        lambda all_: st.lists(st.sampled_from(all_), unique_by=type).map(tuple)
    ),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    mean=st.tuples(fractions, fractions, fractions),
)


@given(policies)
def test_a_policy_round_trips_through_json(policy: ViewPolicy) -> None:
    again = ViewPolicy.from_config(json.loads(json.dumps(policy.to_config())))
    assert again == policy
    assert hash(again) == hash(policy)


@given(policies)
def test_a_policy_round_trips_through_text(policy: ViewPolicy) -> None:
    again = ViewPolicy.parse(
        str(policy), interpolation=policy.interpolation, mean=policy.mean, std=policy.std
    )
    assert again == policy
    assert str(again) == str(policy)


@given(st.text(max_size=40) | st.from_regex(r"(crop|flip|rand|erase|jitter)[-:+.0-9a-z]*"))
def test_any_text_parses_or_is_a_usage_error(text: str) -> None:
    try:
        policy = ViewPolicy.parse(text)
    except UsageError:
        return
    assert ViewPolicy.parse(str(policy)) == policy


def test_every_component_is_read() -> None:
    text = "crop:0.25..1+flip:0.3+rand-m7-n3-p0.6-mstd0.5-mmax12-inc1+jitter:0.1-0-1+erase:0.25"
    policy = ViewPolicy.parse(text)
    assert policy == ViewPolicy(
        geometry=RandomCrop((0.25, 1.0)),
        components=(
            Flip(0.3),
            RandAugment(7, 3, 0.6, 0.5, 12, True),
            ColorJitter(0.1, 0.0, 1.0),
            Erase(0.25),
        ),
    )
    assert str(policy) == text


def test_presets_and_defaults() -> None:
    assert ViewPolicy.parse("crop-flip") == ViewPolicy(RandomCrop((0.08, 1.0)), (Flip(0.5),))
    assert ViewPolicy.parse("center") == ViewPolicy(CenterCrop(0.875))
    assert ViewPolicy.parse("crop+rand-inc1").component(RandAugment) == (
        RandAugment(10, 2, 0.5, 0.0, 10, True)
    )


def test_order_of_the_text_does_not_matter_because_the_order_of_application_is_fixed() -> None:
    assert ViewPolicy.parse("erase:0.1+flip+crop") == ViewPolicy.parse("crop+flip+erase:0.1")


def test_only_centre_views_without_chance_are_deterministic() -> None:
    assert ViewPolicy.parse("center").deterministic
    assert ViewPolicy.parse("center+flip:1+rand-p0+jitter:0+erase:0").deterministic
    for text in ("crop", "center+flip", "center+rand-m9", "center+jitter:0.1", "center+erase:0.1"):
        assert not ViewPolicy.parse(text).deterministic


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no component ''"),
        ("corp+flip", "the nearest is crop"),
        ("crop+earse:0.25", "the nearest is erase"),
        ("flip", "needs crop or center"),
        ("crop+center", "sets the geometry twice"),
        ("crop+flip+flip:0.1", "sets flip twice"),
        ("crop+jitter:0.1+jitter:0.2", "sets jitter twice"),
        ("crop+jiter:0.4", "the nearest is jitter"),
        ("crop+jitter", "'' is not a decimal number"),
        ("crop+jitter:0.4-0.4", "needs 1, 3 or 4 numbers"),
        ("crop+jitter:0.4-0.4--0.1", "'' is not a decimal number"),
        ("crop:0.5", "is not a range"),
        ("crop:0.5..x", "'x' is not a decimal number"),
        ("crop+erase", "'' is not a decimal number"),
        ("crop+rand-x3", "'x3' of rand: no option"),
        ("crop+rand-m9-m8", "'m8' of rand: given twice"),
        ("crop+rand-m9.5", "needs an integer"),
        ("crop+rand-inc2", "needs an integer"),
        ("crop+rand-m9-tweights", "'tweights' of rand: no option"),
        ("crop+rand-m" + "9" * 5000, "no option"),
    ],
)
def test_an_unreadable_text_names_the_part_and_lists_the_grammar(text: str, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        ViewPolicy.parse(text)
    assert found in str(caught.value)
    assert "crop[:LO..HI]" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "range_"),
    [
        ("crop:0.5..0.2", "0 < LO <= HI <= 1"),
        ("crop:0..1", "0 < LO <= HI <= 1"),
        ("center:0", "(0, 1]"),
        ("crop+flip:1.5", "0..1"),
        ("crop+erase:2", "0..1"),
        ("crop+jitter:8", "0..7"),
        ("crop+jitter:0.4-0.4-0.4-0.6", "0..0.5"),
        ("crop+rand-m31", "0..30"),
        ("crop+rand-n0", "1..16"),
        ("crop+rand-n17", "1..16"),
        ("crop+rand-p3", "0..1"),
        ("crop+rand-mstd1001", "0..1000"),
    ],
)
def test_a_number_out_of_range_names_the_range(text: str, range_: str) -> None:
    with pytest.raises(UsageError, match="needs") as caught:
        ViewPolicy.parse(text)
    assert range_ in str(caught.value)


def test_constants_are_checked() -> None:
    with pytest.raises(UsageError, match="bicubic or bilinear"):
        ViewPolicy(interpolation="lanczos")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="mean"):
        ViewPolicy(mean=(0.5, 0.5, float("nan")))
    with pytest.raises(UsageError, match="std"):
        ViewPolicy(std=(0.5, 0.0, 0.5))


def test_a_config_of_another_version_is_a_mismatch() -> None:
    config = ViewPolicy().to_config() | {"version": 2}
    with pytest.raises(CacheMismatch, match="views are of version 2"):
        ViewPolicy.from_config(config)


@pytest.mark.parametrize(
    "damage",
    [
        {"version": None},
        {"policy": "corp"},
        {"policy": 3},
        {"policy": None},
        {"interpolation": "nearest"},
        {"interpolation": ["bicubic"]},
        {"mean": [0.5, 0.5]},
        {"mean": "abc"},
        {"mean": [0.5, "0.5", 0.5]},
        {"std": [1, 1, float("inf")]},
        {"extra": 1},
    ],
)
def test_a_damaged_config_is_an_integrity_error(damage: dict[str, object]) -> None:
    with pytest.raises(CacheCorrupt, match="manifest"):
        ViewPolicy.from_config(ViewPolicy().to_config() | damage)
