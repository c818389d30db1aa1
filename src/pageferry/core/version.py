"""The version of pageferry, which two ends tell each other in their hellos."""

__version__ = "0.1.0"
