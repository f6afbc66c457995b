"""What imports make is not looked through for garbage."""

from __future__ import annotations

import gc
import weakref

import pytest

from gspo_lightning.program.imports import objects_that_stay


class Node:
    """An object that refers to itself: only a search for cycles finds that nobody uses it."""

    def __init__(self):
        self.own = self


@pytest.fixture(autouse=True)
def _collection():
    yield
    gc.enable()


def test_no_search_takes_place_and_what_is_made_is_left_out_of_later_ones():
    searches = []
    gc.callbacks.append(lambda phase, info: searches.append(phase))
    try:
        before = gc.get_freeze_count()
        with objects_that_stay():
            kept = weakref.ref(Node())
            [[] for _ in range(10 * gc.get_threshold()[0])]
            assert searches == [] and not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > before
        gc.collect()
        assert kept() is not None and searches
    finally:
        gc.callbacks.pop()
    later = weakref.ref(Node())
    gc.collect()
    assert later() is None


def test_a_program_without_searches_keeps_to_it_and_an_import_that_fails_turns_them_on_again():
    with pytest.raises(ImportError), objects_that_stay():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    with objects_that_stay():
        pass
    assert not gc.isenabled()
