"""Any plan and any manifest survives its file, and every change of the file is noticed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalekd.cache.documents import canonical, parse_committed
from scalekd.cache.documents.manifest import Identity, Manifest, Plan, Provenance
from scalekd.cache.files import digest
from scalekd.cache.layout import ShardId
from scalekd.errors import CacheCorrupt, CacheMismatch

_FROZEN = Path(__file__).parents[1] / "frozen" / "format1" / "float16" / "plan.json"
_BASE = json.loads(_FROZEN.read_bytes())

_SHAPE = ("grid", "num_channels", "num_prefix_tokens")

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_versions = st.dictionaries(_text, _text, max_size=4)
_summaries = st.fixed_dictionaries(
    dict.fromkeys(
        ("mean", "p95", "max"),
        st.floats(0, allow_nan=False, allow_infinity=False) | st.integers(0, 2**53),
    )
)
_measured = st.dictionaries(
    st.sampled_from(["3", "4"]),
    st.fixed_dictionaries(
        {"num_views": st.integers(1, 10**6)}
        | dict.fromkeys(("raw", "spatial", "frequency"), _summaries)
    ),
)


@st.composite
def identities(draw: st.DrawFn) -> Identity:
    document = copy.deepcopy(_BASE["identity"])
    block = draw(st.integers(1, 300))
    shard = block * draw(st.integers(1, 20))
    document.update(
        block_size=block,
        shard_size=shard,
        batch_size=draw(st.integers(1, 4096)),
        precision=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        skip_corrupt=draw(st.booleans()),
        logits=draw(st.sampled_from([None, document["logits"]])),
    )
    document["data"].update(
        num_samples=draw(st.integers(1, 12 * shard)),
        max_key_bytes=draw(st.integers(1, 4096)),
        class_names=draw(st.none() | st.lists(_text, max_size=4)),
        fingerprint=draw(st.binary(max_size=4).map(lambda value: digest(value).sha256)),
    )
    document["views"].update(
        seed=draw(st.integers(0, 2**63 - 1)),
        view_size=draw(st.lists(st.integers(24, 4096), min_size=2, max_size=2)),
        environment=draw(_versions),
    )
    for stage in list(document["stages"]):
        if draw(st.booleans()):
            document["stages"][stage].update(
                grid=draw(st.lists(st.integers(1, 20), min_size=2, max_size=2)),
                num_channels=draw(st.integers(1, 2048)),
                num_prefix_tokens=draw(st.integers(0, 8)),
            )
            shape = {name: document["stages"][stage][name] for name in _SHAPE}
            document["teacher"]["stages"][stage] = shape
        else:
            del document["stages"][stage]
    document["teacher"]["img_size"] = document["views"]["view_size"]
    kept = draw(st.permutations([int(stage) for stage in document["stages"]]))
    document["request"] = {"stages": kept, "logits": draw(_text), "codec": draw(_text)}
    return Identity.model_validate(document)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    provenance = Provenance(
        software=draw(_versions),
        licence=draw(st.none() | _text),
        note=draw(st.none() | _text),
        measured=draw(_measured),
    )
    return Plan.of(draw(identities()), provenance)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    plan, passes = draw(plans()), draw(st.integers(1, 3))
    hashes = st.binary(max_size=3).map(lambda value: digest(value).sha256)
    records = {
        ShardId(unit, shard).record_path: draw(hashes)
        for unit in ("samples", *range(passes))
        for shard in range(plan.identity.num_shards)
    }
    return Manifest(
        plan=plan,
        num_passes=passes,
        num_views=draw(st.integers(0, 2**50)),
        skipped=tuple(draw(st.lists(_text, max_size=3))),
        files={"plan.json": digest(canonical(plan))},
        records=records,
        total_bytes=draw(st.integers(0, 2**60)),
    ).sealed()


@given(plans())
@settings(max_examples=100, deadline=None)
def test_any_plan_round_trips_through_json(plan: Plan) -> None:
    content = canonical(plan)
    again = parse_committed(Plan, content, where="here")
    assert again == plan
    assert canonical(again) == content
    assert content == (json.dumps(json.loads(content), sort_keys=True, indent=2) + "\n").encode()


@given(manifests())
@settings(max_examples=50, deadline=None)
def test_any_manifest_round_trips_through_json(manifest: Manifest) -> None:
    content = canonical(manifest)
    assert canonical(parse_committed(Manifest, content, where="here")) == content


@given(identities(), identities())
@settings(max_examples=50, deadline=None)
def test_plans_have_equal_ids_only_if_their_identities_are_equal(
    first: Identity, second: Identity
) -> None:
    nothing = Provenance(software={})
    ids = [Plan.of(each, nothing).cache_id for each in (first, second)]
    assert (ids[0] == ids[1]) == (canonical(first) == canonical(second))


@given(manifests(), st.data())
@settings(max_examples=100, deadline=None)
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(
    manifest: Manifest, data: st.DataObject
) -> None:
    content = bytearray(canonical(manifest))
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    with pytest.raises((CacheCorrupt, CacheMismatch)):
        parse_committed(Manifest, bytes(content), where="here")


@given(plans(), st.data())
@settings(max_examples=100, deadline=None)
def test_no_other_value_in_an_identity_goes_unnoticed(plan: Plan, data: st.DataObject) -> None:
    document: Any = json.loads(canonical(plan))
    node = document["identity"]
    while True:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key]:
            break
        node = node[key]
    value = data.draw(_measured)
    assume(json.dumps(value) != json.dumps(node[key]))
    node[key] = value
    content = (json.dumps(document, sort_keys=True, indent=2) + "\n").encode()
    with pytest.raises((CacheCorrupt, CacheMismatch), match="here"):
        parse_committed(Plan, content, where="here")
