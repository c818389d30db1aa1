"""The command line: options, progress, tables; everything it does, it does through the rooms below."""
