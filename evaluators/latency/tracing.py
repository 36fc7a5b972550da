"""Any torch module as a list of priced operators, without running it on real data.

The module runs once on fake tensors, which have shapes and types and no values, but claim the device that is asked
for: so torch takes the same paths as it will there (which attention kernel, say). What arrives at the dispatcher is
recorded, call by call.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from archfront.errors import InputError
from archfront.evaluators.latency.operators import Operator, count_macs, describe, kind_of

_log = logging.getLogger(__name__)

_FREE = {"prim.device.default", "aten.empty.memory_format", "aten.detach.default", "aten.alias.default"}
"""Calls of the bookkeeping of fake tensors, or of no work at all."""

_FOLLOWERS = {"norm", "activation", "elementwise", "softmax"}
"""Kinds that a compiler can put behind what made their input."""


@dataclass(frozen=True, kw_only=True)
class SitePolicy:
    """What a compression policy does to one module.

    Attributes:
        weight_bits, activation_bits: of the numbers that it computes with.
        sparsity: share of zeros among its weights, in [0, 1).
    """

    weight_bits: int = 32
    activation_bits: int = 32
    sparsity: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A network as its operators.

    Attributes:
        operators: in the order of the forward pass.
        groups: for each fusion group what it is: ``conv-norm-activation``, ``attention``, ``mlp``, or its kinds.
        params: of the module, shared ones once.
        weight_bytes: of parameters and buffers as they are stored.
        modules: calls of modules, each of which costs an interpreter something.
        warnings: why it was traced with real data, if it was.
    """

    operators: tuple[Operator, ...]
    groups: tuple[str, ...]
    params: int
    weight_bytes: int
    modules: int
    warnings: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        return sum(operator.macs for operator in self.operators)


def trace(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    policies: Mapping[str, SitePolicy] | None = None,
) -> Trace:
    """The operators of one forward pass in evaluation mode.

    Args:
        model: takes one tensor; on any device, the meta device included. Its mode is left as it was.
        input_shape: without the batch.
        batch: inputs a pass.
        device: that the fake tensors claim to be on.
        dtype: of the input and of floating parameters.
        policies: by module path, what the operators of these modules carry as bits and sparsity.

    Raises:
        InputError: the module fails on such an input.
    """
    training = {name for name, module in model.named_modules() if module.training}
    model.eval()
    try:
        try:
            recorder = _traced_on_fakes(model, (batch, *input_shape), device, dtype)
            warnings: tuple[str, ...] = ()
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            warning = f"traced on real tensors, for this path alone: it does not run without values ({reason})"
            recorder = _traced_on_values(model, (batch, *input_shape), dtype)
            _log.warning("%s was %s", type(model).__name__, warning)
            warnings = (warning,)
    finally:
        for name, module in model.named_modules():
            module.training = name in training
    operators, groups = recorder.finished(policies or {})
    stored = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return Trace(
        operators=operators,
        groups=groups,
        params=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(t.numel() * t.element_size() for t in stored),
        modules=recorder.modules,
        warnings=warnings,
    )


def _traced_on_fakes(model: nn.Module, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> _Recorder:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        made: dict[int, Tensor] = {}

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                kind = dtype if tensor.is_floating_point() else tensor.dtype
                made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device=device)
            return made[id(tensor)]

        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        weights = {name: fake(tensor) for name, tensor in named}
        recorder = _Recorder(weights.values())
        example = torch.empty(shape, dtype=dtype, device=device)
        with recorder.paths(model), recorder:
            torch.func.functional_call(model, weights, (example,), tie_weights=False)
    return recorder


def _traced_on_values(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> _Recorder:
    """Data-dependent control flow needs values: real ones, on the CPU, random."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_meta:
                tensor = torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor.dtype)
            weights[name] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        recorder = _Recorder(weights.values())
        try:
            with recorder.paths(model), recorder:
                torch.func.functional_call(
                    model, weights, (torch.randn(shape, generator=generator, device="cpu").to(dtype),)
                )
        except Exception as error:
            problem = f"cannot run on an input of {tuple(shape)}: {type(error).__name__}: {error}"
            raise InputError("model", type(model).__name__, problem, "Give the shape that it takes.") from error
    return recorder


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps each call with where its tensors came from."""

    def __init__(self, weights: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = 0
        self._weights = {id(weight) for weight in weights}
        self._alive: list[Any] = list(weights)  # ids are true only while their objects live
        self._producer: dict[int, int] = {}
        self._calls: list[Operator] = []
        self._inputs: list[list[int]] = []
        self._path = [""]

    @contextmanager
    def paths(self, model: nn.Module) -> Iterator[None]:
        """Know, while it runs, which module is at work."""

        def enter(path: str, *_: Any) -> None:
            self.modules += 1
            self._path.append(path)

        def leave(*_: Any) -> None:
            self._path.pop()

        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(enter, path)))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        target = str(func)
        taken, given = list(_tensors((args, kwargs))), list(_tensors(out))
        if target in _FREE or not given:
            for tensor in given:
                # A detached weight is a weight still.
                if any(id(t) in self._weights for t in taken):
                    self._weights.add(id(tensor))
                if taken and id(taken[0]) in self._producer:
                    self._producer[id(tensor)] = self._producer[id(taken[0])]
                self._alive.append(tensor)
            return out
        schema = func._schema
        is_view = kind_of(target) == "view"
        is_view |= not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)
        weights = [t for t in taken if id(t) in self._weights]
        number = len(self._calls)
        self._calls.append(
            Operator(
                call=describe(target, args, kwargs),
                module=self._path[-1],
                macs=count_macs(func, args, kwargs, out),
                read_bytes=sum(t.numel() * t.element_size() for t in taken),
                written_bytes=0 if is_view else sum(t.numel() * t.element_size() for t in given),
                weight_bytes=sum(t.numel() * t.element_size() for t in weights),
                tokens=next((int(t.shape[1]) for t in taken if t.dim() == 3 and id(t) not in self._weights), None),
            )
        )
        self._inputs.append([self._producer[id(t)] for t in taken if id(t) in self._producer])
        for tensor in given:
            if is_view and weights and len(weights) == len(taken):
                self._weights.add(id(tensor))
            else:
                self._producer[id(tensor)] = number
            self._alive.append(tensor)
        return out

    def finished(self, policies: Mapping[str, SitePolicy]) -> tuple[tuple[Operator, ...], tuple[str, ...]]:
        """The operators with their policies and fusion groups, and the names of the groups."""
        numbers, names = fusion_groups([call.kind for call in self._calls], self._inputs)
        found = []
        for call, group in zip(self._calls, numbers, strict=True):
            policy = policies.get(call.module)
            marks = {} if policy is None else vars(policy)
            found.append(replace(call, group=group, **marks))
        return tuple(found), tuple(names)


def fusion_groups(kinds: Sequence[str], inputs: Sequence[Sequence[int]]) -> tuple[list[int], list[str]]:
    """Which operators a compiler can make one: what follows a convolution or product joins it.

    Args:
        kinds: of the operators in order.
        inputs: for each the numbers of the operators whose results it takes.

    Returns:
        the group of each operator, and what each group is.
    """
    used = [0] * len(kinds)
    for sources in inputs:
        for source in set(sources):
            used[source] += 1
    group = list(range(len(kinds)))
    members: dict[int, list[str]] = {}
    for i, kind in enumerate(kinds):
        source = next((s for s in inputs[i] if used[s] == 1), -1)
        before = [] if source < 0 else members[group[source]]
        follows = kind in _FOLLOWERS and bool(before) and before[0] in ("conv", "linear", "matmul")
        attention = kind == "matmul" and before[-1:] == ["softmax"]
        mlp = kind == "linear" and before[:1] == ["linear"] and before[-1:] == ["activation"]
        viewing = kind == "view" and bool(before) and before[0] != "view"
        if follows or attention or mlp or viewing:
            group[i] = group[source]
        members.setdefault(group[i], [])
        if kind != "view" or not members[group[i]]:
            members[group[i]].append(kind)
    order = {g: n for n, g in enumerate(dict.fromkeys(group))}
    return [order[g] for g in group], [_group_name(members[g]) for g in order]


def _group_name(kinds: Sequence[str]) -> str:
    if "attention" in kinds or ("softmax" in kinds and kinds.count("matmul") == 2):
        return "attention"
    if kinds.count("linear") == 2 and "activation" in kinds:
        return "mlp"
    return "-".join(dict.fromkeys(kinds))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
