"""``--oracle``: a second tracker, or digests of all memory, watches the first and names each page that it lost."""
