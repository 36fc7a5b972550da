"""Networks of timm, by name, and its vision transformer at any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from archfront.errors import InputError, suggestion
from archfront.spaces.models.source import ModelSource, Normalisation, positive
from archfront.spaces.torchvision_compat import import_timm


class TimmModel(ModelSource):
    """Any network of timm.

    Args:
        model: its name in timm, ``resnet18``.
        resolution, in_channels: of the images; timm's own by default.
        classes: of the output; timm's own by default.
        weights: a checkpoint; fresh ones by default.
        seed: of fresh weights.
        normalisation: of the images, as its weights were trained with: ``data``, ``imagenet`` or ``half``.

    Raises:
        InputError: timm does not know the model, or there is no such file.
    """

    name: ClassVar[str] = "timm"

    def __init__(
        self,
        *,
        model: str,
        resolution: int | None = None,
        in_channels: int = 3,
        classes: int = 1000,
        weights: str | None = None,
        seed: int = 0,
        normalisation: Normalisation = "data",
    ) -> None:
        timm = import_timm()
        if not timm.is_model(model):
            raise InputError("model.model", model, "is unknown to timm", suggestion(model, timm.list_models()))
        settings = timm.models.get_pretrained_cfg(model)
        if resolution is None:
            resolution = int(settings.input_size[-1]) if settings is not None else 224
        positive(resolution=resolution, in_channels=in_channels, classes=classes)
        super().__init__(weights, seed, normalisation)
        self.model = model
        self.resolution, self.in_channels, self.classes = resolution, in_channels, classes

    @property
    def config(self) -> Mapping[str, Any]:
        fields = ("model", "resolution", "in_channels", "classes")
        return {field: getattr(self, field) for field in fields}

    def architecture(self) -> nn.Module:
        timm = import_timm()
        arguments: dict[str, Any] = {"in_chans": self.in_channels, "num_classes": self.classes}
        try:
            made: nn.Module = timm.create_model(self.model, img_size=self.resolution, **arguments)
        except TypeError:  # most convolutional networks take any size, and no such argument
            made = timm.create_model(self.model, **arguments)
        return made


class VisionTransformer(ModelSource):
    """timm's ``VisionTransformer`` with a class token, by default small enough for 28x28 images on a CPU.

    Args:
        resolution, in_channels: of the images.
        patch: pixels of a patch's side.
        dim: width of the embedding.
        depth: blocks.
        heads: of each block.
        mlp_ratio: width of the MLP's middle over ``dim``.
        classes: of the output.
        weights: a checkpoint; fresh ones by default.
        seed: of fresh weights.
        normalisation: of the images, as its weights were trained with: ``data``, ``imagenet`` or ``half``.

    Raises:
        InputError: numbers that do not go together, or no such file.
    """

    name: ClassVar[str] = "vit"

    def __init__(
        self,
        *,
        resolution: int = 28,
        in_channels: int = 1,
        patch: int = 4,
        dim: int = 64,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        classes: int = 10,
        weights: str | None = None,
        seed: int = 0,
        normalisation: Normalisation = "data",
    ) -> None:
        positive(resolution=resolution, in_channels=in_channels, patch=patch, dim=dim, depth=depth, heads=heads)
        positive(classes=classes)
        if not 0 < mlp_ratio <= 64:
            raise InputError("model.mlp_ratio", mlp_ratio, "is no ratio of widths", "Give more than 0, up to 64.")
        for field, number, of, total in (("patch", patch, "resolution", resolution), ("heads", heads, "dim", dim)):
            if total % number:
                raise InputError(f"model.{field}", number, f"does not divide {of} {total}", "Give one that does.")
        super().__init__(weights, seed, normalisation)
        self.resolution, self.in_channels, self.classes = resolution, in_channels, classes
        self.patch, self.dim, self.depth, self.heads, self.mlp_ratio = patch, dim, depth, heads, mlp_ratio

    @property
    def config(self) -> Mapping[str, Any]:
        fields = ("resolution", "in_channels", "patch", "dim", "depth", "heads", "mlp_ratio", "classes")
        return {field: getattr(self, field) for field in fields}

    def architecture(self) -> nn.Module:
        import_timm()
        from timm.models.vision_transformer import VisionTransformer as Network

        made: nn.Module = Network(
            img_size=self.resolution,
            patch_size=self.patch,
            in_chans=self.in_channels,
            num_classes=self.classes,
            embed_dim=self.dim,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=self.mlp_ratio,
        )
        return made
