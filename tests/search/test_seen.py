"""The compact set of what a job has asked for behaves as a set of pairs."""

import numpy as np
import pytest

from archfront.search import seen
from archfront.search.seen import Seen, pair_hashes


@pytest.mark.parametrize("recent", [1, 7, 1 << 16])
def test_it_is_a_set(recent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the newest ones moved to the sorted array at once, often and never."""
    monkeypatch.setattr(seen, "_RECENT", recent)
    rng = np.random.default_rng(0)
    compact, plain = Seen(), set()
    for _ in range(60):
        keys = [bytes([0] * 15 + [i]) for i in rng.integers(0, 200, size=int(rng.integers(0, 12))).tolist()]
        fidelity = int(rng.choice([0, 1, 9]))
        within: set[bytes] = set()
        expected = []
        for key in keys:
            expected.append((key, fidelity) not in plain and key not in within)
            within.add(key)
        assert compact.new(keys, fidelity).tolist() == expected
        compact.add(keys, np.full(len(keys), fidelity))
        plain |= {(key, fidelity) for key in keys}
        assert len(compact) == len(plain)
        assert all(((key, level) in compact) == ((key, level) in plain) for key in keys for level in (0, 1, 9))


def test_every_bit_of_a_pair_counts() -> None:
    """Keys of a space that fills only some of their bytes are told apart too, and so are fidelities."""
    keys = [bytes([0] * i + [1 << bit] + [0] * (15 - i)) for i in range(16) for bit in range(8)]
    hashes = [pair_hashes(keys, fidelity) for fidelity in (-1, 0, 1, 2, 2**62)]
    assert len(set(np.concatenate(hashes).tolist())) == 5 * 128
    assert len(set(pair_hashes([b"", b"\1", b"ab"], 0).tolist())) == 3
