"""What messages share."""

import pytest

from vblora.errors import listed


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "none"), (1, "`0`"), (4, "`0`, `1`, `2`, `3`"), (5, "`0`, `1`, `2`, `3` and 1 more")],
)
def test_names_are_listed(count, text):
    assert listed(range(count)) == text


def test_the_caller_writes_names_and_says_how_many():
    assert listed(iter("abc"), repr, most=1) == "'a' and 2 more"
