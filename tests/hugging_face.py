"""Tiny models of transformers from configurations, with a batch each; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="pip install '.[hf]'")
transformers.logging.set_verbosity_error()  # of configurations that are odd because they are small
transformers.logging.disable_progress_bar()

Batch = dict[str, Tensor]
VOCABULARY, ROWS, LENGTH = 48, 3, 6
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "labels": IDS}
CLASSES = torch.tensor([0, 1, 1])
IMAGES = torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SOUND = torch.randn(ROWS, 8, 16, generator=torch.Generator().manual_seed(2))

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "attention_dropout": 0.0,
}
_TOKENS = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1}
_DECODER = {**_SIZES, **_TOKENS, "eos_token_id": 2, "num_key_value_heads": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _of(name: str, batch: Batch, **settings: Any) -> Callable[[], tuple[nn.Module, Batch]]:
    """A model class of transformers by its name, with the configuration that belongs to it."""

    def make() -> tuple[nn.Module, Batch]:
        kind = getattr(transformers, name)
        torch.manual_seed(3)
        return kind(kind.config_class(**settings)), dict(batch)

    return make


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "bert": _of(
        "BertForSequenceClassification", {"input_ids": IDS, "labels": CLASSES}, **_SIZES, **_TOKENS, **_DROPOUT
    ),
    "gpt2": _of(
        "GPT2LMHeadModel",
        TEXT,
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    "llama": _of("LlamaForCausalLM", TEXT, **_DECODER),
    "qwen2": _of("Qwen2ForCausalLM", TEXT, **_DECODER),
    "qwen3": _of("Qwen3ForCausalLM", TEXT, **_DECODER, head_dim=8, tie_word_embeddings=True),
    "t5": _of(
        "T5ForConditionalGeneration",
        TEXT,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        vocab_size=VOCABULARY,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
    "vit": _of(
        "ViTForImageClassification",
        {"pixel_values": IMAGES, "labels": CLASSES},
        **_SIZES,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
    ),
    "whisper": _of(
        "WhisperForConditionalGeneration",
        {"input_features": SOUND, "labels": IDS},
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        dropout=0.0,
    ),
    "mixtral": _of("MixtralForCausalLM", TEXT, **_DECODER, num_experts_per_tok=2, num_local_experts=4),
    "qwen2_moe": _of(
        "Qwen2MoeForCausalLM", TEXT, **_DECODER, **_EXPERTS, num_experts=4, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": _of("Qwen3MoeForCausalLM", TEXT, **_DECODER, **_EXPERTS, num_experts=4, head_dim=8),
    "deepseek_v3": _of(
        "DeepseekV3ForCausalLM",
        TEXT,
        **_DECODER,
        **_EXPERTS,
        **_LATENT,
        num_local_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
    ),
    "gpt_oss": _of("GptOssForCausalLM", TEXT, **_DECODER, head_dim=8, num_experts_per_tok=2, num_local_experts=4),
    "llama4": _of(
        "Llama4ForCausalLM",
        TEXT,
        **_DECODER,
        head_dim=8,
        intermediate_size_mlp=32,
        num_experts_per_tok=1,
        num_local_experts=3,
    ),
    "jetmoe": _of(
        "JetMoeForCausalLM",
        TEXT,
        **{k: v for k, v in _DECODER.items() if k not in ("num_attention_heads", "num_key_value_heads")},
        num_key_value_heads=1,
        kv_channels=8,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
}
"""By architecture: makes a model, always with the same weights and without dropout, and its batch."""

FUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "jetmoe")
"""Those whose experts share one weight of three axes."""
