"""What the tests of whole migrations share; the classes are in tests/helpers."""

import subprocess

import pytest
from at_work import runs_on
from processes import PAGEFERRY, Process, launch, reap
from terminal import Console
from trips import Move

from pageferry.engine.destination import Destination


@pytest.fixture
def start(tmp_path):
    """Starts processes with a control socket, by the arguments of the command line, and ends them."""
    made = []

    def begin(*arguments, name=None, within=()):
        made.append(Process(tmp_path, name or f"process{len(made)}", *arguments, within=within))
        return made[-1]

    yield begin
    for process in made:
        process.end()


@pytest.fixture
def background():
    """Starts commands of pageferry's that go on while the test does; what they print comes through pipes."""
    made = []

    def begin(*arguments, **options):
        command = [*PAGEFERRY, *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        made.append(launch(command, **options))
        return made[-1]

    yield begin
    for popen in made:
        reap(popen)


@pytest.fixture
def seat():
    """Starts commands of pageferry's that the test works with, and ends them."""
    made = []

    def begin(*arguments, **options):
        made.append(Console(*arguments, **options))
        return made[-1]

    yield begin
    for console in made:
        console.close()


@pytest.fixture
def inn(inns, make_vm):
    """A destination of the accel under test."""
    return inns(make_vm)


@pytest.fixture
def move(inns, make_vm):
    """Makes taped migrations of a guest to a machine of its kind; ``kind`` is the class of the destination."""

    def make(vm, kind=Destination):
        inn = inns(make_vm)
        inn.kind = kind
        return Move(vm, inn)

    return make


@pytest.fixture
def running(guests):
    """Makes guests that run and have done some work."""

    def make(*arguments, **options):
        vm = guests(*arguments, **options)
        vm.resume()
        assert runs_on(vm)
        return vm

    return make
