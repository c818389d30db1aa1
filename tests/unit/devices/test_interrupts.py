"""Lines that share an IRQ are one; those without a controller lead nowhere."""

from pageferry.devices.interrupts import InterruptLines


class Controller:
    def __init__(self):
        self.seen = []

    def set_line(self, irq, level):
        self.seen.append((irq, level))


def test_an_irq_is_high_while_any_of_its_devices_drives_it():
    lines, controller = InterruptLines(), Controller()
    lines.connect(controller)
    first, second, other = lines.line(10), lines.line(10), lines.line(11)
    for drive, level in ((first, True), (second, True), (first, False), (other, True), (other, True), (second, False)):
        drive(level)
    assert controller.seen == [(10, True), (11, True), (10, False)]


def test_a_controller_with_a_new_state_is_told_every_level():
    lines, controller = InterruptLines(), Controller()
    lines.line(4)(True)
    lines.line(8)
    lines.connect(controller)
    lines.drive_all()
    assert controller.seen == [(4, True), (8, False)]
