"""Guest pages on their way: gathered and encoded at the source, scattered into memory at the destination."""
