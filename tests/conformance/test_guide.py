"""The trackers of docs/guide/trackers.md, as they stand there: they can be chosen by name, and keep every promise."""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
from processes import cli
from tiers import sample

import pageferry
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import UnsupportedError, UsageError, VmError
from pageferry.core.vm import VmConfig
from pageferry.kvm.trackers import TRACKERS, Tracker, bitmap_tracker
from pageferry.kvm.vm import KvmVm
from pageferry.testing import CHECKS, check_log_dirty
from pageferry.vmm.accel import choose_machines

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "trackers.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
HEAT, PLAIN, KIT = SNIPPETS
SMALLEST = 4 << 20
CONFIG = VmConfig(memory_bytes=SMALLEST)

ALL = [check.name for check in CHECKS]
FEW = ["rounds-are-exact", "off-and-on-again", "marks-outside-ram", "mark-between-steps-of-clean", "strange-ranges"]


@pytest.fixture
def users_modules(tmp_path, monkeypatch):
    """A folder on the path of modules; what is imported from there is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "heat.py").write_text(HEAT)
    (tmp_path / "plain.py").write_text(PLAIN)
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.mark.parametrize("check", sample(ALL, "a few checks of the one, all of the machine's own", quick=FEW))
def test_the_tracker_over_the_machines_own_keeps_every_promise(users_modules, accel, check):
    make_vm = choose_machines(accel, "heat:Heat").make_vm
    check_log_dirty(make_vm, memory_bytes=[SMALLEST], checks=[check])


@pytest.mark.parametrize("check", sample(ALL, "a few checks of the one, all of kvm-bitmap", quick=FEW[:2]))
def test_the_tracker_over_kvms_log_keeps_every_promise(users_modules, kvm_support, check):
    machines = choose_machines(tracker="plain:PLAIN")
    assert machines.accel == "kvm"
    check_log_dirty(machines.make_vm, memory_bytes=[SMALLEST, (3 << 30) + 5 * 4096], checks=[check])


@pytest.mark.exhaustive("the whole kit: the checks one by one are above")
def test_the_kit_runs_as_the_guide_has_it_and_finds_nothing(users_modules, capsys):
    exec(compile(KIT, "the guide", "exec"), {})
    assert capsys.readouterr().out == ""


def test_the_kit_as_the_guide_has_it_names_what_a_tracker_lacks(users_modules, capsys):
    (users_modules / "heat.py").write_text(HEAT.replace("def peek(", "def look("))
    exec(compile(KIT, "the guide", "exec"), {})
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "can-be-checked (operator semantics): tracker 'heat:Heat' made Heat, which has no peek"


def test_the_table_of_bitmaps_is_true():
    table = GUIDE.read_text().partition("### Bitmaps")[2].partition("###")[0]
    names = set(re.findall(r"`(?:DirtyBitmap\.)?(\w+)\(", table)) - {"DirtyBitmap"}
    public = {name for name in vars(DirtyBitmap) if not name.startswith("_")} - {"nbits", "words"}
    assert names == public


@pytest.mark.parametrize(
    "oracle",
    [
        ("--oracle", "digests"),
        pytest.param((), marks=pytest.mark.exhaustive("the same without a witness")),
    ],
)
def test_a_guest_moves_under_it(users_modules, oracle):
    environment = os.environ | {"PYTHONPATH": str(users_modules)}
    options = ("--accel", "soft", "--memory", "16M", "--tracker", "heat:Heat", *oracle)
    result = cli("demo", *options, env=environment)
    assert result.returncode == 0, result.stderr
    assert "tracker heat over hap" in result.stdout


def test_it_tells_the_hottest_frames_when_log_dirty_ends(users_modules, capsys):
    guest = pageferry.boot("kv", pageferry.choose_machines("soft", tracker="heat:Heat"), memory_bytes=16 << 20)
    guest.resume()
    pageferry.save(guest, users_modules / "guest.pf")
    guest.close()
    assert re.search(r"^the hottest frames: 0x[0-9a-f]+ \([1-9]\d* rounds\), ", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    ("source", "name", "told"),
    [
        ("", "nope:Nope", "'nope:Nope' cannot be loaded: ModuleNotFoundError"),
        ("", "mine:Nope", "'mine:Nope' cannot be loaded: AttributeError"),
        ("1 / 0", "mine:Mine", "'mine:Mine' cannot be loaded: ZeroDivisionError"),
        ("Mine = 7", "mine:Mine", "'mine:Mine' is 7: neither a Tracker nor a class"),
        ("def Mine(): pass", "mine:Mine", "'mine:Mine' cannot be made: TypeError"),
        (
            "class Mine:\n    tracker, enabled = 'mine', False\n    def __init__(self, vm): pass",
            "mine:Mine",
            "'mine:Mine' made Mine, which has no enable, peek, clean, clean_range, off, mark, stats",
        ),
    ],
)
def test_what_is_not_a_tracker_is_refused_before_a_guest_is_made(users_modules, source, name, told):
    (users_modules / "mine.py").write_text(source)
    with pytest.raises(UsageError, match=re.escape(told)) as refused:
        choose_machines("soft", name).make_vm(CONFIG)
    assert "docs/guide/trackers.md" in refused.value.hint


def test_what_it_does_wrong_is_told_as_its_own(users_modules):
    (users_modules / "mine.py").write_text(
        "from heat import Heat\n"
        "class Mine(Heat):\n"
        "    def peek(self):\n        return [1]\n"
        "    def clean(self):\n        raise KeyError(3)\n"
    )
    vm = choose_machines("soft", "mine:Mine").make_vm(CONFIG)
    vm.log_dirty.enable()
    with pytest.raises(VmError, match=re.escape("mine:Mine returned [1] from peek, not a DirtyBitmap")):
        vm.log_dirty.peek()
    with pytest.raises(VmError, match=re.escape("tracker mine:Mine failed in clean: KeyError(3)")):
        vm.log_dirty.clean()
    vm.close()


def test_one_of_kvms_is_not_for_soft(users_modules):
    with pytest.raises(UnsupportedError, match="not for soft"):
        choose_machines("soft", "plain:PLAIN")


def test_the_witness_beside_it_is_digests(users_modules):
    with pytest.raises(UnsupportedError, match="no oracle pagemap-scan beside a tracker of your own"):
        choose_machines("soft", "heat:Heat", witness="pagemap-scan")


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_over_another_that_leaves_out_its_prepare_is_refused(kvm_support, name):
    """Of kvm-bitmap it would lose bits: KVM clears them, and the tracker believes that they stay."""
    base = TRACKERS[name]
    with pytest.raises(UnsupportedError, match=f"{name} was made for a machine that was not prepared for it"):
        KvmVm(CONFIG, tracker=Tracker(prepare=lambda vm_fd: None, make=base.make)).close()


@pytest.mark.parametrize("base", [*TRACKERS.values(), bitmap_tracker(0)], ids=[*TRACKERS, "bitmap, automatic"])
def test_one_that_has_all_of_the_other_is_not(kvm_support, base):
    kind = Tracker(prepare=base.prepare, make=base.make, own_mapping=base.own_mapping)
    KvmVm(CONFIG, tracker=kind).close()
