import json

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


@given(messages, st.sampled_from(["", "\n", "\r\n \t"]), st.booleans(), st.data())
def test_values_come_out_whole_under_any_chunking(wanted, between, ascii_only, data):
    stream = between.join([*(json.dumps(value, ensure_ascii=ascii_only) for value in wanted), ""]).encode()
    framer = JsonFramer()
    seen = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        seen += framer.feed(stream[:size])
        stream = stream[size:]
    assert [json.loads(value) for value in seen] == wanted


def test_garbage_ends_at_the_newline():
    assert JsonFramer().feed(b'nonsense {\n{"a":1}"x"\n') == [b"nonsense {", b'{"a":1}', b'"x"']


def test_brackets_in_strings_do_not_count():
    assert JsonFramer().feed(rb'{"a":"}\"}"}{') == [rb'{"a":"}\"}"}']


def test_an_endless_value_is_refused():
    framer = JsonFramer()
    for _ in range(16):
        assert framer.feed(b"[" * (1 << 16)) == []
    with pytest.raises(ValueError, match="longer than"):
        framer.feed(b"[")
