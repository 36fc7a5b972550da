"""What bits cost: bytes of the weights, and bit operations, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from archfront.spaces.policies.packing import quantised_bytes
from archfront.spaces.policies.quantiser import FLOAT

if TYPE_CHECKING:
    from archfront.spaces.policies.bits import Bits
    from archfront.spaces.space import Population

Vector = npt.NDArray[np.float64]

NAMES = ("size_bytes", "model_mb", "gbops")
MEBI = 2**20


@dataclass(frozen=True, kw_only=True)
class BitCosts:
    """Costs of each layer at the bits that its decisions give it.

    ``size_bytes`` is all that has to be stored: packed codes, scales and zero points, and everything that is no
    layer's weight at its own type. ``model_mb`` is HAWQ-V3's model size: parameters times bits of the layers, in
    MiB. ``gbops`` are multiply-adds times bits of the weight times bits of the input, in 1e9.

    Attributes:
        weight_columns, input_columns: for each layer the column that sets its bits, or -1.
        weight_bits, input_bits: for each layer its bits for each choice of that column, or its fixed ones.
        sizes: for each layer its stored bytes for each of its ``weight_bits``.
        other_bytes, other_gbops: of everything else.
    """

    weight_columns: tuple[int, ...]
    input_columns: tuple[int, ...]
    weight_bits: tuple[Vector, ...]
    input_bits: tuple[Vector, ...]
    sizes: tuple[Vector, ...]
    paths: tuple[str, ...]
    params: tuple[int, ...]
    macs: tuple[int, ...]
    other_bytes: float
    other_gbops: float

    @classmethod
    def of(cls, space: Bits) -> BitCosts:
        """Of a space of bits."""
        places = {name: i for i, column in enumerate(space.columns) for name in column.name.split("+")}
        rows: list[tuple[int, int, Vector, Vector, Vector]] = []
        for layer in space.layers.found:
            kept = float(space.keep.get(layer.path, FLOAT))
            column = places.get(f"{layer.path}:weights", -1)
            bits = np.array(space.columns[column].choices if column >= 0 else [kept], dtype=np.float64)
            if space.activations == "follow":
                reads, inputs = column, bits
            else:
                reads = places.get(f"{layer.path}:activations", -1)
                kept_inputs = FLOAT if space.activations == "float" else kept
                inputs = np.array(space.columns[reads].choices if reads >= 0 else [kept_inputs], dtype=np.float64)
            sizes = [
                float(layer.float_bytes)
                if width == FLOAT
                else quantised_bytes(layer.shape, space.quantiser(int(width)))
                for width in bits
            ]
            rows.append((column, reads, bits, inputs, np.array(sizes, dtype=np.float64)))
        columns, reads_, bits_, inputs_, sizes_ = zip(*rows, strict=True)
        return cls(
            weight_columns=columns,
            input_columns=reads_,
            weight_bits=bits_,
            input_bits=inputs_,
            sizes=sizes_,
            paths=tuple(layer.path for layer in space.layers.found),
            params=tuple(layer.params for layer in space.layers.found),
            macs=tuple(layer.macs for layer in space.layers.found),
            other_bytes=float(space.layers.other_bytes),
            other_gbops=space.layers.other_macs * FLOAT * FLOAT / 1e9,
        )

    def by_layer(self) -> dict[str, dict[str, Vector]]:
        """Path -> ``NAMES`` -> one number for each choice of the layer's weights.

        Bit operations are those with inputs that follow the weights or have one width.
        """
        found = {}
        for i, path in enumerate(self.paths):
            bits, inputs = self.weight_bits[i], self.input_bits[i]
            read = inputs if self.input_columns[i] == self.weight_columns[i] else inputs[:1]
            model_mb, gbops = self.params[i] * bits / 8 / MEBI, self.macs[i] * bits * read / 1e9
            found[path] = {"size_bytes": self.sizes[i], "model_mb": model_mb, "gbops": gbops}
        return found

    def __call__(self, population: Population) -> dict[str, Vector]:
        """``NAMES`` -> ``(n,)``."""
        count = len(population)
        size, model_mb, gbops = np.full(count, self.other_bytes), np.zeros(count), np.full(count, self.other_gbops)
        for i, (column, reads) in enumerate(zip(self.weight_columns, self.input_columns, strict=True)):
            chosen = population[:, column] if column >= 0 else np.zeros(count, dtype=np.int64)
            read = population[:, reads] if reads >= 0 else np.zeros(count, dtype=np.int64)
            bits = self.weight_bits[i][chosen]
            size += self.sizes[i][chosen]
            model_mb += self.params[i] * bits / 8 / MEBI
            gbops += self.macs[i] * bits * self.input_bits[i][read] / 1e9
        return {"size_bytes": size, "model_mb": model_mb, "gbops": gbops}
