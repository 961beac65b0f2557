"""Reading and writing safetensors tensor by tensor, against the library itself."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from calmix.errors import InputError, ModelError
from calmix.models.shards import read_file, read_header, write_file

TENSORS = {
    "a.weight": torch.randn(5, 3),
    "a.half": torch.randn(4, 7).bfloat16(),
    "b": torch.arange(6).view(2, 3),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def test_shards_match_safetensors(tmp_path):
    theirs, ours = tmp_path / "model.safetensors", tmp_path / "own.safetensors"
    save_file(TENSORS, theirs, {"format": "pt"})
    assert_close(read_file(theirs), TENSORS, rtol=0, atol=0)
    write_file(ours, TENSORS)
    assert_close(read_file(ours), TENSORS, rtol=0, atol=0)
    assert ours.read_bytes() == theirs.read_bytes()


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def test_damaged_file_or_header_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (
        b"",
        b"\xff" * 40,
        struct.pack("<Q", 8) + b"not json",
        entry()[:-4],
        entry() + b"more",
        entry(shape=[1 << 40]),
        entry(shape=[-2]),
        entry(offsets=[-8, 0]),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="is cut short or damaged: fetch it again"):
            read_header(path)
    path.write_bytes(entry("F8_E4M3", [8], [0, 8]))
    with pytest.raises(ModelError, match="type F8_E4M3: convert them to bfloat16"):
        read_header(path)
    path.unlink()
    path.mkdir()  # the system's reason is given, here one that root has too
    with pytest.raises(InputError, match=r"cannot read .*model\.safetensors: Is a directory"):
        read_header(path)
