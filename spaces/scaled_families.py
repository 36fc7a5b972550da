"""Networks whose depth and width can be multiplied: timm's, by the arguments their classes are built with, and ours."""

from __future__ import annotations

import copy
import difflib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from types import FunctionType
from typing import Any

import torch
from torch import nn

from archfront.errors import InputError, suggestion
from archfront.spaces.nasnet_cells import DARTS_V2, NASNET_A, NamedCells, NasNet
from archfront.spaces.scaling_rules import Plan, Stage
from archfront.spaces.torchvision_compat import import_timm


class Family(ABC):
    """A network as a plan, and the making of networks from changed plans of the same number of stages."""

    plan: Plan

    @abstractmethod
    def build(self, plan: Plan, classes: int, in_channels: int) -> nn.Module:
        """The network of a plan."""

    def problem(self, plan: Plan) -> str | None:
        """Why a plan cannot be built, from building and running it without data; None where it can."""
        try:
            with torch.device("meta"), torch.no_grad():
                self.build(plan, 2, 3).eval()(torch.empty(1, 3, 64, 64))
        # A class says in its own way what it cannot take, often by a bare assertion.
        except (AssertionError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__} {error}".strip()
        return None


@lru_cache(maxsize=32)
def family(name: str) -> Family:
    """The family of ``timm:<model>`` or ``archfront:<cells>``.

    Raises:
        InputError: unknown, or not to be scaled; the message says what is.
    """
    source, _, model = name.partition(":")
    if source == "archfront":
        if model not in _CELLS:
            raise InputError("space.family", name, "is unknown", suggestion(model, _CELLS))
        return _CellFamily(*_CELLS[model])
    if source != "timm":
        raise InputError("space.family", name, "is no name of a family", f"Give {_SUPPORTED}.")
    cls, arguments = _definition(model)
    made = _FAMILIES.get(cls.__name__)
    if made is None or arguments.get("pruned"):
        raise InputError("space.family", name, "has no depth and width to multiply", f"Give {_SUPPORTED}.")
    return made(cls, arguments)


def _definition(model: str) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class of one of timm's models and the arguments it is built with, without building it.

    An entry point of timm has its definition in its body and ends in ``build_model_with_cfg``. It is run here with that
    one name bound to something that keeps the arguments, in copies of the module's functions: nothing of timm itself is
    changed, for other threads may be building models.
    """
    models = import_timm().models
    if not models.is_model(model):
        near = ", ".join(difflib.get_close_matches(model, models.list_models(), n=3))
        raise InputError("space.family", f"timm:{model}", "is unknown to timm", f"Near: {near or 'none'}.")
    entry = models.model_entrypoint(model)
    module = sys.modules[entry.__module__]
    signature = inspect.signature(getattr(module, "build_model_with_cfg", lambda: None))

    def keep(*args: Any, **kwargs: Any) -> None:
        raise _Found(signature.bind(*args, **kwargs).arguments)

    scope = dict(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            scope[name] = FunctionType(value.__code__, scope, name, value.__defaults__, value.__closure__)
            scope[name].__kwdefaults__ = value.__kwdefaults__
    scope["build_model_with_cfg"] = keep
    try:
        scope[entry.__name__](pretrained=False)
    except _Found as found:
        arguments = dict(found.arguments.get("kwargs", {}))
        if found.arguments.get("model_cfg") is not None:
            arguments["cfg"] = found.arguments["model_cfg"]
        arguments.pop("features_only", None)
        return found.arguments["model_cls"], arguments
    raise InputError("space.family", f"timm:{model}", "does not show its definition", f"Give {_SUPPORTED}.")


class _Found(Exception):
    """Leaves an entry point of timm as soon as it has called ``build_model_with_cfg``."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class _TimmFamily(Family):
    def __init__(self, cls: type[nn.Module], arguments: dict[str, Any]) -> None:
        self._class = cls
        self._arguments = arguments
        self.plan = self._plan()

    @abstractmethod
    def _plan(self) -> Plan: ...

    @abstractmethod
    def _changed(self, plan: Plan) -> dict[str, Any]:
        """Arguments of the class that differ for a plan."""

    def build(self, plan: Plan, classes: int, in_channels: int) -> nn.Module:
        arguments = {**self._arguments, **self._changed(plan), "num_classes": classes, "in_chans": in_channels}
        return self._class(**arguments)

    def _argument(self, name: str) -> Any:
        """What the class is given, or its default."""
        return self._arguments.get(name, inspect.signature(self._class.__init__).parameters[name].default)


class _BlockArguments(_TimmFamily):
    """EfficientNet, MobileNet, FBNet, TinyNet, ...: lists of block arguments."""

    def _plan(self) -> Plan:
        self._rows: list[dict[str, Any]] = []
        rounded = self._argument("round_chs_fn")
        stages = []
        for part, blocks in enumerate(self._arguments["block_args"]):
            for row in _runs(blocks):
                if row[0].get("group_size") not in (None, 0, 1) or row[0].get("force_in_chs") or row[0].get("s2d"):
                    problem = "ties widths to each other in its blocks"
                    raise InputError("space.family", self._class.__name__, problem, f"Give {_SUPPORTED}.")
                self._rows.append(row[0])
                stages.append(Stage(part, len(row), rounded(row[0]["out_chs"]), row[0]["stride"]))
        stem = self._argument("stem_size")
        return Plan(
            stem if self._argument("fix_stem") else rounded(stem), tuple(stages), self._argument("num_features")
        )

    def _changed(self, plan: Plan) -> dict[str, Any]:
        parts: list[list[dict[str, Any]]] = [[] for _ in self._arguments["block_args"]]
        for row, stage in zip(self._rows, plan.stages, strict=True):
            parts[stage.part] += [{**copy.deepcopy(row), "out_chs": stage.channels} for _ in range(stage.blocks)]
        widths = {"stem_size": plan.stem, "fix_stem": True, "num_features": plan.head, "round_chs_fn": int}
        return {"block_args": parts, **widths}


class _RegNet(_TimmFamily):
    """RegNet X, Y, Z and V. Their configuration has a line's slope for widths, so the stages are replaced after it."""

    def _plan(self) -> Plan:
        cfg = self._config
        # The method reads nothing of an instance.
        cls: Any = self._class
        rows, _ = cls._get_stage_args(None, cfg)
        stages = [
            Stage(i, row["depth"], row["out_chs"], row["stride"], row["group_size"], cfg.bottle_ratio)
            for i, row in enumerate(rows)
        ]
        return Plan(cfg.stem_width, tuple(stages), cfg.num_features)

    def _changed(self, plan: Plan) -> dict[str, Any]:
        return {"cfg": replace(self._config, stem_width=plan.stem, num_features=plan.head)}

    @property
    def _config(self) -> Any:
        fields = {k: v for k, v in self._arguments.items() if k in type(self._arguments["cfg"]).__dataclass_fields__}
        return replace(self._arguments["cfg"], **fields)

    def build(self, plan: Plan, classes: int, in_channels: int) -> nn.Module:
        base: Any = self._class

        class Planned(base):  # type: ignore[misc]
            def _get_stage_args(self, *args: Any, **kwargs: Any) -> Any:
                rows, common = super()._get_stage_args(*args, **kwargs)
                for row, stage in zip(rows, plan.stages, strict=True):
                    row |= {"depth": stage.blocks, "out_chs": stage.channels, "group_size": stage.group}
                    row["drop_path_rates"] = None
                return rows, common

        Planned.__name__ = Planned.__qualname__ = base.__name__
        arguments = {**self._arguments, **self._changed(plan), "num_classes": classes, "in_chans": in_channels}
        built: nn.Module = Planned(**arguments)
        return built


class _Byob(_TimmFamily):
    """Stages of basic and bottleneck blocks: timm's own RegNetZ sizes, GENet, ..."""

    def _plan(self) -> Plan:
        cfg = self._arguments["cfg"]
        plain = all(getattr(block, "type", None) in ("basic", "bottle") for block in cfg.blocks)
        plain = plain and all(isinstance(block.gs, (int, type(None))) for block in cfg.blocks)
        plain = (
            plain and isinstance(cfg.stem_chs, int) and cfg.width_factor == 1 and cfg.head_type in ("", "classifier")
        )
        if not plain or cfg.self_attn_layer or cfg.fixed_input_size:
            problem = "has other blocks than basic and bottleneck ones, or another stem or head"
            raise InputError("space.family", self._class.__name__, problem, f"Give {_SUPPORTED}.")
        inputs = {bool((b.block_kwargs or cfg.block_kwargs).get("bottle_in")) for b in cfg.blocks}
        stages = [Stage(i, b.d, b.c, b.s, b.gs or 0, b.br) for i, b in enumerate(cfg.blocks)]
        stride = 4 if cfg.stem_pool else 2
        return Plan(cfg.stem_chs, tuple(stages), cfg.num_features, stride, inputs == {True}, multiple=8)

    def _changed(self, plan: Plan) -> dict[str, Any]:
        cfg = self._arguments["cfg"]
        blocks = tuple(
            replace(block, d=stage.blocks, c=stage.channels, gs=stage.group if block.gs else block.gs)
            for block, stage in zip(cfg.blocks, plan.stages, strict=True)
        )
        return {"cfg": replace(cfg, blocks=blocks, stem_chs=plan.stem, num_features=plan.head)}


class _Lists(_TimmFamily):
    """Classes that take a list of depths and one of widths; the stem keeps its width or has that of the first stage."""

    depths: str
    widths: str

    def _plan(self) -> Plan:
        pairs = zip(self._argument(self.depths), self._argument(self.widths), strict=True)
        stages = [Stage(i, depth, width, 2 if i else 1) for i, (depth, width) in enumerate(pairs)]
        return Plan(0, tuple(stages), stem_stride=4)

    def _changed(self, plan: Plan) -> dict[str, Any]:
        depths = tuple(stage.blocks for stage in plan.stages)
        return {self.depths: depths, self.widths: tuple(stage.channels for stage in plan.stages)}


class _ResNet(_Lists):
    """ResNet and ResNeXt; widths are those before a bottleneck's expansion."""

    depths, widths = "layers", "channels"

    def problem(self, plan: Plan) -> str | None:
        for stage in plan.stages:
            if stage.channels * self._argument("base_width") < 64:
                return f"{stage.channels} channels give a group less than one"
        return super().problem(plan)


class _ConvNeXt(_Lists):
    depths, widths = "depths", "dims"


class _CellFamily(Family):
    """Stacked cells: depth is the number of cells in a stage, width the number of filters."""

    def __init__(self, cells: NamedCells, filters: int) -> None:
        self._cells = cells
        self.plan = Plan(
            3 * filters, tuple(Stage(i, 6, filters * 2**i, 2 if i else 1) for i in range(3)), stem_stride=1
        )

    def build(self, plan: Plan, classes: int, in_channels: int) -> nn.Module:
        space = NasNet(
            blocks=len(self._cells.normal),
            operations=sorted(
                {name for cell in (self._cells.normal, self._cells.reduction) for b in cell for _, name in b}
            ),
            combine=self._cells.combine,
            cells=plan.stages[0].blocks,
            filters=plan.stages[0].channels,
            stem_filters=plan.stem,
            classes=classes,
            in_channels=in_channels,
        )
        return space.build(self._cells.genotype)


_CELLS = {"nasnet_a": (NASNET_A, 32), "darts_v2": (DARTS_V2, 36)}
_FAMILIES: dict[str, type[_TimmFamily]] = {
    "EfficientNet": _BlockArguments,
    "MobileNetV3": _BlockArguments,
    "RegNet": _RegNet,
    "ByobNet": _Byob,
    "ResNet": _ResNet,
    "ConvNeXt": _ConvNeXt,
}
_SUPPORTED = (
    f"timm:<model> of one of the classes {', '.join(_FAMILIES)} (with plain blocks), e.g. timm:efficientnet_b0, "
    f"timm:mobilenetv2_100, timm:regnetz_b16, timm:resnet18, or {' or '.join(f'archfront:{name}' for name in _CELLS)}"
)


def _runs(blocks: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Equal neighbours together."""
    return [list(run) for _, run in groupby(blocks)]
