"""Guests in files: save, restore, and lazy restore, in which the guest runs meanwhile."""
