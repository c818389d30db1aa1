"""Faults of the proof, and of what the report says of it. Each is a class derived from a sound one."""

from dataclasses import replace

from altered import AlteredDestination, AlteredSource

from mutation import audit_checks
from mutation.fault import Faults, Room
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.events import MigrationReport, Phase
from pageferry.core.frames import GfnArray
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.job import JobStatus
from pageferry.engine.report import ReportBuilder
from pageferry.engine.verify.audit import Auditor
from pageferry.engine.verify.compare import ReceivedPages
from pageferry.engine.verify.digests import RunDigests, digest_runs

fault = Faults(Room.ENGINE)


class _LooksFirst(Auditor):
    _early: DirtyBitmap

    def _begin_piece(self) -> bool:
        begun = super()._begin_piece()
        self._early = self._peek()
        return begun

    def due(self) -> RunDigests | None:
        with self._changed:
            sound, self._peek = self._peek, lambda: self._early.copy()
            try:
                return super().due()
            finally:
                self._peek = sound


@fault(
    "no bug on record: a bit says something of the time before it was read, a digest of the time after",
    law=7,
    found_by=("written-while-it-is-digested",),
)
class DigestedAfterItsBitWasRead(AlteredSource, parts={"verify.prove.Auditor": _LooksFirst}):
    """An audit reads the bits first and digests then: a page that is written in between is said to lie still."""


class _KeepsProofs(PageAccounts):
    def reported(self, dirty: DirtyBitmap, gfns: range | None = None) -> None:
        proven = self.proven()
        super().reported(dirty, gfns)
        self.is_proven |= proven


@fault(
    "no bug on record: a digest is of one sending, and the page is sent again",
    law=7,
    found_by=("written-after-it-was-proven",),
)
class ProofOutlivesThePage(AlteredSource, parts={"attempt.PageAccounts": _KeepsProofs}):
    """A page that was proven stays so when it is dirty and is sent again."""


@fault(
    "no bug on record: a share that is reported, and was not proven",
    law=7,
    found_by=("written-while-it-is-digested", "written-after-it-was-proven"),
)
class ProvesNothing(audit_checks.InventsAudits):
    """All pages are reported as proven during pre-copy, and none is digested."""


class _NeverDiffers(ReceivedPages):
    def audit(self, first_gfns: GfnArray, pages: GfnArray, digests: object) -> None:
        ours = digest_runs(self.memory, first_gfns, pages)
        super().audit(first_gfns, pages, ours)


@fault(
    "no bug on record: a mismatch that is never reported",
    law=7,
    found_by=("an-audit-tells",),
)
class AuditsNotCompared(AlteredDestination, parts={"destination.ReceivedPages": _NeverDiffers}):
    """The destination takes every audited page for proven, whatever the digests say."""


class _Believes(ReceivedPages):
    def all_proven(self, first_gfns: GfnArray, pages: GfnArray) -> bool:
        return True


@fault(
    "no bug on record: an audit that is not looked up",
    law=7,
    found_by=("an-invented-audit-is-refused",),
)
class AnyAuditBelieved(AlteredDestination, parts={"destination.ReceivedPages": _Believes}):
    """At the pause the destination believes whatever it is told of audits."""


class _LeavesOutTheProof(ReportBuilder):
    def build(self, status: JobStatus, reason: str) -> MigrationReport:
        report = super().build(status, reason)
        if report.downtime_s is not None and report.downtime_parts_s is not None:
            parts_s = {name: part_s for name, part_s in report.downtime_parts_s.items() if name != Phase.VERIFY}
            report = replace(report, downtime_s=sum(parts_s.values()), downtime_parts_s=parts_s)
        return report


@fault(
    "no bug on record: a number that looks better without it",
    law=None,
    found_by=("the-downtime-is-all-of-it",),
)
class DowntimeWithoutTheProof(AlteredSource, parts={"attempt.ReportBuilder": _LeavesOutTheProof}):
    """The downtime that is reported leaves out the verification."""


class _CountsStallsTwice(ReportBuilder):
    def build(self, status: JobStatus, reason: str) -> MigrationReport:
        report = super().build(status, reason)
        spent = report.guest_time
        if spent is None or spent.lost_s is None:
            return report
        lost_s = spent.lost_s + spent.rehearsal_s + spent.enable_s + spent.clean_s
        return replace(report, guest_time=replace(spent, lost_s=lost_s))


@fault(
    "no bug on record: a stall is a part of the time that was lost, and not besides it",
    law=None,
    found_by=("lost-time-counts-once",),
)
class LostTimeCountedTwice(AlteredSource, parts={"attempt.ReportBuilder": _CountsStallsTwice}):
    """What stalled the guest is added to the time that it lost, which has it already."""
