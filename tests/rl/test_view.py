"""The picture of a run on a terminal, drawn where the last one stood."""

import io
import math
import re

import pytest

from glm5_jax.rl import view
from glm5_jax.rl.view import TerminalView, sparks


class Terminal(io.StringIO):
    """A screen that knows two commands: up n lines, clear below."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines: list[str] = []
        for part in re.split(r"(\x1b\[\d*[AJ]|\n)", self.getvalue()):
            if match := re.fullmatch(r"\x1b\[(\d*)([AJ])", part):
                if match[2] == "A":
                    at = len(lines) - int(match[1])
                    assert at >= 0
                else:
                    del lines[at:]
            elif part and part != "\n":
                lines.append(part)
        return lines


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr(view.shutil, "get_terminal_size", lambda: view.shutil.os.terminal_size((40, 6)))
    return Terminal()


def test_each_step_stands_where_the_last_one_stood(screen):
    one = TerminalView(["reward"], stream=screen)
    one.write(1, {"length": 5.0, "reward/sums": 0.25})
    one.write(2, {"length": 7.0, "reward/sums": 0.75})
    assert screen.screen() == ["step 2", "reward/sums        0.75  ▁█", "length                7  ▁█"]


def test_what_has_no_room_is_counted(screen):
    one = TerminalView(stream=screen)
    one.write(1, {f"m{i}": i for i in range(7)})
    lines = screen.screen()
    assert [line.split()[0] for line in lines] == ["step", "m0", "m1", "m2", "and"] and lines[-1] == "and 4 more"
    assert len(lines) < 6


def test_lines_end_where_the_terminal_does(screen):
    one = TerminalView(stream=screen)
    for step in range(100):
        one.write(step, {"a_name_of_some_length": step})
    assert max(map(len, screen.screen())) == 39


def test_a_file_gets_a_line_for_each_step():
    file = io.StringIO()
    one = TerminalView(["staleness", "reward"], stream=file)
    one.write(3, {"reward/sums": 0.5, "other": 1.0, "staleness/mean": 2})
    one.write(4, {"reward/sums": 1.0})
    assert file.getvalue() == "step 3  staleness/mean 2  reward/sums 0.5\nstep 4  reward/sums 1\n"


@pytest.mark.parametrize(("values", "expected"), [
    ([], ""), ([1, 1], "▁▁"), ([0, 7], "▁█"), ([0, math.nan, 7], "▁ █"), ([math.inf, 2], " ▁")])
def test_sparks(values, expected):
    assert sparks(values) == expected
