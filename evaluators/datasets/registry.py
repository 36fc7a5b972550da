"""The table of data sets that job files can name."""

from __future__ import annotations

from archfront.evaluators.datasets.dataset import Source
from archfront.registry import Registry

DATASETS: Registry[Source] = Registry(
    "datasets",
    {
        "digits": "archfront.evaluators.datasets.digits:Digits",
        "mnist": "archfront.evaluators.datasets.idx:Mnist",
        "fashion-mnist": "archfront.evaluators.datasets.idx:FashionMnist",
        "cifar10": "archfront.evaluators.datasets.cifar:Cifar10",
        "image-folder": "archfront.evaluators.datasets.folder:ImageFolder",
        "text": "archfront.evaluators.datasets.text:Text",
    },
)
