"""Shares of a cluster: dominant resource fairness, nothing left idle that somebody could use."""

import math

from hypothesis import given
from hypothesis import strategies as st

from archfront.search.executors.fair_shares import Claim, fair_slots


def test_alone_a_claim_gets_all_it_asks_for() -> None:
    # More than fits: an autoscaler shall see what is missing.
    assert fair_slots([Claim(slots=100, needs={"CPU": 1})], {"CPU": 4}) == [100]


def test_equal_claims_halve_a_cluster_and_small_ones_leave_the_rest() -> None:
    def cpu(slots: int) -> Claim:
        return Claim(slots=slots, needs={"CPU": 1})

    assert fair_slots([cpu(50), cpu(50)], {"CPU": 8}) == [4, 4]
    assert fair_slots([cpu(1), cpu(50)], {"CPU": 8}) == [1, 7]
    assert fair_slots([cpu(3), cpu(3), cpu(3)], {"CPU": 2}) == [1, 1, 0]


def test_the_published_example() -> None:
    """Ghodsi et al., NSDI 2011, figure 3: tasks of <1 CPU, 4 GB> and <3 CPU, 1 GB> on 9 CPUs and 18 GB."""
    claims = [Claim(slots=9, needs={"CPU": 1, "memory": 4}), Claim(slots=9, needs={"CPU": 3, "memory": 1})]
    assert fair_slots(claims, {"CPU": 9, "memory": 18}) == [3, 2]


def test_a_part_of_a_cluster() -> None:
    """Of two controllers each has half; what cannot be halved both may wait for."""
    one = Claim(slots=8, needs={"CPU": 1})
    assert fair_slots([one], {"CPU": 8}, 0.5) == [4]
    gpu = Claim(slots=1, needs={"CPU": 1, "GPU": 1})
    assert sum(fair_slots([gpu, gpu], {"CPU": 4, "GPU": 1}, 0.5)) == 1
    assert fair_slots([Claim(slots=2, needs={"CPU": 4})], {"CPU": 2}, 0.5) == [0]


def test_turns_and_idleness() -> None:
    one, other = Claim(slots=1, needs={"CPU": 1}, served_s=60), Claim(slots=1, needs={"CPU": 1}, served_s=0)
    assert fair_slots([one, other], {"CPU": 1}) == [0, 1]
    idle = Claim(slots=4, needs={"CPU": 1}, busy=False)
    assert fair_slots([idle, Claim(slots=3, needs={"CPU": 1})], {"CPU": 4}) == [1, 3]


amounts = st.sampled_from([0.25, 0.5, 1.0, 2.0])
claims_ = st.lists(
    st.builds(
        Claim,
        slots=st.integers(0, 20),
        needs=st.dictionaries(st.sampled_from(["CPU", "GPU", "memory"]), amounts, min_size=1),
        served_s=st.floats(0, 100),
        busy=st.booleans(),
    ),
    min_size=2,
    max_size=5,
)


@given(claims_, st.dictionaries(st.sampled_from(["CPU", "GPU", "memory"]), st.integers(0, 16).map(float)))
def test_never_too_much_and_nothing_wasted(claims: list[Claim], capacity: dict[str, float]) -> None:
    given_ = fair_slots(claims, capacity)
    used = {
        name: math.fsum(n * c.needs.get(name, 0) for n, c in zip(given_, claims, strict=True))
        for name in ("CPU", "GPU", "memory")
    }
    assert all(used[name] <= capacity.get(name, 0) + 1e-6 for name in used)
    for slots, claim in zip(given_, claims, strict=True):
        assert 0 <= slots <= claim.slots
        fits = all(used[name] + need <= capacity.get(name, 0) + 1e-9 for name, need in claim.needs.items())
        assert slots == claim.slots or not fits
