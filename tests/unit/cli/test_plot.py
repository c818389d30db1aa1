"""The picture of a report: what is in it, where it can be drawn, and when that is refused."""

import json
import re
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import reports

from pageferry.cli.plot import PlotFile
from pageferry.cli.plot.html import page
from pageferry.cli.plot.picture import picture
from pageferry.core.errors import UsageError

MiB = 1 << 20
EMPTY_HEAT = {"first_gfns": [], "last_gfns": [], "pages": [], "rounds_per_row": 1, "rows": []}
WORDS = {"outcome": "It moved.", "rates": ["The wire moved <fast>."], "guest_time": [], "hot": [], "advice": []}
PARTS = {"pause": 0.01, "stop-and-copy": 0.1, "state": 0.02, "verify": 0.15, "handoff": 0.02}


def stats(index, sent, remaining, duration_s, *, final=False):
    return asdict(reports.stats(index, sent, remaining, duration_s=duration_s, final=final))


def report(**changes):
    """A report of two rounds and the stop-and-copy, as JSON; in round 1 the guest was throttled."""
    made = reports.report((2560, 256), (256, 64), policy="converge", source_accel="kvm", tracker="kvm-bitmap").to_json()
    seen = {
        "total_s": 3.5,
        "downtime_s": 0.3,
        "downtime_parts_s": PARTS,
        "paused_at_s": 3.0,
        "rounds": [stats(0, 2560, 256, 2.0), stats(1, 256, 64, 0.5), stats(2, 64, 0, 0.1, final=True)],
        "round_ends": [{"ended_s": 2.25, "throttle": 0.0}, {"ended_s": 2.875, "throttle": 0.4}],
        "sent": {
            "heat": {
                "first_gfns": [0, 1024, 0x100000],
                "last_gfns": [1023, 2047, 0x1001FF],
                "pages": [1024, 1024, 512],
                "rounds_per_row": 1,
                "rows": [[1024, 1024, 512], [0, 256, 0], [0, 64, 0]],
            }
        },
        "explanation": WORDS,
        "reason": "it </script> fits",
    }
    return json.loads(json.dumps(made | seen | changes))


NOTHING = report(
    status="failed",
    guest_at="source",
    destination_accel=None,
    downtime_s=None,
    downtime_parts_s=None,
    paused_at_s=None,
    rounds=[],
    round_ends=[],
    sent={"heat": EMPTY_HEAT},
    explanation=None,
)


def test_the_bars_are_the_rounds_where_they_were():
    bars = picture(report()).bars
    assert [(bar.label, bar.began_s, bar.ended_s) for bar in bars] == [
        ("round 0", 0.25, 2.25),
        ("round 1", 2.375, 2.875),
        ("stop-and-copy", 3.01, pytest.approx(3.11)),
    ]
    assert [bar.sent_bytes_per_s for bar in bars] == [5 * MiB, 2 * MiB, pytest.approx(2.5 * MiB)]
    assert [bar.dirty_bytes_per_s for bar in bars] == [0.5 * MiB, 0.5 * MiB, None]
    assert [(bar.throttle, bar.final) for bar in bars] == [(0.0, False), (0.4, False), (0.0, True)]


def test_what_came_after_the_switch_has_a_bar_to_the_end_and_a_row():
    heat = report()["sent"]["heat"]
    switched = report(
        postcopy={"duration_s": 0.125, "sent_pages": 640, "zero_pages": 320},
        sent={"heat": heat | {"rows": [*heat["rows"], [64, 0, 512]]}},
    )
    bar = picture(switched).bars[-1]
    assert (bar.label, bar.began_s, bar.ended_s, bar.sent_pages) == ("post-copy", 3.375, 3.5, 640)
    assert (bar.sent_bytes_per_s, bar.dirty_bytes_per_s, bar.final) == (10 * MiB, None, False)
    assert picture(switched).heat.rows == ("round 0", "round 1", "stop-and-copy", "post-copy")
    assert picture(switched).heat.shares[-1] == (0.0625, 0.0, 1.0)
    assert b"post-copy: 640 pages in 125.0 ms" in page(picture(switched))


def test_the_downtimes_parts_follow_one_another():
    parts = picture(report()).parts
    assert [part.name for part in parts] == list(PARTS)
    assert [part.began_s for part in parts] == pytest.approx([0.0, 0.01, 0.11, 0.13, 0.28])
    assert sum(part.duration_s for part in parts) == pytest.approx(0.3)


def test_the_heat_is_the_share_of_a_cells_pages():
    heat = picture(report()).heat
    assert heat.shares == ((1.0, 1.0, 1.0), (0.0, 0.25, 0.0), (0.0, 0.0625, 0.0))
    assert heat.times == (1.0, 1.3125, 1.0)
    assert heat.rows == ("round 0", "round 1", "stop-and-copy")
    assert heat.cells[2] == "gfn 0x100000 to 0x1001ff"
    assert heat.breaks == (2,)
    assert dict(heat.ticks)[2] == "4 GiB"


def test_the_address_where_an_area_begins_is_told_before_others():
    firsts = [*range(50), *range(5000, 5050)]
    heat = {"first_gfns": firsts, "last_gfns": firsts, "pages": [1] * 100, "rounds_per_row": 1, "rows": [[1] * 100]}
    ticks = picture(report(sent={"heat": heat})).heat.ticks
    assert (50, "19.53 MiB") in ticks


def test_rows_of_several_rounds_are_named_and_shared_so():
    rounds = [stats(index, 1, 1, 0.1) for index in range(4)] + [stats(4, 1, 0, 0.1, final=True)]
    ends = [{"ended_s": 0.1 * index, "throttle": 0.0} for index in range(1, 5)]
    heat = {"first_gfns": [0], "last_gfns": [9], "pages": [10], "rounds_per_row": 2, "rows": [[20], [15], [5]]}
    drawn = picture(report(rounds=rounds, round_ends=ends, sent={"heat": heat})).heat
    assert drawn.rows == ("rounds 0 to 1", "rounds 2 to 3", "rounds 4 to 4")
    assert drawn.shares == ((1.0,), (0.75,), (0.5,))


def test_a_round_that_failed_in_the_middle_has_a_row_and_no_bar():
    heat = {"first_gfns": [0], "last_gfns": [9], "pages": [10], "rounds_per_row": 1, "rows": [[10], [3]]}
    made = report(rounds=[stats(0, 10, 5, 1.0)], round_ends=[], sent={"heat": heat})
    assert picture(made).bars == ()
    assert picture(made).heat.rows == ("round 0", "round 1")
    assert picture(made).heat.shares == ((1.0,), (0.3,))


@pytest.mark.parametrize("areas", [1, 2, 8, 9, 100, 256])
def test_labels_of_the_heat_map_are_few_and_apart(areas):
    firsts = [area * 100_000 + cell for area in range(areas) for cell in range(256 // areas)]
    heat = {
        "first_gfns": firsts,
        "last_gfns": firsts,
        "pages": [1] * len(firsts),
        "rounds_per_row": 1,
        "rows": [[1] * len(firsts)],
    }
    ticks = [cell for cell, _ in picture(report(sent={"heat": heat})).heat.ticks]
    assert ticks[0] == 0
    assert 4 <= len(ticks) <= 10
    assert all(after - before >= len(firsts) / 9 for before, after in pairwise(ticks))


def figures(drawn):
    """The page's SVGs, parsed."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page(picture(drawn)).decode(), re.S)]


def titles(figure):
    return [title.text for title in figure.iter("title")]


def test_the_page_shows_each_round_each_part_and_each_cell_by_name():
    rounds, rates, downtime, heat, legend = figures(report())
    assert titles(rounds) == [
        "downtime: 300.0 ms",
        "round 0: 2,560 pages in 2.00 s",
        "round 1: 256 pages in 500.0 ms, the guest throttled for 40%",
        "stop-and-copy: 64 pages in 100.0 ms",
    ]
    assert titles(rates)[1] == "round 1: sent 2 MiB/s, dirtied 512 KiB/s"
    assert titles(downtime)[3] == "verify: 150.0 ms, 50%"
    assert "gfn 0x400 to 0x7ff, round 1: 256 pages sent, 25%" in titles(heat)
    assert sum("pages sent" in title for title in titles(heat)) == 5  # cells of which nothing was sent are not drawn
    assert "gfn 0x400 to 0x7ff: each page sent 1.31 times on average" in titles(heat)
    assert len(titles(legend)) == 11


def test_what_is_drawn_lies_inside_the_picture():
    instant = [stats(0, 2560, 0, 0.0), stats(1, 0, 0, 0.0, final=True)]
    for made in (report(), report(rounds=instant), NOTHING):
        for figure in figures(made):
            _, _, width, height = map(float, figure.get("viewBox").split())
            for rect in figure.iter("rect"):
                x, y = float(rect.get("x")), float(rect.get("y"))
                assert x >= 0
                assert x + float(rect.get("width")) <= width
                assert 0 <= y <= y + float(rect.get("height")) <= height


def test_the_page_stands_alone_and_holds_the_report():
    text = page(picture(report())).decode()
    assert not re.search(r"https?:|src=|href=|@import|url\(", text)
    assert "The wire moved &lt;fast&gt;." in text
    assert "prefers-color-scheme: dark" in text
    (data,) = re.findall(r'<script type="application/json" id="report">(.*?)</script>', text, re.S)
    assert json.loads(data) == report()


def test_a_migration_of_which_there_is_nothing_to_draw_says_so():
    text = page(picture(NOTHING)).decode()
    for words in ("Migration failed, guest at source", "No round was made.", "The guest has not moved.", "No page was"):
        assert words in text
    assert "<svg" not in text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.svg", "no picture can be made in 'a.svg'"),
        ("a", "no picture"),
        ("none/a.html", "cannot write .*/none/a.html"),
        (".", "no picture can be made"),
    ],
)
def test_a_file_that_cannot_be_drawn_into_is_refused_at_once(tmp_path, name, says):
    with pytest.raises(UsageError, match=says):
        PlotFile(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "a.html").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        PlotFile(tmp_path / "a.html")


def test_a_file_without_a_drawing_is_left_as_it_was(tmp_path):
    mine, new = tmp_path / "mine.html", tmp_path / "new.html"
    mine.write_text("precious")
    for path in (mine, new):
        with PlotFile(path):
            pass
    assert mine.read_text() == "precious"
    assert not new.exists()


def test_a_drawn_file_stays_and_the_old_one_is_replaced(tmp_path):
    path = tmp_path / "a.html"
    path.write_text("x" * 1_000_000)
    with PlotFile(path) as file:
        file.draw(report())
    assert path.read_bytes() == page(picture(report()))
    with PlotFile(Path(tmp_path / "b.html")) as file:
        file.draw(NOTHING)
    assert (tmp_path / "b.html").exists()
