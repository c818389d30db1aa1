import json
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.vmm.json_framer import JsonFramer

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3) | st.lists(values, max_size=3), max_size=4)


@given(messages, st.sampled_from(["", "\n", "\r\n \t"]), st.booleans(), st.lists(st.integers(1, 100), min_size=1))
def test_values_come_out_whole_under_any_chunking(wanted, between, ascii_only, sizes):
    stream = between.join([*(json.dumps(value, ensure_ascii=ascii_only) for value in wanted), ""]).encode()
    framer = JsonFramer()
    seen = []
    for size in cycle(sizes):
        if not stream:
            break
        seen += framer.feed(stream[:size])
        stream = stream[size:]
    assert [json.loads(value) for value in seen] == wanted


def test_garbage_ends_at_the_newline():
    assert JsonFramer().feed(b'nonsense {\n{"a":1}"x"\n') == [b"nonsense {", b'{"a":1}', b'"x"']


def test_brackets_in_strings_do_not_count():
    assert JsonFramer().feed(rb'{"a":"}\"}"}{') == [rb'{"a":"}\"}"}']


def test_an_endless_value_is_refused():
    framer = JsonFramer()
    assert framer.feed(b'["') == []
    for _ in range(15):
        assert framer.feed(b"x" * (1 << 16)) == []
    with pytest.raises(ValueError, match="longer than"):
        framer.feed(b"x" * (1 << 16))
