"""Hidden states: whatever room there is, what was set is read."""

import errno

import pytest
import torch

from calmix.errors import DiskError
from calmix.pruning.work import States

CPU = torch.device("cpu")
BATCH = 2 * 3 * 4 * 4  # bytes of a micro-batch of two rows


def made(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, 4, generator=generator).to(dtype) for rows in (2, 2, 1)]


@pytest.mark.parametrize(("room", "files"), [(0, 3), (BATCH, 2), (2**20, 0)])
def test_what_was_set_is_read(tmp_path, room, files):
    states = States(tmp_path, CPU, room)
    for block in range(4):
        values = made(block, torch.bfloat16 if block == 2 else torch.float32)
        for number, value in enumerate(values):
            states[number] = value
            states[number].zero_()  # a copy
        assert all(torch.equal(states[n], value) for n, value in enumerate(values))
        if block < 2:  # those of half the bytes find more room
            assert len(list(tmp_path.iterdir())) == files


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "x")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(DiskError, match="no space left"):
        States(tmp_path, CPU)[0] = torch.ones(2)
