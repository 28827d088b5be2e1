"""The process that renders templates: what it survives, what it is killed for, and with whom it ends."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import eventually, is_alive, needs_proc
from smelt.data.template_process import TemplateProcess
from smelt.errors import InvalidInput, UnsupportedModel

pytestmark = pytest.mark.timeout(60)

ENDLESS = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
RENDER_ENDLESSLY = "threading.Thread(target=p.render, args=(ENDLESS, {}), daemon=True).start()"


@pytest.fixture(scope="module")
def shared() -> Iterator[TemplateProcess]:
    process = TemplateProcess(max_seconds=5)
    yield process
    process.close()


def test_variables_go_there_and_texts_and_errors_come_back(shared: TemplateProcess) -> None:
    assert shared.render("{{ x.y[1] }} 🐈", {"x": {"y": ["a", "ü"]}}) == "ü 🐈"
    with pytest.raises(InvalidInput, match="refuses the conversation: no tools") as refused:
        shared.render("{{ raise_exception('no tools') }}", {})
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**9 }}", "too much memory"),
        ("{{ ('ab' * 10**8) | list }}", "too much memory"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ x.__class__.__mro__ }}", "SecurityError"),
        ("{% macro more() %}{{ more() }}{% endmacro %}{{ more() }}", "calls itself without end"),
        ("{{" + "(" * 10**5 + ")" * 10**5 + "}}", "calls itself without end|not valid|too much memory"),
    ],
)
def test_a_hostile_template_is_refused_and_the_next_rendering_works(
    shared: TemplateProcess, template: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        shared.render(template, {"x": 1})
    assert shared.render("{{ x }}", {"x": 1}) == "1"


@pytest.mark.parametrize("template", [ENDLESS, "{{ 7 ** (7 ** 12) }}"])
def test_what_takes_too_long_is_killed_and_the_next_rendering_works(template: str) -> None:
    process = TemplateProcess(max_seconds=0.3)
    process.start()
    killed = process.pid
    assert killed is not None
    started_at = time.monotonic()
    with pytest.raises(UnsupportedModel, match=r"longer than 0\.3 s"):
        process.render(template, {})
    assert time.monotonic() - started_at < 5
    assert not is_alive(killed)
    assert process.render("{{ x }}", {"x": 1}) == "1"
    process.close()


def test_a_process_that_was_killed_is_replaced() -> None:
    process = TemplateProcess()
    process.start()
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert process.render("{{ x }}", {"x": 1}) == "1"
    process.close()


def test_threads_share_one(shared: TemplateProcess) -> None:
    rendered: dict[int, str] = {}

    def render(number: int) -> None:
        rendered[number] = shared.render("{{ x }}", {"x": number})

    threads = [threading.Thread(target=render, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rendered == {number: str(number) for number in range(20)}


def test_it_imports_nothing_heavy() -> None:
    code = """
import sys
from smelt.data import template_process
print(sorted({"torch", "numpy", "pydantic", "tokenizers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_proc
def test_nothing_of_the_environment_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    process = TemplateProcess()
    process.start()
    assert b"hunter2" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    process.close()


@needs_proc
@pytest.mark.parametrize("work", ["", pytest.param(RENDER_ENDLESSLY, marks=pytest.mark.slow)])  # seconds of CPU time
def test_it_ends_with_its_starter(work: str) -> None:
    code = f"""
import os, signal, sys, threading
from smelt.data.template_process import TemplateProcess
ENDLESS = {ENDLESS!r}
p = TemplateProcess(max_seconds=60)
p.start()
print(p.pid, flush=True)
{work or "pass"}
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    assert is_alive(pid)
    starter.communicate("\n")
    eventually(lambda: not is_alive(pid), "the end of an orphan")
