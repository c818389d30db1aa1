"""Guests in files: save, restore, and restore of a guest that runs meanwhile."""
