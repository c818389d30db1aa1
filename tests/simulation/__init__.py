"""Explored interleavings of the real code, and guests that go there and back by chance."""
