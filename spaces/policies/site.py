"""A place of a model at which a compression policy has a choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from archfront.errors import InputError, suggestion

Choice = int | float | str | bool
"""What a policy says of one site: a number of bits, a kept share, a pattern's name."""

Policy = Mapping[str, Choice]
"""Site id -> choice. A site that is not named keeps its identity, the last choice of its domain."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One decision of a policy.

    Attributes:
        id: unique in its model, ``layer1.0.conv1:weights``.
        kind: ``weight-bits``, ``activation-bits``, or what another transform understands.
        domain: the choices, from the strongest compression to none. The last one changes nothing.
        module: path of the module in the model; empty for a decision about all of it.
        members: paths of all modules that change with it; empty where ``module`` says it.
        tied: sites of one kind and one such name take the same choice; None for a site of its own.
        facts: numbers about it: ``params``, ``macs``, ``elements``.
    """

    id: str
    kind: str
    domain: tuple[Choice, ...]
    module: str = ""
    members: tuple[str, ...] = ()
    tied: str | None = None
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> Choice:
        return self.domain[-1]


def tied_groups(sites: Sequence[Site]) -> list[tuple[int, ...]]:
    """Indices of the sites that take one choice, group after group; alone where nothing ties them.

    Raises:
        InputError: tied sites have different domains.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for i, site in enumerate(sites):
        groups.setdefault((site.kind, site.tied) if site.tied is not None else (site.kind, f" {site.id}"), []).append(i)
    for (_, name), members in groups.items():
        if len({sites[i].domain for i in members}) > 1:
            domains = {sites[i].id: sites[i].domain for i in members}
            raise InputError("sites", domains, f"are tied as {name!r}", "Give them one domain.")
    return [tuple(members) for members in groups.values()]


def complete(sites: Sequence[Site], policy: Policy) -> dict[str, Choice]:
    """A policy with the identity where it says nothing.

    Raises:
        InputError: an unknown site, a choice outside of its domain, or tied sites with different ones.
    """
    by_id = {site.id: site for site in sites}
    for name, choice in policy.items():
        if name not in by_id:
            raise InputError(f"policy.{name}", choice, "is for no site of the model", suggestion(name, by_id))
        if choice not in by_id[name].domain:
            allowed = ", ".join(map(str, by_id[name].domain))
            raise InputError(f"policy.{name}", choice, "is not allowed there", f"Give one of: {allowed}.")
    full = {site.id: policy.get(site.id, site.identity) for site in sites}
    for group in tied_groups(sites):
        chosen = {sites[i].id: full[sites[i].id] for i in group}
        if len(set(chosen.values())) > 1:
            raise InputError("policy", chosen, "are tied, and differ", "Give all of them one choice.")
    return full
