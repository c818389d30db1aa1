"""Fuzzing: recorded conversations, files, states and commands, changed by chance, against whatever reads them."""
