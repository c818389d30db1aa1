"""A migration in the words of QMP's ``query-migrate``."""

from typing import Any

from pageferry.core.frames import PAGE_SIZE
from pageferry.engine.attempt import Attempt


def migrate_info(attempt: Attempt) -> dict[str, Any]:
    """Return the answer to ``query-migrate``: QEMU's fields, and the report and error of an attempt that is over."""
    result: dict[str, Any] = {
        "status": attempt.status,
        "total-time": int(attempt.elapsed_s * 1000),
        "x-guest-at": attempt.guest_at,
        "ram": _ram(attempt),
        "x-pageferry-packed": _packed(attempt),
    }
    if attempt.report is None:
        outlook = attempt.outlook()
        if outlook.expected_downtime_s is not None:
            result["expected-downtime"] = round(outlook.expected_downtime_s * 1000)
        result["x-eta-s"] = outlook.eta_s
        result["x-eta-reason"] = outlook.eta_reason
        result["ram"]["dirty-pages-rate"] = round(outlook.dirty_bytes_per_s / PAGE_SIZE)
        if outlook.wire_bytes_per_s is not None:
            result["ram"]["mbps"] = outlook.wire_bytes_per_s * 8 / 1e6
    if attempt.postcopy_paused is not None:
        result["x-postcopy-paused"] = attempt.postcopy_paused
    if attempt.report is not None:
        result["x-pageferry-report"] = attempt.report.to_json()
        if attempt.report.downtime_s is not None:
            result["downtime"] = round(attempt.report.downtime_s * 1000)
        if attempt.error is not None:
            result["error-desc"] = str(attempt.error)
            result["x-pageferry-error"] = {
                "phase": attempt.error.phase,
                "guest_at": attempt.error.guest_at,
                "reason": attempt.error.reason,
                "hint": attempt.error.hint,
            }
    return result


def _packed(attempt: Attempt) -> dict[str, int]:
    traffic = attempt.traffic()
    return {
        "pages": traffic.packed_pages,
        "bytes": traffic.packed_bytes,
        "delta-pages": traffic.delta_pages,
        "delta-bytes": traffic.delta_bytes,
    }


def _ram(attempt: Attempt) -> dict[str, Any]:
    traffic, elapsed_s = attempt.traffic(), attempt.elapsed_s
    normal_pages = traffic.sent_pages - traffic.zero_pages
    return {
        "total": traffic.memory_bytes,
        "remaining": traffic.remaining_pages * PAGE_SIZE,
        "transferred": traffic.sent_bytes,
        "normal": normal_pages,
        "normal-bytes": normal_pages * PAGE_SIZE,
        "duplicate": traffic.zero_pages,
        "skipped": 0,
        "dirty-sync-count": traffic.rounds,
        "page-size": PAGE_SIZE,
        "mbps": traffic.sent_bytes * 8 / 1e6 / elapsed_s if elapsed_s else 0.0,
    }
