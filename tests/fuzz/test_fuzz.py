"""A sample of the fuzzer; `make test-long` runs ten thousand mutations."""

from tests.fuzz.readers import KINDS
from tests.fuzz.running import run


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "fuzz" / "files" / "cache"))
    read, refused, faults = run(tmp_path / "fuzz", 120)
    assert not faults, "\n".join(f"{k} {v[0]}\n{v[1]}" for k, v in faults.items())
    assert {*read, *refused} == set(KINDS)
    assert refused.total() > 50, "mutations that damage nothing test nothing"
