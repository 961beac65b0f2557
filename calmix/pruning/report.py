"""The report of a pruning run: layers and totals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from calmix.models.blocks import Dense
from calmix.pruning.solvers.ggml_types import Encoded
from calmix.pruning.solvers.grids import Grid
from calmix.shown import Shown, rounded_percent


@dataclass(frozen=True)
class LayerReport:
    """The result for one layer.

    `error` is the share of output energy lost, in the weights of the run's tokens: on tokens that
    were not fitted if `held_out`, else on the fitted ones; `fitted_error` is always on the latter.
    `corrected` tells whether weights make up for each other's errors; they do not if that lost
    more on held-out tokens. `shrinkage` is the share of the Gram matrix's mean diagonal added to
    its diagonal, `tokens` the number routed to it if it belongs to an expert, `bits` the storage
    per quantised weight: levels, scales and mask. `type` is that of GGML's blocks.
    """

    name: str
    rows: int
    columns: int
    pruned: int = 0
    sparsity: float = 0.0
    error: float | None = None
    damping: float | None = None
    factor_dtype: str | None = None
    dead_inputs: int = 0
    tokens: int | None = None
    bits: float | None = None
    type: str | None = None
    shrinkage: float = 0.0
    fitted_error: float | None = None
    held_out: bool = False
    corrected: bool = True


@dataclass(frozen=True)
class Dropped:
    """The scores of a mixture's experts, and the indices of those kept."""

    name: str
    scores: list[float]
    kept: list[int]


PARTS: dict[str, Any] = {
    "layers": LayerReport,
    "outer": LayerReport,
    "dense": Dense,
    "dropped": Dropped,
}


@dataclass(repr=False)
class PruneReport(Shown):
    """What a pruning run did: a report per layer, totals, and seconds.

    `options` are the method's; `dense`
    lists the matrices of blocks that were left unchanged; `weighted` tells whether tokens were
    weighted by what their errors cost. `rows_at_once` is the number of rows each
    process ran at a time, which can change rounding. `grids` of quantised parameters are stored
    beside the weights, not here. `outer` are rounded matrices outside the blocks: output head and
    embeddings.
    """

    method: str
    pattern: str
    propagation: str | None
    tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    weighted: bool = False
    rows: int = 0
    rows_at_once: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    dense: list[Dense] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    outer: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    grids: dict[str, Grid | Encoded] = field(default_factory=dict, compare=False)

    @property
    def weights(self) -> int:
        """Number of weights in the pruned layers."""
        return sum(layer.rows * layer.columns for layer in self.layers)

    @property
    def pruned(self) -> int:
        """Number of weights set to zero."""
        return sum(layer.pruned for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights in pruned layers that are zero."""
        return self.pruned / self.weights if self.weights else 0.0

    @property
    def bits(self) -> float | None:
        """Bits per weight in the quantised layers; None if there are none."""
        quantised = [layer for layer in self.layers if layer.bits is not None]
        size = sum(layer.rows * layer.columns for layer in quantised)
        taken = sum(layer.rows * layer.columns * (layer.bits or 0) for layer in quantised)
        return taken / size if size else None

    @property
    def dense_weights(self) -> int:
        """Number of weights in unchanged matrices of the blocks."""
        return sum(dense.weights for dense in self.dense)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        totals = ("weights", "pruned", "sparsity", "bits", "dense_weights")
        values = asdict(replace(self, grids={})) | {name: getattr(self, name) for name in totals}
        del values["grids"]
        return values

    def _line(self) -> str:
        seconds = f", {self.seconds['total']:.0f} s" if "total" in self.seconds else ""
        return (
            f"{self.method} to {self.pattern}, {self.pruned:,} of {self.weights:,} weights "
            f"pruned ({self.sparsity:.2%}){seconds}"
        )

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "layer": one.name,
                "weights": one.rows * one.columns,
                "pruned %": rounded_percent(one.sparsity),
                "output energy lost %": rounded_percent(one.error),
            }
            for one in self.layers
        ]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruneReport:
        """Return the report that `to_dict` gave."""
        values = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        for name, kind in PARTS.items():
            values[name] = [kind(**part) for part in values[name]]
        return cls(**values)
