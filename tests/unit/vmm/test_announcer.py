import pytest

from pageferry.vmm.announcer import Announcer


@pytest.mark.parametrize(
    ("known", "text", "said"),
    [
        (
            "it sees its host's CPU",
            "it sees its host's CPU; move it nowhere",
            "move it nowhere",
        ),
        ("it sees its host's CPU", "the disk is gone", "the disk is gone"),
        (None, "it sees its host's CPU; move it nowhere", "it sees its host's CPU; move it nowhere"),
    ],
    ids=["known", "another", "nothing known"],
)
def test_of_a_known_warning_only_what_is_new_is_said(known, text, said):
    lines = []
    Announcer(lines.append, known).warn(text)
    assert lines == [f"warning: {said}"]
