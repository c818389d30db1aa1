"""The vocabulary everything else shares: addresses, errors, bitmaps, guest memory, the protocols, policy and events.

Imports nothing else of pageferry.
"""
