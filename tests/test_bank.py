"""The feature bank: rows come back as they were, or not at all, whatever happened to their files meanwhile."""

import errno
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from finetune import bank
from finetune.bank import Bank, Entry

import numpy as np
import pytest
import torch
from torch import Tensor

KEY = {"trunk": "0123", "pictures": ["a.png", "b.png"], "lot": 16}
PLENTY = 1e9
BITS = {2: torch.int16, 4: torch.int32}
CHANNELS_LAST = {"memory_format": torch.channels_last}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 4, seed: int = 0) -> Tensor:
    """Return rows as behind a ReLU, 10 numbers each."""
    return noise(count, 10, seed=seed).relu()


def put(entry: Entry, values: Tensor, numbers: Sequence[int] | None = None) -> None:
    entry.put(range(len(values)) if numbers is None else numbers, values)


def keep(store: Bank, values: Tensor, key: dict = KEY) -> None:
    """Put all rows of an entry."""
    entry = store.entry(key, len(values))
    put(entry, values)
    entry.close()


def found(folder: Path, count: int = 4, key: dict = KEY) -> Tensor | None:
    """Return all rows of an entry, as another run would read them; None where it would not."""
    entry = Bank(folder, PLENTY).entry(key, count)
    try:
        return entry.read(range(count))
    finally:
        entry.close()


def is_same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are alike to the bit, NaN and -0 too."""
    assert one.dtype == other.dtype
    return torch.equal(one.view(BITS[one.itemsize]), other.view(BITS[one.itemsize]))


def the_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))


# Rows ---------------------------------------------------------------------------------------------------------------

SPECIAL = [0x00000000, -0x80000000, 0x7FC00000, 0x7F800001, -1, -0x3FFFFF, 0x7F800000, -0x800000, 1, -0x7FFFFFFF]
KINDS = {
    "as behind a ReLU": noise(4, 8, 3, 5).relu().contiguous(**CHANNELS_LAST),
    "4-d, channels first": noise(4, 8, 3, 5).relu(),
    "one pixel": noise(4, 1, 1, 8).permute(0, 3, 1, 2),
    "2-d": noise(4, 33).relu(),
    "3-d": noise(4, 7, 5).relu(),
    "one number": noise(4, 1),
    "dense": noise(4, 8, 3, 5).abs() + 1,
    "all zero": torch.zeros(4, 8, 3, 5).contiguous(**CHANNELS_LAST),
    "some rows all zero": noise(4, 9) * torch.tensor([[0.0], [1.0], [0.0], [1.0]]),
    "-0, NaN and infinity": torch.tensor(SPECIAL, dtype=torch.int32).expand(4, 10).contiguous().view(torch.float32),
    "bfloat16": noise(4, 8, 3, 5).relu().bfloat16().contiguous(**CHANNELS_LAST),
    "bfloat16, all patterns": torch.arange(-(2**15), 2**15, dtype=torch.int16).view(4, -1).view(torch.bfloat16),
    "float16": noise(4, 33).relu().half(),
}


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_rows_come_back_bit_for_bit(values, tmp_path):
    keep(Bank(tmp_path, PLENTY), values)
    back = found(tmp_path)
    assert is_same(back, values)
    assert back.stride() == values.stride()


@pytest.mark.parametrize("values", [noise(3, 5, 4).transpose(1, 2), noise(6, 10)[::2, ::2], noise(1, 5).expand(3, 5)])
def test_rows_that_lie_scattered_in_memory_come_back_bit_for_bit(values, tmp_path):
    keep(Bank(tmp_path, PLENTY), values)
    assert is_same(found(tmp_path, 3), values)


def test_what_was_read_may_be_changed(tmp_path):
    keep(Bank(tmp_path, PLENTY), rows())
    found(tmp_path).mul_(2)
    assert is_same(found(tmp_path), rows())


@pytest.mark.parametrize("kind", [list, tuple, np.array, np.int32])
def test_rows_are_put_in_any_order_and_lots_and_read_in_any_other(kind, tmp_path):
    values = rows(7)
    entry = Bank(tmp_path, PLENTY).entry(KEY, 7)
    for lot in ([3, 0, 6], [5], [1, 4, 2]):
        entry.put(kind(lot), values[lot])
    entry.close()
    entry = Bank(tmp_path, PLENTY).entry(KEY, 7)
    for lot in ([6, 5, 4, 3, 2, 1, 0], [2], [1, 1, 5]):
        assert is_same(entry.read(kind(lot)), values[lot])
    entry.close()


def test_a_row_that_is_put_twice_is_as_it_was_put_last(tmp_path):
    entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
    put(entry, rows(seed=1))
    put(entry, rows(seed=2)[1:3], [1, 2])
    entry.close()
    expected = rows(seed=1)
    expected[1:3] = rows(seed=2)[1:3]
    assert is_same(found(tmp_path), expected)


def test_threads_share_an_entry(tmp_path, monkeypatch):
    values = rows(300)
    lots = [list(range(at, at + 3)) for at in range(0, 300, 3)]
    random.Random(0).shuffle(lots)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: time.sleep(1e-4) or write(file, data))  # others go on
    entry = Bank(tmp_path, PLENTY).entry(KEY, 300)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda lot: entry.put(lot, values[lot]), lots))
    entry.close()
    entry = Bank(tmp_path, PLENTY).entry(KEY, 300)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda lot: is_same(entry.read(lot), values[lot]), lots))
    entry.close()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (noise(2, 4, 3, 3), noise(2, 4, 3, 3).contiguous(**CHANNELS_LAST)),
        (noise(2, 4, 3, 3).contiguous(**CHANNELS_LAST), noise(2, 4, 3, 3)),
    ],
)
def test_lots_that_lie_differently_in_memory_do_not_come_back_as_other_numbers(first, second, tmp_path):
    entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
    put(entry, first, [0, 1])
    put(entry, second, [2, 3])
    entry.close()
    back = found(tmp_path)
    assert back is None or torch.equal(back, torch.cat([first, second]))


@pytest.mark.parametrize("count", [*range(1, 20), 1000])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_packed_row_is_a_bit_for_each_number_and_those_that_are_not_zero(count, dtype):
    rng = np.random.default_rng(count)
    for share in (0.0, 0.07, 0.5, 1.0):
        row = (rng.integers(1, 2**16, count) * (rng.random(count) < share)).astype(dtype)
        packed, out = bank.pack(row), np.zeros_like(row)
        assert len(packed) == -(-count // 8) + row.itemsize * np.count_nonzero(row)
        bank.unpack(packed, out)
        assert (out == row).all()


def test_zeros_take_an_eleventh_of_the_space_at_most(tmp_path):
    values = noise(4, 64, 13, 13).contiguous(**CHANNELS_LAST)
    values[noise(4, 64, 13, 13, seed=1) < 1.5] = 0  # but for 7 in 100
    keep(Bank(tmp_path, PLENTY), values)
    assert size(tmp_path) < values.nbytes * (1 / 32 + 0.08) < values.nbytes / 8


# Entries --------------------------------------------------------------------------------------------------------------


def test_an_entry_is_there_for_later_runs_and_not_written_again(tmp_path):
    folder = tmp_path / "made/by it"
    keep(Bank(folder, PLENTY), rows())
    content = the_file(folder).read_bytes()
    keep(Bank(folder, PLENTY), rows(seed=1))
    assert the_file(folder).read_bytes() == content
    assert is_same(found(folder), rows())


def test_an_entry_can_be_read_once_all_rows_are_there_and_put_until_then(tmp_path):
    entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
    assert not entry.is_readable
    assert entry.read([0]) is None
    put(entry, rows())
    assert found(tmp_path) is None
    assert entry.read([0]) is None
    entry.close()
    entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
    assert entry.is_readable
    put(entry, rows(seed=1))
    assert is_same(entry.read([0, 1, 2, 3]), rows())
    entry.close()


def test_an_entry_that_is_closed_takes_and_gives_nothing(tmp_path):
    for _ in range(2):  # one that is put, and one that is read
        entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
        put(entry, rows())
        entry.close()
        entry.close()
        put(entry, rows(seed=1))
        assert entry.read([0]) is None
        assert not entry.is_readable
    assert is_same(found(tmp_path), rows())
    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize("missing", [{0}, {2}, {3}, {0, 1, 2}, {0, 1, 2, 3}])
def test_nothing_is_left_of_an_entry_that_lacks_a_row(missing, tmp_path, capsys):
    there = sorted({0, 1, 2, 3} - missing)
    entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
    for row in there:
        put(entry, rows()[row : row + 1], [row])
    entry.close()
    assert names(tmp_path) == []
    assert found(tmp_path) is None
    keep(Bank(tmp_path, PLENTY), rows())
    assert is_same(found(tmp_path), rows())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "other", [KEY | {"trunk": "0124"}, KEY | {"pictures": ["b.png", "a.png"]}, KEY | {"lot": 64}, KEY | {"new": 0}, {}]
)
def test_another_key_is_another_entry(other, tmp_path):
    keep(Bank(tmp_path, PLENTY), rows())
    assert found(tmp_path, key=other) is None
    keep(Bank(tmp_path, PLENTY), rows(seed=1), other)
    assert is_same(found(tmp_path, key=other), rows(seed=1))
    assert is_same(found(tmp_path), rows())


def test_the_same_key_in_another_order_is_the_same_entry(tmp_path):
    keep(Bank(tmp_path, PLENTY), rows())
    assert is_same(found(tmp_path, key=dict(reversed(KEY.items()))), rows())


@pytest.mark.parametrize("count", [3, 5])
def test_an_entry_of_another_number_of_rows_is_none(count, tmp_path):
    keep(Bank(tmp_path, PLENTY), rows())
    assert found(tmp_path, count) is None
    keep(Bank(tmp_path, PLENTY), rows(count))
    assert is_same(found(tmp_path, count), rows(count))


def test_two_runs_may_write_the_same_entry_at_once(tmp_path):
    one, other = (Bank(tmp_path, PLENTY).entry(KEY, 4) for _ in range(2))
    for row in range(4):
        for entry in (one, other):
            put(entry, rows()[row : row + 1], [row])
    one.close()
    reader = Bank(tmp_path, PLENTY).entry(KEY, 4)
    other.close()  # in the place of what is read
    assert is_same(reader.read(range(4)), rows())
    reader.close()
    assert is_same(found(tmp_path), rows())
    assert len(names(tmp_path)) == 1


def test_one_run_is_not_disturbed_by_another_that_stops_on_its_way(tmp_path):
    one, other = (Bank(tmp_path, PLENTY).entry(KEY, 4) for _ in range(2))
    put(one, rows())
    put(other, rows()[:1])
    other.close()
    one.close()
    assert is_same(found(tmp_path), rows())


def test_an_entry_that_another_process_drops_is_read_to_its_end(tmp_path):
    keep(Bank(tmp_path, PLENTY), rows())
    entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
    the_file(tmp_path).unlink()
    assert is_same(entry.read(range(4)), rows())
    entry.close()


def test_an_entry_is_read_where_its_time_of_use_can_not_be_noted(tmp_path, monkeypatch):
    keep(Bank(tmp_path, PLENTY), rows())
    for number in (errno.EPERM, errno.EROFS, errno.ENOENT):  # another user's; or dropped just now
        with monkeypatch.context() as patch:
            patch.setattr(os, "utime", raising(number))
            assert is_same(found(tmp_path), rows())
    assert is_same(found(tmp_path), rows())


# Damage -------------------------------------------------------------------------------------------------------------


def check_is_a_miss(folder: Path, path: Path, content: bytes) -> None:
    """See that an entry of such a content is none, is gone once that was seen, and can be put again."""
    path.write_bytes(content)
    assert found(folder) is None
    assert names(folder) == []
    keep(Bank(folder, PLENTY), rows())
    assert is_same(found(folder), rows())


def test_a_changed_bit_anywhere_is_a_miss(tmp_path):
    keep(Bank(tmp_path, PLENTY), rows())
    path = the_file(tmp_path)
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (0, 7):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            check_is_a_miss(tmp_path, path, bytes(changed))


def test_a_file_cut_anywhere_is_a_miss(tmp_path):
    keep(Bank(tmp_path, PLENTY), rows())
    path = the_file(tmp_path)
    content = path.read_bytes()
    for length in range(len(content)):
        check_is_a_miss(tmp_path, path, content[:length])


def test_a_file_of_something_else_is_a_miss(tmp_path):
    keep(Bank(tmp_path, PLENTY), rows())
    path = the_file(tmp_path)
    content = path.read_bytes()
    rng = random.Random(0)
    garbage = [rng.randbytes(rng.randrange(1, 400)) for _ in range(100)]
    fillings = [bytes([byte]) * length for byte in (0, 1, 0x7F, 0x80, 0xFF) for length in (15, 16, 17, 400)]
    for each in [content + b"\0", content + content[-16:], content[1:], b"\n", *garbage, *fillings]:
        check_is_a_miss(tmp_path, path, each)


def test_the_rows_beside_a_damaged_one_are_read(tmp_path):
    keep(Bank(tmp_path, PLENTY), rows())
    path = the_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[0] ^= 1  # of row 0
    path.write_bytes(content)
    entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
    assert entry.read([0]) is None
    assert entry.read([1, 0]) is None
    assert is_same(entry.read([1, 2, 3]), rows()[1:])
    entry.close()


def test_a_folder_where_an_entry_belongs_is_a_miss(tmp_path, capsys):
    keep(Bank(tmp_path, PLENTY), rows())
    path = the_file(tmp_path)
    path.unlink()
    (path / "more").mkdir(parents=True)
    keep(Bank(tmp_path, PLENTY), rows())
    assert found(tmp_path) is None
    assert names(tmp_path) == [path.name]
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_entry_that_can_not_be_dropped_is_a_miss(tmp_path, monkeypatch):
    keep(Bank(tmp_path, PLENTY), rows())
    path = the_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(Path, "unlink", raising(errno.EACCES))  # another user's, in a folder like /tmp
    assert found(tmp_path) is None


# Room ---------------------------------------------------------------------------------------------------------------


def fill(folder: Path, count: int) -> list[Path]:
    """Keep entries {"number": 0, 1, …}, of one size, of which the first was used longest ago; return their files."""
    paths = []
    for number in range(count):
        before = set(folder.glob("*"))
        keep(Bank(folder, PLENTY), torch.ones(4, 10), {"number": number})
        paths += set(folder.glob("*")) - before
        os.utime(paths[-1], (1000 + number, 1000 + number))
    return paths


def kept(paths: list[Path]) -> list[int]:
    return [number for number, path in enumerate(paths) if path.exists()]


def test_the_files_are_never_larger_than_the_limit(tmp_path):
    rng = random.Random(0)
    for limit in (500, 1000, 2000, 3000):
        folder = tmp_path / str(limit)
        stored = 0
        for number in range(25):
            count, width = rng.randrange(1, 8), rng.choice([10, 20, 60])
            entry = Bank(folder, limit).entry({"number": number}, count)
            for row in range(count):
                put(entry, noise(1, width), [row])
                assert size(folder) <= limit
            entry.close()
            assert size(folder) <= limit
            stored += found(folder, count, {"number": number}) is not None
        assert stored > 2


def test_an_entry_is_kept_where_it_just_fits(tmp_path):
    keep(Bank(tmp_path / "one", PLENTY), rows())
    whole = size(tmp_path / "one")
    keep(Bank(tmp_path / "fits", whole), rows())
    keep(Bank(tmp_path / "does not", whole - 1), rows())
    assert is_same(found(tmp_path / "fits"), rows())
    assert names(tmp_path / "does not") == []


def test_a_full_bank_drops_what_was_used_longest_ago(tmp_path):
    paths = fill(tmp_path, 4)
    one = paths[0].stat().st_size
    found(tmp_path, key={"number": 0})  # used now
    keep(Bank(tmp_path, 4 * one), torch.ones(4, 10), {"number": "new"})
    assert kept(paths) == [0, 2, 3]
    keep(Bank(tmp_path, 4 * one), torch.ones(4, 10), {"number": "newer"})
    assert kept(paths) == [0, 3]
    assert found(tmp_path, key={"number": "new"}) is not None


def test_entries_used_at_the_same_time_are_dropped_one_by_one(tmp_path):
    paths = fill(tmp_path, 4)
    for path in paths:
        os.utime(path, (1000, 1000))
    keep(Bank(tmp_path, 4 * paths[0].stat().st_size), torch.ones(4, 10), {"number": "new"})
    assert len(kept(paths)) == 3


def test_a_bank_drops_nothing_that_it_was_asked_for_itself(tmp_path):
    paths = fill(tmp_path, 3)
    store = Bank(tmp_path, 3 * paths[0].stat().st_size)
    for number in (0, 1):
        store.entry({"number": number}, 4).close()
        os.utime(paths[number], (1000, 1000))
    keep(store, torch.ones(4, 10), {"number": "new"})
    assert kept(paths) == [0, 1]
    keep(store, torch.ones(4, 10), {"number": "newer"})  # there is room for three, all of them asked for
    assert kept(paths) == [0, 1]
    assert found(tmp_path, key={"number": "new"}) is not None
    assert found(tmp_path, key={"number": "newer"}) is None


def test_nothing_is_dropped_in_vain(tmp_path, capsys):
    paths = fill(tmp_path, 3)
    store = Bank(tmp_path, 3 * paths[0].stat().st_size)
    keep(store, torch.ones(40, 10), {"number": "large"})
    entry = store.entry({"number": "larger"}, 4)
    put(entry, torch.ones(1, 10000), [0])
    assert kept(paths)
    entry.close()
    assert size(tmp_path) <= store.limit
    assert capsys.readouterr().err == ""


def test_a_lower_limit_holds_from_the_next_entry_on(tmp_path):
    paths = fill(tmp_path, 6)
    limit = 2 * paths[0].stat().st_size
    keep(Bank(tmp_path, limit), torch.ones(4, 10), {"number": "new"})
    assert kept(paths) == [5]
    assert size(tmp_path) <= limit


def test_a_limit_of_zero_keeps_nothing(tmp_path, capsys):
    keep(Bank(tmp_path / "bank", 0), rows())
    assert names(tmp_path / "bank") == []
    paths = fill(tmp_path / "filled", 2)  # with another limit
    keep(Bank(tmp_path / "filled", 0), rows())
    assert kept(paths) == []
    assert capsys.readouterr().err == ""


def left_behind(folder: Path, seconds: float) -> Path:
    """Return the file that a process leaves which is killed so long ago while it writes an entry."""
    before = set(folder.glob("*"))
    put(Bank(folder, PLENTY).entry({"killed": seconds}, 4), torch.ones(3, 10))
    (path,) = set(folder.glob("*")) - before
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_what_a_killed_process_left_is_dropped_when_its_room_is_needed(tmp_path):
    paths = fill(tmp_path, 2)  # which nobody has used since 1970
    left = left_behind(tmp_path, 2 * bank.ABANDONED)
    one = paths[0].stat().st_size
    keep(Bank(tmp_path, size(tmp_path) + one), torch.ones(4, 10), {"number": "new"})
    assert left.exists()  # there is room
    keep(Bank(tmp_path, size(tmp_path) + one - 1), torch.ones(4, 10), {"number": "newer"})
    assert not left.exists()
    assert kept(paths) == [0, 1]


def test_what_another_process_is_writing_is_not_dropped(tmp_path):
    (path,) = fill(tmp_path, 1)
    left = left_behind(tmp_path, bank.ABANDONED / 2)
    keep(Bank(tmp_path, size(tmp_path)), torch.ones(4, 10), {"number": "new"})
    assert not path.exists()
    keep(Bank(tmp_path, left.stat().st_size + 50), torch.ones(4, 10), {"number": "newer"})
    assert left.exists()


def test_an_entry_whose_unfinished_file_was_dropped_is_not_kept(tmp_path, capsys):
    entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
    put(entry, rows()[:2], [0, 1])
    the_file(tmp_path).unlink()
    put(entry, rows()[2:], [2, 3])
    entry.close()
    assert names(tmp_path) == []
    assert capsys.readouterr().err.count("\n") == 1


# A disk that does not take it -----------------------------------------------------------------------------------------


def raising(number: int) -> Callable:
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_rows_are_whole_on_a_disk_that_takes_a_few_bytes_at_a_time(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    keep(Bank(tmp_path, PLENTY), rows())
    assert is_same(found(tmp_path), rows())


@pytest.mark.parametrize("room", [0, 1, 30, 90])
def test_a_full_disk_is_said_in_a_line_and_leaves_nothing(room, tmp_path, monkeypatch, capsys):
    check_a_full_disk(room, tmp_path, monkeypatch, capsys)


def test_a_disk_that_is_full_when_the_index_is_written_leaves_nothing(tmp_path, monkeypatch, capsys):
    keep(Bank(tmp_path / "whole", PLENTY), rows())
    check_a_full_disk(size(tmp_path / "whole") - 1, tmp_path / "bank", monkeypatch, capsys)


def check_a_full_disk(room: int, folder: Path, monkeypatch, capsys) -> None:
    write, entry = os.write, Bank(folder, PLENTY).entry(KEY, 4)
    with monkeypatch.context() as patch:

        def fill_up(file: int, data: bytes) -> int:
            nonlocal room
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = write(file, data[:room])
            room -= written
            return written

        patch.setattr(os, "write", fill_up)
        for row in range(4):
            put(entry, rows()[row : row + 1], [row])
        entry.close()
    said = capsys.readouterr()
    assert said.err == f"warning: features are not kept: No space left on device: {folder}\n"
    assert said.out == ""
    assert names(folder) == []
    keep(Bank(folder, PLENTY), rows())  # once there is room
    assert is_same(found(folder), rows())


def test_a_disk_that_tells_only_in_the_end_that_it_is_full(tmp_path, monkeypatch, capsys):
    entry = Bank(tmp_path, PLENTY).entry(KEY, 4)
    put(entry, rows())
    close = os.close
    with monkeypatch.context() as patch:

        def close_and_fail(file: int) -> None:
            close(file)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        patch.setattr(os, "close", close_and_fail)
        entry.close()
    assert names(tmp_path) == []
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_can_not_be_made_is_said_in_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    for folder in (tmp_path / "file", tmp_path / "file/in it"):
        entry = Bank(folder, PLENTY).entry(KEY, 4)
        for row in range(4):
            put(entry, rows()[row : row + 1], [row])
        assert entry.read([0]) is None
        entry.close()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: features are not kept: ")
        assert line.endswith(f": {folder}")
    assert (tmp_path / "file").read_text() == "text"


def test_a_run_says_once_that_its_features_are_not_kept(tmp_path, capsys):
    (tmp_path / "file").write_text("text")
    store = Bank(tmp_path / "file", PLENTY)
    for epoch in range(5):
        keep(store, rows(), {"epoch": epoch})
    assert capsys.readouterr().err.count("\n") == 1


def test_an_entry_that_can_not_be_dropped_does_not_stop_a_run(tmp_path, monkeypatch):
    paths = fill(tmp_path, 2)
    limit = size(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", raising(errno.EACCES))
        keep(Bank(tmp_path, limit), torch.ones(4, 10), {"number": "new"})
    assert kept(paths) == [0, 1]
    assert size(tmp_path) <= limit


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let the process open no more files than it has open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_process_that_can_open_no_more_files_drops_none(tmp_path, capsys):
    keep(Bank(tmp_path, PLENTY), rows())
    reader = Bank(tmp_path, PLENTY).entry(KEY, 4)
    with no_more_files():
        assert found(tmp_path) is None
        keep(Bank(tmp_path, PLENTY), rows(seed=1), {"number": "new"})
        assert is_same(reader.read(range(4)), rows())
        reader.close()
        assert is_same(found(tmp_path), rows())  # with what is free now
    assert capsys.readouterr().err.count("\n") == 1
    assert len(names(tmp_path)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_no_file_stays_open_whatever_became_of_an_entry(tmp_path, monkeypatch):
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, threads = opened(), threading.active_count()
    keep(Bank(tmp_path, PLENTY), rows())
    path = the_file(tmp_path)
    content = path.read_bytes()
    for changed in (content, content[:-1], content[1:], b"", bytes([content[0] ^ 1]) + content[1:]):
        path.write_bytes(changed)
        found(tmp_path)
        keep(Bank(tmp_path, PLENTY), rows())
    for limit in (0, 60, 200):
        keep(Bank(tmp_path, limit), rows(), {"limit": limit})
    unfinished = Bank(tmp_path, PLENTY).entry({"unfinished": True}, 4)
    put(unfinished, rows()[:1])
    unfinished.close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", raising(errno.ENOSPC))
        keep(Bank(tmp_path, PLENTY), rows(), {"full": True})
    assert opened() == before
    assert threading.active_count() == threads
