"""A migration in the words of QMP's ``query-migrate``."""

from typing import Any

from pageferry.core.frames import PAGE_SIZE
from pageferry.engine.job import Job


def migrate_info(job: Job) -> dict[str, Any]:
    """Return the answer to ``query-migrate``: QEMU's fields, and the report and error of a job that is over."""
    result: dict[str, Any] = {
        "status": job.status,
        "total-time": int(job.elapsed_s * 1000),
        "x-guest-at": job.guest_at,
        "ram": _ram(job),
        "x-pageferry-packed": _packed(job),
    }
    if job.report is None:
        outlook = job.outlook()
        if outlook.expected_downtime_s is not None:
            result["expected-downtime"] = round(outlook.expected_downtime_s * 1000)
        result["x-eta-s"] = outlook.eta_s
        result["x-eta-reason"] = outlook.eta_reason
        result["ram"]["dirty-pages-rate"] = round(outlook.dirty_bytes_per_s / PAGE_SIZE)
        if outlook.wire_bytes_per_s is not None:
            result["ram"]["mbps"] = outlook.wire_bytes_per_s * 8 / 1e6
    if job.postcopy_paused is not None:
        result["x-postcopy-paused"] = job.postcopy_paused
    if job.report is not None:
        result["x-pageferry-report"] = job.report.to_json()
        if job.report.downtime_s is not None:
            result["downtime"] = round(job.report.downtime_s * 1000)
        if job.error is not None:
            result["error-desc"] = str(job.error)
            result["x-pageferry-error"] = {
                "phase": job.error.phase,
                "guest_at": job.error.guest_at,
                "reason": job.error.reason,
                "hint": job.error.hint,
            }
    return result


def _packed(job: Job) -> dict[str, int]:
    counts = job.traffic().counts
    return {
        "pages": counts.packed_pages,
        "bytes": counts.packed_bytes,
        "delta-pages": counts.delta_pages,
        "delta-bytes": counts.delta_bytes,
    }


def _ram(job: Job) -> dict[str, Any]:
    traffic, elapsed_s = job.traffic(), job.elapsed_s
    normal_pages = traffic.counts.sent_pages - traffic.counts.zero_pages
    return {
        "total": traffic.memory_bytes,
        "remaining": traffic.remaining_pages * PAGE_SIZE,
        "transferred": traffic.sent_bytes,
        "normal": normal_pages,
        "normal-bytes": normal_pages * PAGE_SIZE,
        "duplicate": traffic.counts.zero_pages,
        "skipped": 0,
        "dirty-sync-count": traffic.rounds,
        "page-size": PAGE_SIZE,
        "mbps": traffic.sent_bytes * 8 / 1e6 / elapsed_s if elapsed_s else 0.0,
    }
