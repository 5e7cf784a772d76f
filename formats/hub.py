"""SAEs from the Hugging Face hub and to it: any known format in, this project's own or an export out, with a card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formats.common import first_line
from pipeline.errors import InputError, Stop
from pipeline.hub import connection_errors, explain

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:/(.+))?")
_KEPT: list[str] = ["*.json", "*.safetensors", "*.pt", "*.pth", "*.npz", "*.yaml", "*.parquet", "*.md"]


def is_hub_id(path: str) -> bool:
    return not Path(path).exists() and _ID.fullmatch(path) is not None


def fetch(hub_id: str) -> Path:
    """OWNER/NAME, or OWNER/NAME/FOLDER of it, in the hub's local cache. Raises Stop with the fix where it cannot be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    match = _ID.fullmatch(hub_id)
    assert match is not None
    repo, folder = match[1], (match[2] or "").strip("/")
    patterns = [f"{folder}/*"] if folder else _KEPT
    try:
        path = Path(snapshot_download(repo, allow_patterns=patterns))
    except HFValidationError as error:
        raise InputError(f"{hub_id} is no repository of the hub ({error}); write OWNER/NAME.") from None
    except LocalEntryNotFoundError as error:  # an OSError, which hides that of the network
        if isinstance(error.__cause__, connection_errors()):
            raise explain(error.__cause__, repo) from None
        raise Stop(f"{repo} cannot be fetched ({first_line(error)}); check the network and HF_ENDPOINT.") from None
    except (OSError, connection_errors()) as error:
        raise explain(error, repo) from None
    found = path / folder
    if not found.exists():
        raise InputError(f"{repo} has no {folder}; name one of its folders, or a file in it.")
    return found


def push(folder: Path, repo: str) -> str:
    """Upload a folder to a repository of the hub, made if it is not there. Returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a sparse autoencoder")
    except HFValidationError as error:
        raise InputError(f"{repo} is no name of a repository ({error}); write USER/NAME.") from None
    except (OSError, connection_errors()) as error:
        raise explain(error, repo) from None
    return str(address)


def card(info: Mapping[str, Any], name: str, repo: str, licence: str | None) -> str:
    """The model card of an SAE, from its JSON."""
    model = info.get("model") or {}
    quality = info.get("quality") or {}
    facts = {
        "model": model.get("name"),
        "site": info.get("site"),
        "transcoder to": info.get("target_site"),
        "gate": info.get("gate", "topk"),
        "latents": info.get("n_latents"),
        "k": info.get("k"),
        "normalisation": info.get("normalization", "layer_norm"),
        "begin-of-text before each text": info.get("begin_of_text"),
        "trained on activations": f"{info['tokens_trained']:,}" if info.get("tokens_trained") else None,
        "FVU, held out": round(quality["val_fvu"], 4) if quality.get("val_fvu") else None,
        "dead latents": f"{quality['dead_frac']:.2%}" if quality.get("dead_frac") is not None else None,
    }
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts.items() if value is not None)
    licensed = [f"license: {licence}"] if licence else []
    header = ["---", "tags: [sparse-autoencoder, interpretability]", *licensed, "---"]
    return "\n".join(
        [
            *header,
            f"# {name}",
            "",
            f"A sparse autoencoder of {model.get('name', 'a Llama')} at `{info.get('site')}`.",
            "",
            "| | |\n|---|---|",
            rows,
            "",
            "In Python, in the folder of the project that trained it:",
            "",
            "```python",
            "from sae import load_sae_model",
            "",
            f'sae = load_sae_model("{name}.pth")  # after: python sae_convert.py import {repo} --pull',
            "values, indices = sae.encode(activations)  # raw activations of the site",
            "```",
            "",
            "For SAELens: `python sae_convert.py export NAME.pth --to saelens --output_path FOLDER`, then",
            "`SAE.load_from_disk(FOLDER)`.",
            "",
            ""
            if licence
            else "The licence is the uploader's to state; the model's own licence holds for what is made of it.",
        ]
    )
