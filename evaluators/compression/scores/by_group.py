"""Two groups of sites, each with a score of its own."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from archfront.errors import InputError
from archfront.evaluators.compression.scores.registry import SCORES
from archfront.evaluators.compression.scores.score import Score, Subject, Vector


class ByGroup(Score):
    """One score for the sites whose ids match, another for the rest: their damages may be in different units, and no
    sum of both means anything. The allocator ``two-pool`` keeps them apart.

    Zhao et al., "MixDQ", 2024: content and image quality.

    Args:
        pool: glob patterns of ids of the first group.
        first, rest: scores, as ``{"name": ..., <options>}``.
    """

    name: ClassVar[str] = "by-group"

    def __init__(
        self,
        *,
        pool: Sequence[str] = ("*:activations",),
        first: Mapping[str, Any] | None = None,
        rest: Mapping[str, Any] | None = None,
    ) -> None:
        if not pool:
            raise InputError("score.pool", list(pool), "is empty", "Give a pattern such as '*mlp*'.")
        self.pool = list(pool)
        self.first = SCORES.build(first or {"name": "distortion", "of": "kl"}, "score.first")
        self.rest = SCORES.build(rest or {"name": "distortion", "of": "sqnr"}, "score.rest")

    def measure(self, subject: Subject) -> list[Vector]:
        one, other = self.first.measure(subject), self.rest.measure(subject)
        return [
            mine if any(fnmatch.fnmatch(site.id, pattern) for pattern in self.pool) else theirs
            for site, mine, theirs in zip(subject.sites, one, other, strict=True)
        ]
