"""How often each page was sent, as the report has it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HotRange:
    """Frames ``first_gfn .. first_gfn + pages - 1``, among those that were sent most often.

    ``sent_pages``: sendings of pages of the range, in all rounds. ``again_pages``: those beyond each page's first.
    """

    first_gfn: int
    pages: int
    sent_pages: int
    again_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Sendings by round and place; only places of which something was sent.

    A cell is frames ``first_gfns[i] .. last_gfns[i]``, of which ``pages[i]`` were sent at least once: about as many in
    each, so that a guest with much memory and little in it shows that little; fewer before a long gap. Row r is rounds
    ``r * rounds_per_row`` and following, ``rounds_per_row`` of them; ``rows[r][i]`` is how many pages of cell i they
    sent.
    """

    first_gfns: tuple[int, ...]
    last_gfns: tuple[int, ...]
    pages: tuple[int, ...]
    rounds_per_row: int
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SentPages:
    """How often which pages were sent, in all rounds and the stop-and-copy.

    ``pages``: distinct pages. ``rewritten_pages``: those of them that were sent more than once. ``again_pages``:
    sendings beyond each page's first. ``hot``: where these were, most first.
    """

    pages: int
    rewritten_pages: int
    again_pages: int
    hot: tuple[HotRange, ...]
    heat: HeatMap
