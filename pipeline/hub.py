"""What the scripts that fetch from the Hugging Face hub share: checks of what arrives, errors in a sentence."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.files import sha256


def is_whole(path: Path, file: dict[str, Any]) -> bool:
    """Whether the file at `path` has the size and the checksum that the hub states."""
    if path.stat().st_size != file["bytes"]:
        return False
    if "sha256" in file:
        return sha256(path) == file["sha256"]
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file["git_sha1"]


def explain(error: Exception, repo: str) -> str:
    """One sentence, with the mend, for an error of the hub, the way to it, or the disk."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    hub, page, settings = constants.ENDPOINT, f"https://huggingface.co/{repo}", "https://huggingface.co/settings/tokens"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    token = get_token()
    if isinstance(error, GatedRepoError) and not token:
        return f"{repo} needs a token: accept the licence at {page}, make a token at {settings}, put it into HF_TOKEN."
    if status == 403 and token:
        return (
            f"Your token may not read {repo}: accept the licence at {page} with the token's account, wait until that "
            f"page says granted, and let the token read gated repositories ({settings})."
        )
    if status == 401 and token:
        return f"{hub} refuses your token; make a new one at {settings} and put it into HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} no longer has the commit this folder was begun with; remove the folder and run again."
    if status in (401, 404):
        return f"{hub} does not have {repo} or its files ({status}); see whether {page} is still there."
    if status is not None:
        return f"{hub} answered {status} to the request for {repo}; run again later, it continues."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to fetch a model."
    if isinstance(error, HTTPError):
        return f"No connection to {hub} ({error}); check the network and HF_ENDPOINT and run again, it continues."
    return f"{repo} could not be written ({error}); free some disk or name another folder, and run again to continue."
