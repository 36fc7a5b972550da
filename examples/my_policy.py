"""Compression policies of your own: residual blocks of a ResNet that are left out."""

from torch import nn

from archfront.spaces.policies.policy_space import PolicySpace
from archfront.spaces.policies.site import Site


class SkippedBlocks(PolicySpace):
    """Every residual block that keeps its input's shape may be skipped."""

    name = "skipped-blocks"

    def find_sites(self):
        blocks = [(path, b) for path, b in self.source.architecture().named_modules() if hasattr(b, "conv2")]
        kept = [path for path, block in blocks if block.stride == 1 and not block.padded]
        return [Site(id=path, kind="blocks", domain=("skip", "keep"), module=path) for path in kept]

    def transform(self, model, variant, inputs):
        for path, choice in variant.items():
            if choice == "skip":
                model.set_submodule(path, nn.Identity())
        return model


ARCHFRONT_PLUGINS = {"spaces": {"skipped-blocks": SkippedBlocks}}
