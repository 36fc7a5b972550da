"""A space of your own: multilayer perceptrons, some layers deep, each of some width."""

from itertools import pairwise

from torch import nn

from archfront.spaces.product import Column, ProductSpace
from archfront.spaces.space import Layer


class Perceptrons(ProductSpace):
    """Multilayer perceptrons of up to `depth` hidden layers."""

    name = "perceptrons"

    def __init__(self, *, widths: list[int], depth: int = 4, inputs: int = 64, classes: int = 10) -> None:
        super().__init__([Column(f"layer{i}", ("skip", *widths)) for i in range(depth)])
        self.inputs, self.classes = inputs, classes

    def canonical(self, population):
        order = (population == 0).argsort(axis=1, kind="stable")  # skipped layers leave nothing: move them to the end
        return population[[[i] for i in range(len(population))], order]

    def build(self, genotype):
        sizes = [self.inputs, *(w for w in genotype if w != "skip")]
        hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], self.classes))

    def describe(self, genotype):
        return [Layer(name=f"layer{i}", kind=str(w), shape=(w,)) for i, w in enumerate(genotype) if w != "skip"]


ARCHFRONT_PLUGINS = {"spaces": {"perceptrons": Perceptrons}}
