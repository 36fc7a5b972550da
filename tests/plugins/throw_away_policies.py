"""Two compression policies as a user would write them: channels pruned by magnitude, and a constant merge schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from archfront.spaces.policies.policy_space import PolicySpace, Variant
from archfront.spaces.policies.site import Site


class PrunedChannels(PolicySpace):
    """Each residual block of a ResNet keeps a share of the channels between its two convolutions, those with the
    largest weights."""

    name: ClassVar[str] = "pruned-channels"

    def __init__(self, *, model: dict[str, Any], shares: list[float] | None = None) -> None:
        self.shares = tuple(shares or (0.25, 0.5, 0.75, 1.0))
        super().__init__(model=model)

    @property
    def options(self) -> Mapping[str, Any]:
        return {"shares": list(self.shares)}

    def find_sites(self) -> list[Site]:
        model = self.source.architecture()
        paths = [path for path, module in model.named_modules() if hasattr(module, "bn1") and hasattr(module, "conv2")]
        return [Site(id=path, kind="channels", domain=self.shares, module=path) for path in paths if path]

    def transform(self, model: nn.Module, variant: Variant, inputs: Sequence[Tensor]) -> nn.Module:
        for path, share in variant.items():
            block: Any = model.get_submodule(path)
            weight = block.conv1.weight.detach()
            count = max(1, round(share * len(weight)))
            if count == len(weight):
                continue
            kept = weight.abs().sum((1, 2, 3)).topk(count).indices.sort().values
            block.conv1.weight = nn.Parameter(weight[kept])
            block.conv2.weight = nn.Parameter(block.conv2.weight.detach()[:, kept])
            for name in ("weight", "bias"):
                setattr(block.bn1, name, nn.Parameter(getattr(block.bn1, name).detach()[kept]))
            block.bn1.running_mean, block.bn1.running_var = block.bn1.running_mean[kept], block.bn1.running_var[kept]
            block.conv1.out_channels = block.conv2.in_channels = block.bn1.num_features = count
        return model


class MergeSchedule(PolicySpace):
    """Before every block of a vision transformer, so many of the most similar pairs of tokens become their mean."""

    name: ClassVar[str] = "merge-schedule"

    def __init__(self, *, model: dict[str, Any], pairs: list[int] | None = None) -> None:
        self.pairs = tuple(pairs or (4, 2, 0))
        super().__init__(model=model)

    @property
    def options(self) -> Mapping[str, Any]:
        return {"pairs": list(self.pairs)}

    def find_sites(self) -> list[Site]:
        return [Site(id="schedule", kind="tokens", domain=self.pairs)]

    def transform(self, model: nn.Module, variant: Variant, inputs: Sequence[Tensor]) -> nn.Module:
        pairs = variant["schedule"]
        if pairs:
            for block in model.blocks:  # type: ignore[union-attr]
                block.register_forward_pre_hook(lambda _, tokens: (merged(tokens[0], pairs), *tokens[1:]))
        return model


def merged(tokens: Tensor, pairs: int) -> Tensor:
    """``(n, t, c)`` to ``(n, t - pairs, c)``; the first token, the class's, is never merged."""
    first, rest = tokens[:, :1], tokens[:, 1:]
    ours, theirs = rest[:, ::2], rest[:, 1::2]
    likeness = functional.normalize(ours, dim=-1) @ functional.normalize(theirs, dim=-1).transpose(1, 2)
    best, partner = likeness.max(-1)
    order = best.argsort(dim=1, descending=True)
    gone, stay = order[:, :pairs], order[:, pairs:]
    wide = (..., None)
    going, kept = (ours.gather(1, i[wide].expand(-1, -1, tokens.shape[-1])) for i in (gone, stay))
    # As a product: a mean by scattering has no operator in ONNX.
    into = (partner.gather(1, gone)[wide] == torch.arange(theirs.shape[1], device=tokens.device)).to(tokens.dtype)
    counts = 1 + into.sum(1)[wide]
    return torch.cat([first, kept, (theirs + into.transpose(1, 2) @ going) / counts], 1)


ARCHFRONT_PLUGINS = {"spaces": {"pruned-channels": PrunedChannels, "merge-schedule": MergeSchedule}}
