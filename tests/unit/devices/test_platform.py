import numpy as np
import pytest

from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.core.run import GuestExit, SyncPoint, Wait
from pageferry.core.state import DeviceState
from pageferry.core.vm import MachineModel
from pageferry.devices.clock import CLOCK_PORT, TIMER_PORT, Clock, Timer
from pageferry.devices.dma import COMMAND_COPY, COMMAND_FILL, DMA_MMIO, STATUS_DONE, STATUS_ERROR
from pageferry.devices.platform import EXIT_PORT, SYNC_PORT, Platform

S = 10**9


@pytest.fixture
def memory():
    return GuestMemory.linear(32 << 20)


@pytest.fixture
def platform(memory):
    return Platform(memory, MachineModel.PLAIN)


def test_space_that_nothing_answers_reads_as_ones(platform):
    assert platform.bus.port_read(0x60, 2) == 0xFFFF
    assert platform.bus.mmio_read(0xFEA0_0000, 8) == 2**64 - 1
    assert platform.bus.port_write(0x60, 1, 0) is None
    assert platform.bus.mmio_write(0xFEA0_0000, 8, 1) is None


def test_exit_wait_and_sync_are_effects(platform):
    assert platform.bus.port_write(EXIT_PORT, 4, 3) == GuestExit(3)
    assert platform.bus.port_write(CLOCK_PORT, 4, 1500) == Wait(0.0015)
    assert platform.bus.port_write(SYNC_PORT, 4, 9) is None
    assert [platform.bus.port_read(SYNC_PORT, 4) for _ in range(2)] == [1, 2]
    platform.sync.attached.set()
    assert platform.bus.port_write(SYNC_PORT, 4, 9) == SyncPoint(9)
    platform.sync.reply(77)
    assert [platform.bus.port_read(SYNC_PORT, 4) for _ in range(2)] == [77, 77]


def test_guest_time_goes_on_where_it_was():
    now = [100 * S]
    clock = Clock(lambda: now[0])
    now[0] += 2 * S + S // 2 + 999
    assert clock.read(0, 4) == 2_500_000
    saved = clock.save()
    now[0] = 7 * S + 1  # another host
    other = Clock(lambda: now[0])
    other.load(saved)
    assert other.now_us() == 2_500_000
    now[0] += S
    assert other.now_us() == 3_500_000
    assert [other.read(at, 1) for at in range(4)] == list((3_500_000).to_bytes(4, "little"))


@pytest.mark.parametrize("saved_us", [1 << 63, (1 << 64) - 1])
def test_a_clock_that_would_soon_not_fit_its_state_is_refused(saved_us):
    clock = Clock(lambda: 0)
    with pytest.raises(VmError, match="shows a time that it cannot have"):
        clock.load(saved_us.to_bytes(8, "little"))
    clock.load((saved_us // 2 - 1).to_bytes(8, "little"))
    assert int.from_bytes(clock.save(), "little") == saved_us // 2 - 1


@pytest.fixture
def timer():
    """A timer, and the guest time that it counts in."""
    now = [1_000]
    timer = Timer(lambda: now[0])
    return timer, now


def test_a_timer_that_was_never_started_stands(timer):
    timer, now = timer
    now[0] += 10**9
    assert (timer.read(0, 4), timer.read(4, 4)) == (0, 0)


def test_a_timer_counts_its_periods_and_tells_once_that_one_ended(timer):
    timer, now = timer
    timer.write(0, 4, 250)
    seen = []
    for step in (0, 249, 1, 1, 249, 250):
        now[0] += step
        seen.append((timer.read(0, 4), timer.read(4, 4)))
    ended = 1 << 31
    assert seen == [(250, 0), (1, 0), (250, ended | 1), (249, ended | 1), (250, ended | 2), (250, ended | 3)]
    timer.write(4, 4, 0)
    assert timer.read(4, 4) == 3
    now[0] += 250
    assert timer.read(4, 4) == ended | 4
    assert [timer.read(4 + at, 1) for at in range(4)] == [4, 0, 0, 0x80]
    timer.write(0, 4, 0)
    assert (timer.read(0, 4), timer.read(4, 4)) == (0, 0)


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (1, 4), (2, 2), (6, 2), (5, 1)])
def test_a_timer_takes_whole_registers_only(timer, offset, size):
    timer, now = timer
    timer.write(0, 4, 100)
    now[0] += 150
    before = timer.save()
    timer.write(offset, size, 7)
    assert timer.save() == before


def test_a_timer_goes_on_in_the_guest_time_that_it_arrives_in(timer):
    timer, now = timer
    timer.write(0, 4, 100)
    now[0] += 350
    timer.write(4, 4, 0)
    other = Timer(lambda: now[0])
    other.load(timer.save())
    assert (other.read(0, 4), other.read(4, 4)) == (50, 3)
    now[0] += 50
    assert (other.read(0, 4), other.read(4, 4)) == (100, 1 << 31 | 4)


def test_a_timer_of_the_future_is_refused(timer):
    timer, now = timer
    timer.write(0, 4, 100)
    now[0] -= 1
    with pytest.raises(VmError, match="after the guest time"):
        timer.load(timer.save())


def test_a_machine_loads_its_timer_with_the_time_that_belongs_to_it(memory):
    old, new = Platform(memory, MachineModel.PLAIN), Platform(memory, MachineModel.PLAIN)
    old.clock.load((10**12).to_bytes(8, "little"))
    old.bus.port_write(TIMER_PORT, 4, 1000)
    new.bus.load(old.bus.save())
    assert 0 < new.bus.port_read(TIMER_PORT, 4) <= 1000
    assert new.clock.now_us() >= 10**12


def dma(platform, command, **registers):
    offsets = {"source": 0, "target": 8, "length": 16, "flag": 24, "pattern": 32}
    for name, value in registers.items():
        platform.bus.mmio_write(DMA_MMIO + offsets[name], 4, value & 0xFFFF_FFFF)
        platform.bus.mmio_write(DMA_MMIO + offsets[name] + 4, 4, value >> 32)
    platform.bus.mmio_write(DMA_MMIO + 0x28, 4, command)
    return platform.bus.mmio_read(DMA_MMIO + 0x2C, 4)


def test_dma_fills_copies_and_marks(platform, memory):
    marked = []
    memory.on_write(lambda gfns: marked.extend(gfns.tolist()))
    pattern = 0x1122334455667788
    assert dma(platform, COMMAND_FILL, target=0x5004, length=0x1003, pattern=pattern, flag=0x9000) == STATUS_DONE
    expected = (pattern.to_bytes(8, "little") * 0x300)[:0x1003]
    assert memory.read(0x5004, 0x1003) == expected
    assert memory.read(0x6007, 2) == b"\0\0"
    assert memory.read_u64(0x9000) == 1
    assert marked == [5, 6, 9]
    assert dma(platform, COMMAND_COPY, source=0x5004, target=0x20000, length=0x1003, flag=0x9000) == STATUS_DONE
    assert memory.read(0x20000, 0x1003) == expected
    assert memory.read_u64(0x9000) == 2 == platform.bus.mmio_read(DMA_MMIO + 0x30, 8)
    assert set(marked[3:]) == {0x20, 0x21, 9}


@pytest.mark.parametrize(
    "registers",
    [
        {"command": 9},
        {"command": COMMAND_FILL, "target": (32 << 20) - 4, "length": 8},
        {"command": COMMAND_FILL, "target": 0, "length": 2**63},
        {"command": COMMAND_FILL, "target": 0, "length": (16 << 20) + 1},
        {"command": COMMAND_COPY, "source": 2**63, "target": 0, "length": 8},
    ],
)
def test_dma_mistakes_are_the_guests_to_read(platform, memory, registers):
    assert dma(platform, **registers) == STATUS_ERROR
    assert not np.frombuffer(memory.read(0, 0x10000), np.uint8).any()


def test_saved_devices_must_be_this_machines(platform, memory):
    states = platform.bus.save()
    other = Platform(memory, MachineModel.PLAIN)
    other.bus.load(states)
    assert [s.name for s in other.bus.save()] == [s.name for s in states]
    for wrong in (
        states[1:],
        (*states, DeviceState(name="floppy", data=b"")),
        (*states, states[0]),
        *(
            (*states[:n], DeviceState(name=state.name, data=state.data + b"\0"), *states[n + 1 :])
            for n, state in enumerate(states)
        ),
        *(
            (*states[:n], DeviceState(name=state.name, data=state.data[:-1]), *states[n + 1 :])
            for n, state in enumerate(states)
            if state.data
        ),
    ):
        with pytest.raises(VmError):
            other.bus.load(wrong)
