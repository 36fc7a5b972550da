"""The residual stream of a pre-norm transformer: all that writes, normalises and reads it, and its rotation."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.rotation import (
    centre_linear_out,
    centre_rows,
    fold_layer_norm,
    rotate_linear_in,
    rotate_linear_out,
    rotate_rows,
)
from archfront.spaces.models.decoder import Block, Transformer
from archfront.spaces.policies.quantised import float_weight
from archfront.spaces.torchvision_compat import import_timm


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A layer normalisation of the stream: the attribute of a module that holds it, and all that reads it."""

    holder: nn.Module
    attribute: str
    readers: tuple[nn.Linear, ...]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Factors of channels, behind a layer that writes to the stream: the attribute of a module that holds them."""

    holder: nn.Module
    attribute: str
    writer: nn.Linear


@dataclass(frozen=True, kw_only=True)
class Attention:
    """How a block's tokens see each other.

    Attributes:
        block: path of the block.
        reader: path of the layer that makes the queries.
        layers: of queries and keys, or the one of queries, keys and values.
        heads: that these are divided into.
        causal: whether a token sees itself and those before it alone.
    """

    block: str
    reader: str
    layers: tuple[nn.Linear, ...]
    heads: int
    causal: bool

    def probabilities(self, features: Tensor) -> Tensor:
        """Of tokens that the layers read, ``(n, t, d)``, by their float weights: ``(n, heads, queries, keys)``."""
        made = [functional.linear(features, _weight(layer), layer.bias) for layer in self.layers]
        query, key = made if len(made) > 1 else made[0].chunk(3, -1)[:2]
        query, key = (torch.unflatten(one, -1, (self.heads, -1)).transpose(1, 2) for one in (query, key))
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if self.causal:
            unseen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(unseen, -torch.inf)
        return logits.softmax(-1)


@dataclass(frozen=True, kw_only=True)
class ResidualStream:
    """Of one network.

    Attributes:
        vectors: that are added to it: embeddings, positions, a class token.
        writers: layers that add to it.
        scales: factors behind writers.
        norms: all that reads it reads one of these.
        attentions: of the blocks.
    """

    vectors: tuple[nn.Parameter, ...]
    writers: tuple[nn.Linear | nn.Conv2d, ...]
    scales: tuple[Scale, ...]
    norms: tuple[Norm, ...]
    attentions: tuple[Attention, ...]

    @property
    def width(self) -> int:
        return self.norms[0].readers[0].in_features

    @property
    def layers(self) -> list[nn.Module]:
        """All that write to it or read it."""
        return [*self.writers, *(reader for norm in self.norms for reader in norm.readers)]

    def attention_of(self, path: str) -> Attention | None:
        """Of the block that a layer is part of."""
        return next((one for one in self.attentions if path.startswith(f"{one.block}.")), None)

    def rotate(self, rotation: Tensor) -> None:
        """Let the stream be ``x Q`` where it was ``x`` without its mean, in place. The network's outputs do not change.

        Layer normalisations become root-mean-square ones without a gain, as ``rotation.fold_layer_norm`` says.

        Args:
            rotation: ``Q``, ``(width, width)``, orthogonal.
        """
        for scale in self.scales:
            _fold_scale(scale)
        for norm in self.norms:
            held = getattr(norm.holder, norm.attribute)
            setattr(norm.holder, norm.attribute, fold_layer_norm(held, norm.readers))
            for reader in norm.readers:
                rotate_linear_in(reader, rotation)
        for writer in self.writers:
            centre_linear_out(writer)
            rotate_linear_out(writer, rotation)
        for vectors in self.vectors:
            centre_rows(vectors)
            rotate_rows(vectors, rotation)


def residual_stream(model: nn.Module) -> ResidualStream:
    """Of archfront's ``decoder``, or of a vision transformer of timm.

    Raises:
        InputError: another network, or one whose parts are not the plain ones.
    """
    if isinstance(model, Transformer):
        return _of_decoder(model)
    import_timm()
    parts = importlib.import_module("timm.models.vision_transformer")
    if type(model) is parts.VisionTransformer:
        return _of_vision_transformer(model, parts)
    problem = "is neither the model 'decoder' nor a VisionTransformer of timm, whose residual streams are known"
    raise InputError("recovery.rsq", type(model).__name__, problem, "Choose 'gptq'.")


def _of_decoder(model: Transformer) -> ResidualStream:
    writers: list[nn.Linear] = []
    norms: list[Norm] = []
    attentions: list[Attention] = []
    for i, block in enumerate(model.blocks):
        path = f"blocks.{i}"
        if not isinstance(block, Block):
            raise _unlike(path)
        attention, mlp = block.attention, block.mlp
        writers += [attention.proj, mlp.fc2]
        norms.append(Norm(holder=block, attribute="norm1", readers=(attention.q, attention.k, attention.v)))
        norms.append(Norm(holder=block, attribute="norm2", readers=(mlp.fc1,)))
        layers = (attention.q, attention.k)
        attentions.append(
            Attention(block=path, reader=f"{path}.attention.q", layers=layers, heads=attention.heads, causal=True)
        )
    norms.append(Norm(holder=model, attribute="norm", readers=(model.head,)))
    _check_norms(norms)
    return ResidualStream(
        vectors=(_parameter(model.tokens.weight), model.positions),
        writers=tuple(writers),
        scales=(),
        norms=tuple(norms),
        attentions=tuple(attentions),
    )


def _of_vision_transformer(model: Any, parts: Any) -> ResidualStream:
    """Of a network whose classes are all those that timm's module has under their names."""
    _check(type(model.patch_embed) is parts.PatchEmbed, "patch_embed")
    _check_identities(model, "patch_embed.norm", "norm_pre")
    # The largest of rotated features is not the largest of them.
    _check(model.global_pool in ("", "avg", "token"), "global_pool")
    writers: list[nn.Linear | nn.Conv2d] = [model.patch_embed.proj]
    scales: list[Scale] = []
    norms: list[Norm] = []
    attentions: list[Attention] = []
    for i, block in enumerate(model.blocks):
        path = f"blocks.{i}"
        _check(type(block) is parts.Block, path)
        _check(type(block.attn) is parts.Attention and block.attn.gate is None, f"{path}.attn")
        _check(type(block.mlp) is parts.Mlp and isinstance(block.mlp.fc1, nn.Linear), f"{path}.mlp")
        _check_identities(
            model, *(f"{path}.{name}" for name in ("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm"))
        )
        for name, writer in (("ls1", block.attn.proj), ("ls2", block.mlp.fc2)):
            writers.append(writer)
            if isinstance(getattr(block, name), parts.LayerScale):
                scales.append(Scale(holder=block, attribute=name, writer=writer))
            else:
                _check_identities(model, f"{path}.{name}")
        qkv = block.attn.qkv
        norms.append(Norm(holder=block, attribute="norm1", readers=(qkv,)))
        norms.append(Norm(holder=block, attribute="norm2", readers=(block.mlp.fc1,)))
        attentions.append(
            Attention(block=path, reader=f"{path}.attn.qkv", layers=(qkv,), heads=block.attn.num_heads, causal=False)
        )
    _check(isinstance(model.head, nn.Linear), "head")
    last, other = ("norm", "fc_norm") if isinstance(model.norm, nn.LayerNorm) else ("fc_norm", "norm")
    _check_identities(model, other)
    norms.append(Norm(holder=model, attribute=last, readers=(model.head,)))
    _check_norms(norms)
    vectors = (model.cls_token, model.reg_token, model.pos_embed)
    return ResidualStream(
        vectors=tuple(one for one in vectors if one is not None),
        writers=tuple(writers),
        scales=tuple(scales),
        norms=tuple(norms),
        attentions=tuple(attentions),
    )


def _check(known: bool, path: str) -> None:
    if not known:
        raise _unlike(path)


def _unlike(path: str) -> InputError:
    problem = "is not as in a plain pre-norm transformer, whose residual stream is known"
    return InputError("recovery.rsq", path, problem, "Choose 'gptq'.")


def _check_identities(model: nn.Module, *paths: str) -> None:
    for path in paths:
        _check(type(model.get_submodule(path)) is nn.Identity, path)


def _check_norms(norms: Sequence[Norm]) -> None:
    for norm in norms:
        held = getattr(norm.holder, norm.attribute)
        if not isinstance(held, nn.LayerNorm):
            problem = "stands where a layer normalisation is expected"
            raise InputError("recovery.rsq", f"{norm.attribute}: {type(held).__name__}", problem, "Choose 'gptq'.")


def _fold_scale(scale: Scale) -> None:
    """Put the factors into the layer before them."""
    gamma = getattr(scale.holder, scale.attribute).gamma.detach().double()
    with torch.no_grad():
        scale.writer.weight.copy_(scale.writer.weight.double() * gamma[:, None])
        if scale.writer.bias is not None:
            scale.writer.bias.copy_(scale.writer.bias.double() * gamma)
    setattr(scale.holder, scale.attribute, nn.Identity())


def _weight(layer: nn.Linear) -> Tensor:
    found = float_weight(layer)
    assert found is not None
    return found


def _parameter(tensor: Tensor) -> nn.Parameter:
    assert isinstance(tensor, nn.Parameter)
    return tensor
