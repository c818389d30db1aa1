import threading

import pytest
from shortage import no_more_threads

from pageferry.core.errors import GuestCrash, VmError
from pageferry.core.run import GuestExit, RunControl, SyncPoint, Wait
from pageferry.core.threads import OutOfThreadsError
from pageferry.core.vm import VmStatus


class FakeVcpu:
    """Runs until kicked; ``effects`` come first, one per entry. A kick before entry is lost, as on real machines."""

    def __init__(self, *effects):
        self.effects = list(effects)
        self.inside = False
        self.entries = 0
        self._kicked = threading.Event()
        self.entered = threading.Event()
        self.left = threading.Event()

    def run(self):
        self._kicked.clear()
        self.inside = True
        self.entered.set()
        self.entries += 1
        try:
            if self.effects:
                effect = self.effects.pop(0)
                if isinstance(effect, Exception):
                    raise effect
                return effect
            assert self._kicked.wait(60)
            return None
        finally:
            self.inside = False
            self.left.set()

    def kick(self):
        self._kicked.set()


@pytest.fixture
def control():
    made = []

    def make(*vcpus, **options):
        made.append(RunControl(vcpus, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_vcpu_has_a_thread_from_its_first_run_on(control):
    run = control(FakeVcpu(), FakeVcpu())
    assert run.thread_ids == (None, None)
    run.resume()
    first, second = run.thread_ids
    assert len({first, second, threading.get_native_id(), None}) == 4
    run.pause()
    assert run.thread_ids == (first, second)


def test_a_guest_without_threads_for_its_vcpus_stays_paused_and_runs_later(control):
    vcpus = [FakeVcpu(), FakeVcpu()]
    run = control(*vcpus)
    with no_more_threads(), pytest.raises(OutOfThreadsError):
        run.resume()
    assert run.status is VmStatus.PAUSED
    assert not any(vcpu.entries for vcpu in vcpus)
    run.resume()
    for vcpu in vcpus:
        assert vcpu.entered.wait(60)


def test_pause_returns_when_every_vcpu_is_outside(control):
    vcpus = [FakeVcpu(), FakeVcpu(), FakeVcpu()]
    run = control(*vcpus)
    assert run.status is VmStatus.PAUSED
    for _ in range(50):
        run.resume()
        assert run.status is VmStatus.RUNNING
        run.pause()
        assert not any(v.inside for v in vcpus)
        assert run.status is VmStatus.PAUSED


def test_the_hypervisors_pause_nests_inside_the_users(control):
    vcpu = FakeVcpu()
    run = control(vcpu)
    run.resume()
    with run.stopped(), run.stopped():
        assert not vcpu.inside
        assert run.status is VmStatus.RUNNING
        run.pause()
        entries = vcpu.entries
    assert run.status is VmStatus.PAUSED
    assert vcpu.entries == entries
    run.resume()
    run.pause()


def test_a_stopped_section_holds_a_vcpu_that_is_resumed_meanwhile(control):
    vcpu = FakeVcpu()
    run = control(vcpu)
    with run.stopped():
        run.resume()
        assert vcpu.entries == 0


def test_an_exit_ends_the_guest(control):
    run = control(FakeVcpu(GuestExit(7)), FakeVcpu())
    run.resume()
    assert run.wait(60) is VmStatus.SHUTDOWN
    assert run.end.exit_code == 7
    with pytest.raises(VmError, match="has ended"):
        run.resume()
    run.pause()
    assert run.status is VmStatus.SHUTDOWN


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (GuestCrash("triple fault at rip 0x100"), "triple fault"),
        (VmError("no"), "machine"),
        (ZeroDivisionError(), "in"),
    ],
)
def test_a_crash_is_reported_and_final(control, error, text, caplog):
    run = control(FakeVcpu(error))
    run.resume()
    assert run.wait(60) is VmStatus.CRASHED
    assert text in run.end.crash


def test_a_sync_point_pauses_and_shows_its_value(control):
    run = control(FakeVcpu(SyncPoint(42)))
    run.resume()
    assert run.wait(60) is VmStatus.PAUSED
    assert run.sync_value == 42
    run.resume()
    assert run.sync_value is None


def test_a_waiting_vcpu_can_be_paused_at_once(control):
    vcpu = FakeVcpu(Wait(3600))
    run = control(vcpu)
    run.resume()
    while vcpu.entries == 0:
        run.wait(0.001)
    run.pause()
    run.resume()
    with run.stopped():
        pass
    run.close()  # joins the thread: it would hang here if the wait could not be cut short


def test_a_frozen_guest_stays_where_it_is_whatever_the_user_does(control):
    vcpu = FakeVcpu()
    run = control(vcpu)
    run.resume()
    run.freeze()
    entries = vcpu.entries
    run.pause()
    run.resume()
    assert run.status is VmStatus.RUNNING
    assert run.held
    assert run.still
    assert not vcpu.inside
    assert vcpu.entries == entries
    run.thaw()
    assert not run.held
    assert not run.still
    with pytest.raises(VmError, match="not frozen"):
        run.thaw()


class Meddler(FakeVcpu):
    """While one thread waits for it to stop, another resumes the guest, before the kick has its effect."""

    run_control = None

    def kick(self):
        if self.run_control is not None:
            control, self.run_control = self.run_control, None
            control.resume()
        super().kick()


def test_a_pause_that_is_resumed_meanwhile_does_not_hunt_the_vcpus_for_ever(control):
    vcpu = Meddler()
    run = control(vcpu)
    run.resume()
    while not vcpu.inside:
        run.wait(0.001)
    vcpu.run_control = run
    run.pause()
    assert vcpu.run_control is None
    assert run.status is VmStatus.RUNNING
    run.pause()
    assert run.status is VmStatus.PAUSED
    assert not vcpu.inside


@pytest.mark.parametrize("effect", [GuestExit(0), SyncPoint(1), GuestCrash("triple fault")])
def test_what_stops_one_vcpu_stops_all_without_a_wait(control, effect):
    other = FakeVcpu()

    class First(FakeVcpu):
        def run(self):
            assert other.entered.wait(60)
            return super().run()

    run = control(First(effect), other)
    run.resume()
    assert other.left.wait(60)


class Caller(FakeVcpu):
    """A device or a console sink that asks the run control for something, on the vCPU's own thread."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask
        self.error = None
        self.asked = threading.Event()

    def run(self):
        if not self.asked.is_set():
            try:
                self.ask(self.run_control)
            except VmError as error:
                self.error = error
            self.asked.set()
        return super().run()


@pytest.mark.parametrize("ask", ["pause", "freeze", "wait", "close"])
def test_a_vcpus_own_thread_may_not_wait_for_vcpus_to_stop(control, ask):
    vcpu = Caller(lambda run: getattr(run, ask)())
    vcpu.run_control = run = control(vcpu)
    run.resume()
    assert vcpu.asked.wait(60)
    assert "cannot wait for itself" in str(vcpu.error)
    run.pause()


# -- how long it stood -------------------------------------------------------------------------------------------------


class Standing:
    """What a machine is told of its guest's standing still, by a clock that is set here."""

    def __init__(self, control):
        self.now_ns = 1000
        self.stood = []
        self.vcpu = FakeVcpu()
        self.run = control(self.vcpu, on_stood=self.tell, now_ns=lambda: self.now_ns)

    def tell(self, ns):
        assert not self.vcpu.inside
        self.stood.append(ns)


@pytest.fixture
def standing(control):
    standing = Standing(control)
    standing.run.resume()
    assert standing.stood == [], "it has not run before"
    return standing


def test_a_guest_that_runs_on_is_told_how_long_it_stood(standing):
    for hold, release in (
        (standing.run.pause, standing.run.resume),
        (standing.run.freeze, standing.run.thaw),
    ):
        standing.stood.clear()
        hold()
        standing.now_ns += 70
        release()
        standing.now_ns += 500
        assert standing.stood == [70]


def test_holds_that_overlap_are_one(standing):
    standing.run.pause()
    standing.now_ns += 5
    standing.run.freeze()
    standing.now_ns += 5
    standing.run.resume()
    assert standing.stood == []
    standing.now_ns += 5
    with standing.run.stopped():
        standing.now_ns += 5
    standing.run.thaw()
    assert standing.stood == [20]


def test_what_was_told_for_a_saved_state_is_not_told_again(standing):
    standing.run.freeze()
    standing.now_ns += 30
    standing.run.count_standing()
    standing.now_ns += 4
    standing.run.thaw()
    assert standing.stood == [30, 4]


def test_a_guest_that_was_loaded_stands_from_then_on(control):
    standing = Standing(control)
    standing.run.stand_from_now()
    standing.now_ns += 9
    standing.run.resume()
    assert standing.stood == [9]


class Deaf(FakeVcpu):
    """One that waits for something that never comes."""

    def kick(self):
        pass


def test_the_end_of_the_process_stops_vcpus_and_waits_for_none_that_does_not_come(control):
    vcpu, deaf = FakeVcpu(), Deaf()
    run = control(vcpu, deaf)
    run.stop_for_exit()  # nothing has run
    run.resume()
    assert vcpu.entered.wait(60)
    assert deaf.entered.wait(60)
    run.stop_for_exit(patience_s=0.05)
    assert (vcpu.inside, deaf.inside) == (False, True)
    with pytest.raises(VmError, match="cannot be resumed"):
        run.resume()
    deaf._kicked.set()
