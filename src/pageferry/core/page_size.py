"""The size of a page, for what needs no more than that: :mod:`pageferry.core.frames` brings numpy."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
