"""A guest that runs while some of its pages are missing: the pager, and the two ends of what follows a switch."""
