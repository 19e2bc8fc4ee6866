"""Drafts from what stood before."""

import random

from jvlm.inference.drafts import NGramDrafts


def longest_match(tokens, most):
    """What followed the last 4, 3 or 2 tokens where they stood last, by looking everywhere."""
    for length in (4, 3, 2):
        tail = tokens[-length:]
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tail and len(tokens) > length:
                return tuple(tokens[start + length : start + length + most])
    return ()


def test_proposals_are_those_of_a_search_through_all_tokens():
    rng = random.Random(0)
    for _ in range(30):
        tokens, drafts = [rng.randrange(4) for _ in range(rng.randint(1, 20))], NGramDrafts(most=4)
        for _ in range(40):
            assert drafts.propose(tokens) == longest_match(tokens, 4)
            tokens += [rng.randrange(4) for _ in range(rng.randint(1, 3))]


def test_a_proposal_is_no_longer_than_there_is_room():
    assert NGramDrafts().propose([1, 2, 3, 4, 5, 1, 2], 2) == (3, 4)
    assert NGramDrafts().propose([1, 2, 3, 1, 2], 0) == ()


def test_too_many_wrong_proposals_silence_it_for_a_while():
    drafts, tokens = NGramDrafts(most=4, window=8, pause=10), [1, 2, 3, 4, 5, 6, 1, 2]
    for _ in range(2):
        assert drafts.propose(tokens)
        drafts.observe(len(tokens), 4, 1)
    assert not drafts.active(len(tokens))
    assert drafts.propose(tokens) == ()
    later = [*tokens, *range(10, 18), 1, 2]
    assert drafts.active(len(later))
    assert drafts.propose(later)


def test_proposals_that_are_right_often_enough_go_on():
    drafts = NGramDrafts(most=4, window=8)
    for _ in range(10):
        drafts.observe(50, 4, 2)
    assert drafts.active(50)
