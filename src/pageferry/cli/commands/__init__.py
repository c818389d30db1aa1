"""The commands: each checks what it was given, then does it through the rooms below or the control socket."""
