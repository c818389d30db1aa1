"""Pending events in a vCPU's state: an event whose delivery has begun, an exception, an NMI, a triple fault.

Only a state from elsewhere has them: here an event is delivered as a whole, between two instructions. A software
interrupt that was begun is dropped: RIP is at its instruction, which is executed anew.

Source: AMD APM volume 2, 15.20 (the layout of ``pending_event``); kernel ``api.rst``, KVM_GET_VCPU_EVENTS.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

from pageferry.core.errors import GuestCrash, VmError
from pageferry.core.state import PendingException, VcpuState
from pageferry.hypervisor.exceptions import BREAKPOINT, DEBUG, NMI, OVERFLOW, PAGE_FAULT, Event, Kind

_VALID, _HAS_ERROR_CODE = 1 << 31, 1 << 11
_EXTERNAL, _NMI, _EXCEPTION, _SOFTWARE = 0, 2, 3, 4


@dataclass(slots=True, kw_only=True)
class PendingEvents:
    """What is pending on one vCPU; false when nothing is. The fields are those of ``VcpuState``."""

    pending_event: int = 0
    error_code: int = 0
    pending_exception: PendingException | None = None
    nmi_pending: bool = False
    triple_fault_pending: bool = False

    @classmethod
    def of_state(cls, state: VcpuState) -> Self:
        """Return a state's.

        Raises:
            VmError: an event is of an unknown kind.
        """
        kind = state.pending_event >> 8 & 7
        if state.pending_event & _VALID and kind not in (_EXTERNAL, _NMI, _EXCEPTION, _SOFTWARE):
            raise VmError(f"the state has a pending event of unknown kind {kind}")
        is_software = kind == _SOFTWARE or (kind == _EXCEPTION and state.pending_event & 0xFF in (BREAKPOINT, OVERFLOW))
        return cls(
            pending_event=state.pending_event if state.pending_event & _VALID and not is_software else 0,
            error_code=state.error_code,
            pending_exception=state.pending_exception,
            nmi_pending=state.nmi_pending,
            triple_fault_pending=state.triple_fault_pending,
        )

    def __bool__(self) -> bool:
        return bool(self.pending_event or self.pending_exception or self.nmi_pending or self.triple_fault_pending)

    def fields(self) -> dict[str, Any]:
        """Return the fields of ``VcpuState``."""
        return asdict(self) | {"pending_exception": self.pending_exception}

    def take(self, *, holds_nmi: bool) -> Event | None:
        """Return what is to be delivered now, no longer pending; ``holds_nmi``: an NMI must wait.

        Raises:
            GuestCrash: a triple fault was pending.
        """
        if self.triple_fault_pending:
            raise GuestCrash("triple fault")
        if self.pending_event:
            event, self.pending_event = self.pending_event, 0
            error_code, self.error_code = self.error_code, 0
            return Event(
                vector=event & 0xFF,
                kind=Kind.EXCEPTION if event >> 8 & 7 == _EXCEPTION else Kind.EXTERNAL,
                error_code=error_code if event & _HAS_ERROR_CODE else None,
            )
        if self.pending_exception is not None:
            exception, self.pending_exception = self.pending_exception, None
            return Event(
                vector=exception.vector,
                error_code=exception.error_code,
                cr2=exception.payload if exception.vector == PAGE_FAULT else None,
                dr6=exception.payload if exception.vector == DEBUG else None,
            )
        if self.nmi_pending and not holds_nmi:
            self.nmi_pending = False
            return Event(vector=NMI, kind=Kind.EXTERNAL)
        return None
