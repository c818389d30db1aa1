"""For authors of machines and trackers: the conformance kit, the stamp oracle, and faults to prove the kit with."""

from pageferry.testing.conformance import CHECKS, Check, ConformanceError, check_log_dirty, failures
from pageferry.testing.oracle import StampOracle

__all__ = ["CHECKS", "Check", "ConformanceError", "StampOracle", "check_log_dirty", "failures"]
