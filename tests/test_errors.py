"""What an error of a library is cut down to in one of ours."""

import pytest

from dde_cache.errors import first_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("one"), "one"),
        (ValueError("one\ntwo"), "one"),
        (ImportError("\n  SiglipTokenizer wants a library\n"), "SiglipTokenizer wants a library"),
        (OSError(), "OSError"),
        (RuntimeError(" \n"), "RuntimeError"),
    ],
)
def test_the_first_line_with_words(error, expected):
    assert first_line(error) == expected
