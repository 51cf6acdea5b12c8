"""Third-party models, tiny and with random weights, and what each is run with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 97}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {**SMALL, "image_size": 16, "patch_size": 4, "num_channels": 3}
TOKENS, LENGTH = 97, 11


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model: how it is made, and with what it is run."""

    name: str
    make: Callable[[], nn.Module]
    example: Callable[[], dict[str, Any] | tuple[Any, ...]]
    sites: int
    """How many sites must be swapped."""


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, TOKENS, (2, length))


def padded() -> dict[str, Any]:
    """A batch whose second entry is filled up on the left."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def pairs() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(7)}


def image(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def hugging_face(
    config: str, model: str, options: dict[str, Any], example: Callable[[], Any], sites: int, **more: Any
) -> Entry:
    def make() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**{**options, **more}))
        return made

    return Entry(f"transformers {model}", make, example, sites)


def x_transformers(causal: bool) -> Entry:
    def make() -> nn.Module:
        from x_transformers import Decoder, Encoder, TransformerWrapper

        layers = (Decoder if causal else Encoder)(dim=32, depth=2, heads=4, attn_flash=True)
        made: nn.Module = TransformerWrapper(num_tokens=TOKENS, max_seq_len=32, attn_layers=layers)
        return made

    return Entry(f"x-transformers {'decoder' if causal else 'encoder'}", make, lambda: (ids(),), 2)


def diffusers_transformer() -> Entry:
    def make() -> nn.Module:
        from diffusers import DiTTransformer2DModel

        made: nn.Module = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
        )
        return made

    def example() -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 5]),
            "class_labels": torch.tensor([1, 2]),
        }

    return Entry("diffusers DiTTransformer2DModel", make, example, 2)


CLIP = {"text_config": {**TEXT, "projection_dim": 16}, "vision_config": {**IMAGE, "projection_dim": 16}}
SPEECH = {**TEXT, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DISTIL = {"dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48, "vocab_size": 97}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 97, "n_positions": 64}

ZOO = (
    hugging_face("LlamaConfig", "LlamaForCausalLM", GROUPED, padded, 2),
    hugging_face("MistralConfig", "MistralForCausalLM", GROUPED, padded, 2, sliding_window=4),
    hugging_face("Qwen2Config", "Qwen2ForCausalLM", GROUPED, padded, 2),
    hugging_face("Qwen3Config", "Qwen3ForCausalLM", GROUPED, padded, 2, head_dim=16),
    hugging_face("Gemma2Config", "Gemma2ForCausalLM", GROUPED, padded, 2, head_dim=16, sliding_window=4),
    hugging_face("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED, padded, 2, head_dim=16, sliding_window=4),
    hugging_face("GptOssConfig", "GptOssForCausalLM", GROUPED, padded, 2, head_dim=16, sliding_window=4, **EXPERTS),
    hugging_face("Phi3Config", "Phi3ForCausalLM", GROUPED, padded, 2, pad_token_id=0),
    hugging_face("Starcoder2Config", "Starcoder2ForCausalLM", GROUPED, padded, 2),
    hugging_face("Olmo2Config", "Olmo2ForCausalLM", GROUPED, padded, 2),
    hugging_face("GraniteConfig", "GraniteForCausalLM", GROUPED, padded, 2),
    hugging_face("CohereConfig", "CohereForCausalLM", GROUPED, padded, 2),
    hugging_face("MixtralConfig", "MixtralForCausalLM", GROUPED, padded, 2, num_local_experts=2),
    hugging_face("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT, padded, 2),
    hugging_face("GPT2Config", "GPT2LMHeadModel", GPT2, padded, 2),
    hugging_face("OPTConfig", "OPTForCausalLM", TEXT, padded, 2, ffn_dim=48, word_embed_proj_dim=32),
    hugging_face("BertConfig", "BertModel", TEXT, padded, 2),
    hugging_face("RobertaConfig", "RobertaModel", TEXT, padded, 2),
    hugging_face("ElectraConfig", "ElectraModel", TEXT, padded, 2),
    hugging_face("DistilBertConfig", "DistilBertModel", DISTIL, padded, 2),
    hugging_face("ViTConfig", "ViTModel", IMAGE, image, 2),
    hugging_face("DeiTConfig", "DeiTModel", IMAGE, image, 2),
    hugging_face("Dinov2Config", "Dinov2Model", IMAGE, image, 2),
    hugging_face("ViTMAEConfig", "ViTMAEModel", IMAGE, image, 2),
    hugging_face("SiglipVisionConfig", "SiglipVisionModel", IMAGE, image, 3),
    hugging_face("CLIPConfig", "CLIPModel", CLIP, lambda: {**padded(), **image()}, 4),
    hugging_face("Wav2Vec2Config", "Wav2Vec2Model", SPEECH, lambda: {"input_values": torch.randn(2, 400)}, 2),
    hugging_face("HubertConfig", "HubertModel", SPEECH, lambda: {"input_values": torch.randn(2, 400)}, 2),
    hugging_face(
        "WhisperConfig", "WhisperForConditionalGeneration", BART,
        lambda: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids()}, 6,
        num_mel_bins=8, max_source_positions=20, max_target_positions=32, pad_token_id=0,
    ),
    hugging_face("BartConfig", "BartForConditionalGeneration", BART, pairs, 6),
    hugging_face("MarianConfig", "MarianMTModel", BART, pairs, 6, pad_token_id=0),
    x_transformers(causal=True),
    x_transformers(causal=False),
    diffusers_transformer(),
)  # fmt: skip
