"""What is kept in a spool comes back as it was, or nothing does."""

import errno
import io
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from tools.spool import Spool, SpoolError, spool_in


def test_what_threads_keep_comes_back_whole_and_in_any_order(tmp_path):
    random = Random(1)
    data = [random.randbytes(random.choice((0, 1, 100, 50_000))) for _ in range(400)]
    with spool_in(tmp_path) as spool, ThreadPoolExecutor(4) as threads:
        kept = list(threads.map(spool.keep, data))
        assert [one.length for one in kept] == [len(one) for one in data]
        for number in random.sample(range(400), 400):
            assert kept[number].read() == data[number]
        assert list(threads.map(lambda one: one.read(), kept)) == data


def test_file_of_a_spool_has_no_name(tmp_path):
    with spool_in(tmp_path) as spool:
        spool.keep(b"x" * 100_000)
        assert list(tmp_path.iterdir()) == []


class FullDisk(io.BytesIO):
    """Takes ten bytes."""

    def write(self, data):
        if self.tell() + len(data) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_after_the_disk_was_full_nothing_is_given_back_and_nothing_taken():
    spool = Spool(FullDisk())
    kept = spool.keep(b"12345678")
    assert kept.read() == b"12345678"
    with pytest.raises(SpoolError, match="No space left"):
        spool.keep(b"9012")
    for again in (kept.read, lambda: spool.keep(b"")):
        with pytest.raises(SpoolError, match="No space left"):
            again()
