"""Sparse autoencoders and transcoders, all kinds by one formula, and their files.

    z      = s x                                normalised input
    h      = gate(W_enc (z - c b_pre) + b_enc)  few of n_latents are above 0
    z_hat  = W_dec h + b_pre                    + W_skip z in a skip transcoder
    x_hat  = z_hat / s                          / s_target in a transcoder: the activation at another site

`Kind` says what gate, s and c can be. The published kind is TopK on activations normalised one by one (Gao et al. 2024,
arXiv:2406.04093, section 2):

    z      = (x - mean(x)) / (std(x) + eps)             over d_model, std with n - 1
    h      = ReLU(TopK(W_enc (z - b_pre) + b_enc))      keeps k of n_latents
    x_hat  = (W_dec h + b_pre) * std(x) + mean(x)

Only the encoder's matrix product is dense, computed in blocks of rows; decoding touches only the kept latents. The
sparse training loss is in autoencoder/losses.py.
"""

import json
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import blobfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.files import atomic_path, write_json
from pipeline.manifests import FORMAT_VERSION
from pipeline.sae_files import SaeFiles

# Bytes per block of a matrix product: a CPU's cache size, and enough to keep a GPU busy.
_BLOCK_BYTES = {"cpu": 2**25, "cuda": 2**31}
_LEAST_ROWS = 256
_GROUP = 16  # latents per group in TopK's first round
_KINDS_VERSION = FORMAT_VERSION + 1  # format_version of SAEs that are not of the published kind


Gate = Literal["topk", "jumprelu", "relu"]
Normalization = Literal["layer_norm", "none", "scale"]


class Kind(NamedTuple):
    """What sets one SAE apart from another. The defaults are the published kind; NAME.json holds what differs.

    field          value         what it means                                             needs
    gate           topk          keep each activation's k highest, then ReLU               k
                   jumprelu      keep what is above 0 and the latent's threshold           tensor threshold
                   relu          keep what is above 0
    normalization  layer_norm    z = (x - mean(x)) / (std(x) + eps), undone by the same    normalize_eps
                                 activation's mean and std
                   none          z = x
                   scale         z = scale * x                                             scale
    centred        true, false   whether b_pre is taken off z before the encoder (c)
    target_site    a site        transcoder (arXiv:2406.11944): x_hat is the activation
                                 there, z_hat / target_scale
    skip           true, false   adds W_skip z to z_hat (arXiv:2501.18823)                 tensor skip, target_site

    jumprelu: Rajamanoharan et al. 2024, arXiv:2407.14435; what BatchTopK becomes once trained (arXiv:2412.06410).
    """

    gate: Gate = "topk"
    normalization: Normalization = "layer_norm"
    scale: float = 1.0
    centred: bool = True
    target_site: str | None = None
    target_scale: float = 1.0
    skip: bool = False

    @property
    def not_default(self) -> dict[str, Any]:
        """The fields that differ from the published kind."""
        return {name: value for name, value in self._asdict().items() if value != Kind._field_defaults[name]}

    @property
    def in_words(self) -> str:
        """For people: TopK; JumpReLU; skip transcoder, TopK, ..."""
        shape = "" if self.target_site is None else ("skip transcoder, " if self.skip else "transcoder, ")
        return shape + {"topk": "TopK", "jumprelu": "JumpReLU", "relu": "ReLU"}[self.gate]

    def check(self) -> None:
        """Raise ValueError, with the field's name, for a value that means nothing."""
        for name, allowed in (("gate", Gate), ("normalization", Normalization)):
            if (value := getattr(self, name)) not in allowed.__args__:
                raise ValueError(f"{name} = {value!r} is none of {', '.join(allowed.__args__)}")
        for name in ("centred", "skip"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} = {value!r} is neither true nor false")
        for name in ("scale", "target_scale"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} = {value!r} is not a number above 0")
        if self.scale != 1 and self.normalization != "scale":
            raise ValueError(f"scale = {self.scale} contradicts normalization = {self.normalization!r}")
        if self.target_site is None and (self.skip or self.target_scale != 1):
            raise ValueError("skip and target_scale belong to a transcoder, which needs a target_site")


def rows_at_once(row_bytes: int, device: torch.device) -> int:
    """Rows per block, at row_bytes per row."""
    return max(_LEAST_ROWS, _BLOCK_BYTES.get(device.type, 2**31) // max(1, row_bytes))


def top_k(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row (batch, n_latents), in any order, and their indices: (batch, k) each.

    Exact in two rounds: the k groups of latents with the highest maxima hold the k highest latents.
    """
    batch, n_latents = pre_acts.shape
    n_groups = n_latents // _GROUP
    if n_latents % _GROUP or n_groups < 2 * k:
        return pre_acts.topk(k, dim=1, sorted=False)
    grouped = pre_acts.view(batch, _GROUP, n_groups)  # group j: latents j, j + n_groups, ...
    groups = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, groups[:, None].expand(-1, _GROUP, -1)).flatten(1)  # (batch, _GROUP * k)
    values, places = candidates.topk(k, dim=1, sorted=False)
    return values, places // k * n_groups + groups.gather(1, places % k)


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Values and indices of several `encode`s, (rows, width) each, one below the other, filled up to the widest."""
    width = max(values.shape[1] for values, _ in parts)
    values, indices = (
        torch.cat([F.pad(part, (0, width - part.shape[1])) for part in each]) for each in zip(*parts, strict=True)
    )
    return values, indices


def products_are_exact(device: torch.device) -> bool:
    """Whether float32 products on `device` have float32's precision: not on a GPU that may use TF32 for them.

    Products that are not exact only choose latents; the values of the chosen are computed again by `dot_products`.
    """
    return device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32


def dot_products(a: Tensor, b: Tensor, latents: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """a[row] . b[latent] of each entry, in float32.

    latents, rows: (n_entries), rows in ascending order; offsets: (len(a)), where each row's entries begin.
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a.contiguous(), b, latents, offsets, rows, 0)


class SparseAutoencoder(nn.Module):
    """State dict: b_pre (d_model), encoder.weight (n_latents, d_model), encoder.bias (n_latents),
    decoder.weight (d_model, n_latents), whose columns are the latents' directions; by kind also threshold (n_latents)
    and skip (d_model, d_model). `info`: the JSON beside the weights.

    Construction leaves the weights uninitialised: load a state dict or call `initialize`.
    k: latents kept per activation; for other gates than topk their mean number, where it is known.
    normalize_eps: of layer_norm; 0 with other normalisations, so that z * (std + eps) + mean is x with all of them.
    n_slices: above 1 for one slice of an SAE that several processes train together (see `slice`); n_latents then counts
    the slice's latents, and k is the number kept over all slices. Raises ValueError for an impossible k or kind.
    """

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        k: int | None = None,
        normalize_eps: float = 1e-5,
        n_slices: int = 1,
        kind: Kind = Kind(),  # noqa: B008, immutable
    ):
        super().__init__()
        kind.check()
        if k is None and kind.gate == "topk":
            raise ValueError("gate topk needs k")
        if k is not None and not 0 < k <= n_latents * n_slices:
            raise ValueError(f"k = {k} must lie between 1 and n_latents = {n_latents * n_slices}")
        self.d_model, self.n_latents, self.k, self.kind = d_model, n_latents, k, kind
        self.normalize_eps = normalize_eps if kind.normalization == "layer_norm" else 0.0
        self.info: dict[str, Any] = {}
        self.b_pre = nn.Parameter(torch.empty(d_model))
        self.skip = nn.Parameter(torch.empty(d_model, d_model)) if kind.skip else None
        self.threshold: Tensor | None
        self.register_buffer("threshold", torch.zeros(n_latents) if kind.gate == "jumprelu" else None)
        # "meta" and to_empty skip nn.Linear's own initialisation.
        self.encoder = nn.Linear(d_model, n_latents, device="meta").to_empty(device=self.b_pre.device)
        self.decoder = nn.Linear(n_latents, d_model, bias=False, device="meta")
        # Stored latent by latent, so that one latent's direction is contiguous; the published shape is the transpose.
        self.decoder.weight = nn.Parameter(torch.empty(n_latents, d_model).t())

    @torch.no_grad()
    def initialize(self, b_pre: Tensor, generator: torch.Generator | None = None, orthogonal: bool = False) -> None:
        """Random unit directions, the encoder tied to the decoder, encoder bias zero (arXiv:2406.04093, section 2.4).

        b_pre: (d_model), the mean of the normalised activations, in a transcoder of its targets. A skip begins as zero.
        orthogonal: directions are orthogonal to one another within the first d_model latents, within the next d_model,
        and so on.
        """
        if orthogonal:
            n_bases = -(-self.n_latents // self.d_model)
            squares = (torch.randn(self.d_model, self.d_model, generator=generator) for _ in range(n_bases))
            directions = torch.cat([torch.linalg.qr(square).Q for square in squares])[: self.n_latents]
        else:
            directions = F.normalize(torch.randn(self.n_latents, self.d_model, generator=generator), dim=1)
        self.decoder.weight.copy_(directions.t())
        self.encoder.weight.copy_(directions)
        self.encoder.bias.zero_()
        self.b_pre.copy_(b_pre)
        if self.skip is not None:
            self.skip.zero_()

    def slice(self, rank: int, size: int) -> "SparseAutoencoder":
        """A copy of slice `rank` of `size`: n_latents / size latents from rank * n_latents / size on, all of b_pre and
        of the skip."""
        n = self.n_latents // size
        own = slice(rank * n, (rank + 1) * n)
        part = SparseAutoencoder(self.d_model, n, self.k, self.normalize_eps, n_slices=size, kind=self.kind)
        with torch.no_grad():
            part.b_pre.copy_(self.b_pre)
            if part.skip is not None and self.skip is not None:
                part.skip.copy_(self.skip)
            if part.threshold is not None and self.threshold is not None:
                part.threshold.copy_(self.threshold[own])
            part.encoder.weight.copy_(self.encoder.weight[own])
            part.encoder.bias.copy_(self.encoder.bias[own])
            part.decoder.weight.copy_(self.decoder.weight[:, own])
        return part

    @torch.no_grad()
    def rescaled(
        self, normalization: Normalization, scale: float = 1.0, target_scale: float = 1.0
    ) -> "SparseAutoencoder":
        """The same function of raw activations with other constant scales; normalization: none or scale.

        Directions keep their length, so latents and thresholds are multiplied by new / old scale of the output; the
        same latents fire. Not for transcoders that are centred.
        """
        kind = self.kind._replace(normalization=normalization, scale=scale, target_scale=target_scale)
        out = scale / self.kind.scale if kind.target_site is None else target_scale / self.kind.target_scale
        through = out * self.kind.scale / scale  # of matrices that read z
        factors = {"encoder.weight": through, "skip": through, "decoder.weight": 1.0}
        sae = SparseAutoencoder(self.d_model, self.n_latents, self.k, kind=kind)
        sae.load_state_dict({name: tensor * factors.get(name, out) for name, tensor in self.state_dict().items()})
        return sae

    @property
    def site(self) -> str:
        """Where its input is captured. Raises KeyError if `info` does not say."""
        return self.info["site"]

    @property
    def output_site(self) -> str:
        """Where its reconstruction belongs, and its directions: the site, or a transcoder's target."""
        return self.kind.target_site or self.site

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (..., d_model), and the mean and std (..., 1) that undo it: x = z * (std + eps) + mean. float32.

        Without a normalisation by activation the mean is 0 and the std 1 / scale.
        """
        x = x.float()
        if self.kind.normalization == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = x.std(-1, keepdim=True)
            return (x - mean) / (std + self.normalize_eps), mean, std
        mean = x.new_zeros(*x.shape[:-1], 1)
        return x * self.kind.scale, mean, mean + 1 / self.kind.scale

    def normalize_target(self, x: Tensor) -> Tensor:
        """What z_hat should be: raw x (..., d_model) at `output_site`, normalised. float32."""
        return self.normalize(x)[0] if self.kind.target_site is None else x.float() * self.kind.target_scale

    def restore(self, z_hat: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """x_hat (..., d_model) of a normalised reconstruction. mean, std: of its input, from `normalize`."""
        return z_hat * std + mean if self.kind.target_site is None else z_hat / self.kind.target_scale

    def at_output(self, latents: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What latents (n) add to the activation at `output_site` when they have `values` (n_latents), and b_pre there:
        (n, d_model), (d_model). With layer_norm in normalised space, since each activation has a scale of its own."""
        scale = self.kind.scale if self.kind.target_site is None else self.kind.target_scale
        return self.decoder.weight.t()[latents] * values[latents, None] / scale, self.b_pre / scale

    def encode(self, x: Tensor, h_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Raw x (..., d_model) -> values >= 0 and int64 indices of the kept latents, (..., width) each, largest first.

        h_bias: (n_latents), added to the encoder's output before the gate: steering. Values are in normalised space.

        With gate topk the width is k. With the others it is the highest number of latents that any of these
        activations keeps, at least 1. Places that an activation does not need hold the value 0 and the index of some
        latent, so that indices always can be gathered with: a latent fires where its value is above 0.
        """
        z, _, _ = self.normalize(x)
        return self.encode_normalized(z, h_bias)

    def centre(self, z: Tensor) -> Tensor:
        """What the encoder reads of normalised z."""
        return z - self.b_pre if self.kind.centred else z

    def encode_normalized(self, z: Tensor, h_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`encode` for activations that are already normalised."""
        x = self.centre(z).to(self.encoder.weight.dtype)
        blocks = []
        for rows in x.reshape(-1, self.d_model).split(rows_at_once(4 * self.n_latents, x.device)):
            pre_acts = F.linear(rows, self.encoder.weight, self.encoder.bias)  # (rows, n_latents)
            if h_bias is not None:
                pre_acts = pre_acts + h_bias
            values, indices = self._gate(pre_acts.float())
            if x.dtype == torch.float32 and not products_are_exact(x.device):
                values = self._pre_acts_of(rows, indices, h_bias).masked_fill(values == 0, 0)
            blocks.append((values, indices))
        values, indices = (part.view(*x.shape[:-1], part.shape[1]) for part in joined(blocks))
        values, order = values.sort(dim=-1, descending=True, stable=True)
        return values.relu(), indices.gather(-1, order)

    def _gate(self, pre_acts: Tensor) -> tuple[Tensor, Tensor]:
        """The kept of each row of pre-activations (rows, n_latents): values and indices (rows, width), in any order.
        NaN is kept."""
        if self.kind.gate == "topk":
            assert self.k is not None
            return top_k(pre_acts, self.k)
        least = pre_acts.new_zeros(()) if self.threshold is None else self.threshold
        kept = pre_acts.masked_fill(pre_acts <= least, 0).relu()
        n_kept = (kept != 0).sum(1)
        return top_k(kept, max(1, int(n_kept.max())) if len(kept) else 1)

    def _pre_acts_of(self, x: Tensor, indices: Tensor, h_bias: Tensor | None) -> Tensor:
        """The pre-activations of x (rows, d_model), centred, of chosen latents (rows, width): float32 (rows, width)."""
        width = indices.shape[1]
        latents, entries = indices.flatten(), torch.arange(indices.numel(), device=x.device)
        bias = self.encoder.bias if h_bias is None else self.encoder.bias + h_bias
        dots = dot_products(x, self.encoder.weight, latents, entries[::width].contiguous(), entries // width)
        return (dots + bias[latents]).view(-1, width)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Kept latents (..., width) -> W_dec h + b_pre (..., d_model), in normalised space."""
        width = values.shape[-1]
        directions = self.decoder.weight.t()  # (n_latents, d_model)
        weights = values.reshape(-1, width).to(directions.dtype)
        z_hat = F.embedding_bag(indices.reshape(-1, width), directions, per_sample_weights=weights, mode="sum")
        return z_hat.view(*values.shape[:-1], self.d_model) + self.b_pre

    def reconstruct(self, z: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        """z_hat (..., d_model) of z and its kept latents: `decode`, and in a skip transcoder W_skip z."""
        z_hat = self.decode(values, indices)
        return z_hat if self.skip is None else z_hat + F.linear(z.to(self.skip.dtype), self.skip)

    def forward(self, x: Tensor, h_bias: Tensor | None = None) -> Tensor:
        """Raw activations (..., d_model) -> their reconstruction, or in a transcoder that of the activations at
        `output_site`; same shape and dtype."""
        z, mean, std = self.normalize(x)
        z_hat = self.reconstruct(z, *self.encode_normalized(z, h_bias))
        return self.restore(z_hat, mean, std).to(x.dtype)

    # ---- training invariants

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale each latent's direction, a column of decoder.weight, to unit norm, in place."""
        self.decoder.weight.div_(self.decoder.weight.norm(dim=0, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def project_decoder_grad(self) -> None:
        """Remove from each direction's gradient the part along the direction, in place: after backward, before step."""
        if (grad := self.decoder.weight.grad) is None:
            return
        n_rows = rows_at_once(4 * self.d_model, grad.device)
        blocks = zip(self.decoder.weight.t().split(n_rows), grad.t().split(n_rows), strict=True)
        for directions, grads in blocks:  # (n_rows, d_model) each
            grads.addcmul_(directions, (directions * grads).sum(1, keepdim=True), value=-1)


# ---- files


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """torch.save, atomically. Raises Stop for a full disk."""
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).partition("\n")[0]) from error


def save_sae(
    sae: SparseAutoencoder, path: str | Path, info: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write NAME.pth, a plain state dict in `dtype` (thresholds stay float32), and NAME.json."""
    state = {
        name: tensor.detach().cpu().to(torch.float32 if name == "threshold" else dtype).contiguous()
        for name, tensor in sae.state_dict().items()
    }
    kind = sae.kind.not_default
    # Older code reads the published kind and refuses the others.
    facts: dict[str, Any] = {"format_version": _KINDS_VERSION if kind else FORMAT_VERSION}
    facts |= {"d_model": sae.d_model, "n_latents": sae.n_latents}
    facts |= {} if sae.k is None else {"k": sae.k}
    facts |= {"normalize_eps": sae.normalize_eps} if sae.kind.normalization == "layer_norm" else {}
    facts |= {name: value for name, value in sae.kind._asdict().items() if name in kind or name in info}
    save_tensors(Path(path), state)
    write_json(SaeFiles(path).json, {**facts, **info, **facts})


def load_sae_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **keywords: Any
) -> SparseAutoencoder:
    """Load NAME.pth with its NAME.json. Published files without a JSON need k and normalize_eps as keywords.

    keywords: k, normalize_eps, fields of `Kind`, and whatever else `info` should hold.
    Raises InputError for a file that is not an SAE, or a keyword that contradicts the JSON.
    """
    state = _read_file(str(path), device)
    info = _read_info(str(path), keywords)
    kind = kind_of(info, SaeFiles(path).json)
    for name, needed in (("k", kind.gate == "topk"), ("normalize_eps", kind.normalization == "layer_norm")):
        if needed and name not in info:
            raise InputError(
                f"{path} has no JSON beside it that says {name}; give {name} (the published SAE: k=64, "
                f"normalize_eps=1e-6), or write "
                f'{SaeFiles(path).json}: {{"k": 64, "normalize_eps": 1e-6, "site": "layers.22.attention_norm"}}.'
            )
    state = _checked(state, kind, str(path))
    n_latents, d_model = state["encoder.weight"].shape
    try:
        sae = SparseAutoencoder(d_model, n_latents, info.get("k"), info.get("normalize_eps", 0.0), kind=kind)
    except ValueError as error:
        raise InputError(f"{path}: {error}; correct k.") from None
    sae.to(device=device, dtype=dtype)
    if sae.threshold is not None:
        sae.threshold = sae.threshold.float()  # rounding it would change what passes
    sae.load_state_dict(state)
    sae.info = info
    return sae.requires_grad_(False).eval()


def kind_of(info: Mapping[str, Any], file: str) -> Kind:
    """The kind that a NAME.json (`info`, read from `file`) states. Raises InputError for an impossible one."""
    kind = Kind(**{name: info[name] for name in Kind._fields if name in info})
    try:
        kind.check()
    except ValueError as error:
        raise InputError(f"{file}: {error}; correct it, or fetch newer code for a newer kind.") from None
    return kind


def _read_file(path: str, device: str | torch.device) -> Any:
    try:
        with blobfile.BlobFile(path, "rb") as file:
            return torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"There is no SAE at {path}; run sae_training.py or name a .pth file.") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, OSError):
        raise InputError(f"{path} is truncated or not a state dict of tensors; fetch or train it again.") from None


def _checked(state: Any, kind: Kind, path: str) -> dict[str, Tensor]:
    """The state dict, names and shapes checked; other entries of the file are dropped."""
    keys = {"b_pre", "encoder.weight", "encoder.bias", "decoder.weight"}
    keys |= ({"threshold"} if kind.gate == "jumprelu" else set()) | ({"skip"} if kind.skip else set())
    if not isinstance(state, dict) or not keys <= state.keys():
        found = sorted(map(str, state))[:4] if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path} is not an SAE: it needs {sorted(keys)} and holds {found}.")
    shapes: dict[str, tuple[int, ...]] = {name: tuple(getattr(state[name], "shape", ())) for name in keys}
    if len(shapes["encoder.weight"]) != 2:
        raise InputError(f"{path} holds encoder.weight as {shapes['encoder.weight']}: it is not a matrix.")
    n_latents, d_model = shapes["encoder.weight"]
    expected = {"b_pre": (d_model,), "encoder.bias": (n_latents,), "decoder.weight": (d_model, n_latents)}
    expected |= {"threshold": (n_latents,), "skip": (d_model, d_model)}
    for name in keys - {"encoder.weight"}:
        if shapes[name] != expected[name]:
            raise InputError(f"{path} holds {name} as {shapes[name]} instead of {expected[name]}.")
    return {name: state[name] for name in keys}


def _read_info(path: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """NAME.json, if there is one, and the keywords."""
    json_path = SaeFiles(path).json
    info: dict[str, Any] = {}
    if blobfile.exists(json_path):
        try:
            info = dict(json.loads(blobfile.BlobFile(json_path, "rb").read()))
        except (ValueError, TypeError, OSError) as error:
            raise InputError(
                f"{json_path} is not JSON ({error}); train the SAE again, or write the file by hand."
            ) from None
    if (version := info.get("format_version", FORMAT_VERSION)) not in (FORMAT_VERSION, _KINDS_VERSION):
        raise InputError(
            f"{json_path} has format_version {version}, this code reads {FORMAT_VERSION} and {_KINDS_VERSION}; use "
            "newer code for it."
        )
    for name, value in keywords.items():
        if name in info and info[name] != value:
            raise InputError(f"{json_path} says {name} = {info[name]!r}, not {value!r}; leave {name} out.")
    return info | keywords
