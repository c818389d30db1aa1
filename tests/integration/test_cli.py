"""Bad input and plain questions at the command line: one clear line, the right exit code, never a traceback."""

import json
import os
import re
import socket
import struct
import subprocess

import pytest
from processes import GIVE_UP_S, PAGEFERRY, cli

from pageferry.kvm.probe import probe


def complaint(result, code):
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("pageferry: ")]
    assert len(said) == 1, result.stderr
    assert len([line for line in result.stderr.splitlines() if not line.startswith("warning: ")]) <= 3
    return said[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo", "--workload", "nonesuch"), "unknown workload 'nonesuch'"),
        (("run", "nonesuch"), "unknown workload"),
        (("run", "idle", "--memory", "1M"), "guest memory of 1048576 bytes"),
        (("run", "idle", "--memory", "999T"), "guest memory of"),
        (("run", "idle", "--memory", "3000001"), "multiple of 4096"),
        (("run", "idle", "--memory", "much"), "--memory: not a size: 'much'"),
        (("run", "idle", "--memory", "-5M"), "not a size"),
        (("run", "sweep", "--memory", "8M", "--working-set", "64M", "--accel", "soft"), "memory too small"),
        (("run", "idle", "--rate", "-1"), "--rate"),
        (("run", "rewrite", "--argument", "some"), "--argument: not a size: 'some'"),
        (("run", "rewrite", *["--argument", "1"] * 9, "--accel", "soft"), "9 guest arguments are too many"),
        (("run", "idle", "--cpus", "0"), "--cpus"),
        (("run", "idle", "--cpus", "9"), "--cpus"),
        (("demo", "--cpus", "9"), "--cpus"),
        (("run", "idle", "--accel", "warp"), "warp"),
        (("run", "idle", "--cpu", "486"), "486"),
        (("run", "idle", "--machine", "q35"), "q35"),
        (("run", "/nonexistent/mine.elf", "--accel", "soft"), "/nonexistent/mine.elf"),
        (("run", "idle", "--hugepages", "giant"), "giant"),
        (("run",), "nothing to run"),
        (("run", "idle", "--kernel", "/boot/vmlinuz"), "two guests"),
        (("run", "idle", "--append", "quiet"), "--initrd and --append are for a kernel, and idle is not one"),
        (("run", "--kernel", "/nonexistent/vmlinuz"), "cannot read /nonexistent/vmlinuz"),
        (("run", "--kernel", __file__), "is not a Linux kernel"),
        (("run", __file__), "is nothing that a guest can be"),
        (("run", "--kernel", "/boot/vmlinuz", "--rate", "1"), "not for --kernel"),
        (("run", "idle", "--console", "vga"), "vga"),
        (("demo", "--policy", "hope"), "unknown policy 'hope'"),
        (("demo", "--policy", "xen", "--downtime-limit", "5"), "no downtime limit"),
        (("demo", "--downtime-limit", "0"), "positive limit"),
        (("demo", "--downtime-limit", "nan"), "--downtime-limit: nan is not a positive limit"),
        (("demo", "--downtime-limit", "inf"), "--downtime-limit: inf is not a positive limit"),
        (("demo", "--policy", "deadline", "--deadline", "inf"), "--deadline: inf is not a positive limit"),
        (("demo", "--policy", "deadline", "--max-rounds", "3"), "no max rounds (--max-rounds)"),
        (("demo", "--max-rounds", "0"), "--max-rounds"),
        (("migrate", "tcp://127.0.0.1:1", "--control", "/tmp/x", "--timeout", "nan"), "--timeout"),
        (("limits", "--control", "/tmp/x", "--downtime-limit", "inf"), "--downtime-limit: inf is not a positive limit"),
        (("limits", "--control", "/tmp/x", "--bandwidth", "1K"), "--bandwidth: a bandwidth of 1024 bytes a second"),
        (("receive", "http://somewhere", "--control", "/tmp/x"), "not an address"),
        (("receive", "tcp://127.0.0.1:99999", "--control", "/tmp/x"), "not an address"),
        (("migrate", "tcp://127.0.0.1", "--control", "/tmp/x"), "not an address"),
        (("migrate", "tcp://127.0.0.1:1"), "control"),
        (("migrate", "tcp://127.0.0.1:1", "--control", "/tmp/x", "--bandwidth", "fast"), "not a size: 'fast'"),
        (("migrate", "tcp://127.0.0.1:1", "--control", "/tmp/x", "--connections", "17"), "--connections"),
        (("migrate", "tcp://127.0.0.1:1", "--control", "/tmp/x", "--compress", "zip"), "zip"),
        (("migrate", "tcp://127.0.0.1:1", "--control", "/tmp/x", "--delta-cache", "64M"), "needs a packing"),
        (("migrate", "tcp://127.0.0.1:1", "--control", "/tmp/x", "--bandwidth", "1K"), "1024 bytes a second is too"),
        (("save", "guest.bin", "--control", "/tmp/x", "--bandwidth", "1K"), "1024 bytes a second is too little"),
        (
            ("run", "idle", "--accel", "soft", "--control", "/nonexistent/folder/x"),
            "cannot listen on the control socket",
        ),
        (("demo", "--plot", "picture.pdf"), "no picture can be made in 'picture.pdf'"),
        (("demo", "--plot", "/nonexistent/folder/a.html"), "cannot write /nonexistent/folder/a.html"),
        (("migrate", "tcp://127.0.0.1:1", "--control", "/tmp/x", "--plot", "/nonexistent/a.html"), "cannot write"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage(here, arguments, says):
    assert says in complaint(here(*arguments), 2)


@pytest.mark.parametrize("accel", ["kvm", "soft"])
def test_who_mistakes_the_model_for_the_machine_is_told_the_right_option(here, accel):
    assert f"\nhint: --machine is the guest's model, plain or pc; what runs it is --accel {accel}\n" in (
        here("run", "idle", "--machine", accel).stderr
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("status", "--control", "/nonexistent/x"), 6, "no guest process answers"),
        (("migrate", "tcp://127.0.0.1:1", "--control", "/nonexistent/x"), 6, "no guest process answers"),
        (("migrate", "fax:5", "--control", "/nonexistent/x"), 2, "not an address"),
        (("save", "x", "--control", "/nonexistent/x", "--bandwidth", "1K"), 2, "--bandwidth"),
        (("demo", "--downtime-limit", "0"), 2, "--downtime-limit"),
        (("demo", "--frobnicate"), 2, "--frobnicate"),
        (("inspect", "/nonexistent/x"), 2, "cannot read /nonexistent/x"),
        (("doctor", "--frobnicate"), 2, "--frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_with_json_a_failure_is_one_object_too(here, arguments, code, says):
    result = here(*arguments, "--json")
    assert result.returncode == code, result.stderr
    told = json.loads(result.stdout)
    assert told["status"] == "failed"
    assert says in told["error"]
    assert f"pageferry: {told['error']}\n" in result.stderr
    assert told["hint"]
    assert told["guest_at"] is None


def test_wrong_usage_of_a_process_of_its_own():
    assert "frobnicate" in complaint(cli("frobnicate"), 2)


def test_a_file_that_is_not_a_program(here, tmp_path):
    file = tmp_path / "mine.elf"
    file.write_bytes(b"\x7fELF but not really")
    complaint(here("run", file, "--accel", "soft"), 2)
    file.write_bytes(b"#!/bin/sh\n")
    complaint(here("run", file, "--accel", "soft"), 2)
    complaint(here("run", tmp_path, "--accel", "soft"), 2)
    class_32 = b"\x7fELF\x01\x01\x01".ljust(64, b"\0")
    file.write_bytes(class_32)
    complaint(here("run", file, "--accel", "soft"), 2)


def test_a_control_socket_without_a_process(here, tmp_path):
    for command in ("status", "pause", "resume", "quit"):
        assert "no guest process answers" in complaint(here(command, "--control", tmp_path / "x"), 6)
    assert "no guest process answers" in complaint(here("migrate", "--control", tmp_path / "x", "tcp://127.0.0.1:1"), 6)


def test_a_port_in_use(here, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = here("receive", f"tcp://127.0.0.1:{port}", "--control", tmp_path / "x", "--accel", "soft")
    assert "cannot listen at" in complaint(result, 2)


def test_kvm_that_is_missing_is_said_with_a_hint(tmp_path):
    """Without /dev/kvm in sight (a mount namespace of its own hides it)."""
    hidden = ["unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/kvm && exec "$@"', "sh"]
    tried = subprocess.run([*hidden, "true"], capture_output=True, check=False)
    if tried.returncode or not os.path.exists("/dev/kvm"):
        pytest.skip(f"cannot hide /dev/kvm here: {tried.stderr.decode()}")
    command = [*hidden, *PAGEFERRY, "run", "idle", "--accel", "kvm"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "kvm" in complaint(result, 5).lower()
    assert "hint: " in result.stderr


@pytest.mark.parametrize("accel", ["auto", "soft"])
def test_a_tracker_that_is_nowhere_is_wrong_usage(here, accel):
    assert "no tracker nosuch" in complaint(here("run", "idle", "--accel", accel, "--tracker", "nosuch"), 2)


def test_huge_pages_that_the_host_has_not_are_said_with_a_hint(here, kvm_support, hugetlb_pool):
    result = here("run", "idle", "--memory", "1G", "--accel", "kvm", "--hugepages", "hugetlb")
    assert "pool of 2 MiB pages cannot give 512" in complaint(result, 5)
    assert "hint: as root: sysctl vm.nr_hugepages=" in result.stderr
    assert "single 4 KiB frames" in complaint(here("run", "idle", "--accel", "soft", "--hugepages", "hugetlb"), 5)


def elf(code):
    """The smallest program: one segment at 1 MiB that begins with the code."""
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, 0x100078, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    size = 0x78 + len(code)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, 0x100000, 0x100000, size, size, 0x1000) + code


@pytest.mark.parametrize(
    ("code", "returncode", "says"),
    [
        ("31c0e6f4", 0, "exit code 0"),  # xor eax, eax; out 0xf4, al
        ("b003e6f4", 3, "exit code 3"),  # mov al, 3; out 0xf4, al
        ("b800010000e7f4", 8, "exit code 256"),  # mov eax, 256; out 0xf4, eax
        ("0f0b", 9, "crashed"),  # ud2
        ("f4", 9, "crashed"),  # hlt, in ring 3
    ],
)
def test_a_program_of_ones_own(here, tmp_path, accel, code, returncode, says):
    file = tmp_path / "mine.elf"
    file.write_bytes(elf(bytes.fromhex("66baf803b068ee" + code)))  # 'h' to the console first
    result = here("run", file, "--memory", "8M", "--accel", accel)
    assert result.returncode == returncode, result.stderr
    assert result.stdout == "h"
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failed_demo_still_reports(tmp_path):
    result = cli("demo", "--accel", "soft", "--memory", "32M", "--downtime-limit", "0.001", "--json")
    assert result.returncode == 3
    report = json.loads(result.stdout)
    assert (report["status"], report["guest_at"], report["verified"]) == ("failed", "source", False)
    assert "verification alone" in result.stderr
    advice = report["explanation"]["advice"]
    assert "A downtime limit of " in advice[0]
    assert result.stderr.endswith(f"hint: {' '.join(advice)}\n")
    assert "report: The wire moved " in result.stderr


def test_a_running_guest_ends_by_ctrl_c(background):
    idle = background("run", "idle", "--memory", "16M", "--accel", "soft")
    assert b"idle" in idle.stdout.readline()
    idle.send_signal(2)
    idle.communicate(timeout=GIVE_UP_S)
    assert idle.returncode == 0


def test_help_and_version_tell(here):
    result = here("--help")
    assert result.returncode == 0
    for command in (
        "demo",
        "run",
        "receive",
        "migrate",
        "save",
        "restore",
        "inspect",
        "status",
        "pause",
        "resume",
        "quit",
        "doctor",
    ):
        assert command in result.stdout
        assert here(command, "--help").returncode == 0
    assert here("--version").stdout.startswith("pageferry ")
    assert here().returncode == 2


def test_doctor_tells_what_works(here):
    result = here("doctor", "--json")
    assert result.returncode == 0, result.stderr
    findings = json.loads(result.stdout)
    assert findings["accel-soft"]["works"] is True
    assert "dirty pages" in findings["accel-soft"]["detail"]
    if findings["accel-kvm"]["works"]:
        assert findings["kvm-cpuid"]["works"] is probe().exact_cpuid
    for finding in findings.values():
        assert finding["works"] or finding["advice"]
    lines = here("doctor").stdout.splitlines()  # not at a terminal: each finding is one line, its advice one more
    assert [line.split()[1] for line in lines if line[:3].strip()] == list(findings)
    assert len(lines) == sum(1 + bool(finding["advice"]) for finding in findings.values())


def test_a_cpu_that_the_machine_has_not_is_said_with_a_hint():
    for command, code in ((("run", "idle"), 5), (("demo",), 6)):  # of a demo, its guest process failed
        result = cli(*command, "--accel", "soft", "--cpu", "host")
        assert result.returncode == code, result.stderr
        assert "baseline CPU only" in result.stderr
        assert "Traceback" not in result.stderr


def test_a_pc_that_the_machine_has_not_is_said_with_a_hint(here):
    result = here("run", "idle", "--accel", "soft", "--machine", "pc", "--cpus", "2")
    assert result.returncode == 5, result.stderr
    assert "pageferry: the software machine's PC has 1 vCPU, not 2" in result.stderr
    assert "hint: use --accel kvm" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.exhaustive("a demo is a run, a receive and a migrate, which have tests of their own")
@pytest.mark.kvm
def test_demo_of_a_guest_with_interrupt_controllers(kvm_support):
    if not kvm_support.capabilities["KVM_CAP_IRQCHIP"]:
        pytest.skip("this KVM has no KVM_CAP_IRQCHIP")
    result = cli("demo", "--accel", "kvm", "--machine", "pc", "--memory", "32M", "--downtime-limit", "60000", "--json")
    assert result.returncode == 0, result.stderr
    devices = [device["name"] for device in json.loads(result.stdout)["devices"]]
    assert devices[-4:] == ["pic0", "pic1", "ioapic", "pit"]


def test_demo_prints_one_json_object(process_accel):
    result = cli("demo", "--accel", process_accel, "--memory", "64M", "--downtime-limit", "60000", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["status"] == "completed"
    assert report["verified"] is True
    assert report["source_accel"] == process_accel
    assert report["oracle"] is None
    assert sum(report["sent"]["heat"]["pages"]) == report["sent"]["pages"]
    spent = report["guest_time"]
    assert (spent["work_after_per_s"] is None) == (spent["work_before_per_s"] is None)
    assert re.search(r'"first_gfns": \[ \d+(, \d+)* \]', result.stdout)  # on one line
    assert "the guest works at the destination" in result.stderr
    assert "round 0" in result.stderr


@pytest.mark.exhaustive("a demo is a run, a receive and a migrate, which have tests of their own")
def test_a_demo_that_the_oracle_watches(process_accel):
    result = cli(
        "demo",
        "--accel",
        process_accel,
        "--oracle",
        "digests",
        "--memory",
        "32M",
        "--downtime-limit",
        "60000",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["status"], report["tracker"].partition(" ")[2]) == ("completed", "against digests")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("oracle: ")]
    oracle = report["oracle"]
    assert oracle["trackers"] == report["tracker"]
    assert f"oracle: {oracle['trackers']} agreed on {oracle['pages']:,} pages in {oracle['rounds']} round" in line
    assert "Traceback" not in result.stderr


def test_an_oracle_that_cannot_be_is_refused_in_one_line(here):
    assert "no oracle pagemap-scan on soft" in complaint(
        here("run", "idle", "--accel", "soft", "--oracle", "pagemap-scan"), 5
    )


@pytest.mark.exhaustive("a demo is a run, a receive and a migrate, which have tests of their own")
def test_a_picture_is_drawn_of_a_migration_and_of_one_that_failed(tmp_path):
    for name, limit, code in (("a.html", "60000", 0), ("b.html", "0.001", 3)):
        file = tmp_path / name
        demo = ("demo", "--accel", "soft", "--memory", "32M", "--downtime-limit", limit, "--plot", file, "--json")
        result = cli(*demo)
        assert result.returncode == code, result.stderr
        assert f"picture: {file}\n" in result.stderr
        (data,) = re.findall(r'id="report">(.*?)</script>', file.read_text(), re.S)
        told = json.loads(result.stdout)
        assert json.loads(data) == {name: value for name, value in told.items() if name not in ("error", "hint")}


@pytest.mark.exhaustive("a demo is a run, a receive and a migrate, which have tests of their own")
def test_a_disk_that_is_full_spoils_the_picture_and_not_the_migration(tmp_path):
    (tmp_path / "a.html").symlink_to("/dev/full")
    result = cli(
        "demo", "--accel", "soft", "--memory", "32M", "--downtime-limit", "60000", "--plot", tmp_path / "a.html"
    )
    assert result.returncode == 0, result.stderr
    assert "the picture could not be written to" in result.stderr
    assert "migration completed" in result.stdout


@pytest.mark.exhaustive("a demo is a run, a receive and a migrate, which have tests of their own")
def test_demo_of_a_guest_with_two_vcpus(process_accel):
    result = cli(
        "demo",
        "--accel",
        process_accel,
        "--memory",
        "64M",
        "--cpus",
        "2",
        "--workload",
        "smp",
        "--downtime-limit",
        "60000",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["status"] == "completed"
    assert "and 2 vCPUs" in result.stderr
