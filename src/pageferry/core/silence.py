"""How long the other end may say nothing before it is told, in the outlook and in ``pageferry status``."""

SILENT_S = 1.0
