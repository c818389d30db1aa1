"""Proof that two memories are equal (law 7): digests, audits while the guest runs, the comparison at the pause."""
