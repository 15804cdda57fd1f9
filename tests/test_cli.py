"""The dsv3 command: names, lazy imports, and errors in words."""

import argparse
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from dsv3lib import cli
from dsv3lib.errors import DataError


def command_that(monkeypatch, action, arguments=lambda parser: None):
    """A table with the one command `probe`, whose run() does `action`."""
    module = types.ModuleType("probe_module")
    module.add_arguments = arguments
    module.run = action
    monkeypatch.setitem(sys.modules, "probe_module", module)
    return {"probe": cli.Command("probe_module", "probe things")}


def raise_(error):
    """An action that raises."""

    def action(_):
        raise error

    return action


def test_no_command_lists_them_all(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in shown and command.help in shown


def test_status_and_arguments_reach_the_command(monkeypatch):
    seen = []

    def action(args: argparse.Namespace) -> int:
        seen.append(args.steps)
        return 7

    commands = command_that(monkeypatch, action, lambda parser: parser.add_argument("--steps", type=int))
    assert cli.main(["probe", "--steps", "3"], commands) == 7
    assert seen == [3]


@pytest.mark.parametrize("argv", [["nope"], ["probe", "--nope"]])
def test_unknown_words_are_refused(monkeypatch, capsys, argv):
    commands = command_that(monkeypatch, lambda args: 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(argv, commands)
    assert stop.value.code == 2
    assert "nope" in capsys.readouterr().err


def test_a_project_error_is_one_line_without_traceback(monkeypatch, capsys):
    commands = command_that(monkeypatch, raise_(DataError("folder 'x' is empty;\n give --data another")))
    assert cli.main(["probe"], commands) == cli.EXIT_ERROR == 2
    assert capsys.readouterr().err == "DataError: folder 'x' is empty; give --data another\n"


@pytest.mark.parametrize("argv", [["--debug", "probe"], ["probe", "--debug"]])
def test_debug_shows_the_traceback(monkeypatch, capsys, argv):
    commands = command_that(monkeypatch, raise_(DataError("bad")))
    assert cli.main(argv, commands) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("DataError: bad\n")


def test_markup_in_a_message_is_shown_as_it_is(monkeypatch, capsys):
    commands = command_that(monkeypatch, raise_(DataError("shape [B, T] and [/x]")))
    assert cli.main(["probe"], commands) == 2
    assert "shape [B, T] and [/x]" in capsys.readouterr().err


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    commands = command_that(monkeypatch, raise_(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"], commands)


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    commands = command_that(monkeypatch, raise_(KeyboardInterrupt()))
    assert cli.main(["probe"], commands) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_broken_import_stops_its_own_command_only(monkeypatch, capsys):
    commands = command_that(monkeypatch, lambda args: 0)
    commands["broken"] = cli.Command("a_module_that_is_not_there", "break")
    assert cli.main(["broken"], commands) == 2
    assert "a_module_that_is_not_there" in capsys.readouterr().err
    assert cli.main(["probe"], commands) == 0


def test_each_shipped_command_has_the_two_functions():
    for name, command in cli.COMMANDS.items():
        module = __import__(command.module, fromlist=["run"])
        module.add_arguments(argparse.ArgumentParser(prog=name))
        assert callable(module.run)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from dsv3lib.cli import main; main([]); "
        "heavy = {'torch', 'matplotlib', 'transformers', 'IPython'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "dsv3lib.cli", "doctor", "--json"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writing)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.returncode == 0


def test_a_real_ctrl_c_ends_a_real_process_cleanly(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import time\n"
        "def add_arguments(parser): pass\n"
        "def run(args):\n    print('started', flush=True)\n    time.sleep(60)\n    return 0\n"
    )
    code = "from dsv3lib.cli import *; raise SystemExit(main(['s'], {'s': Command('sleeper', 's')}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
