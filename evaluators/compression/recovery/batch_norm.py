"""Batch normalisation's running statistics, computed anew after a model was changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.recovery import Case, Recovery

_BATCH = 256
"""Samples whose statistics are averaged."""


class BatchNorm(Recovery):
    """Batch normalisations get the statistics of what reaches them now; see ``reestimate_batch_norm``."""

    name: ClassVar[str] = "batch-norm"
    stage = 3

    def recover(self, case: Case) -> None:
        # Batches count alike, so they are made alike, however many samples pass at once elsewhere.
        samples = torch.cat(list(case.batches))
        reestimate_batch_norm(case.student, torch.chunk(samples, -(-len(samples) // _BATCH)))


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of every batch normalisation by those of these batches, in place.

    With ``B`` batches, ``running_mean = 1/B sum_b mean_b`` and ``running_var = 1/B sum_b var_b``, where ``mean_b`` and
    ``var_b`` (unbiased) are of what reaches the layer from batch ``b``, over the batch and space, while all batch
    normalisations normalise by their batch and every other module is in evaluation mode. Batches count alike, whatever
    their sizes. Which modules are in training mode, momenta and parameters are afterwards as they were; if a batch
    fails, so are the statistics.

    Source: Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", 2019 (exact
    averages in place of moving ones).

    Args:
        model: with any number of batch normalisations; those without running statistics, and models without any, are
            left alone.
        batches: inputs of the model.

    Returns:
        how many layers have new statistics.

    Raises:
        InputError: no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and _tracks(m)]
    if not norms:
        return 0
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise InputError("recovery.batches", 0, "batches were given", "Give one or more.")
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            # A momentum of None is torch's cumulative average.
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for batch in itertools.chain([first], batches):
                model(batch)
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return len(norms)


def _tracks(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    return norm.track_running_stats and norm.running_mean is not None
