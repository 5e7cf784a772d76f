"""Write a model again with biases added: as a Hugging Face folder, and a GGUF file as a copy of itself.

A bias needs no new code where the model is opened: transformers and vLLM read `mlp_bias` and `attention_bias` in a
Llama's config.json, llama.cpp reads `blk.N.ffn_down.bias` and the like in a GGUF file of architecture llama.

    model.safetensors      the weights as they are, in the order that rotates halves, and a bias for each matrix of the
                           kinds that have one: those given, else zeros
    config.json            a Hugging Face folder's own, or what the checkpoint says in those words
    tokenizer.json, ...    copied, or made from a GGUF file's metadata or from Meta's tokenizer.model
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import blobfile
import gguf
import numpy as np
import safetensors.torch
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor

from llama_3.checkpoint import Checkpoint, find_checkpoint
from llama_3.gguf import gguf_tokenizer, read_gguf
from llama_3.loading import GGUF_NAMES, HF_NAMES, READERS, Loaded, Quantized, model_args, without_needless
from llama_3.model import ModelArgs, rope_frequencies
from llama_3.tokenizer import BYTE_OF, SPLIT_PATTERN, TiktokenTokenizer, load_tokenizer, read_ranks
from pipeline.errors import InputError

THEIRS = {ours: theirs for theirs, ours in HF_NAMES.items()}
# The matrices that get a bias together, by the switch in config.json.
SWITCHES = {
    "mlp_bias": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    "attention_bias": ("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pth", "*.gguf")
_HEAD = ("wq", "wk")  # the matrices whose rows RoPE rotates


def save_hugging_face(
    model_dir: str, folder: Path, biases: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> torch.dtype:
    """Write the model in `model_dir` to a new Hugging Face folder, with biases; returns the dtype of its weights.

    biases: by a matrix's name in Meta's words, such as layers.3.feed_forward.w2, each as long as its output, in the
    order of Meta's rows; added to those that the model has. dtype: of the file; None: the checkpoint's own, bfloat16
    for a quantised one.
    Raises InputError for a checkpoint that cannot be said in a config.json.
    """
    found = find_checkpoint(model_dir)
    args, reader = model_args(found), READERS[found.format]
    loaded = without_needless(reader.weights(found))
    dtype = dtype or stored_dtype(loaded.values())
    tied = is_tied(loaded)
    for name in [name for name in loaded if name.endswith(".bias")]:
        matrix, own = name.removesuffix(".bias"), loaded.pop(name).tensor
        own = own.read(torch.float32) if isinstance(own, Quantized) else own.float()
        biases = {**biases, matrix: own + biases[matrix].cpu() if matrix in biases else own}
    switches = [name for name, parts in SWITCHES.items() if any(bias.split(".", 2)[2] in parts for bias in biases)]
    state: dict[str, Tensor] = {}
    for name, each in loaded.items():
        if name == "output.weight" and tied:
            continue
        tensor = each.tensor.read(dtype) if isinstance(each.tensor, Quantized) else each.tensor.to(dtype)
        if not reader.rotates_halves and name.split(".")[-2] in _HEAD:
            tensor = in_halves(tensor, args.head_dim)
        state[hugging_face_name(name)] = tensor.contiguous()
    for layer in range(args.n_layers):
        for part in (part for name in switches for part in SWITCHES[name]):
            name = f"layers.{layer}.{part}"
            bias = biases.get(name)
            if bias is None:
                bias = torch.zeros(state[hugging_face_name(name + ".weight")].shape[0])
            elif part.rpartition(".")[2] in _HEAD:
                bias = in_halves(bias, args.head_dim)
            state[hugging_face_name(name + ".bias")] = bias.to(dtype).cpu().contiguous()
    folder.mkdir(parents=True)
    if found.format == "hugging face":
        copy_others(Path(found.folder), folder)
        config = dict(found.config)
    else:
        config = config_json(args, tied, dtype, load_tokenizer(model_dir), found)
        write_tokenizer(found, model_dir, folder)
    config |= dict.fromkeys(switches, True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return dtype


def stored_dtype(loaded: Iterable[Loaded]) -> torch.dtype:
    """The dtype of the largest tensor; bfloat16 for a quantised one, which float32 would not make better."""
    tensor = max((each.tensor for each in loaded), key=lambda tensor: tensor.numel())
    if isinstance(tensor, Tensor):
        return tensor.dtype
    exact = {"F32": torch.float32, "F16": torch.float16}
    return exact.get(tensor.source.kind.name, torch.bfloat16)


def is_tied(loaded: Mapping[str, Loaded]) -> bool:
    """Whether embedding and output are one tensor, or equal ones."""
    embedding, output = loaded["tok_embeddings.weight"].tensor, loaded["output.weight"].tensor
    if embedding is output:
        return True
    return isinstance(embedding, Tensor) and isinstance(output, Tensor) and torch.equal(embedding, output)


def in_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk, or their biases, from Meta's order (pairs side by side) to Hugging Face's (two halves)."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)


def hugging_face_name(name: str) -> str:
    """layers.3.feed_forward.w3.weight -> model.layers.3.mlp.up_proj.weight."""
    layer, _, kind = name.rpartition(".")
    if layer == "output":
        return f"lm_head.{kind}"
    if not layer.startswith("layers."):
        return f"model.{THEIRS[layer]}.{kind}"
    _, number, part = layer.split(".", 2)
    return f"model.layers.{number}.{THEIRS[part]}.{kind}"


def copy_others(source: Path, folder: Path) -> None:
    """Everything of a Hugging Face folder that holds no weights: tokenizer, templates, settings."""
    for path in source.iterdir():
        if path.is_file() and path.name[0] != "." and not any(path.match(pattern) for pattern in _WEIGHTS):
            shutil.copyfile(path, folder / path.name)


# ---- config.json


def config_json(args: ModelArgs, tied: bool, dtype: torch.dtype, tokenizer: Any, found: Checkpoint) -> dict[str, Any]:
    """What a Llama's config.json says in transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.hidden_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.max_seq_len,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope_scaling(args, found),
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def rope_scaling(args: ModelArgs, found: Checkpoint) -> dict[str, Any] | None:
    """The entry of config.json. A GGUF file holds divisors of the frequencies instead of the factor they come from."""
    if args.rope_divisors is not None:
        guess = replace(args, rope_divisors=None, rope_scaling_factor=max(args.rope_divisors))
        if not torch.allclose(rope_frequencies(guess), rope_frequencies(args), rtol=1e-5):
            raise InputError(
                f"{found.config_path} scales RoPE in a way that config.json has no words for; name the Hugging Face "
                "folder of the same model."
            )
        args = guess
    if args.rope_scaling_factor == 1.0:
        return None
    if args.rope_original_context == 0:
        return {"rope_type": "linear", "factor": args.rope_scaling_factor}
    return {
        "rope_type": "llama3",
        "factor": args.rope_scaling_factor,
        "low_freq_factor": args.rope_low_freq_factor,
        "high_freq_factor": args.rope_high_freq_factor,
        "original_max_position_embeddings": args.rope_original_context,
    }


# ---- tokenizers


def write_tokenizer(found: Checkpoint, model_dir: str, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a GGUF file or of Meta's tokenizer.model."""
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if found.format == "gguf":
        parts = gguf_tokenizer(read_gguf(found.config_path))
        model, bos_id, ends = parts.model, parts.bos_id, parts.eos_ids
        begins = parts.add_bos
        settings |= {"chat_template": parts.template[0]} if parts.template else {}
    else:
        tokenizer = load_tokenizer(model_dir)
        assert isinstance(tokenizer, TiktokenTokenizer)
        model = byte_level_model(tokenizer, read_ranks(blobfile.join(found.folder, "tokenizer.model")))
        bos_id, ends, begins = tokenizer.bos_id, [tokenizer.eos_id], True
    if begins and bos_id is not None:
        bos = model.id_to_token(bos_id)
        model.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, bos_id)])
    settings |= {"bos_token": model.id_to_token(bos_id)} if bos_id is not None else {}
    settings |= {"eos_token": model.id_to_token(ends[0])} if ends else {}
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def byte_level_model(tokenizer: TiktokenTokenizer, ranks: Mapping[bytes, int]) -> tokenizers.Tokenizer:
    """A tokenizer.model as one of the tokenizers library."""
    text_of = {byte: text for text, byte in BYTE_OF.items()}
    written = lambda token: "".join(text_of[byte] for byte in token)
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    merges = [(written(first), written(second)) for first, second in merges_of(ranks)]
    model = tokenizers.Tokenizer(BPE(vocabulary, merges, ignore_merges=True))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    special = sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__)
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return model


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that a byte-level BPE's ranks imply: for each token the two parts that its bytes have become when only
    tokens of lower rank were made."""
    found = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
            best = min(range(len(joined)), key=joined.__getitem__)
            if joined[best] >= ranks[token]:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


# ---- GGUF


def copy_gguf(source: str, path: Path, biases: Mapping[str, Tensor]) -> None:
    """A copy of a GGUF file with biases, by names in Meta's words as above, added to those that it has; everything else
    is kept bit for bit."""
    theirs = {ours: name for name, ours in GGUF_NAMES.items()}
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":  # the writer's own
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    added = {}
    for name, bias in biases.items():
        _, layer, part = name.split(".", 2)
        added[f"blk.{layer}.{theirs[part]}.bias"] = bias.float().cpu().contiguous().numpy()
    tensors = [tensor for tensor in reader.tensors if tensor.name not in added]
    for tensor in reader.tensors:
        if tensor.name in added:
            added[tensor.name] = added[tensor.name] + gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    for name, values in added.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    for values in added.values():
        writer.write_tensor_data(np.ascontiguousarray(values))
    writer.close()
