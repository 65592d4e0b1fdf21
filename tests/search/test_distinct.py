from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.estimate import to_arrays
from autopar.layout import Layout
from autopar.plan import Plan, Recompute, ScheduleName, parse_slug
from autopar.search.distinct import distinct_codes, distinct_key, first_of_each

DEGREES = st.sampled_from([1, 2, 3, 8])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    zero = draw(st.sampled_from([0, 1, 2, 3]))
    tp, cp, pp, ep, etp = (draw(DEGREES) for _ in range(5))
    dp = ep * etp * draw(st.sampled_from([1, 2]))
    return Plan(
        layout=Layout(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, **{"dp_shard" if zero else "dp_replicate": dp}),
        zero_stage=zero if zero != 0 or dp == 1 else 0,
        microbatch_size=draw(st.sampled_from([1, 2])),
        schedule=draw(st.sampled_from([ScheduleName.ONE_F_ONE_B, ScheduleName.GPIPE])),
        recompute=draw(st.sampled_from(list(Recompute))),
    )


@given(st.lists(plans(), min_size=2, max_size=12))
def test_codes_are_equal_exactly_where_keys_are(found: list[Plan]) -> None:
    codes = distinct_codes(to_arrays(found))
    keys = [distinct_key(plan) for plan in found]
    for i, key in enumerate(keys):
        assert [key == other for other in keys] == (codes == codes[i]).tolist()
        assert distinct_codes(to_arrays([found[i]]))[0] == codes[i]
    assert codes.min() >= 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("tp2.pp2.dp4.z1.mb1", "tp2.pp2.vp2.dp4.z2.mb4.ac-full.sp", True),
        ("tp2.pp2.dp4.z0.mb1", "tp2.pp2.dp4.z2.mb1.rep2", True),
        ("dp8.z2.mb1", "dp8.z3.mb1", False),
        ("dp8.z3.mb1", "dp8.z3.mb1.rep2", True),
        ("tp2.dp4.z3.mb1", "tp4.dp2.z3.mb1", False),
        ("ep2.dp8.z1.mb1", "ep4.dp8.z1.mb1", False),
        # ZeRO-3 on one rank shards nothing.
        ("tp8.z3.mb1", "tp8.z0.mb1", True),
    ],
)
def test_what_is_the_same_answer(one: str, other: str, same: bool) -> None:
    keys = [distinct_key(parse_slug(slug)) for slug in (one, other)]
    codes = distinct_codes(to_arrays([parse_slug(slug) for slug in (one, other)]))
    assert (keys[0] == keys[1], bool(codes[0] == codes[1])) == (same, same)


def test_the_best_of_every_answer_in_order() -> None:
    codes = np.asarray([7, 3, 7, 5, 3, 9])
    assert first_of_each(codes).tolist() == [0, 1, 3, 5]
    assert first_of_each(codes, 2).tolist() == [0, 1]


def test_degrees_beyond_any_model_are_refused() -> None:
    with pytest.raises(OverflowError, match="tp=4096 does not fit"):
        distinct_codes(to_arrays([parse_slug("tp4096.mb1")]))
