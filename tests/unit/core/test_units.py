import pytest

from pageferry.core.errors import UsageError
from pageferry.core.units import parse_rate


@pytest.mark.parametrize(
    ("text", "rate"),
    [("0", None), (" 0 ", None), ("100M", 100 << 20), ("1GiB/s", 1 << 30), ("65536", 65536), ("64k/s", 64 << 10)],
)
def test_rates(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-1", "0M", "1 /s/s", "1.5G"])
def test_what_is_not_a_rate(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_rate(text)
