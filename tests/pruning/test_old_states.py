"""Hidden states in memory and in files: what is read, what is kept, what nobody overwrites."""

import json

import pytest
import torch

from calmix.errors import InputError
from calmix.pruning.old_states import KeptStates, Room, damaged

CPU = torch.device("cpu")
ROWS = [2, 2, 1]
BATCH = 2 * 3 * 4 * 4  # bytes of a micro-batch of two rows
PINNED = 128  # what PyTorch takes for one
ROOMS = [Room(), Room(BATCH), Room(2 * BATCH), Room(2**20), Room(BATCH, PINNED)]


def made(seed):
    """The states of all micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 3, 4, generator=generator) for count in ROWS]


def put(states, values):
    for number, value in enumerate(values):
        states[number] = value
    assert states.turn()


def same(states, values):
    return all(torch.equal(states[number], value) for number, value in enumerate(values))


@pytest.fixture
def unpinned(monkeypatch):
    """A CPU has no pinned memory to give."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_what_was_kept_is_read_on(tmp_path, room):
    states = KeptStates(tmp_path, ROWS, CPU, room)
    put(states, made(0))
    assert same(states, made(0))
    for block in range(1, 6):
        before = made(block - 1)
        for number, value in enumerate(made(block)):
            assert torch.equal(states[number], before[number])
            states[number] = value
        assert states.turn()
        assert same(states, made(block))
    assert not states.turn()  # nothing has come since


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize("room", ROOMS, ids=str)
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupted_run_goes_on_from_the_last_that_count(tmp_path, room, late):
    """Whatever came after them, and if they were written while the next ones were made."""
    states = KeptStates(tmp_path, ROWS, CPU, room)
    put(states, made(0))
    kept = None
    for block in range(1, 7):
        values = made(block)
        if block in (2, 5):
            keep = states.keeping()
            if late and room.host == 0:  # what is pinned waits for `before_write`
                put(states, values)
                kept = keep()
            else:
                kept = keep()
                put(states, values)
            states.counted = frozenset({kept["side"]})
        else:
            put(states, values)
        assert same(states, values)
        if kept is not None:
            again = KeptStates(tmp_path, ROWS, CPU, room)
            again.restore(kept["entries"], kept["side"])
            assert same(again, made(1 if block < 5 else 4))
    assert len(list(tmp_path.iterdir())) == (3 if room.device + room.host < 3 * BATCH else 2)


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_a_block_may_return_another_type_and_shape(tmp_path, room):
    """Mamba's blocks return float32 whatever they read, Gemma 3n's hold four streams."""
    states = KeptStates(tmp_path, ROWS, CPU, room)
    put(states, [value.bfloat16() for value in made(0)])
    wide = [value.expand(4, *value.shape).clone() for value in made(1)]
    for values in (made(2), wide, [value.double() for value in made(3)], made(4)):
        put(states, values)
        assert same(states, values)
        held = [value for _, value in states._held.values()]
        assert sum(value.nbytes for value in held) <= room.device + room.host
        kept = states.keeping()()
        states.counted = frozenset({kept["side"]})
        again = KeptStates(tmp_path, ROWS, CPU, room)
        again.restore(json.loads(json.dumps(kept["entries"])), kept["side"])
        assert same(again, values)
        assert again[0].dtype == values[0].dtype


@pytest.mark.usefixtures("unpinned")
@pytest.mark.parametrize(("host", "held"), [(63, []), (127, [2]), (PINNED, [0]), (320, [0, 1, 2])])
def test_pinned_memory_counts_as_it_is_taken(tmp_path, host, held):
    """By powers of two: 128 bytes for the 96 of two rows, 64 for the 48 of one."""
    states = KeptStates(tmp_path, ROWS, CPU, Room(0, host))
    for seed in range(2):
        put(states, made(seed))
        assert list(states._held) == held
        assert same(states, made(seed))


@pytest.mark.usefixtures("unpinned")
def test_what_is_kept_waits_for_the_device_that_makes_it(tmp_path, monkeypatch):
    """Which need not be the current one."""
    waited = []

    class Event:
        def __init__(self, device, enable_timing):
            self.device = device

        def record(self, queue):
            assert queue == ("queue of", self.device)

        def synchronize(self):
            waited.append(self.device)

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: ("queue of", device))
    states = KeptStates(tmp_path, ROWS, torch.device("cuda", 1), Room(0, 2**20))
    put(states, made(0))
    states.keeping()()
    assert waited == [torch.device("cuda", 1)]


def test_what_is_read_may_be_changed(tmp_path):
    """A block that works in place changes nothing of what is kept."""
    for room in (Room(), Room(2**20)):
        states = KeptStates(tmp_path, ROWS, CPU, room)
        put(states, made(0))
        states[1].zero_()
        assert same(states, made(0))


def test_damage_is_told(tmp_path):
    states = KeptStates(tmp_path, ROWS, CPU)
    put(states, made(0))
    kept = states.keeping()()
    again = KeptStates(tmp_path, ROWS, CPU)
    with pytest.raises(InputError, match=str(damaged(tmp_path))):
        again.restore(kept["entries"], 3)
    again.restore(kept["entries"] | {"1": [5, *kept["entries"]["1"][1:]]}, kept["side"])
    assert torch.equal(again[0], made(0)[0])
    with pytest.raises(InputError, match=r"states-\d is damaged: start over with --overwrite"):
        again[1]
    (tmp_path / "states-1").unlink()
    with pytest.raises(InputError, match="is damaged"):
        again[2]
