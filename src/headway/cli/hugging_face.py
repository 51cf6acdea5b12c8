"""Models of Hugging Face transformers for `headway try`: a type or config class made tiny, or a local folder as it is.

Nothing is downloaded. transformers is imported when a model is asked for, not before.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

TOKENS = 24
"""Length of an example in tokens."""

TINY: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "n_embed"), 64),
    **dict.fromkeys(
        ("embedding_size", "word_embed_proj_dim", "projection_dim", "projection_size", "d_embed", "emb_dim"), 64
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim"), 16),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("vocab_size",), 256),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions"), 128),
    **dict.fromkeys(("max_source_positions",), 64),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("num_mel_bins",), 16),
}
"""Sizes that configs have by these names, and what a tiny model has there."""


def from_transformers(name: str) -> nn.Module:
    """The model that `hf:<name>` means."""
    try:
        import transformers
    except ImportError as error:
        raise typer.BadParameter(
            f"hf:{name} needs transformers, which is not installed; pip install transformers"
        ) from error
    folder = Path(name)
    if folder.is_dir():
        return _from_folder(folder, transformers)
    return _model(tiny(_config(name, transformers)), transformers)


def _from_folder(folder: Path, transformers: Any) -> nn.Module:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"got hf:{folder}, takes a folder with a transformers config.json: {error}") from error
    has_weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")] != []
    if has_weights:
        loaded: nn.Module = _class(config, transformers).from_pretrained(folder, local_files_only=True)
        return loaded
    return _model(config, transformers)


def _class(config: Any, transformers: Any) -> Any:
    """The class that the folder was saved from, which holds all that was saved."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None) or _auto(config, transformers)


def _config(name: str, transformers: Any) -> Any:
    types = transformers.CONFIG_MAPPING
    if name in types:
        return types[name]()
    found = getattr(transformers, name, None) if name.endswith("Config") else None
    if isinstance(found, type) and issubclass(found, transformers.PretrainedConfig):
        return found()
    close = difflib.get_close_matches(name, list(types.keys()), 4) or ["llama", "bert", "vit", "whisper"]
    raise typer.BadParameter(
        f"got hf:{name}, takes a model type (such as {', '.join(close)}), a config class (LlamaConfig),"
        " or a local folder with config.json; nothing is downloaded"
    )


def tiny(config: Any) -> Any:
    """The config with every size that is known by name made small; parts that are configs themselves too."""
    by_stage = isinstance(
        getattr(config, "depths", None), list | tuple
    )  # as Swin: widths, heads and depths hang together
    for name, size in TINY.items():
        was = getattr(config, name, None)
        hangs = by_stage and (size == TINY["hidden_size"] or name in ("image_size", "patch_size"))
        if isinstance(was, int) and not isinstance(was, bool) and was > size and not hangs:
            setattr(config, name, size)
    if hasattr(config, "qk_rope_head_dim"):
        config.head_dim = config.qk_rope_head_dim  # as DeepSeek has it: rotary tables go by it
        config.num_key_value_heads = config.num_attention_heads
    if getattr(config, "vocab_size", 0) is None:
        config.vocab_size = TINY["vocab_size"]
    _lists(config)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(getattr(config, name, None), int) and getattr(config, name) >= TINY["vocab_size"]:
            setattr(config, name, {"pad_token_id": 0, "bos_token_id": 1}.get(name, 2))
    for part in vars(config).values():
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            tiny(part)
    return config


def _lists(config: Any) -> None:
    """What says something about each layer is cut to the layers there are."""
    layers = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None)
    if isinstance(layers, int) and isinstance(kinds, list) and len(kinds) > layers:
        # The last ones, as in models that mix kinds these end on the rarer, so that both are seen.
        config.layer_types = kinds[-layers:]


def _auto(config: Any, transformers: Any) -> Any:
    """The class that makes the most of the model: with its language head where there is one."""
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    return (
        transformers.AutoModelForCausalLM if type(config) in causal and not encoder_decoder else transformers.AutoModel
    )


def _model(config: Any, transformers: Any) -> nn.Module:
    try:
        made: nn.Module = _auto(config, transformers).from_config(config)
    except Exception as error:  # a config can refuse its sizes in any way it likes
        kind = type(config).__name__
        raise typer.BadParameter(
            f"cannot make a {kind} model: {type(error).__name__}: {error};"
            " save a config that works to a folder, and pass hf:<folder>"
        ) from error
    return made


def is_one(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "main_input_name")


def examples(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs by name that the model may run with, as far as its forward knows the names; the likeliest first."""
    asked = inspect.signature(model.forward).parameters
    for inputs in _inputs(model.config, model.main_input_name):
        inputs["use_cache"] = False
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = _ids(_part(model.config, "text_config"))
        known = {name: value for name, value in inputs.items() if name in asked}
        if any(isinstance(value, Tensor) for value in known.values()):
            yield known


def _inputs(config: Any, main: str) -> Iterator[dict[str, Any]]:
    ids = {"input_ids": _ids(_part(config, "text_config")), "attention_mask": _attention_mask()}
    vision = _part(config, "vision_config")
    size = getattr(vision, "image_size", None) or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    image = {"pixel_values": torch.randn(2, channels, height, width)}
    if main == "input_features":
        bins = getattr(config, "num_mel_bins", 80)
        yield {"input_features": torch.randn(2, bins, 2 * getattr(config, "max_source_positions", 64))}
        yield {"input_features": torch.randn(2, 64, getattr(config, "input_feat_per_channel", bins))}
    if main == "input_values":
        yield {"input_values": torch.randn(2, 4000)}
        yield {"input_values": torch.randn(2, getattr(config, "max_length", 64), getattr(config, "num_mel_bins", 16))}
    if main == "pixel_values":
        yield image
        yield {"pixel_values": torch.randn(2, getattr(config, "num_frames", 2), channels, height, width)}
    yield ids | image  # a model that knows no images does not ask for them
    yield ids
    yield image


def _part(config: Any, name: str) -> Any:
    """Of a model of several parts, the one that says it; else the config itself."""
    found = getattr(config, name, None)
    return config if found is None else found


def _ids(config: Any) -> Tensor:
    # Not the first few, which may mean the start, the end or padding.
    return torch.randint(3, max(getattr(config, "vocab_size", 256), 4), (2, TOKENS))


def _attention_mask() -> Tensor:
    """The second text is shorter, and padded on the right."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, TOKENS * 2 // 3 :] = 0
    return mask
