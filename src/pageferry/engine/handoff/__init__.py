"""The handoff of a guest: who may run it (custody), how its source gives it and its destination takes it."""
