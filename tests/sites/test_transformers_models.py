"""Tiny models of Hugging Face transformers with random weights: swapped, they give the same answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headway.sites import transformers as ours
from headway.sites.site import Site, Ticket

tf = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
]

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GQA: dict[str, Any] = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
TWO_KINDS = ["sliding_attention", "full_attention"]

DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**GQA),
    "mistral": lambda: tf.MistralConfig(**GQA, sliding_window=4),
    "gemma2": lambda: tf.Gemma2Config(**GQA, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**GQA, sliding_window=4, query_pre_attn_scalar=8, layer_types=TWO_KINDS),
    "qwen3": lambda: tf.Qwen3Config(**GQA),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=None, pad_token_id=0
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **GQA, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, layer_types=TWO_KINDS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**BASE),
    "opt": lambda: tf.OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    ),
    "phi3": lambda: tf.Phi3Config(**BASE, num_key_value_heads=2, sliding_window=None),
    "llama4": lambda: tf.Llama4TextConfig(
        **GQA, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=4, interleave_moe_layer_step=2
    ),
}  # fmt: skip
EAGER_ONLY = ("gemma2", "gpt_oss")
"""What sdpa cannot compute: softcap and sinks."""


def filled(model: nn.Module) -> nn.Module:
    """Weights large enough that attention matters; by their names, so the same for two models of one kind."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim > 1 or "sink" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return model.eval()


def decoder(name: str, implementation: str | None = None) -> Any:
    default = "eager" if name in EAGER_ONLY else "sdpa"
    model = tf.AutoModelForCausalLM.from_config(DECODERS[name](), attn_implementation=implementation or default)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the grouped one has no float64
    return filled(model)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def real(side: str, batch: int = 2, length: int = 9, filler: int = 3) -> Tensor:
    """transformers' attention_mask: one entry with filler on one side, others without."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, slice(0, filler) if side == "left" else slice(length - filler, None)] = 0
    return mask


SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
NO_DROP: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 4}
TEXT: dict[str, Any] = {**SMALL, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}


def _encoder_decoder(cls: Any, **more: Any) -> Any:
    return cls(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, dropout=0.0, **more,
    )  # fmt: skip


def _clip() -> Any:
    return tf.CLIPConfig(
        text_config={**TEXT, "bos_token_id": 1, "eos_token_id": 2}, vision_config=IMAGE, projection_dim=16
    )


def _llava() -> Any:
    text = {**GQA, "model_type": "llama"}
    vision = {**IMAGE, "model_type": "clip_vision_model"}
    return tf.LlavaConfig(text_config=text, vision_config=vision, image_token_id=63, image_seq_length=16)


def _with_image() -> Tensor:
    tokens = ids(2, 22).clamp_max(60)
    tokens[:, 4:20] = 63
    return tokens


PADDED = {"input_ids": ids(2, 9), "attention_mask": real("right")}

ENCODERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "bert": (lambda: tf.BertConfig(**TEXT, **NO_DROP), PADDED),
    "roberta": (lambda: tf.RobertaConfig(**TEXT, **NO_DROP), PADDED),
    "modernbert": (
        lambda: tf.ModernBertConfig(**{**TEXT, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1},
                                    sep_token_id=2, local_attention=4, global_attn_every_n_layers=2),
        PADDED,
    ),
    "vit": (lambda: tf.ViTConfig(**IMAGE, **NO_DROP), {"pixel_values": numbers(2, 3, 16, 16)}),
    "dinov2": (lambda: tf.Dinov2Config(**IMAGE, **NO_DROP), {"pixel_values": numbers(2, 3, 16, 16)}),
    "clip": (_clip, {**PADDED, "pixel_values": numbers(2, 3, 16, 16)}),
    "siglip": (
        lambda: tf.SiglipConfig(text_config={**TEXT, "bos_token_id": 1, "eos_token_id": 2}, vision_config=IMAGE),
        {**PADDED, "pixel_values": numbers(2, 3, 16, 16)},
    ),
    "whisper": (
        lambda: _encoder_decoder(tf.WhisperConfig, num_mel_bins=8, max_source_positions=10, max_target_positions=32),
        {"input_features": numbers(2, 8, 20), "decoder_input_ids": ids(2, 6)},
    ),
    "wav2vec2": (
        lambda: tf.Wav2Vec2Config(
            **SMALL, conv_dim=[16, 16], conv_stride=[4, 2], conv_kernel=[4, 2], num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
            layerdrop=0.0, feat_proj_dropout=0.0, apply_spec_augment=False,
        ),
        {"input_values": numbers(2, 160), "attention_mask": real("right", length=160, filler=60)},
    ),
    "t5": (
        lambda: tf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0),
        {**PADDED, "decoder_input_ids": ids(2, 6)},
    ),
    "bart": (
        lambda: _encoder_decoder(tf.BartConfig, max_position_embeddings=32), {**PADDED, "decoder_input_ids": ids(2, 6)}
    ),
    "llava": (
        _llava,
        {
            "input_ids": _with_image(), "pixel_values": numbers(2, 3, 16, 16),
            "attention_mask": real("left", length=22),
        },
    ),
}  # fmt: skip
"""Each with its inputs. The first batch entry of a text has filler at its end, that of llava at its start."""


FLAGS = {"use_cache": False}


def swap(model: nn.Module, keep: Callable[[str], bool] = lambda name: True) -> tuple[Callable[[], None], list[Ticket]]:
    tickets = [Ticket(s.name, s.kind) for s in ours.find(model) if not s.because and keep(s.name)]
    return ours.apply(model, {ticket.name: Site(ticket) for ticket in tickets}), tickets


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_decoding_is_token_equal(name, cache, side):
    model = decoder(name)
    wants = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    wants["attention_mask"] = real("left") if side == "left" else torch.ones(2, 9, dtype=torch.long)
    before = model.generate(ids(2, 9), **wants)
    undo, tickets = swap(model)
    assert torch.equal(model.generate(ids(2, 9), **wants), before)
    assert len(tickets) == 2
    assert all(sum(ticket.runs.values()) == 8 for ticket in tickets)
    undo()
    assert torch.equal(model.generate(ids(2, 9), **wants), before)


def answers(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """What a model says on rows that mean something, and the gradients of all parameters."""
    out = model(**inputs)
    found = [v for k, v in out.items() if k in ("logits", "last_hidden_state", "text_embeds", "image_embeds")]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == found[0].shape[:2]:
        found = [found[0][mask.bool()]]
    loss = sum((x * numbers(*x.shape).to(x)).sum() for x in found)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [*(x.detach() for x in found), *(g for g in gradients if g is not None)]


def doubled(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


class InFloat64(TorchFunctionMode):
    """Models lower norms and softmax to float32, which a judge must not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            wants = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)]
            if func is Tensor.float or (func in (Tensor.to, Tensor.type) and wants == [torch.float32]):
                return args[0]
            if func is torch.nn.functional.softmax and kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def check_against_float64(model: Any, inputs: dict[str, Any]) -> None:
    """Ours errs no more than a small multiple of what eager attention errs in float32.

    A gradient that is 0 in truth, as of a bias of keys, is nothing but rounding of others, and counts as of some size.
    """
    with InFloat64():
        truth = answers(copy.deepcopy(model).double(), doubled(inputs))
    plain = answers(model, inputs)
    undo, tickets = swap(model)
    now = answers(model, inputs)
    undo()
    assert tickets
    assert all(ticket.runs for ticket in tickets)
    assert len(now) == len(plain) == len(truth)
    largest = max(true.abs().max() for true in truth)
    for mine, theirs, true in zip(now, plain, truth, strict=True):
        scale = largest / 30 if true.abs().max() < 1e-12 * largest else true.abs().max()
        for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            assert norm(mine - true) <= 4 * norm(theirs - true) + 2e-6 * scale


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_and_composites_err_no_more_than_eager(name):
    config, inputs = ENCODERS[name]
    check_against_float64(filled(tf.AutoModel.from_config(config(), attn_implementation="eager")), inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_err_no_more_than_eager(name, side):
    inputs = {"input_ids": ids(2, 9), "attention_mask": real(side), **FLAGS}
    check_against_float64(decoder(name, "eager"), inputs)
