"""What the pictures of all wings share: colours, and writing a file."""

import os
import tempfile
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart, and that stand out on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#332288")
MARKERS = "osD^vPX*"
INK, GREY, PALE = "#333333", "#9a9a9a", "#f4f4f4"


def save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a matplotlib figure as PNG in one step: after a kill the file is the old one or the new one."""
    with tempfile.NamedTemporaryFile(dir=Path(path).parent, suffix=".png", delete=False) as file:
        try:
            figure.savefig(file, format="png", dpi=150)
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
