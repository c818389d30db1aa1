"""The size of a page, for modules that need nothing else: :mod:`pageferry.core.frames` imports numpy."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
