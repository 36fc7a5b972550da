"""An evaluator of your own: how deep a network is, and how many multiplications its linear layers make."""

from torch import nn

from archfront.evaluators.evaluator import Evaluated, Evaluator, Metric, MetricSpec


class Shape(Evaluator):
    """Depth and multiplications of a network's linear layers."""

    name = "shape"
    batch_size = 100  # candidates a call

    def __init__(self, *, bias: bool = True) -> None:  # `bias:` in the job file
        self.bias = bias

    @property
    def metrics(self):
        return [
            MetricSpec(name="depth", unit="layers", direction="max"),
            MetricSpec(name="multiplications", unit="1", direction="min"),
        ]

    def evaluate(self, tasks, context):
        return [self.one(context.space.build(task.genotype)) for task in tasks]

    def one(self, model):
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        work = sum(m.in_features * m.out_features + self.bias * m.out_features for m in layers)
        return Evaluated({"depth": Metric(len(layers)), "multiplications": Metric(work)})


ARCHFRONT_PLUGINS = {"evaluators": {"shape": Shape}}
