"""Which categories own a level-1 code."""

from hypothesis import given
from hypothesis import strategies as st

from genrecall.quantization.level1_categories import Level1Categories, choose_categories

PATHS = [("a", "x")] * 5 + [("a", "y")] * 2 + [("b", "z", "q")] * 3 + [("c",)] * 1 + [()] * 4


def test_an_items_category_is_its_deepest_ancestor_with_enough_items():
    # ("a","y") has 2 items, so they count for ("a",); ("b","z","q") has 3; ("c",) has 1 and no ancestor: no category.
    chosen = choose_categories(PATHS, min_items=3, max_categories=10)
    assert chosen.paths == (("a",), ("a", "x"), ("b", "z", "q"))
    assert chosen.codes_of([("a", "x"), ("a", "y"), ("b", "z", "q"), ("c",), ()]).tolist() == [1, 0, 2, -1, -1]


def test_the_smallest_subtree_is_rolled_up_until_they_fit():
    # Of ("a",) 2, ("a","x") 5, ("b","z","q") 3 items two may stay. The subtrees of b hold one category each, so nothing is won there; that of ("a",) holds two.
    chosen = choose_categories(PATHS, min_items=3, max_categories=2)
    assert chosen.paths == (("a",), ("b", "z", "q"))
    assert chosen.codes_of([("a", "x"), ("a", "new", "leaf"), ("b", "z", "q"), ("b",)]).tolist() == [0, 0, 1, -1]


def test_small_leaves_do_not_end_in_the_root():
    # Two aisles of 4 and 6 small leaves and one of 2 large ones: the aisle with the fewest items goes, then the next; the large leaves stay, and no code is the whole shop's.
    paths = (
        [("shop", "tea", leaf) for leaf in "abcd"] * 2 + [("shop", "tools", leaf) for leaf in "abcdef"] * 2 + [("shop", "lamps", leaf) for leaf in "ab"] * 20
    )
    assert choose_categories(paths, min_items=1, max_categories=9).paths == (
        ("shop", "lamps", "a"),
        ("shop", "lamps", "b"),
        ("shop", "tea"),
        *(("shop", "tools", leaf) for leaf in "abcdef"),
    )
    assert choose_categories(paths, min_items=1, max_categories=4).paths == (("shop", "lamps", "a"), ("shop", "lamps", "b"), ("shop", "tea"), ("shop", "tools"))


def test_with_too_many_roots_the_smallest_stay_without_a_code():
    assert choose_categories(PATHS, min_items=1, max_categories=1).paths == (("a",),)


def test_no_categories_give_no_codes():
    assert len(choose_categories([(), ()], min_items=1, max_categories=5)) == 0
    assert Level1Categories(()).codes_of([("a",)]).tolist() == [-1]


paths = st.lists(st.lists(st.sampled_from("abc"), max_size=4).map(tuple), max_size=40)


@given(paths, st.integers(1, 5), st.integers(0, 8))
def test_never_more_than_allowed_and_every_category_has_enough_items(catalogue, min_items, most):
    chosen = choose_categories(catalogue, min_items=min_items, max_categories=most)
    assert len(chosen) <= most
    for path in chosen.paths:
        assert sum(item[: len(path)] == path for item in catalogue) >= min_items
    for item, code in zip(catalogue, chosen.codes_of(catalogue).tolist(), strict=True):
        longest = max((len(path) for path in chosen.paths if item[: len(path)] == path), default=0)
        assert (chosen.paths[code] == item[:longest]) if longest else code == -1


@given(paths, st.integers(1, 3), st.integers(0, 8))
def test_rolling_up_equals_looking_through_all_members_every_time(catalogue, min_items, most):
    below = {item[:depth]: 0 for item in catalogue for depth in range(1, len(item) + 1)}
    for path in below:
        below[path] = sum(item[: len(path)] == path for item in catalogue)
    members: dict[tuple[str, ...], int] = {}
    for item in catalogue:
        deepest = next((item[:depth] for depth in range(len(item), 0, -1) if below[item[:depth]] >= min_items), None)
        if deepest is not None:
            members[deepest] = members.get(deepest, 0) + 1
    for root in sorted((path for path, count in below.items() if count >= min_items), key=lambda path: (below[path], -len(path), path)):
        held = [path for path in members if path[: len(root)] == root]
        if len(members) > most and len(held) > 1:
            members[root] = sum(members.pop(path) for path in held)
    expected = sorted(sorted(members, key=lambda path: (-members[path], path))[:most])
    assert list(choose_categories(catalogue, min_items=min_items, max_categories=most).paths) == expected
