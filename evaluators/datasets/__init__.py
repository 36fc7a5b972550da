"""Data sets by name, with splits that are a function of a seed and nothing else."""

from archfront.evaluators.datasets.dataset import DataSet, RawData, Source, load
from archfront.evaluators.datasets.registry import DATASETS

__all__ = ["DATASETS", "DataSet", "RawData", "Source", "load"]
