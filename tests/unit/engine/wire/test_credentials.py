"""The files of --tls-dir and the one-time secret: what is taken, and what is refused by name and with what to do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from certified import authority, tls_dir

from pageferry.core.errors import UnsupportedError, UsageError
from pageferry.engine.wire.credentials import CA_CERT, FILES, Credentials, names_of, new_secret, read_secret
from pageferry.engine.wire.lab_keys import make_keys
from pageferry.stream.ferry_order import Side

EACH_END = pytest.mark.parametrize("side", Side)


@pytest.fixture
def directory(tmp_path):
    def make(side):
        return tls_dir(tmp_path / side, side, authority(), "here.example")

    return make


def credentials(path, side):
    return Credentials.from_dir(path, side, "there.example")


@EACH_END
def test_the_files_have_the_names_that_qemu_gives_them(directory, side):
    path = directory(side)
    end = "client" if side is Side.SOURCE else "server"
    assert sorted(os.listdir(path)) == sorted(["ca-cert.pem", f"{end}-cert.pem", f"{end}-key.pem"])
    assert credentials(path, side).peer == "there.example"


@EACH_END
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_file_that_is_missing_is_named(directory, side, which):
    path = directory(side)
    name = (CA_CERT, *FILES[side])[which]
    (path / name).unlink()
    with pytest.raises(UsageError, match=f"there is no .*/{re.escape(name)}$") as refused:
        credentials(path, side)
    assert "pageferry keys" in refused.value.hint


@EACH_END
def test_a_file_that_cannot_be_read_is_named(directory, side):
    path = directory(side)
    (path / FILES[side][1]).unlink()
    (path / FILES[side][1]).mkdir()
    with pytest.raises(UsageError, match=r"-key\.pem cannot be read: Is a directory"):
        credentials(path, side)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(directory):
    path = directory(Side.SOURCE)
    (path / "client-key.pem").chmod(0)
    with pytest.raises(UsageError, match=r"client-key\.pem cannot be read: Permission denied"):
        credentials(path, Side.SOURCE)


@EACH_END
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_key_that_others_can_read_or_change_is_refused(directory, side, mode):
    path = directory(side)
    key = path / FILES[side][1]
    key.chmod(mode)
    with pytest.raises(UsageError, match=rf"-key.pem can be read or changed by others \(mode {mode:04o}\)") as refused:
        credentials(path, side)
    assert refused.value.hint == f"chmod 600 {key}"
    key.chmod(0o400)
    credentials(path, side)


@EACH_END
def test_what_is_not_a_certificate_or_not_its_key_is_refused(directory, tmp_path, side):
    path = directory(side)
    certificate, key = FILES[side]
    sound = (path / CA_CERT).read_bytes()
    (path / CA_CERT).write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"ca-cert\.pem is not a certificate"):
        credentials(path, side)
    (path / CA_CERT).write_bytes(sound)
    other = tls_dir(tmp_path / "other", side, authority(), "here.example")
    (path / key).write_bytes((other / key).read_bytes())
    with pytest.raises(UsageError, match="cannot be used: key values mismatch") as refused:
        credentials(path, side)
    assert "its own private key" in refused.value.hint
    (path / certificate).write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"-cert\.pem and .*-key\.pem cannot be used"):
        credentials(path, side)


def test_a_destination_says_whom_it_accepts(directory):
    with pytest.raises(UsageError, match="says whom it accepts") as refused:
        Credentials.from_dir(directory(Side.DESTINATION), Side.DESTINATION, None)
    assert "--peer" in refused.value.hint
    assert Credentials.from_dir(directory(Side.SOURCE), Side.SOURCE, None).peer is None


@pytest.mark.parametrize("peer", ["", "there..example", ".example", "x:uri", "a b", "a" * 64])
@pytest.mark.parametrize("side", Side)
def test_what_cannot_be_a_name_is_no_peer(directory, side, peer):
    with pytest.raises(UsageError, match="no peer to expect") as refused:
        Credentials.from_dir(directory(side), side, peer)
    assert "--peer" in refused.value.hint


CERTIFICATE = {
    "subject": ((("commonName", "common.example"),),),
    "subjectAltName": (("DNS", "A.example"), ("IP Address", "2001:DB8:0:0:0:0:0:1"), ("URI", "x:uri"), ("DNS", "*.w")),
}


@pytest.mark.parametrize(
    ("peer", "accepted"),
    [
        ("a.example", True),
        ("2001:db8::1", True),
        ("common.example", False),
        ("b.example", False),
        ("any.w", False),
        ("2001:db8::2", False),
    ],
)
def test_only_alternative_names_count_and_no_wildcards(directory, peer, accepted):
    ours = Credentials.from_dir(directory(Side.DESTINATION), Side.DESTINATION, peer)
    assert ours.accepts(CERTIFICATE) == accepted
    assert not ours.accepts({})
    assert names_of(CERTIFICATE) == ("A.example", "2001:DB8:0:0:0:0:0:1", "*.w")


def test_a_secret_is_new_each_time_and_goes_through_a_file(tmp_path):
    first, second = new_secret(), new_secret()
    assert first != second
    assert re.fullmatch(r"pageferry-secret-1\.[A-Za-z0-9_-]{43}", first)
    file = tmp_path / "secret"
    file.write_text(f"{first}\n")
    file.chmod(0o600)
    assert read_secret(file) == first
    file.chmod(0o644)
    with pytest.raises(UsageError, match="can be read or changed by others"):
        read_secret(file)
    with pytest.raises(UsageError, match="there is no") as missing:
        read_secret(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for path in (Path(os.devnull), tmp_path / "pipe"):
        with pytest.raises(UsageError, match=f"{path} is not a regular file$") as refused:
            read_secret(path)
        assert refused.value.hint == missing.value.hint == "`pageferry receive --secret new` prints one"


@pytest.mark.parametrize(
    "text", ["", "x", "pageferry-secret-1.", "pageferry-secret-1." + "A" * 42, "pageferry-secret-1." + "A" * 44, "\xe9"]
)
def test_what_is_not_a_secret_is_refused_and_not_repeated(tmp_path, text):
    file = tmp_path / "secret"
    file.write_text(text, encoding="utf-8")
    file.chmod(0o600)
    with pytest.raises(UsageError, match=r"(not a|holds no) secret") as refused:
        read_secret(file)
    assert "receive --secret new" in refused.value.hint


def test_without_the_library_certificates_are_read_and_not_made(directory):
    """In a process of its own: here the library is loaded already."""
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from pathlib import Path\n"
        "from pageferry.engine.wire.credentials import Credentials, Side, new_secret\n"
        "Credentials.from_dir(Path(sys.argv[1]), Side.SOURCE, None)\n"
        "try: Credentials.from_secret(new_secret(), Side.SOURCE)\n"
        "except Exception as error: print(type(error).__name__, error.hint)\n"
    )
    command = [sys.executable, "-c", program, str(directory(Side.SOURCE))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == f"{UnsupportedError.__name__} pip install 'pageferry[tls]'\n"


def test_the_keys_of_a_lab_are_private_and_complete(tmp_path):
    made = make_keys(tmp_path / "lab", source="a.example", destination="10.0.0.2", days=3)
    assert sorted(made) == ["ca", "destination", "source"]
    for path in made.values():
        assert path.stat().st_mode & 0o077 == 0
        assert all(file.stat().st_mode & 0o077 == 0 for file in path.iterdir())
    Credentials.from_dir(made["source"], Side.SOURCE, "10.0.0.2")
    Credentials.from_dir(made["destination"], Side.DESTINATION, "a.example")
    assert not any("ca-key" in file.name for end in Side for file in made[end].iterdir())
    with pytest.raises(UsageError, match="is not empty"):
        make_keys(tmp_path / "lab", source="a", destination="b", days=3)
    with pytest.raises(UsageError, match="cannot be made: Not a directory"):
        make_keys(made["ca"] / CA_CERT / "x", source="a", destination="b", days=3)
