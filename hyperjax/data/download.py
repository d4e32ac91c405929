"""Downloads that give up quickly, and that leave either a whole file or nothing."""

import http.client
import os
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import IO

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0


def data_root() -> Path:
    """Returns the folder of prepared and downloaded data: `TFDS_DATA_DIR`, or `~/tensorflow_datasets`."""
    return user_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def user_path(path: str | os.PathLike) -> Path:
    """Returns a path with a leading `~` replaced, where there is such a home."""
    return Path(os.path.expanduser(path))


def download_folder() -> Path:
    """Returns the folder that downloads are kept in."""
    return data_root() / "downloads" / "hyperjax"


def download(url: str, advice: str) -> Path:
    """Downloads an archive into `download_folder()`, once: a file that is there already is taken as it is.

    Args:
        url: what to download.
        advice: what a user without a network can do: the end of the error message.

    Returns:
        The archive's path.

    Raises:
        ValueError: no answer within `CONNECT_SECONDS`, a broken transfer, something that is no archive, or a folder
            that cannot be written.
    """
    target = download_folder() / url.rsplit("/", 1)[-1]
    if os.path.isfile(target):
        return target
    response = connect(url, advice)
    part = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, suffix=".part", delete=False) as file:
            part = file.name
            _copy(response, file, target.name)
        if not (zipfile.is_zipfile(part) or tarfile.is_tarfile(part)):
            raise OSError("what came is no archive")
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"cannot download {url} to {target} ({one_line(error)}); {advice}") from error
    finally:
        response.close()
        if part:
            Path(part).unlink(missing_ok=True)
    return target


def connect(url: str, advice: str):
    """Opens a URL, or gives up after `CONNECT_SECONDS`, in a thread: looking a name up has no time limit of its own."""
    import urllib.error
    import urllib.request

    answers: list = []

    def connect() -> None:
        try:
            answers.append(urllib.request.urlopen(url, timeout=READ_SECONDS))
        except urllib.error.HTTPError as error:
            error.close()
            answers.append(error)
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if not answers:
        raise ValueError(f"no answer from {url} within {CONNECT_SECONDS:g} seconds; {advice}")
    if isinstance(answers[0], Exception):
        raise ValueError(f"cannot reach {url} ({one_line(answers[0])}); {advice}") from answers[0]
    return answers[0]


def _copy(response, file: IO[bytes], name: str) -> None:
    """Copies a response into a file under a progress bar; raises OSError if it ends early."""
    import tqdm

    size = int(response.headers.get("Content-Length") or 0)
    with tqdm.tqdm(total=size or None, unit="B", unit_scale=True, desc=name, leave=False) as bar:
        while block := response.read(1 << 16):
            file.write(block)
            bar.update(len(block))
        if size and bar.n != size:
            raise OSError(f"{bar.n} of {size} bytes came")


def one_line(error: BaseException, limit: int = 200) -> str:
    """Returns an exception's message on one line of at most `limit` characters, or its class if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
