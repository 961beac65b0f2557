"""Reading and writing safetensors tensor by tensor, against the library itself."""

import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from calmix.errors import ModelError
from calmix.models.shards import Shards, ShardWriter, read_header

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


def test_what_the_library_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    same(Shards(tmp_path).read(TENSORS), TENSORS)


def test_what_is_written_in_any_order_the_library_reads(tmp_path):
    halves = dict(list(TENSORS.items())[:3]), dict(list(TENSORS.items())[3:])
    files = {f"model-{i}.safetensors": half for i, half in enumerate(halves)}
    places = {
        file: {name: (t.dtype, tuple(t.shape)) for name, t in half.items()}
        for file, half in files.items()
    }
    first = ShardWriter(tmp_path, places)
    first.write({name: TENSORS[name] for name in ("scalar", "b", "a.weight")})
    # A later process goes on with the files that are there.
    second = ShardWriter(tmp_path, places)
    second.write({name: TENSORS[name] for name in ("flag", "a.half", "empty")})
    second.sync()
    second.write_index()
    same({**load_file(tmp_path / "model-0.safetensors"),
          **load_file(tmp_path / "model-1.safetensors")}, TENSORS)  # fmt: skip
    same(Shards(tmp_path).read(TENSORS), TENSORS)


def test_values_are_converted_to_the_type_of_their_place(tmp_path):
    writer = ShardWriter(tmp_path, {"model.safetensors": {"w": (torch.bfloat16, (2, 2))}})
    writer.write({"w": torch.full((2, 2), 1 / 3)})
    found = load_file(tmp_path / "model.safetensors")["w"]
    assert torch.equal(found, torch.full((2, 2), 1 / 3).bfloat16())
    assert not (tmp_path / "model.safetensors.index.json").exists()


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
def test_a_damaged_file_is_told(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_header(path)
