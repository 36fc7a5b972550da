"""In the measuring process: a policy's network with the kernels that are faster on this device, judged as it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from archfront.evaluators.compression.compressible import judged_outputs
from archfront.evaluators.deployment.half_precision import in_half
from archfront.evaluators.deployment.kernel_layers import DENSE, Time, choose, with_kernels
from archfront.evaluators.deployment.student_files import accuracy_facts, read_samples, read_student, write_record
from archfront.spaces.policies.policy_chain import policies_of
from archfront.spaces.policies.quantised import bake, without_input_quantisers
from archfront.spaces.space import Space

Finished = Callable[[Callable[[], object]], Callable[[], object]]
Graph = Callable[[nn.Module, Tensor], Callable[[], object]]


def student_call(
    space: Space,
    item: Mapping[str, Any],
    device: str,
    *,
    finished: Finished,
    graph: Graph | None = None,
    time: Time | None = None,
) -> Callable[[], object]:
    """One forward pass of a student in half precision, its kernels chosen here. The item's ``record`` gets what was
    chosen for each layer, and what the network loses as it runs.

    Args:
        space: of the job.
        item: with ``student``, ``samples`` and ``record``, files; ``genotype`` or ``untouched``; and ``batch``.
        device: as torch names it.
        finished: makes a call return when its work is done.
        graph: makes one call of a module a CUDA graph; None to launch kernels one by one.
        time: of ``choose``.

    Raises:
        RuntimeError: the student's state is not one of this genotype's networks.
        ValueError: it has no finite outputs in half precision.
    """
    policies = policies_of(space, "a backend of kernels")
    model = policies.source.build()
    if not item.get("untouched"):
        model = policies.transform(model, policies.variant(item["genotype"]), ())
    model = bake(without_input_quantisers(model)).eval()
    plans = read_student(item["student"], model)
    example = policies.source.example(int(item.get("batch", 1)))
    if example.is_floating_point():
        example = torch.randn(example.shape)
    model, example = in_half(model.to(device), example.to(device))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def ready(layer: nn.Module, x: Tensor) -> Callable[[], object]:
        return finished(partial(layer, x) if graph is None else graph(layer, x))

    timing = {} if time is None else {"time": time}
    choices = choose(model, plans, example, ready=ready, **timing)
    model = with_kernels(model, plans, choices)
    write_record(
        item["record"],
        {
            "dtype": str(dtype).removeprefix("torch."),
            "kernel_layers": sum(choice.kernel != DENSE for choice in choices),
            "layers": [asdict(choice) for choice in choices],
            **judged(model, item["samples"], example),
        },
    )
    return partial(model, example) if graph is None else graph(model, example)


@torch.no_grad()
def judged(model: nn.Module, samples: str, example: Tensor) -> dict[str, Any]:
    """Accuracy of a network, and what it lost, on the device and in the dtype of an example."""
    facts: dict[str, Any] = {}
    for prefix, (batches, labels, own) in read_samples(samples).items():
        given = (batch.to(example.device) for batch in batches)
        logits = [model(x.to(example.dtype) if x.is_floating_point() else x).float().cpu() for x in given]
        facts |= accuracy_facts(prefix, judged_outputs(labels, own, torch.cat(logits)))
    return facts
