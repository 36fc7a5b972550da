"""How the workers of one cluster are shared among the jobs that want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_NEVER = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one job asks of the cluster.

    Attributes:
        slots: workers that it could use.
        needs: amount of each resource that one worker takes.
        served_s: worker-seconds that it has had, in coarse steps: among equals, who had least comes first. Steps that
            are too fine would move workers to and fro all the time.
        busy: whether it has work for them now; who has none gets what the others leave.
    """

    slots: int
    needs: Mapping[str, float]
    served_s: float = 0.0
    busy: bool = True


def fair_slots(claims: Sequence[Claim], capacity: Mapping[str, float], part: float = 1.0) -> list[int]:
    """Workers for each claim: dominant resource fairness by progressive filling.

    One worker at a time goes to the claim whose largest share of any resource is smallest (Ghodsi et al., NSDI 2011,
    Algorithm 1), until nothing fits. A claim that is alone gets all it asks for: workers that do not fit yet tell an
    autoscaler what is missing.

    Args:
        capacity: of the whole cluster, by resource.
        part: of it that these claims may use, the rest being others'. Never less than one worker takes, where the whole
            cluster has that: a GPU cannot be halved by those who need a whole one, but they can wait for it in turn.
    """
    if len(claims) == 1 and part >= 1:
        return [claims[0].slots]
    given = [0] * len(claims)
    most = {name: max(claim.needs.get(name, 0.0) for claim in claims) for claim in claims for name in claim.needs}
    whole = {name: capacity.get(name, 0.0) for name in most}
    free = {name: max(part * whole[name], min(whole[name], most[name])) for name in most}
    waiting = {i for i, claim in enumerate(claims) if claim.slots > 0}
    while waiting:
        i = min(waiting, key=lambda i: (not claims[i].busy, _share(claims[i], given[i], capacity), claims[i].served_s))
        needs = claims[i].needs
        if given[i] == claims[i].slots or any(free[name] < need - 1e-9 for name, need in needs.items()):
            waiting.discard(i)
            continue
        given[i] += 1
        for name, need in needs.items():
            free[name] -= need
    return given


def _share(claim: Claim, slots: int, capacity: Mapping[str, float]) -> float:
    """The dominant share of a claim with so many workers."""
    shares = [slots * need / capacity[name] if capacity.get(name) else _NEVER for name, need in claim.needs.items()]
    return max(shares, default=0.0)
