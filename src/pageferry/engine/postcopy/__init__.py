"""After a switch: pages that the guest needs at the destination and that are still at the source."""
