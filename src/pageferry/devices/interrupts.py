"""Interrupt lines: how a device asks for an interrupt, whatever controller a machine has.

A device is given a :data:`Line` and says what level it drives, with the bus's lock held. :class:`InterruptLines` joins
the devices that share an IRQ and tells the machine's :class:`InterruptController` what changed.
"""

from collections.abc import Callable
from typing import Protocol

Line = Callable[[bool], None]
"""Drives a device's interrupt output high (True) or low; called with the bus's lock held."""

IRQS = 16
IRQ_TIMER, IRQ_COM1, IRQ_RTC, IRQ_SCI = 0, 4, 8, 9
PCI_IRQS = (10, 11)
#: The inputs that are level-triggered when a guest starts, as firmware would leave them; bit n is IRQ n.
ELCR_AT_START = sum(1 << irq for irq in PCI_IRQS)


class InterruptController(Protocol):
    """The controller that the interrupt lines of a machine lead to."""

    def set_line(self, irq: int, level: bool) -> None:
        """Drive the input of an IRQ, 0 to 15. The controller decides what an edge or a level means."""


class CpuInterrupts(Protocol):
    """The interrupt controllers as a vCPU in software uses them; on a real CPU the kernel does that."""

    on_raise: Callable[[], None]
    """Called when ``pending`` becomes true, on any thread and with the bus's lock held: wakes a halted vCPU."""

    @property
    def pending(self) -> bool:
        """Whether an interrupt is requested (the INTR pin); any thread, no lock."""

    def acknowledge(self) -> int:
        """Take the interrupt and return its vector, as the CPU's acknowledge cycle does; takes the bus's lock."""


class InterruptLines:
    """The lines of all devices. Those of one IRQ are joined: its level is high while any of them drives it high.

    Until a controller is connected the lines lead nowhere, as on a machine that has none.
    """

    def __init__(self) -> None:
        self._controller: InterruptController | None = None
        self._raised = [0] * IRQS  # one bit for each line of the IRQ
        self._lines = [0] * IRQS

    def connect(self, controller: InterruptController) -> None:
        """Lead the lines to a controller, before anything runs."""
        self._controller = controller

    def line(self, irq: int) -> Line:
        """Return a new line of an IRQ, low as yet."""
        bit = 1 << self._lines[irq]
        self._lines[irq] += 1

        def drive(level: bool) -> None:
            before = self._raised[irq]
            self._raised[irq] = before | bit if level else before & ~bit
            if bool(before) != bool(self._raised[irq]):
                self._drive(irq)

        return drive

    def drive_all(self) -> None:
        """Tell the controller every level: its state was replaced."""
        for irq, lines in enumerate(self._lines):
            if lines:
                self._drive(irq)

    def _drive(self, irq: int) -> None:
        if self._controller is not None:
            self._controller.set_line(irq, bool(self._raised[irq]))
