"""The Python tool: what it keeps, what it tells a model, and what code can do to it."""

import dataclasses
import json
import os
import select
import signal
import sys
import threading

import pytest

from glm5_jax.envs.sandbox import Limits, Sandbox, SandboxUnavailable
from glm5_jax.envs.tools_python import CallOutcome, PythonTool

FORGE = "import os\nfor f in range(3, 20):\n  try: os.write(f, {} + b'\\n')\n  except OSError: pass"
ROOMY = Limits(memory_bytes=200 * 2**20)


def wait_for_end(tool):
    """The kernel takes its time to kill; the call must not come before."""
    assert select.select([tool._process._leader], [], [], 60)[0]


@pytest.fixture(scope="module")
def shared():
    """One interpreter for the tests that do not break it."""
    with PythonTool(Sandbox(limits=ROOMY), call_s=60) as tool:
        yield tool


@pytest.mark.parametrize("code, output, value", [
    ("1 + 1", "", "2"),
    ("print('a')\n'b'", "a\n", "'b'"),
    ("x = 3", "", None),
    ("None", "", None),
    ("", "", None),
    ("def f(n):\n    return n + 1\nf(2);", "", "3"),
    ("import sys\nprint('out')\nprint('err', file=sys.stderr)\nprint('out')", "out\nerr\nout\n", None),
    ("import os\nprint('first')\nos.system('echo child')", "first\nchild\n", "0"),
    ("'täglich 漢字 \\U0001F600'", "", "'täglich 漢字 \U0001F600'"),
    ("print('\\ud800')", "\\ud800\n", None),
    ("__name__", "", "'__main__'"),
    ("class A: pass\nimport pickle\nlen(pickle.dumps(A())) > 0", "", "True"),
])
def test_output_and_value(shared, code, output, value):
    result = shared.call(code)
    assert (result.outcome, result.output, result.value, result.error) == ("ok", output, value, None)


def test_variables_imports_and_files_are_kept(shared):
    for code in ("import math\nradius = 2", "def area(): return math.pi * radius ** 2", "open('f', 'w').write('kept')"):
        assert shared.call(code).outcome is CallOutcome.OK
    assert shared.call("round(area(), 3), open('f').read()").value == "(12.566, 'kept')"
    assert shared.call("1 / 0").state_kept
    assert shared.call("radius").value == "2"


@pytest.mark.parametrize("code, last", [
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("def f(:", "SyntaxError: invalid syntax"),
    ("input()", "EOFError: EOF when reading a line"),
    ("exit(3)", "SystemExit: 3"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("class A:\n    def __repr__(self): raise ValueError('no')\nA()", "ValueError: no"),
    ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "E: <exception str() failed>"),
    ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    ("import socket\nsocket.create_connection(('192.0.2.1', 80))", "OSError: [Errno 101] Network is unreachable"),
])
def test_an_exception_is_text(shared, code, last):
    result = shared.call(code)
    assert result.outcome is CallOutcome.ERROR
    assert result.error.splitlines()[-1] == last


def test_a_traceback_shows_the_code_and_nothing_of_the_host(shared):
    error = shared.call("import json\ndef load(text):\n    return json.loads(text)\nload('{')").error
    lines = error.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].startswith('  File "<call ') and lines[2] == "    load('{')"
    assert "return json.loads(text)" in error
    assert sys.base_prefix == "/usr" or sys.base_prefix not in error
    assert "python_driver" not in error and "evaluate" not in error


def test_output_is_cut_and_the_state_stays():
    with PythonTool(Sandbox(limits=ROOMY), call_s=60, output_chars=100) as tool:
        result = tool.call("x = 1\nprint('a' * 5_000_000)\n'b' * 5_000_000")
        assert (result.outcome, result.output, result.truncated) == ("ok", "a" * 100, True)
        assert len(result.value) == 100
        assert "cut to 100 characters" in result.text()
        assert tool.call("x").text() == "1"
        fits, cut = tool.call("'b' * 98"), tool.call("'b' * 99")
        assert [(len(result.value), result.truncated) for result in (fits, cut)] == [(100, False), (100, True)]
        failed = tool.call("raise ValueError('c' * 1000)")
        assert (len(failed.error), failed.error[-2:], failed.truncated) == (100, "c\n", True)


@pytest.mark.parametrize("key", ["value", "error"])
def test_output_is_cut_whatever_the_code_replaces(key):
    with PythonTool(Sandbox(limits=ROOMY), call_s=60, output_chars=100) as tool:
        result = tool.call(f"import json\nold = json.dumps\njson.dumps = lambda x: old({{**x, '{key}': 'a' * 1000}})")
        assert (getattr(result, key), result.truncated) == ("a" * 100, True)


def test_text_can_be_encoded(shared):
    result = shared.call("class A:\n    def __repr__(self): return '\\ud800'\nA()")
    assert result.value == "\\ud800"
    assert shared.call("raise ValueError('\\ud800')").error.endswith("ValueError: \\ud800\n")


@pytest.mark.parametrize("code, outcome", [
    ("import os; os._exit(4)", "exit"),
    ("import ctypes; ctypes.string_at(0)", "exit"),
    ("import os; os.closerange(0, 100)", "exit"),
    ("import ctypes; ctypes.CDLL(None).unshare(0x10000000)", "blocked"),
    ("held = []\nwhile True: held.append(b'x' * 10**6)", "memory"),
    # Forged replies: not JSON, not an object, too deep, another number; then one without text, and one too long.
    (FORGE.format("b'{'"), "protocol"),
    (FORGE.format("b'[1]'"), "protocol"),
    (FORGE.format("b'[' * 100_000"), "protocol"),
    (FORGE.format("b'{\"id\": \"1\"}'"), "protocol"),
    ("import json\nold = json.dumps\njson.dumps = lambda x: old({**x, 'value': {}})", "protocol"),
    ("import json\njson.dumps = lambda x: 'x' * 10**7", "output"),
])
def test_a_lost_interpreter_is_told_and_replaced(code, outcome):
    with PythonTool(Sandbox(limits=ROOMY), call_s=60) as tool:
        assert tool.call("x = 1").outcome is CallOutcome.OK
        result = tool.call(code)
        assert (result.outcome, result.state_kept) == (outcome, False)
        assert "All variables are lost" in result.text()
        assert tool.call("x").error.endswith("NameError: name 'x' is not defined\n")


def test_a_call_has_its_time():
    with PythonTool(Sandbox(limits=ROOMY), call_s=0.5) as tool:
        result = tool.call("while True: pass")
        assert result.outcome is CallOutcome.TIMEOUT
        assert "longer than 0.5 s" in result.text()


def test_output_before_the_end_is_kept():
    with PythonTool(Sandbox(limits=ROOMY), call_s=60) as tool:
        result = tool.call("import os\nprint('begun', flush=True)\nos._exit(4)")
        assert (result.outcome, result.output) == (CallOutcome.EXIT, "begun\n")


def test_an_interpreter_killed_from_outside_is_told_and_replaced():
    with PythonTool(Sandbox(limits=ROOMY), call_s=60) as tool:
        assert tool.call("1").value == "1"
        os.kill(tool._process._popen.pid, signal.SIGKILL)
        wait_for_end(tool)
        result = tool.call("2")
        assert (result.outcome, result.state_kept) == (CallOutcome.KILLED, False)
        assert "killed from outside" in result.text()
        assert tool.call("3").value == "3"


def test_an_interpreter_ends_with_its_thread_and_is_replaced():
    with PythonTool(Sandbox(limits=ROOMY), call_s=60) as tool:
        thread = threading.Thread(target=tool.call, args=("1",))
        thread.start()
        thread.join()
        wait_for_end(tool)
        assert tool.call("2").outcome is CallOutcome.KILLED
        assert tool.call("3").value == "3"


def test_an_interrupted_call_is_not_answered_to_the_next(monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt
    with PythonTool(Sandbox(limits=ROOMY), call_s=60) as tool:
        assert tool.call("x = 1").outcome is CallOutcome.OK
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(tool._process, "exchange", interrupted)
            tool.call("x = 2")
        assert tool.call("x").error.endswith("NameError: name 'x' is not defined\n")


def test_the_definition_is_a_json_schema_of_call():
    function = json.loads(json.dumps(PythonTool.definition))["function"]
    assert function["name"] == "python"
    with PythonTool(Sandbox(limits=ROOMY), call_s=60) as tool:
        assert tool.call(**dict.fromkeys(function["parameters"]["required"], "2")).text() == "2"


def test_wrong_limits_are_named():
    for call_s in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="call_s"):
            PythonTool(call_s=call_s)
    for output_chars in (0, 2.5):
        with pytest.raises(ValueError, match="output_chars"):
            PythonTool(output_chars=output_chars)


def test_no_sandbox_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable), PythonTool() as tool:
        tool.call("1")


def test_plain_mode_works_too():
    with pytest.warns(UserWarning):
        sandbox = Sandbox(mode="subprocess", limits=dataclasses.replace(ROOMY, memory_bytes=2**30))
    with PythonTool(sandbox, call_s=60) as tool:
        assert tool.call("6 * 7").text() == "42"
