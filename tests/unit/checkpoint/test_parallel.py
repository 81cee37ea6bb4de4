"""Threads of our own: results in order, the first error ends the rest, and everybody has gone before it is raised."""

import threading
from concurrent.futures import wait

import pytest

from datastore.threads import each, in_thread


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_results_come_in_the_order_of_the_items(threads: int, count: int) -> None:
    assert each(lambda item: item * item, range(count), threads=threads) == [item * item for item in range(count)]


def test_work_is_done_in_several_threads_at_once() -> None:
    meeting = threading.Barrier(3)
    assert len(set(each(lambda _: meeting.wait(timeout=60), range(3), threads=3))) == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_is_raised_once_all_threads_have_ended(threads: int) -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 5:
            raise ZeroDivisionError
        threading.Event().wait(0.001)
        done.append(item)

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        each(work, range(1000), threads=threads)
    assert threading.active_count() == before
    assert len(done) < 500


def test_the_error_of_a_thread_is_raised_by_who_asks_for_its_result() -> None:
    def work() -> None:
        raise ZeroDivisionError

    future = in_thread(work)
    wait([future])
    with pytest.raises(ZeroDivisionError):
        future.result()
    assert in_thread(lambda: 7).result() == 7
