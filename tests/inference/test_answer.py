"""Where an answer ends, and what of its text may be told before."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jvlm.inference.answer import StopTexts

STOPS = st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=0, max_size=3)


def streamed(pieces, stops, include=False):
    text, given_ = StopTexts(stops, include), ""
    for piece in pieces:
        told, stop = text.add(piece)
        given_ += told
        if stop is not None:
            return given_, stop
    return given_ + text.finish(), None


def whole(text, stops, include=False):
    """The first stop to be complete ends the text."""
    for end in range(1, len(text) + 1):
        done = [s for s in stops if text[:end].endswith(s)]
        if done:
            longest = max(done, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab\n", min_size=1, max_size=1), max_size=12), STOPS, st.booleans())
def test_a_streamed_text_ends_where_the_whole_one_does(pieces, stops, include):
    assert streamed(pieces, stops, include) == whole("".join(pieces), stops, include)


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_nothing_of_a_stop_is_told_before_it_is_known_not_to_be_one(cut):
    text = "one </to two </tool> three"
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    stops, told = StopTexts(["</tool>"]), ""
    for piece in pieces:
        more, stop = stops.add(piece)
        told += more
        assert "one </to two ".startswith(told)
        if stop:
            break
    assert (told, stop) == ("one </to two ", "</tool>")
