"""Which tests `make test-fast` runs: unit tests that start no process, train no model and need no real one.

A test gets the marker `fast` by what it is: where its file stands, which fixtures it takes, and which functions of its
own file and of tests/support/ it uses. `no_processes` holds the marked tests to it.
"""

import sys
import types
from contextlib import contextmanager

SLOW_FIXTURES = {"smollm2", "task_data", "compiler"}
# These learn tasks, run commands on a stream that has learned some, or start processes through the package.
SLOW_FOLDERS = {"whole", "commands", "learning", "serving", "report"}
SLOW_FILES = {
    "test_first_try.py",
    "test_renderer.py",
    "test_apply_template.py",
    "test_run.py",
    "test_one_way.py",
    "test_targets.py",
    "test_awake.py",
}
# Measure memory, on tensors that are large enough for it.
SLOW_TESTS = {
    "test_with_checkpointing_logits_keep_to_their_budget_on_mlx_lms_way_too",
    "test_no_more_than_one_unpacked_weight_is_alive_on_the_way_back_either",
}
PROCESSES = {"subprocess", "multiprocessing", "Popen", "fork"}
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}  # what Python's audit calls them

_running = []  # name of the fast test that runs now, if one does


def is_fast(item):
    """Return whether `make test-fast` runs a test that pytest has collected."""
    if item.get_closest_marker("slow") or item.get_closest_marker("release") or SLOW_FIXTURES & set(item.fixturenames):
        return False
    if item.path.parent.name in SLOW_FOLDERS or item.path.name in SLOW_FILES or item.function.__name__ in SLOW_TESTS:
        return False
    fixtures = [each.func for found in item._fixtureinfo.name2fixturedefs.values() for each in found]
    return not any(_starts_processes(function, set()) for function in (item.function, *fixtures))


@contextmanager
def no_processes(name):
    """While this is open for the test `name`, starting a process raises RuntimeError."""
    _running.append(name)
    try:
        yield
    finally:
        _running.clear()


def _refuse_processes(event, arguments):
    if _running and event in STARTS and not _renders(event, arguments):
        raise RuntimeError(f"{_running[0]} starts a process: tests/support/fast.py says why it may not")


sys.addaudithook(_refuse_processes)


def _renders(event, arguments):
    """Return whether a process is the one that renders chat templates: it is started once for all tests."""
    return event == "subprocess.Popen" and any(str(word).endswith("template_child.py") for word in arguments[1])


def _starts_processes(used, seen):
    """Return whether a function, class or module of the tests names what starts a process, or uses one that does."""
    if isinstance(used, type):
        return any(_starts_processes(method, seen) for method in vars(used).values())
    if isinstance(used, types.ModuleType):
        return bool(PROCESSES & vars(used).keys())
    used = getattr(used, "__wrapped__", used)
    if not isinstance(used, types.FunctionType) or used in seen:
        return False
    seen.add(used)
    names = _names(used.__code__)
    inside = [value for name, value in used.__globals__.items() if name in names and _is_ours(value)]
    return bool(names & PROCESSES) or any(_starts_processes(each, seen) for each in inside)


def _is_ours(value):
    return (getattr(value, "__module__", None) or getattr(value, "__name__", "")).startswith("tests.")


def _names(code):
    """Return the names that a function uses, those of functions inside it included."""
    return set(code.co_names).union(*(_names(each) for each in code.co_consts if isinstance(each, types.CodeType)))
