"""The engine waits by its host alone, so that the simulation can be its clock and its threads."""

import ast
from pathlib import Path

import pageferry.engine

ENGINE = Path(pageferry.engine.__file__).parent
#: What has a real network or a file under it, which no simulation runs.
REAL = {"host.py", "wire/channel.py", "wire/listener.py", "wire/carrier.py", "image/lazy.py", "image/outlet.py"}
WAITS = {"Thread", "Timer", "Condition", "Event", "Semaphore", "Barrier"}


def waits_of(source):
    """Return what a module uses that waits, or tells the time, by itself."""
    nodes = list(ast.walk(ast.parse(source)))
    imports = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imports |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    calls = [node.func for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    made = {call.attr for call in calls if isinstance(call.value, ast.Name) and call.value.id == "threading"}
    return imports & {"time", "queue", "select", "selectors"} | made & WAITS


def test_the_engine_waits_by_its_host_alone():
    files = {str(path.relative_to(ENGINE)): path for path in ENGINE.rglob("*.py")}
    assert {name for name, path in files.items() if waits_of(path.read_text())} == REAL


def test_a_wait_by_itself_is_found():
    assert waits_of("import threading\nthreading.Event().wait()") == {"Event"}
    assert waits_of("import time") == {"time"}
