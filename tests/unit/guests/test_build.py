import hashlib
import json

import pytest

from pageferry.core.errors import UsageError
from pageferry.guests import build
from pageferry.guests.elf import load_elf
from pageferry.guests.workloads import WORKLOADS

MANIFEST = json.loads(build.MANIFEST.read_text())


def test_every_workload_has_source_and_image():
    images = {path.stem for path in build.IMAGES.glob("*.elf")}
    assert set(build.programs()) == set(WORKLOADS) == images == set(MANIFEST["images"])


@pytest.mark.parametrize("name", build.programs())
def test_the_image_is_the_one_that_was_built_from_this_source(name):
    recorded = MANIFEST["images"][name]
    assert recorded["source_sha256"] == build.source_digest(name), "source changed: run `make guests`"
    assert recorded["image_sha256"] == hashlib.sha256((build.IMAGES / f"{name}.elf").read_bytes()).hexdigest()


def test_the_digest_covers_source_header_and_flags(tmp_path):
    for file in build.SOURCES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = build.source_digest("kv", tmp_path)
    digests = {before}
    for file in ("kv.c", "guest.h", "guest.ld"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text + "\n")
        digests.add(build.source_digest("kv", tmp_path))
        (tmp_path / file).write_text(text)
    assert build.source_digest("kv", tmp_path) == before
    digests.add(build.source_digest("kv", tmp_path, (*build.FLAGS, "-O3")))
    assert len(digests) == 5


def compiler():
    cc = build.compiler()
    if cc is None:
        pytest.skip("no C compiler on this machine")
    return cc


@pytest.mark.parametrize("name", build.programs())
def test_the_recorded_compiler_builds_the_same_image_again(name, tmp_path):
    cc = compiler()
    version = build.compiler_version(cc)
    if version != MANIFEST["compiler"]:
        pytest.skip(f"built by {MANIFEST['compiler']}, here is {version}: tests/conformance compares behaviour instead")
    fresh = tmp_path / f"{name}.elf"
    build.build(name, fresh, cc)
    kept = load_elf(build.IMAGES / f"{name}.elf")
    assert load_elf(fresh).segments == kept.segments
    assert fresh.read_bytes() == (build.IMAGES / f"{name}.elf").read_bytes()


def test_a_refused_source_is_one_clear_error(tmp_path):
    cc = compiler()
    (tmp_path / "bad.c").write_text("this is not C\n")
    with pytest.raises(UsageError, match="cannot build guest bad") as caught:
        build.build("bad", tmp_path / "bad.elf", cc, tmp_path)
    assert "bad.c" in caught.value.hint


def test_without_a_compiler_the_build_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build.main() == 1
    assert "C compiler" in capsys.readouterr().err
