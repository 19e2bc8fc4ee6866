"""Pages, their content, and the pool of features, against books that are kept in the plainest way."""

import random

import numpy as np
import pytest

from jvlm.inference.scheduling import prefix
from jvlm.inference.scheduling.features import FeatureTable
from jvlm.inference.scheduling.pages import PagePool
from jvlm.inference.scheduling.sequence_spec import SequenceSpec, media_of
from tests.inference.scheduling.device import picture, spec
from tests.inference.support import prompt
from tests.support import picture as image
from tests.support import run_python


class Books:
    """A prefix cache by brute force: every page that was kept is found by comparing whole prefixes."""

    def __init__(self, size):
        self.size = size
        self.kept: dict[int, tuple] = {}  # page -> all keys up to it
        self.holders: dict[int, int] = {}
        self.unused: list[int] = []  # oldest first

    def match(self, keys):
        found = []
        for i in range(len(keys)):
            page = [page for page, held in self.kept.items() if held == tuple(keys[: i + 1])]
            if not page:
                return found
            found += page
        return found

    def available(self, total):
        return total - sum(count > 0 for count in self.holders.values())


@pytest.mark.parametrize("seed", range(5))
def test_prefixes_are_found_as_by_comparing_all_of_them_and_given_up_in_order(seed):
    rng, pool, books, sequences = random.Random(seed), PagePool(14), Books(13), []
    for _ in range(600):
        if sequences and rng.random() < 0.5:
            for page in reversed(pages := sequences.pop(rng.randrange(len(sequences)))):
                books.holders[page] -= 1
                if not books.holders[page] and page in books.kept:
                    books.unused.append(page)
            pool.release(pages)
            continue
        keys = [bytes([rng.randrange(2)]) for _ in range(rng.randint(1, 5))]
        keys = [b"".join(keys[: i + 1]) for i in range(len(keys))]
        found = pool.match(keys)
        assert found == books.match(keys)
        assert pool.match_length(keys) == len(found)
        pool.share(found)
        for page in found:
            books.holders[page] = books.holders.get(page, 0) + 1
            if page in books.unused:
                books.unused.remove(page)
        need = len(keys) - len(found)
        assert pool.available == books.available(13)
        taken = pool.take(need)
        assert (taken is None) == (need > books.available(13))
        if taken is None:
            for page in reversed(found):
                books.holders[page] -= 1
                if not books.holders[page]:
                    books.unused.append(page)
            pool.release(found)
            continue
        given_up = [page for page in taken if page in books.kept]
        assert given_up == books.unused[: len(given_up)]
        for page in taken:
            assert books.holders.get(page, 0) == 0
            books.kept.pop(page, None)
            if page in books.unused:
                books.unused.remove(page)
            books.holders[page] = 1
        # no page is kept without the one before it
        assert all(not held[:-1] or held[:-1] in books.kept.values() for held in books.kept.values())
        pages = [*found, *taken]
        for i in range(len(found), len(keys)):
            assert pool.register(pages[i], keys[i]) == pages[i]
            books.kept[pages[i]] = tuple(keys[: i + 1])
        sequences.append(pages)


def test_a_page_whose_content_another_keeps_is_given_back():
    pool = PagePool(4)
    (first,), (second,) = pool.take(1), pool.take(1)
    assert pool.register(first, b"x") == first
    assert pool.register(second, b"x") == first
    assert pool.references(first) == 2
    assert pool.free == 2


@pytest.mark.parametrize("seed", range(3))
def test_features_keep_their_places_while_somebody_needs_them(seed):
    rng, table, held = random.Random(seed), FeatureTable(20), []
    sizes = {bytes([i]): rng.randint(1, 8) for i in range(8)}
    for _ in range(500):
        if held and rng.random() < 0.5:
            for key in held.pop(rng.randrange(len(held))):
                table.release(key)
        else:
            wanted = {key: sizes[key] for key in rng.sample(sorted(sizes), rng.randint(1, 3))}
            needed = {key for keys in held for key in keys} | set(wanted)
            fits = sum(sizes[key] for key in needed) <= 20
            known = {key for key in wanted if any(key in keys for keys in held)}
            assert (table.acquire(wanted) is not None) == fits
            if not fits:
                continue
            for key in wanted:
                assert key not in known or table[key].encoded
                table[key].encoded = True
            held.append(tuple(wanted))
        places = [slot for key in {key for keys in held for key in keys} for slot in table[key].slots.tolist()]
        assert len(set(places)) == len(places)
        assert len(places) + table.cached + table.free == 20


def keys_of(parts, **fields):
    return prefix.prompt_keys(spec("a", parts, **fields), 4)


def test_keys_of_pages_differ_from_the_first_difference_on():
    p, q = picture("p", 6), picture("q", 6)
    base = keys_of([1, 2, p, 3, 1, 2, 3])
    assert len(base) == 3
    assert keys_of([1, 2, p, 3, 1, 2, 3, 0]) == base
    for other, same in (
        ([1, 2, q, 3, 1, 2, 3], 0),
        ([1, 2, p, 3, 1, 2, 0], 2),
        ([2, 1, p, 3, 1, 2, 3], 0),
        ([1, 2, picture("p", 3), picture("p", 3), 3, 1, 2, 3], 0),
    ):
        found = keys_of(other)
        assert [a == b for a, b in zip(found, base, strict=False)] == [i < same for i in range(len(found))]
    for fields in ({"salt": "s"}, {"adapter": b"s"}, {"encoder_adapter": b"s"}):
        assert not set(keys_of([1, 2, p, 3, 1, 2, 3], **fields)) & set(base)
    assert keys_of([1], adapter=b"ab") == keys_of([1]) == []
    assert keys_of([1] * 4, adapter=b"ab", encoder_adapter=b"c") != keys_of(
        [1] * 4, adapter=b"a", encoder_adapter=b"bc"
    )


def contents(tiny, *images, **fields):
    example = tiny.processor.encode(prompt("<image>" * len(images), images=list(images), **fields))
    return [media.content for media in SequenceSpec.of("a", example).media]


def test_the_hash_of_a_picture_is_of_its_pixels_its_size_and_its_limits(tiny):
    seen = image(140, 84)
    same, again = contents(tiny, seen, seen.copy())
    assert same == again
    changed = seen.copy()
    changed.putpixel((139, 83), tuple(255 - v for v in seen.getpixel((139, 83))))
    turned = seen.transpose(2)  # by a quarter: other size
    limited = contents(tiny, seen, chat_template_kwargs={"max_pixels": 5000})[0]
    raw = np.asarray(seen).reshape(140, 84, 3)  # the same bytes with width and height exchanged
    found = [same, *contents(tiny, changed, turned, raw, seen.convert("L")), limited]
    assert len(set(found)) == len(found)


def test_the_places_of_pictures_are_those_of_their_vision_tokens_and_patches(tiny):
    example = tiny.processor.encode(prompt("a<image>b<image>", images=[image(84, 84), image(140, 84, 1)]))
    first, second = media_of(example)
    assert (first.first, second.first) == (0, first.tokens)
    assert second.first_patch == first.patches
    assert first.patches + second.patches == example.num_patches
    alone = media_of(tiny.processor.encode(prompt("<image>", images=[image(140, 84, 1)])))
    assert alone[0].content == second.content


def test_the_scheduler_and_the_forms_of_requests_import_no_jax():
    code = (
        "import sys; sys.modules['jax'] = None; import jvlm.inference.scheduling.scheduler, jvlm.inference.requests, "
        "jvlm.inference.drafts, jvlm.inference.constrain; print(*sys.modules)"
    )
    assert "flax" not in run_python(code).split()
