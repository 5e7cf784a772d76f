"""For the scripts that fetch from the Hugging Face hub: the files it lists, and its errors in a sentence."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, Stop
from pipeline.files import sha256


def describe_file(listed: Any) -> dict[str, Any]:
    """source (its path in the repository), bytes, and the hub's checksum.

    The checksum is sha256 for a large file, git_sha1 (git's blob id) for a small one.
    """
    checksum = {"sha256": listed.lfs.sha256} if listed.lfs else {"git_sha1": listed.blob_id}
    return {"source": listed.rfilename, "bytes": listed.lfs.size if listed.lfs else listed.size, **checksum}


@contextlib.contextmanager
def answers_of_a_hub() -> Iterator[None]:
    """Raise InputError if the block trips over an answer that no hub would give."""
    from huggingface_hub import constants

    try:
        yield
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(
            f"{constants.ENDPOINT} does not answer as the Hugging Face hub does; check HF_ENDPOINT and the network."
        ) from None


def is_whole(path: Path, file: dict[str, Any]) -> bool:
    """Whether the file at `path` has the size and the checksum that the hub states."""
    if path.stat().st_size != file["bytes"]:
        return False
    if "sha256" in file:
        return sha256(path) == file["sha256"]
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file["git_sha1"]


def explain(error: Exception, repo: str) -> Stop:
    """What to raise for an error of the hub, the network or the disk: a sentence with the fix.

    InputError if the repository, the token or a setting is at fault; a plain Stop if running again may help.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    hub, page, settings = constants.ENDPOINT, f"https://huggingface.co/{repo}", "https://huggingface.co/settings/tokens"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    token = get_token()
    if isinstance(error, GatedRepoError) and not token:
        return InputError(
            f"{repo} needs a token: accept the licence at {page}, make a token at {settings}, put it into HF_TOKEN."
        )
    if status == 403 and token:
        return InputError(
            f"Your token may not read {repo}: accept the licence at {page} with the token's account, wait until that "
            f"page says granted, and let the token read gated repositories ({settings})."
        )
    if status == 401 and token:
        return InputError(f"{hub} refuses your token; make a new one at {settings} and put it into HF_TOKEN.")
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"{repo} no longer has the commit this folder was begun with; remove the folder and run again."
        )
    if status in (401, 404):
        return InputError(f"{hub} does not have {repo} or its files ({status}); see whether {page} is still there.")
    if status is not None:
        return Stop(f"{hub} answered {status} to the request for {repo}; run again later to continue.")
    if isinstance(error, OfflineModeIsEnabled):
        return InputError("HF_HUB_OFFLINE is set; unset it to fetch a model.")
    if isinstance(error, connection_errors()):
        return Stop(f"No connection to {hub} ({error}); check the network and HF_ENDPOINT, and run again to continue.")
    return Stop(
        f"{repo} could not be written ({error}); free some disk or name another folder, and run again to continue."
    )


def connection_errors() -> type[Exception]:
    """The base class of all errors of the hub's client, connection errors included."""
    from huggingface_hub import errors

    return errors.HTTPError  # pyright: ignore[reportPrivateImportUsage] # of an HTTP library that has changed before
