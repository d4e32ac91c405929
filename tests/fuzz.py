"""What the fuzz tests share: damaged bytes, nonsense as JSON, and what an answer to them may be.

HYPERJAX_FUZZ_EXAMPLES says how many inputs each test draws (20 by default, the same ones every time).
"""

import json
import os
import traceback
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
OURS = (ROOT / "hyperjax", ROOT / "experiments")
GIVEN = os.environ.get("HYPERJAX_FUZZ_EXAMPLES")
EXAMPLES = int(GIVEN or 20)

NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def drawn(share=1.0):
    """Settings of a test whose examples cost more, the smaller its share of them."""
    return settings(
        max_examples=max(3, round(EXAMPLES * share)),
        deadline=None,
        database=None,
        derandomize=GIVEN is None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw, whole):
    """Bytes of a file: cut, with bytes changed, with some put in or left out; or others altogether."""
    kind = draw(st.sampled_from(("flip", "flip", "cut", "insert", "remove", "other", "repeat")))
    if kind == "other":
        return draw(st.binary(max_size=200))
    raw = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        if kind == "flip" and raw:
            raw[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at:]
        elif kind == "insert":
            raw[at:at] = draw(st.binary(max_size=12))
        elif kind == "remove":
            del raw[at : at + draw(st.integers(1, 40))]
        elif kind == "repeat":
            raw[at:at] = raw[at : at + 300]
    return bytes(raw)


@st.composite
def edited(draw, whole):
    """Text of a JSON file: with values or names changed, or not JSON at all."""
    if draw(st.booleans()):
        return draw(damaged(json.dumps(whole).encode()))
    value = dict(whole)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(whole)))
        change = draw(st.sampled_from(("value", "remove", "add", "all")))
        if change == "value":
            value[name] = draw(NONSENSE)
        elif change == "remove":
            value.pop(name, None)
        elif change == "add":
            value[draw(st.text(max_size=8))] = draw(NONSENSE)
        else:
            return json.dumps(draw(NONSENSE)).encode()
    return json.dumps(value).encode()


def answer(function, *arguments):
    """Calls it; returns what it returned, or the one line of the ValueError that our own code raised."""
    try:
        return function(*arguments)
    except ValueError as caught:
        error = caught
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    assert any(folder in origin.parents for folder in OURS), f"raised by {origin}: {error!r}"
    assert str(error).strip()
    return str(error)
