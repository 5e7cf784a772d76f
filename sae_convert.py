"""Open sparse autoencoders of other tools here, and write ours in their formats; each conversion is checked.

Reads   import: PATH, a folder, a file, or OWNER/NAME[/FOLDER] of the hub, in a format that it tells by its files;
        export: PATH, an SAE with its JSON. LLAMA_MODEL_DIR, if given, for activations and measurements
Writes  import: OUTPUT_PATH, NAME.pth with NAME.json; export: OUTPUT_PATH, a folder or file in the format TO; with PUSH
        a repository of the hub
Method  formats/, a module per format. What was read or written is compared with the formula that the other tool
        computes, and with the tool itself where it is installed; a difference above 1e-4 ends the run, with nothing
        written. With a model, import measures the SAE at its site and at the layers beside it
Cost    a copy of the SAE in memory and on disk; with a model about 10 passes over NUM_SENTENCES texts

    python sae_convert.py import EleutherAI/sae-llama-3.1-8b-32x/layers.23 --output_path data/eleuther.pth
    python sae_convert.py import data/goodfire.pth --site layers.19.resid_post --output_path data/goodfire_19.pth
    python sae_convert.py export data/sae.pth --to saelens --output_path data/sae_saelens
    python sae_convert.py export data/sae.pth --push USER/NAME
    python sae_convert.py import USER/NAME --pull --output_path data/theirs.pth
"""

from pathlib import Path
from typing import Literal

from pipeline.options import Count, parse_constants
from pipeline.run import run

_Format = Literal[
    "saelens", "sparsify", "dictionary_learning", "openai", "llamascope", "gemmascope", "sae_dashboard", "neuronpedia"
]

PATH: str  # import: a folder, a file or OWNER/NAME[/FOLDER] of the hub; export: the SAE, NAME.pth
OUTPUT_PATH: str | None = None  # import: the SAE to write, NAME.pth; export: the folder to write
TO: _Format | None = None  # export: the format; the last two show latents, the others hold the SAE itself
PUSH: str | None = None  # export: USER/NAME of the hub to upload to, with a card; without TO in this project's format
PULL = False  # import: the repository holds an SAE of this project; fetch it as it is
LICENCE: str | None = None  # of what is pushed, such as apache-2.0, for the card
SITE: str | None = None  # import: where the SAE reads, such as layers.15.resid_post, if its files do not say
BEGIN_OF_TEXT: bool | None = None  # import: whether it was trained on texts after begin-of-text; true if nobody says
LLAMA_MODEL_DIR: str | None = None  # the SAE's model: for real activations, and for import's measurements
NUM_SENTENCES: Count = 300  # texts of these
MAX_TOKENS: Count = 128  # of each text
TEXT_PATH = str(Path(__file__).parent / "llama_3" / "smollm2" / "dialogues.parquet")  # documents

_COMMANDS = {"import": "open an SAE of another tool", "export": "write an SAE for another tool"}
_ARGUMENT = "path"

if __name__ == "__main__":
    run(lambda: parse_constants(globals(), commands=_COMMANDS, argument=_ARGUMENT))  # before the slow imports

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autoencoder.evaluation import evaluate
from formats import hub
from formats.common import Foreign, Ours, Place
from formats.comparison import Difference, difference, made_up_activations
from formats.dashboards import Known, write_neuronpedia, write_sae_dashboard
from formats.table import FORMATS, Format, recognise
from llama_3 import load_model, load_tokenizer
from llama_3.checkpoint import checkpoint_identity
from llama_3.model import Transformer, check_site
from llama_3.tokenizer import Tokenizer
from pipeline.documents import first_texts
from pipeline.errors import InputError, Stop
from pipeline.files import require_writable
from pipeline.manifests import git_commit
from pipeline.sae_files import SaeFiles
from pipeline.source import Source
from sae import SparseAutoencoder, load_sae_model, save_sae
from serving.constant_steering import stds

_ROWS = 512  # activations compared
_FVU, _RECOVERED = 0.6, 0.8  # a published SAE leaves less unexplained than the first, and recovers more than the second


class Model(NamedTuple):
    """The SAE's model, and texts for it."""

    folder: str
    model: Transformer
    tokenizer: Tokenizer
    sentences: list[list[int]]  # token ids, without begin-of-text


def open_model(folder: str, text_path: str, n: int, max_tokens: int) -> Model:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(folder)
    encoded = [tokenizer.encode(text)[:max_tokens] for text in first_texts(text_path, n)]
    return Model(folder, load_model(folder, device, packed=True), tokenizer, [ids for ids in encoded if len(ids) > 1])


def activations(sae: SparseAutoencoder, opened: Model | None) -> Tensor:
    """Raw activations (n, d_model) to compare on: of the model's texts, or made up without a model."""
    if opened is None:
        return made_up_activations(sae)
    starts = [opened.tokenizer.bos_id] if sae.info.get("begin_of_text") and opened.tokenizer.bos_id is not None else []
    rows = []
    with torch.inference_mode():
        for ids in opened.sentences:
            tokens = torch.tensor([starts + ids], device=opened.model.device)
            rows.append(opened.model.activations(tokens, sae.site)[0, len(starts) :].float().cpu())
            if sum(map(len, rows)) >= _ROWS:
                break
    return torch.cat(rows)[:_ROWS].clone()


def compare(sae: SparseAutoencoder, foreign: Foreign, row: Format, x: Tensor) -> list[tuple[str, Difference]]:
    """Against the format's formula, and its own program where that is installed."""
    found = [("its formula", difference(sae, x, row.formula(foreign, x)))]
    if row.package is not None and (theirs := row.package(foreign.path, x)) is not None:
        found.append(("its own program", difference(sae, x, theirs)))
    return found


def refuse_differences(found: Sequence[tuple[str, Difference]]) -> None:
    """Raise Stop if one is too large."""
    for against, each in found:
        if not each.is_small:
            raise Stop(f"The two differ: against {against}, {each}. Nothing was kept; please report it.")


# ---- import


def facts_of(ours: Ours, config: Any, opened: Model | None) -> dict[str, Any]:
    """What NAME.json says of site and model. Raises InputError where neither the file nor the options say it."""
    site = ours.facts.get("site")
    if config.site and site and config.site != site:
        raise InputError(f"{config.path} says it reads {site}, not {config.site}; leave --site out.")
    site = site or config.site
    if site is None:
        raise InputError(f"{config.path} does not say where it reads; give --site, such as layers.15.resid_post.")
    try:
        layer = check_site(site, opened.model.args.n_layers if opened else 10**6)
    except ValueError as error:
        raise InputError(f"{config.path}: {error}") from None
    begins = ours.facts.get("begin_of_text", True if config.begin_of_text is None else config.begin_of_text)
    facts: dict[str, Any] = {"site": site, "layer": layer, "d_model": ours.W_enc.shape[1], "begin_of_text": begins}
    if opened is not None:
        if opened.model.args.dim != ours.W_enc.shape[1]:
            raise InputError(
                f"{config.path} has d_model {ours.W_enc.shape[1]}, but {opened.folder} has {opened.model.args.dim}; "
                "name the SAE's own model."
            )
        facts |= {"bos_id": opened.tokenizer.bos_id, "rope_scaling_factor": opened.model.args.rope_scaling_factor}
    return facts


def neighbours(site: str, n_layers: int) -> list[str]:
    """The site, and the same kind of site one layer earlier and later."""
    _, layer, kind = site.split(".")
    return [f"layers.{i}.{kind}" for i in (int(layer), int(layer) - 1, int(layer) + 1) if 0 <= i < n_layers]


def measure(sae: SparseAutoencoder, opened: Model) -> dict[str, dict[str, float]]:
    """Site -> L0, FVU, loss recovered: at the SAE's own, the first, and for an autoencoder at its neighbours."""
    sites = neighbours(sae.site, opened.model.args.n_layers) if sae.kind.target_site is None else [sae.site]
    bos_id = opened.tokenizer.bos_id if sae.info.get("begin_of_text") else None
    sae = sae.to(opened.model.device)
    found = {}
    for site in sites:
        result = evaluate(
            opened.model, {"sae": sae}, site, opened.sentences, 2048, bos_id, target_site=sae.kind.target_site
        )
        found[site] = {name: result["sae"][name] for name in ("l0", "fvu", "loss_recovered")}
    return found


def print_measures(found: dict[str, dict[str, float]], k: int | None) -> None:
    print(f"{'site':30}{'L0':>10}{'FVU':>10}{'loss recovered':>16}")
    for site, row in found.items():
        print(f"{site:30}{row['l0']:10.1f}{row['fvu']:10.3f}{row['loss_recovered']:16.1%}")
    own, at_site = next(iter(found.items()))
    best = min(found, key=lambda site: found[site]["fvu"])
    if best != own:
        print(f"Note: it fits {best} better than {own}, where it is said to read; check the site, and give --site.")
    elif at_site["fvu"] > _FVU or at_site["loss_recovered"] < _RECOVERED:
        print("Note: such numbers are not what an SAE gives where it was trained; check model, site, begin-of-text.")
    if k and not k / 3 < at_site["l0"] < 3 * k:
        print(f"Note: its files say about {k} latents per activation, but {at_site['l0']:.0f} fire here.")


def import_sae(config: Any) -> None:
    output = Path(config.output_path or "")
    if output.suffix != ".pth":
        raise InputError("Name the SAE to write with --output_path, ending in .pth.")
    require_writable(output, SaeFiles(output).json)
    for path in (output, Path(SaeFiles(output).json)):
        if path.exists():
            raise InputError(f"{path} is already there; remove it or name another --output_path.")
    path = hub.fetch(config.path) if hub.is_hub_id(config.path) else Path(config.path)
    if config.pull:
        return pull(path, output)
    name, foreign = recognise(path)
    row = FORMATS[name]
    ours = row.to_ours(foreign)
    opened = None
    if config.llama_model_dir:
        opened = open_model(config.llama_model_dir, config.text_path, config.num_sentences, config.max_tokens)
    facts = facts_of(ours, config, opened)
    sae = ours.sae()
    sae.info = facts
    print(f"{config.path}: {name}, {sae.kind.in_words}, {sae.n_latents:,} latents of {sae.d_model}, at {sae.site}.")
    for note in ours.notes:
        print(f"Note: {note}")
    differences = compare(sae, foreign, row, activations(sae, opened))
    refuse_differences(differences)
    origin = {"path": str(config.path), "format": name, "notes": list(ours.notes), **model_named(ours)}
    if opened is not None:
        measured = measure(sae, opened)
        k = ours.k or foreign.config.get("top_k") or foreign.config.get("k")
        print_measures(measured, k if isinstance(k, int) else None)
        origin["measured"] = measured
        known = {**facts, "model": checkpoint_identity(opened.folder)}
        facts |= Source.read(known, output).with_folder("model_dir", opened.folder).as_json(output)
    save_sae(sae.cpu(), output, {**facts, "imported": origin, "git_commit": git_commit()})
    try:
        again = load_sae_model(output)
        refuse_differences(compare(again, foreign, row, made_up_activations(again)))
    except Stop:
        output.unlink()
        Path(SaeFiles(output).json).unlink()
        raise
    print(f"Written: {output}, {SaeFiles(output).json}")
    for against, each in differences:
        print(f"Against {against}: {each}.")
    return None


def model_named(ours: Ours) -> dict[str, Any]:
    return {"model_name": ours.facts["model_name"]} if "model_name" in ours.facts else {}


def pull(folder: Path, output: Path) -> None:
    """Copy an SAE of this project, with everything beside it, under the name that was asked for."""
    weights = sorted(folder.glob("*.pth"))
    if len(weights) != 1:
        raise InputError(f"{folder} holds {len(weights)} .pth files instead of one SAE; name a folder of it.")
    load_sae_model(weights[0])  # refuses anything else
    name, files = SaeFiles(weights[0]), SaeFiles(output)
    prefix = Path(name.name).name
    copied = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.startswith(prefix + ".")]
    for path in copied:
        target = files.beside(path.name[len(prefix) + 1 :])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    print(f"Written: {output}, and {len(copied) - 1} files beside it.")


# ---- export


def export_sae(config: Any) -> None:
    if not (config.to and config.output_path) and not config.push:
        raise InputError("Name a format and a folder with --to and --output_path, or a repository with --push.")
    sae = load_sae_model(config.path)
    if "site" not in sae.info:
        raise InputError(f"{config.path} has no JSON that names its site; write one beside it.")
    opened = None
    if config.llama_model_dir:
        opened = open_model(config.llama_model_dir, config.text_path, config.num_sentences, config.max_tokens)
    output = Path(config.output_path) if config.output_path else None
    if output is not None and output.exists():
        raise InputError(f"{output} is already there; remove it or name another --output_path.")
    parent = output.absolute().parent if output else Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f".{output.name if output else 'sae'}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        says = []
        if config.to in ("sae_dashboard", "neuronpedia"):
            says = write_dashboard(sae, config, temporary, opened)
        elif config.to:
            says = write_and_compare(sae, config.to, temporary, activations(sae, opened))
        else:
            copy_own(SaeFiles(config.path), temporary)
        if config.push:
            name = Path(SaeFiles(config.path).name).name
            text = hub.card(sae.info, name, config.push, config.licence)
            (temporary / "README.md").write_text(text, encoding="utf-8")
            print(f"Uploaded to {hub.push(temporary, config.push)}.")
        if output is not None:
            temporary.rename(output)
            print(f"Written: {output}")
        print("\n".join(says), end="\n" if says else "")
    except OSError as error:
        raise Stop(f"Could not write {output or temporary} ({error}); fix that and run again.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_and_compare(sae: SparseAutoencoder, to: str, folder: Path, x: Tensor) -> list[str]:
    """Write the SAE into an empty folder, open it again, and say how far the two are apart. Raises Stop if too far."""
    row = FORMATS[to]
    assert row.write is not None
    row.write(sae, folder)
    foreign = row.find(Place(folder))
    assert foreign is not None
    found = compare(sae, foreign, row, x)
    refuse_differences(found)
    return [f"Against {against}: {each}." for against, each in found]


def write_dashboard(sae: SparseAutoencoder, config: Any, folder: Path, opened: Model | None) -> list[str]:
    """Write what is known of the latents, in normalised space, directions in the model's own units."""
    if opened is None:
        raise InputError(f"--to {config.to} shows tokens and directions of the model; name it with --llama_model_dir.")
    known = Known(config.path, sae, opened.tokenizer)
    name = (sae.info.get("model") or {}).get("name", "llama"), Path(SaeFiles(config.path).name).name
    if config.to == "neuronpedia":
        n_files = write_neuronpedia(known, folder, *name)
    else:
        spread = stds(opened.model, sae, opened.sentences, opened.tokenizer.bos_id)
        n_files = write_sae_dashboard(known, folder, *name, spread.mean)
    return [f"{n_files} files, each read back and equal."]


def copy_own(files: SaeFiles, folder: Path) -> None:
    """The SAE and what is beside it, but for the metrics of its training."""
    name = Path(files.name)
    for path in sorted(name.parent.iterdir()):
        if path.is_file() and path.name.startswith(name.name + ".") and not path.name.endswith(".metrics.jsonl"):
            shutil.copyfile(path, folder / path.name)


def main() -> None:
    config = parse_constants(globals(), commands=_COMMANDS, argument=_ARGUMENT)
    (import_sae if config.command == "import" else export_sae)(config)


if __name__ == "__main__":
    run(main)
