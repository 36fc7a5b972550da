"""Random search: the base line of every comparison."""

from __future__ import annotations

from archfront.search.strategy import Ask, Proposals, Results, Strategy
from archfront.spaces.space import Population


class RandomSearch(Strategy):
    """Draws candidates from the space's own distribution, none twice; results change nothing."""

    name = "random"

    def ask(self, ask: Ask) -> Proposals:
        rng = ask.rng()
        return self.proposals(self.fresh(ask.count, lambda n: self.space.sample(rng, n)))

    def learn(self, population: Population, results: Results) -> None:
        pass
