"""Threads that cannot be had are an error of the system, wherever one is begun."""

import errno
import re
import threading
from pathlib import Path

import pytest
from shortage import no_more_threads

import pageferry
from pageferry.core.os_hints import is_resource, resource_hint
from pageferry.core.threads import OutOfThreadsError, begin


def test_a_thread_is_begun_with_its_name_and_arguments():
    said = []
    thread = begin(lambda *arguments: said.append((threading.current_thread().name, arguments)), "mine", 1, 2)
    thread.join()
    assert said == [("mine", (1, 2))]
    assert thread.daemon


def test_a_lack_of_threads_is_an_error_of_the_system():
    before = threading.active_count()
    with no_more_threads(), pytest.raises(OutOfThreadsError, match=r"^no more threads can be started$") as told:
        begin(pytest.fail, "never")
    assert told.value.errno == errno.EAGAIN
    assert is_resource(told.value)
    assert "ulimit -u" in resource_hint(told.value)
    assert threading.active_count() == before
    begin(lambda: None, "again").join()


def test_nothing_begins_a_thread_in_another_way():
    package = Path(pageferry.__file__).parent
    begin_some = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"threading\.(Thread|Timer)\(|^class .*\bThread\)", path.read_text(), re.MULTILINE)
    ]
    assert sorted(begin_some) == ["core/threads.py", "engine/host.py"]
