"""Distil a tiny model whose weights are sharded among processes (FSDP 2, on CPUs).

Ends well if masters, zeros and loss are those of a model that is whole.
"""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from calmix.models import find_blocks
from calmix.recovery.distill import Student
from calmix.recovery.training import Masters
from tests.tiny import tiny_ids, tiny_model


def halved():
    model = tiny_model("llama", tie_word_embeddings=False)
    for index in (0, 1):
        for layer in find_blocks(model).prunables(index):
            layer.view()[:, ::2] = 0
    return model


def trained(student, ids, target, own):
    """Two steps; return the losses and the masters, whole."""
    parameters = {
        name.removeprefix("model."): p for name, p in student.named_parameters() if p.requires_grad
    }
    stored = copy.deepcopy(halved().state_dict())
    masters = Masters(parameters, lambda name: stored[name], lambda name: "proj" in name)
    losses = []
    for _ in range(2):
        loss = student(ids[own], target[own]) / ids[own].numel()
        losses.append(loss.item())
        loss.backward()
        masters.collect()
        masters.step(1e-2)
    return losses, dict(masters.full())


def main():
    dist.init_process_group("gloo")
    ids = tiny_ids(4, 16)
    with torch.no_grad():
        target = tiny_model("llama", tie_word_embeddings=False).get_decoder()(
            input_ids=ids, use_cache=False
        )[0]
    model = halved()
    _, expected = trained(
        Student(model, find_blocks(model), None, recompute=True), ids, target, slice(None)
    )
    model = halved()
    student = Student(model, find_blocks(model), None, recompute=True)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*find_blocks(model).blocks, model.get_output_embeddings()):
        fully_shard(part, mesh=mesh)
    fully_shard(student, mesh=mesh)
    rank = dist.get_rank()
    losses, found = trained(student, ids, target, slice(2 * rank, 2 * rank + 2))
    assert losses[1] < losses[0]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
        if "proj" in name:
            assert not value[:, ::2].any()
    dist.destroy_process_group()
