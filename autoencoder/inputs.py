"""What sae_training.py learns from: batches on disk, or a model's activations as it makes them.

data, folders = open_data(data_dir, ...)               of one SAE, or a transcoder: from sae_preprocessing.py
stream = open_stream(options, ...)                     of several: from a model and its sentences, both checked
rows, datas = start_stream(stream, ...)                counted, loaded, and the buffer filled for the statistics
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llama_3 import load_model, load_tokenizer
from llama_3.loading import read_params
from llama_3.model import ModelArgs
from llama_3.tokenizer import Tokenizer
from pipeline.activation_batches import STAGE as BATCHES_STAGE
from pipeline.activation_batches import all_shards
from pipeline.activation_stream import LANES, StreamedRows, sentence_lengths
from pipeline.capturing import Capturer, bos_id_before, check_model, describe_source, open_sentences
from pipeline.distributed import Grid
from pipeline.errors import InputError
from pipeline.manifests import MANIFEST, check_files, read_manifest
from pipeline.packing import row_bytes
from pipeline.progress import gb
from pipeline.sentences import SHUFFLE_SEED, SentenceDataset
from pipeline.source import Source
from pipeline.statistics import ActivationStatistics, read_statistics, write_statistics
from sae import Kind, Normalization

NO_VARIANCE = 1e-9  # share of the mean square; anything less is rounding
_NORMALIZE_EPS = 1e-5  # of a stream; sae_preprocessing.py's default

Folders = dict[str, tuple[str, dict[str, Any]]]  # site -> folder of batches, and its manifest


class KindOptions(NamedTuple):
    """The options of sae_training.py that make the kind of SAE."""

    gate: Literal["topk", "batch_topk"] = "topk"
    normalization: Normalization = "layer_norm"
    skip: bool = False


class Place(NamedTuple):
    """Where an SAE belongs: the site it reads, and the site it reconstructs if it is a transcoder."""

    site: str
    target_site: str | None = None

    @classmethod
    def read(cls, words: str) -> "Place":
        """SITE or READ:WRITE. Raises InputError for a transcoder of a site to itself, or to none."""
        site, colon, target = words.partition(":")
        if colon and not target:
            raise InputError(f"--sites {words} names no site to write; write {site}, or READ:WRITE for a transcoder.")
        if site == target:
            raise InputError(f"--sites {words} reads and writes the same site; write {site} for an SAE of it.")
        return cls(site, target or None)

    @property
    def output_site(self) -> str:
        return self.target_site or self.site

    @property
    def folder(self) -> str:
        """The name of this SAE's folder where there are several; layers.N.transcoder for that of an MLP."""
        if self.target_site is None:
            return self.site
        (layer, kind), (to_layer, to_kind) = (site.rsplit(".", 1) for site in (self.site, self.target_site))
        if (layer, kind, to_kind) == (to_layer, "ffn_norm", "mlp_out"):
            return f"{layer}.transcoder"
        return f"{self.site}-to-{self.target_site}"


class Data(NamedTuple):
    """What one SAE learns from."""

    source: Source  # of the activations that it reads
    place: Place
    normalize_eps: float
    first_validation_sentence: int
    told: str  # what is read, in words
    b_pre: Tensor  # (d_model), the mean of what is reconstructed, normalised
    variance: float  # of what is reconstructed, normalised, per coordinate
    kind: Kind  # of the SAE that these data and the options make


# ---- statistics


def learned(
    read: ActivationStatistics, written: ActivationStatistics, place: Place, options: KindOptions, where: str
) -> tuple[Tensor, float, Kind]:
    """The last three fields of `Data`. read, written: statistics at the sites of `place`, the same ones for an SAE.

    Raises InputError for activations that do not vary; `where` they are.
    """
    is_transcoder = place.target_site is not None
    kind = Kind(  # while it trains; in the end the scale of normalization none is folded into the weights
        gate="jumprelu" if options.gate == "batch_topk" else "topk",
        normalization="layer_norm" if options.normalization == "layer_norm" else "scale",
        scale=1.0 if options.normalization == "layer_norm" else unit_scale(read),
        centred=not is_transcoder,
        target_site=place.target_site,
        target_scale=unit_scale(written) if is_transcoder else 1.0,
        skip=options.skip,
    )
    if not is_transcoder and kind.normalization == "layer_norm":
        b_pre, mean, var = written.b_pre, written.mean_normalized, written.var_normalized
    else:
        factor = kind.target_scale if is_transcoder else kind.scale
        mean, var = written.mean_raw * factor, written.var_raw * factor**2
        b_pre = mean
    if float(var.mean()) <= NO_VARIANCE * float(mean.square().mean()):
        raise InputError(
            f"All {written.count:,} activations to train on in {where} are alike once normalised: there is nothing to "
            "learn; capture other sentences, or another site."
        )
    return b_pre.float(), float(var.mean()), kind


def unit_scale(statistics: ActivationStatistics) -> float:
    """The factor that makes the mean squared length of activations d_model."""
    square = float((statistics.mean_raw.square() + statistics.var_raw).mean())
    return square**-0.5 if square > 0 else 1.0


# ---- batches on disk


def open_data(
    data_dir: str,
    b_pre_path: str | None = None,
    target_dir: str | None = None,
    options: KindOptions = KindOptions(),  # noqa: B008, immutable
) -> tuple[Data, Folders]:
    """What an SAE learns from, and its folders of batches, that of the site it reads first.

    Raises InputError for data that cannot be trained on, or that do not belong together.
    """
    manifest = read_manifest(data_dir, BATCHES_STAGE)
    check_files(data_dir, all_shards(manifest), BATCHES_STAGE)
    site, to, place = manifest["site"], "", Place(manifest["site"])
    folders: Folders = {site: (data_dir, manifest)}
    if target_dir:
        target = open_target(target_dir, data_dir, manifest)
        place, to = Place(site, target["site"]), f" and of {target['site']} from {target_dir}"
        folders[target["site"]] = target_dir, target
    elif options.skip:
        raise InputError("--skip is for a transcoder; name the batches of the site it writes with --target_data_dir.")

    of_site = {}
    for name, (folder, its) in folders.items():
        path = b_pre_path if name == place.output_site else None
        of_site[name] = read_statistics(Path(path or Path(folder) / its["statistics"]))
    found = learned(of_site[site], of_site[place.output_site], place, options, target_dir or data_dir)
    source = Source.read(manifest, Path(data_dir) / MANIFEST)
    if "activations_dir" not in source.folders:  # batches of an older version
        source = source.with_folder("activations_dir", manifest["input_dir"])
    told = f"{manifest['counts']['train']:,} activations of {site} from {data_dir}{to}"
    first = manifest["first_validation_sentence"]
    return Data(source, place, manifest["normalize_eps"], first, told, *found), folders


def open_target(target_dir: str, data_dir: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a transcoder's target. Raises InputError unless its rows are of the same tokens as data_dir's."""
    target = read_manifest(target_dir, BATCHES_STAGE)
    check_files(target_dir, all_shards(target), BATCHES_STAGE)
    if manifest.get("order") is None or manifest.get("order") != target.get("order"):
        raise InputError(
            f"{target_dir} and {data_dir} do not hold the same tokens in the same order; capture both sites in one run "
            "and run sae_preprocessing.py on each with the same options."
        )
    if target["site"] == manifest["site"]:
        raise InputError(f"{target_dir} and {data_dir} are both of {target['site']}; name another site's batches.")
    return target


def check_batches(folders: Folders, batch_size: int, n_processes: int, early_stop: bool) -> None:
    """Raise InputError for options that do not fit the batches."""
    data_dir, manifest = next(iter(folders.values()))
    if batch_size % manifest["batch_size"] or batch_size % n_processes:
        raise InputError(
            f"--batch_size {batch_size} must be a multiple of the stored batches of {manifest['batch_size']} in "
            f"{data_dir} and of the {n_processes} processes that divide it; choose another."
        )
    if batch_size > manifest["counts"]["train"]:
        raise InputError(
            f"{data_dir} has {manifest['counts']['train']} activations to train on, fewer than --batch_size "
            f"{batch_size}; capture more or lower it."
        )
    if early_stop and not manifest["validation_shards"]:
        raise InputError(f"{data_dir} has no held-out activations for --early_stop_epochs; leave that option out.")


# ---- a stream


class StreamOptions(NamedTuple):
    """The options of sae_training.py that belong to --stream."""

    stream: str  # folder of the model
    sites: list[str]
    buffer_size: int
    sentences_dir: str
    num_samples: int
    validation_fraction: float
    max_tokens: int
    begin_of_text: bool
    dtype: str
    batch_tokens: int
    rope_scaling_factor: float | None


class Stream(NamedTuple):
    """A model, not loaded yet, and the sentences that it is to read."""

    options: StreamOptions
    args: ModelArgs
    tokenizer: Tokenizer
    sentences: SentenceDataset
    places: list[Place]
    layers: dict[str, int]  # of every site that is read or written
    bos_id: int | None  # before each sentence
    source: Source  # without a site
    first_validation_sentence: int

    def identity(self) -> dict[str, Any]:
        """The model and the sentences: what a run depends on besides the options."""
        found: dict[str, Any] = {"model": self.source.model, "dataset": self.source.dataset}
        if not self.sentences.manifest:  # published sentences, without checksums
            found["sentence_files"] = self.sentences.files_sha256
        return found


def open_stream(options: StreamOptions, skip: bool) -> Stream:
    """Raises InputError for sites, sentences or options that do not fit the model or one another."""
    args = read_params(options.stream, options.rope_scaling_factor)
    places = [Place.read(words) for words in dict.fromkeys(options.sites)]
    if skip and not all(place.target_site for place in places):
        raise InputError("--skip is for transcoders; write each of --sites as READ:WRITE.")
    sites = list(dict.fromkeys(itertools.chain(*((place.site, place.output_site) for place in places))))
    layers = check_model(args, options.stream, sites, options.max_tokens)
    tokenizer = load_tokenizer(options.stream)
    bos_id = bos_id_before(tokenizer, options.stream, options.begin_of_text)
    sentences = open_sentences(options.sentences_dir, options.num_samples, SHUFFLE_SEED)
    read = sentences, SHUFFLE_SEED, options.max_tokens, tokenizer.bos_id, options.begin_of_text
    source = describe_source(options.stream, args, *read)
    first = len(sentences) - round(options.validation_fraction * len(sentences))
    return Stream(options, args, tokenizer, sentences, places, layers, bos_id, source, first)


def check_stream(stream: Stream, batch_size: int, n_processes: int, early_stop: bool) -> None:
    """Raise InputError for options that do not fit the lanes of the buffer, or the sentences."""
    if batch_size % LANES or LANES % n_processes:
        raise InputError(
            f"The buffer of a stream has {LANES} lanes: --batch_size {batch_size} must be a multiple of {LANES}, and "
            f"{LANES} a multiple of the number of processes, {n_processes}; choose others."
        )
    if early_stop and stream.first_validation_sentence == len(stream.sentences):
        raise InputError("There are no held-out sentences for --early_stop_epochs; raise --validation_fraction.")


def start_stream(
    stream: Stream, kind: KindOptions, batch_size: int, seed: int, folder: Path, grid: Grid
) -> tuple[StreamedRows, list[Data]]:
    """The rows of all sites, and what each SAE learns from.

    Counts the sentences' tokens, loads the model, and fills the buffer once for the statistics, unless a run that is
    continued did so before: both are kept in `folder`. All processes must call this.
    """
    options, everyone, first = stream.options, grid.world, stream.first_validation_sentence
    text = stream.sentences, stream.tokenizer, options.max_tokens
    lengths = sentence_lengths(folder / "sentence_lengths.safetensors", *text, everyone).numpy()
    packed = everyone.device.type == "cpu"  # packed weights are for CPUs
    model = load_model(options.stream, "cpu", getattr(torch, options.dtype), options.rope_scaling_factor, packed)
    capturer = Capturer(
        model.to(everyone.device), list(stream.layers), options.batch_tokens, stream.bos_id, store_dtype="int8"
    )
    rows = StreamedRows(*text, capturer, lengths, first, options.buffer_size, batch_size, seed, grid)
    n_sites = len(capturer.sites)
    memory = n_sites * row_bytes(stream.args.dim, "int8") * min(options.buffer_size, rows.n_train) // everyone.size
    everyone.print(
        f"A stream from {options.stream}, which reads {stream.sentences.folder}: {rows.n_train:,} activations a pass "
        f"and {rows.n_held_out:,} held out, at {', '.join(capturer.sites)}. The buffer is filled {len(rows.fillings)} "
        f"times a pass, and takes {gb(memory)} of memory in each of {everyone.size} processes."
    )
    paths = {site: folder / f"statistics-{site}.safetensors" for site in capturer.sites}
    if not everyone.gather(all(path.exists() for path in paths.values()))[0]:
        found = rows.statistics(_NORMALIZE_EPS)
        for site, path in paths.items() if everyone.is_main else ():
            write_statistics(path, found[site])
        everyone.barrier()
    of_site = {site: read_statistics(path) for site, path in paths.items()}
    datas = []
    for place in stream.places:
        source = dataclasses.replace(stream.source, site=place.site, layer=stream.layers[place.site])
        to = f" and {place.target_site}" if place.target_site else ""
        told = f"{rows.n_train:,} activations a pass of {place.site}{to}, as {options.stream} makes them"
        found = learned(of_site[place.site], of_site[place.output_site], place, kind, f"{options.sentences_dir}")
        datas.append(Data(source, place, _NORMALIZE_EPS, first, told, *found))
    return rows, datas
