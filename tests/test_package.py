"""The package as a newcomer meets it: README's example, the two commands, a light import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PAGES = {"README.md": (12, 30, 30, 30), "hyperjax/README.md": (12,) * 5}  # the longest that each example may be
COLAB = "https://colab.research.google.com/github/hyperjax/hyperjax/blob/main/"


def blocks(language, page="README.md"):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize(("page", "number"), [(page, n) for page, most in PAGES.items() for n in range(len(most))])
def test_the_examples_run(page, number, capsys):
    example = blocks("python", page)[number]
    assert len(example.splitlines()) <= PAGES[page][number]
    exec(compile(example, page, "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_example_is_tested():
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *ROOT.glob("*/README.md"))]
    found = {page: len(blocks("python", page)) for page in pages}
    assert {page: number for page, number in found.items() if number} == {p: len(most) for p, most in PAGES.items()}


def anchors(path):
    titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["README.md", "hyperjax/README.md", "experiments/README.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links or page == "hyperjax/README.md"
    for link in links:
        path, _, title = link.removeprefix(COLAB).partition("#")
        there = (ROOT if link.startswith(COLAB) else (ROOT / page).parent) / path
        assert there.exists(), link
        assert not title or title in anchors(there), link


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
