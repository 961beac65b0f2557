"""Reading and writing safetensors tensor by tensor, against the library itself."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmix.errors import ModelError
from calmix.models.shards import INDEX, Shards, read_file, read_header, write_file, write_index

TENSORS = {
    "a.weight": torch.randn(5, 3),
    "a.half": torch.randn(4, 7).bfloat16(),
    "b": torch.arange(6).view(2, 3),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_the_library_and_calmix_read_what_the_other_has_written(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    same(Shards(tmp_path).read(TENSORS), TENSORS)
    same(read_file(tmp_path / "model.safetensors"), TENSORS)
    write_file(tmp_path / "own.safetensors", TENSORS)
    same(load_file(tmp_path / "own.safetensors"), TENSORS)


def test_an_index_is_written_where_there_are_several_files(tmp_path):
    write_file(tmp_path / "model-1.safetensors", {"b": TENSORS["b"]})
    write_index(tmp_path)
    assert not (tmp_path / INDEX).exists()
    write_file(tmp_path / "model-2.safetensors", {"a": TENSORS["a.half"]})
    write_index(tmp_path)
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 6 * 8 + 28 * 2},
        "weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"},
    }
    assert list(Shards(tmp_path).places) == ["b", "a"]


def header(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable safetensors"),
        (b"\xff" * 40, "not a readable safetensors"),
        (header(b"not json"), "not a readable safetensors"),
        (header(b'{"a": 1}'), "not a readable safetensors"),
        (header(b'{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}}') + b"x", "F4"),
        (header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}') + b"1234", "cut short"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_header(path)
