"""The package as a newcomer meets it: README's example, the two commands, a light import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


@pytest.mark.parametrize("number", range(5))
def test_the_readme_examples_run(number, capsys):
    example = blocks("python")[number]
    assert len(example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_readme_example_is_tested():
    assert len(blocks("python")) == 5


def test_the_readme_opens_with_the_two_commands():
    first, second = blocks("bash")[:2]
    assert "experiments/char_lm.py" in first
    assert "[test]" in second
    for tool in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert tool in second


def test_ci_runs_the_second_command_word_for_word():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    program = re.search(r"awk '(.*?)' README.md", script, re.S).group(1)
    found = subprocess.run(["awk", program, str(ROOT / "README.md")], capture_output=True, text=True, check=True)
    assert found.stdout == blocks("bash")[1]


def test_import_is_light():
    """At most 0.3 s beyond flax and optax (the best of three, as machines are noisy), and none of the heavy ones."""
    code = (
        "import sys, time, flax.linen, optax; t = time.process_time(); import hyperjax; "
        "print(time.process_time() - t, [m for m in ('tensorflow_datasets', 'matplotlib', 'orbax.checkpoint', 'torch') "
        "if m in set(sys.modules) - before])"
    ).replace("t = time", "before = set(sys.modules); t = time")
    best = 1e9
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        seconds, heavy = found.stdout.split(" ", 1)
        assert heavy.strip() == "[]"
        best = min(best, float(seconds))
    assert best < 0.3
