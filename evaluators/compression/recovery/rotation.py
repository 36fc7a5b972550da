"""Rotations of a residual stream that spread outliers over all channels, and weights of tokens by their attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from archfront.errors import InputError


def hadamard(n: int) -> Tensor:
    """Sylvester's Hadamard matrix over ``sqrt(n)``: ``(n, n)``, float64, symmetric and orthogonal.

    Raises:
        InputError: ``n`` is no power of two.
    """
    if n < 1 or n & (n - 1):
        raise InputError("rotation.n", n, "is no power of two", "Use random_rotation for other widths.")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


def random_rotation(n: int, seed: int) -> Tensor:
    """An orthogonal matrix ``(n, n)``, float64: Hadamard's with random signs of its rows if ``n`` is a power of two,
    else uniformly distributed over all (the Q of a Gaussian matrix's QR, with R's diagonal made positive).

    Source: Ashkboos et al., "QuaRot", 2024, for randomised Hadamard matrices; Mezzadri, "How to generate random
    matrices from the classical compact groups", 2007, for the others.

    Raises:
        InputError: ``n`` is below 1.
    """
    generator = torch.Generator().manual_seed(seed)
    if n < 1:
        raise InputError("rotation.n", n, "is no width", "Give 1 or more.")
    if not n & (n - 1):
        signs = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.float64) * 2 - 1
        return signs * hadamard(n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


def rotate_linear_in(linear: nn.Linear, rotation: Tensor) -> None:
    """Let a layer read ``x Q`` where it read ``x``, in place: ``W' = W Q``.

    Args:
        linear: whose inputs are the rotated stream.
        rotation: ``Q``, ``(in_features, in_features)``, orthogonal.

    Raises:
        InputError: a rotation of another width.
    """
    _check_width(linear.in_features, rotation)
    _assign(linear.weight, linear.weight.detach().double() @ rotation.to(linear.weight.device, torch.float64))


def rotate_linear_out(layer: nn.Linear | nn.Conv2d, rotation: Tensor) -> None:
    """Let a layer write ``y Q`` where it wrote ``y``, in place: ``W' = Q^T W``, ``b' = Q^T b``.

    Args:
        layer: whose output channels are added to the stream; a convolution if it embeds patches.
        rotation: ``Q``, ``(channels, channels)``, orthogonal.

    Raises:
        InputError: a rotation of another width.
    """
    _check_width(len(layer.weight), rotation)
    back = rotation.T.to(layer.weight.device, torch.float64)
    flat = layer.weight.detach().double().flatten(1)
    _assign(layer.weight, (back @ flat).reshape(layer.weight.shape))
    if layer.bias is not None:
        _assign(layer.bias, back @ layer.bias.detach().double())


def rotate_rows(vectors: nn.Parameter, rotation: Tensor) -> None:
    """Rotate vectors that are added to the stream, ``(..., d)``, in place: embeddings, positions, a class token.

    Raises:
        InputError: a rotation of another width.
    """
    _check_width(vectors.shape[-1], rotation)
    _assign(vectors, vectors.detach().double() @ rotation.to(vectors.device, torch.float64))


def fold_layer_norm(norm: nn.LayerNorm, readers: Sequence[nn.Linear]) -> nn.RMSNorm:
    """What stands for a layer normalisation once its gain and bias are in its readers, in place, and all that is added
    to the stream was centred (``centre_linear_out``, ``centre_rows``).

    Without a mean to remove, a layer normalisation is a root-mean-square normalisation, and without a gain that
    commutes with every rotation.

    Source: Ashkboos et al., "SliceGPT", 2024, section 3.2.

    Args:
        norm: over one axis; unchanged, to be replaced by what is returned.
        readers: all that reads the normalisation's output; each gets a bias if it has none and the norm has one.

    Raises:
        InputError: a reader of another width, or a normalisation over several axes.
    """
    width = norm.normalized_shape[-1]
    if len(norm.normalized_shape) != 1 or any(reader.in_features != width for reader in readers):
        found = (norm.normalized_shape, [reader.in_features for reader in readers])
        raise InputError("rotation.readers", found, "do not read this normalisation", "Give all layers that do.")
    for reader in readers:
        weight = reader.weight.detach().double()
        if norm.bias is not None:
            shift = weight @ norm.bias.detach().double()
            if reader.bias is None:
                reader.bias = nn.Parameter(shift.to(reader.weight.dtype), requires_grad=reader.weight.requires_grad)
            else:
                _assign(reader.bias, reader.bias.detach().double() + shift)
        if norm.weight is not None:
            _assign(reader.weight, weight * norm.weight.detach().double())
    folded = nn.RMSNorm(width, eps=norm.eps, elementwise_affine=False)
    return folded.train(norm.training)


def centre_linear_out(layer: nn.Linear | nn.Conv2d) -> None:
    """Take the mean over its output channels from all that a layer writes, in place."""
    weight = layer.weight.detach().double()
    _assign(layer.weight, weight - weight.mean(0, keepdim=True))
    if layer.bias is not None:
        bias = layer.bias.detach().double()
        _assign(layer.bias, bias - bias.mean())


def centre_rows(vectors: nn.Parameter) -> None:
    """Take its mean from each vector ``(..., d)`` that is added to the stream, in place."""
    rows = vectors.detach().double()
    _assign(vectors, rows - rows.mean(-1, keepdim=True))


def attention_received(attention: Tensor, least: float = 0.005) -> Tensor:
    """Weights of tokens: attention received, summed over heads and queries, scaled to ``[least, 1]`` by its minimum and
    maximum, and then to mean 1; each sequence by itself. All 1 where every token receives alike.

    Under a causal mask the first tokens receive more, whatever they are.

    Source: Sung et al., "RSQ: Learning from Important Tokens", 2025.

    Args:
        attention: probabilities ``(n, heads, queries, keys)``.
        least: of the scaled values, above 0 and below 1.

    Returns:
        ``(n, keys)``, for ``gptq.hessian_of`` once flattened.

    Raises:
        InputError: another shape, or ``least`` out of range.
    """
    if attention.dim() != 4:
        problem = "is no (n, heads, queries, keys)"
        raise InputError("rotation.attention", tuple(attention.shape), problem, "Give attention maps.")
    if not 0 < least < 1:
        raise InputError("rotation.least", least, "is no least share", "Give above 0 and below 1.")
    received = attention.detach().sum((1, 2))
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    width = high - low
    shares = torch.where(width > 0, (received - low) / width.masked_fill(width == 0, 1), 1)
    scaled = least + (1 - least) * shares
    return scaled / scaled.mean(1, keepdim=True)


def _check_width(width: int, rotation: Tensor) -> None:
    if rotation.shape != (width, width):
        problem = f"is the shape of no rotation of {width} channels"
        raise InputError("rotation.rotation", tuple(rotation.shape), problem, f"Give ({width}, {width}).")


def _assign(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)
