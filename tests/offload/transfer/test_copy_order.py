"""Urgent copies before guesses, and how many guesses are given to the link at a time."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from offload.transfer.order import Begin, CopyOrder

MOST = 100


def test_urgent_copies_begin_at_once_in_the_order_asked() -> None:
    order = CopyOrder(MOST)
    for job in (1, 2, 3):
        order.add(job, 1000, urgent=True, ready=True)
    assert order.begin() == [Begin(1, True, None), Begin(2, True, None), Begin(3, True, None)]
    assert order.begin() == []


def test_a_guess_begins_after_the_urgent_copies_given_before_it_on_a_stream_of_its_own() -> None:
    order = CopyOrder(MOST)
    order.add(1, 50, urgent=False, ready=True)
    order.add(2, 50, urgent=True, ready=True)
    order.add(3, 50, urgent=True, ready=True)
    assert order.begin() == [Begin(2, True, None), Begin(3, True, None), Begin(1, False, 3)]


def test_an_urgent_copy_does_not_wait_for_guesses_under_way() -> None:
    order = CopyOrder(MOST)
    order.add(1, 50, urgent=False, ready=True)
    assert order.begin() == [Begin(1, False, None)]
    order.add(2, 50, urgent=True, ready=True)
    assert order.begin() == [Begin(2, True, None)]


def test_only_so_many_bytes_of_guesses_are_under_way() -> None:
    order = CopyOrder(MOST)
    for job in (1, 2, 3, 4):
        order.add(job, 50, urgent=False, ready=True)
    assert [begin.job for begin in order.begin()] == [1, 2]
    order.finished(1)
    assert [begin.job for begin in order.begin()] == [3]


def test_one_guess_begins_however_large_it_is() -> None:
    order = CopyOrder(MOST)
    for job in (1, 2):
        order.add(job, 5 * MOST, urgent=False, ready=True)
    assert [begin.job for begin in order.begin()] == [1]
    order.finished(1)
    assert [begin.job for begin in order.begin()] == [2]


def test_a_copy_whose_bytes_are_still_on_disk_lets_others_pass() -> None:
    order = CopyOrder(MOST)
    order.add(1, 10, urgent=True, ready=False)
    order.add(2, 10, urgent=True, ready=True)
    order.add(3, 10, urgent=False, ready=False)
    order.add(4, 10, urgent=False, ready=True)
    assert [begin.job for begin in order.begin()] == [2, 4]
    order.ready(1)
    order.ready(3)
    assert [begin.job for begin in order.begin()] == [1, 3]


def test_a_guess_that_somebody_waits_for_becomes_urgent() -> None:
    order = CopyOrder(MOST)
    for job in (1, 2, 3):
        order.add(job, MOST, urgent=False, ready=True)
    assert order.begin() == [Begin(1, False, None)]
    order.urge(3)
    assert order.begin() == [Begin(3, True, None)]


def test_only_what_has_not_begun_can_be_dropped() -> None:
    order = CopyOrder(MOST)
    for job in (1, 2):
        order.add(job, MOST, urgent=False, ready=True)
    order.begin()
    assert not order.drop(1)
    assert order.drop(2)
    assert order.waiting == []
    order.finished(1)
    assert order.begin() == []


class Machine(RuleBasedStateMachine):
    """Whatever is asked: every job begins once, guesses stay within their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.order = CopyOrder(MOST)
        self.sizes: dict[int, int] = {}
        self.guesses: set[int] = set()
        self.begun: list[Begin] = []
        self.under_way: list[Begin] = []
        self.unready: set[int] = set()
        self.dropped: set[int] = set()

    @rule(size=st.integers(1, 3 * MOST), urgent=st.booleans(), ready=st.booleans())
    def add(self, size: int, urgent: bool, ready: bool) -> None:
        job = len(self.sizes)
        self.sizes[job] = size
        if not ready:
            self.unready.add(job)
        self.order.add(job, size, urgent=urgent, ready=ready)

    @rule()
    def begin(self) -> None:
        begins = self.order.begin()
        for begin in begins:
            assert begin.job not in self.unready
            assert begin.after is None or any(
                b.job == begin.after and b.urgent for b in self.under_way + begins
            )
        self.begun += begins
        self.under_way += begins

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        begin = data.draw(st.sampled_from(self.under_way))
        first = next(b for b in self.under_way if b.urgent == begin.urgent)  # queues are in order
        self.under_way.remove(first)
        self.order.finished(first.job)

    @precondition(lambda self: self.order.waiting)
    @rule(data=st.data(), how=st.sampled_from(["urge", "drop", "ready"]))
    def change(self, data: st.DataObject, how: str) -> None:
        job = data.draw(st.sampled_from(self.order.waiting))
        if how == "urge":
            self.order.urge(job)
        elif how == "drop":
            assert self.order.drop(job)
            self.dropped.add(job)
        else:
            self.order.ready(job)
            self.unready.discard(job)

    @invariant()
    def holds(self) -> None:
        self.order.check_integrity()
        jobs = [begin.job for begin in self.begun]
        assert len(set(jobs)) == len(jobs)
        assert not self.dropped & set(jobs)
        guesses = [self.sizes[b.job] for b in self.under_way if not b.urgent]
        assert len(guesses) <= 1 or sum(guesses) <= MOST

    def teardown(self) -> None:
        for job in self.order.waiting:
            self.order.ready(job)
            self.unready.discard(job)
        for _ in range(len(self.sizes) + 1):
            self.begin()
            for begin in self.under_way:
                self.order.finished(begin.job)
            self.under_way.clear()
        assert {b.job for b in self.begun} | self.dropped == set(self.sizes)


TestAnyOrder = Machine.TestCase
