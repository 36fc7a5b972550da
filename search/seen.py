"""Which (candidate, fidelity) pairs a job has asked for, in a few bytes each: a search of millions keeps them all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from archfront.spaces.product import mix
from archfront.spaces.space import KEY_BYTES

Hashes = npt.NDArray[np.uint64]

_RECENT = 1 << 16
_STEP = 0x9E3779B97F4A7C15


class Seen:
    """A growing set of pairs, as 64-bit hashes: the older ones sorted in one array, the newest in a set.

    Two different pairs are taken for one with the chance ``n**2 / 2**65`` among ``n`` (3e-6 for ten million); a search
    then leaves out a candidate that it might have tried, in every run of it alike.
    """

    def __init__(self) -> None:
        self._sorted: Hashes = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def add(self, keys: Sequence[bytes], fidelities: int | npt.NDArray[np.int64]) -> None:
        """Put in pairs, be they new or not."""
        hashes = pair_hashes(keys, fidelities)
        self._recent.update(hashes[~self._is_sorted_in(hashes)].tolist())
        if len(self._recent) >= _RECENT:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent = set()

    def new(self, keys: Sequence[bytes], fidelity: int) -> npt.NDArray[np.bool_]:
        """Which pairs are not in the set, repeats within ``keys`` left out."""
        hashes = pair_hashes(keys, fidelity)
        recent, within = self._recent, set()
        new = ~self._is_sorted_in(hashes)
        for i, pair in enumerate(hashes.tolist()):
            if pair in recent or pair in within:
                new[i] = False
            within.add(pair)
        return new

    def __contains__(self, pair: tuple[bytes, int]) -> bool:
        return not self.new([pair[0]], pair[1])[0]

    def _is_sorted_in(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        if not len(self._sorted):
            return np.zeros(len(hashes), dtype=bool)
        at = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        return np.asarray(self._sorted[at] == hashes)


def pair_hashes(keys: Sequence[bytes], fidelities: int | npt.NDArray[np.int64]) -> Hashes:
    """One 64-bit hash for each key of up to 16 bytes and its fidelity."""
    joined = b"".join(keys)
    if len(joined) != KEY_BYTES * len(keys):
        joined = b"".join(key.ljust(KEY_BYTES, b"\0") for key in keys)
    words = np.frombuffer(joined, dtype="<u8").reshape(-1, 2)
    levels = mix(np.atleast_1d(np.asarray(fidelities, dtype=np.int64)).astype(np.uint64) + np.uint64(_STEP))
    return mix(mix(words[:, 0] ^ levels) + words[:, 1])
