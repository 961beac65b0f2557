"""Prune a tiny model by two processes that share its calibration rows (on CPUs, gloo).

    torchrun --standalone --nproc-per-node 2 -m tests.pruning.shared

Ends well if every process ends with the masks of one process, and with its own peers' weights.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from calmix.errors import InputError
from calmix.pruning import SemiStructured, Unstructured, prune
from calmix.pruning.engine import Run
from tests.pruning.toy import Toy
from tests.tiny import tiny_ids, tiny_model

CASES = [
    ("sparsegpt", Unstructured(0.6), "sequential", False),
    ("admm,iterations=4,refit=2", SemiStructured(2, 4), "sequential", True),
    ("wanda,refit=2", Unstructured(0.5), "block", True),
]


def pruned(method, pattern, propagation, trust):
    Run.trusts = lambda self, device: trust
    model = tiny_model("llama")
    report = prune(
        model, tiny_ids(5, 32), method=method, pattern=pattern, propagation=propagation,
        micro_tokens=64,
    )  # fmt: skip
    return dict(model.named_parameters()), report


def main() -> None:
    expected = [pruned(*case) for case in CASES]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case, (alone, told) in zip(CASES, expected, strict=True):
        together, report = pruned(*case)
        assert report.tokens == told.tokens == 160
        for name, value in together.items():
            other = value.detach().clone()
            dist.broadcast(other, 0)
            assert torch.equal(other, value), (rank, name)
            same = (value == 0) == (alone[name] == 0)
            assert same.float().mean() > 0.995, (case, name, same.float().mean())
            # A row corrects its own weights only: one whose mask is the same is the same.
            rows = same.view(len(same), -1).all(1)
            assert rows.float().mean() > 0.9, (case, name)
            torch.testing.assert_close(value[rows], alone[name][rows], rtol=0.05, atol=0.03)
        for ours, theirs in zip(report.layers, told.layers, strict=True):
            assert (ours.pruned, ours.dead_inputs) == (theirs.pruned, theirs.dead_inputs)
            assert ours.error == pytest.approx(theirs.error, rel=0.05)
            assert ours.damping == pytest.approx(theirs.damping)
    with pytest.raises(InputError, match="1 calibration rows are too few for 2 processes"):
        prune(tiny_model("llama"), tiny_ids(1, 16), pattern=Unstructured(0.5))
    with pytest.raises(InputError, match="Means cannot be gathered by several processes"):
        prune(tiny_model("llama"), tiny_ids(5, 16), method=Toy(), pattern=Unstructured(0.5))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
