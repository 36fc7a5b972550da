"""Known networks as derivations of einspace's grammar, to begin a search with: RE(Mix)'s four, and a fifth.

Each is written with the non-terminals of the paper's own seeds; a search holds their canonical forms.
"""

from __future__ import annotations

from archfront.spaces.grammars.derivation import Tree


def sequential(*parts: Tree) -> Tree:
    return parts[0] if len(parts) == 1 else ("sequential", *parts)


def compute(name: str) -> Tree:
    return ("computation", name)


def convolution(channels: int, kernel: int = 3, stride: int = 1) -> Tree:
    """A convolution with bias: im2col, a linear map of the patches, col2im."""
    return ("routing", f"im2col{kernel}x{kernel}s{stride}p{kernel // 2}", compute(f"linear{channels}"), "col2im")


def residual(body: Tree, shortcut: Tree | None = None) -> Tree:
    return ("branching", "clone2", body, compute("identity") if shortcut is None else shortcut, "add")


def resnet18(*, pooled: bool = True) -> Tree:
    """CIFAR's ResNet-18; with ``pooled`` False a convolution of stride 2 follows the stem in the pool's place.

    The paper's name of that variant is "no_maxpool". Its activations are leaky.
    """
    parts = [convolution(64), "norm", "leaky_relu", "identity" if pooled else convolution(64, stride=2)]
    before = 64
    for stage, channels in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage and not block else 1
            body = sequential(
                convolution(channels, stride=stride), compute("norm"), compute("leaky_relu"),
                convolution(channels), compute("norm"),
            )  # fmt: skip
            shortcut = sequential(convolution(channels, 1, stride), compute("norm"))
            same = before == channels and stride == 1
            parts.append(sequential(residual(body, None if same else shortcut), compute("leaky_relu")))
            before = channels
    return sequential(*parts)


def wide_resnet16_4() -> Tree:
    """WRN-16-4 for small images: pre-activation blocks, two in each of three stages."""
    parts = [convolution(16)]
    for stage, channels in enumerate((64, 128, 256)):
        stride = 2 if stage else 1
        activation = (compute("norm"), compute("leaky_relu"))
        first = sequential(convolution(channels, stride=stride), *activation, convolution(channels))
        # Where the width changes, both branches read what the first activation gives.
        parts.append(sequential(*activation, residual(first, convolution(channels, 1, stride))))
        parts.append(residual(sequential(*activation, convolution(channels), *activation, convolution(channels))))
    return sequential(*parts, "norm", "leaky_relu")


def _patches(width: int) -> list[Tree]:
    stem = ("routing", "im2col4x4s4p0", compute(f"linear{width}"), "identity")
    return [stem, compute("positional")]


def transformer(layers: int = 4, width: int = 512) -> Tree:
    """A vision transformer on patches of 4x4: pre-norm, four heads of 64, an MLP as wide as the tokens."""
    keys = ("routing", "identity", compute("linear64"), "permute21")
    scores = ("branching", "clone2", compute("linear64"), keys, "scaled_dot")
    head = ("branching", "clone2", sequential(scores, compute("softmax")), compute("linear64"), "dot")
    attention = sequential(compute("norm"), ("branching", "clone4", head, "cat4d2"), compute(f"linear{width}"))
    mlp = sequential(compute("norm"), f"linear{width}", "leaky_relu", f"linear{width}")
    return sequential(
        *_patches(width), *[block for _ in range(layers) for block in (residual(attention), residual(mlp))]
    )


def mixer(layers: int = 8, width: int = 512) -> Tree:
    """An MLP-mixer on patches of 4x4: one residual a layer around mixing of tokens, then of features."""
    tokens = [
        ("routing", "permute21", compute("linear_x4"), "identity"), compute("leaky_relu"),
        ("routing", "identity", compute("linear_4th"), "permute21"),
    ]  # fmt: skip
    features = [compute(f"linear{width // 2}"), compute("leaky_relu"), compute(f"linear{width}")]
    layer = residual(sequential(compute("norm"), *tokens, *features))
    return sequential(*_patches(width), *[layer] * layers)


SEEDS = {
    "resnet18": resnet18,
    "resnet18_no_maxpool": lambda: resnet18(pooled=False),
    "wrn16_4": wide_resnet16_4,
    "transformer": transformer,
    "mixer": mixer,
}
"""Makers of the derivations by name."""
