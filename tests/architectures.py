"""A zoo of tiny random transformers, one row per architecture, built in milliseconds and without a download.

int8pass knows no model by name, so the only way to know that its rules see through the spellings people write is to
meet those spellings: fused and split projections, norms with and without (1+w), gamma before and after the cast,
biases, parallel residuals, gated and plain MLPs, convolution-style linears, routed experts. Each row is a real
`transformers` model at two layers and width 64, with every parameter redrawn: matrices large enough for each branch
to matter in the output, vectors (norm weights, biases) moved off the ones and zeros that would hide a wrong fold.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Family = Literal["decoder", "encoder", "encoder-decoder", "vision", "moe"]
Inputs = Callable[[nn.Module], dict[str, Tensor]]

BATCH, LENGTH, VOCABULARY, IMAGE = 2, 16, 128, 32
TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
)  # fmt: skip
GROUPED = TEXT | dict(num_key_value_heads=2, head_dim=16)
PAIR = dict(
    vocab_size=VOCABULARY, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, use_cache=False,
)  # fmt: skip
PIXELS = dict(
    image_size=IMAGE, patch_size=8, num_channels=3, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4,
)  # fmt: skip
EXPERTS = GROUPED | dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)


@dataclass(frozen=True)
class Architecture:
    """One row of the zoo: how to build the model, what to call it with, and what is known of its graph."""

    name: str
    family: Family
    build: Callable[[], nn.Module]
    inputs: Inputs
    linears: int  # nn.Linear and Conv1D modules; experts held as one 3-D parameter are not among them
    own_breaks: int = 1  # graphs a plain torch.compile makes of it; above 1, the model itself breaks its graph
    notes: str = ""


def tokens(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": _ids(LENGTH)}


def token_pairs(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": _ids(LENGTH), "decoder_input_ids": _ids(LENGTH // 2)}


def pixels(model: nn.Module) -> dict[str, Tensor]:
    return {"pixel_values": _floats(model, BATCH, 3, IMAGE, IMAGE)}


def speech(model: nn.Module) -> dict[str, Tensor]:
    """Whisper: the mel frames are two per encoder position (its second convolution has stride 2)."""
    config: Any = model.config
    frames = _floats(model, BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": frames, "decoder_input_ids": _ids(LENGTH // 2)}


def waveform(model: nn.Module) -> dict[str, Tensor]:
    return {"input_values": _floats(model, BATCH, 640)}


def _ids(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))


def _floats(model: nn.Module, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)


def row(
    name: str,
    family: Family,
    model: str,
    linears: int,
    sizes: Mapping[str, Any],
    *,
    inputs: Inputs = tokens,
    attention: str | None = "sdpa",
    own_breaks: int = 1,
    notes: str = "",
    **more: Any,
) -> Architecture:
    """A row whose model is the transformers class named `model`, its config read off that class."""

    def construct() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # transformers 5.17: torch.jit.script, at import
            kind = getattr(transformers, model)
            built: nn.Module = kind(kind.config_class(attn_implementation=attention, **(dict(sizes) | more)))
            return built

    return Architecture(name, family, construct, inputs, linears, own_breaks, notes)


# fmt: off
ARCHITECTURES: tuple[Architecture, ...] = (
    # RMSNorm decoders: gamma times the value cast back to bf16, unless noted
    row("llama", "decoder", "LlamaForCausalLM", 15, GROUPED),
    row("mistral", "decoder", "MistralForCausalLM", 15, GROUPED, sliding_window=8),
    row("qwen2", "decoder", "Qwen2ForCausalLM", 15, GROUPED, notes="bias on q, k, v only"),
    row("qwen3", "decoder", "Qwen3ForCausalLM", 15, GROUPED, notes="RMSNorm on q and k per head, before the transpose"),
    row("gemma2", "decoder", "Gemma2ForCausalLM", 15, GROUPED, attention="eager",
        notes="(1+w) RMSNorm in fp32, before and after each branch; softcaps"),
    row("gemma3", "decoder", "Gemma3ForCausalLM", 15, GROUPED, notes="gemma2 with q and k norms after the transpose"),
    row("phi3", "decoder", "Phi3ForCausalLM", 9, GROUPED, notes="fused qkv and gate_up; up * silu(gate)"),
    row("olmo2", "decoder", "Olmo2ForCausalLM", 15, GROUPED,
        notes="norms only after each branch, so q, k, v, gate and up read the residual; gamma before the cast"),
    row("exaone4", "decoder", "Exaone4ForCausalLM", 15, GROUPED, sliding_window=8, notes="post-norms, gamma after"),
    row("granite", "decoder", "GraniteForCausalLM", 15, GROUPED, residual_multiplier=0.5, logits_scaling=2.0,
        notes="scalar multiples on the embedding, branches and logits"),
    row("glm4", "decoder", "Glm4ForCausalLM", 13, GROUPED, notes="norms before and after; fused gate_up; qkv bias"),
    row("arcee", "decoder", "ArceeForCausalLM", 13, GROUPED, notes="relu squared, no gate"),
    row("apertus", "decoder", "ApertusForCausalLM", 13, GROUPED, notes="xIELU: torch.where over two branches, no gate"),
    # LayerNorm decoders
    row("phi", "decoder", "PhiForCausalLM", 13, TEXT, intermediate_size=130,
        notes="one norm read by q, k, v and fc1 (parallel); fc2 reads 130 columns, no multiple of 8"),
    row("gpt2", "decoder", "GPT2LMHeadModel", 9, TEXT, notes="Conv1D is view, addmm with a [K, N] weight, view"),
    row("gpt_neo", "decoder", "GPTNeoForCausalLM", 13, TEXT, attention="eager", window_size=8,
        attention_types=[[["global", "local"], 1]], notes="biasless q, k, v beside biased out_proj"),
    row("gpt_neox", "decoder", "GPTNeoXForCausalLM", 9, TEXT, notes="parallel branches, two norms of one residual"),
    row("gptj", "decoder", "GPTJForCausalLM", 13, TEXT, attention="eager", rotary_dim=8, notes="parallel branches"),
    row("gpt_bigcode", "decoder", "GPTBigCodeForCausalLM", 9, TEXT, notes="fused multi-query c_attn"),
    row("codegen", "decoder", "CodeGenForCausalLM", 9, TEXT, attention="eager", rotary_dim=8,
        notes="parallel branches; fused qkv, cut up for model parallelism"),
    row("opt", "decoder", "OPTForCausalLM", 13, TEXT, ffn_dim=128, word_embed_proj_dim=64,
        notes="the MLP works on a [B*S, K] view"),
    row("opt_post_norm", "decoder", "OPTForCausalLM", 15, TEXT, ffn_dim=128, word_embed_proj_dim=40,
        do_layer_norm_before=False, notes="norm after the residual add: read by linears and by the next add"),
    row("bloom", "decoder", "BloomForCausalLM", 9, TEXT, attention="eager",
        notes="alibi by baddbmm; hand-written gelu, an autograd.Function whose tracing makes torch warn"),
    row("falcon", "decoder", "FalconForCausalLM", 9, TEXT, new_decoder_architecture=True, num_kv_heads=2,
        notes="linears spelled x @ W.T; parallel branches with a norm each"),
    row("falcon_7b", "decoder", "FalconForCausalLM", 9, TEXT, new_decoder_architecture=False, multi_query=True,
        parallel_attn=True, notes="parallel branches reading one norm"),
    row("falcon_rw", "decoder", "FalconForCausalLM", 9, TEXT, new_decoder_architecture=False, multi_query=False,
        parallel_attn=False, alibi=True, bias=True, notes="linears spelled x @ W.T + b; sequential branches"),
    row("olmo", "decoder", "OlmoForCausalLM", 15, GROUPED, notes="layer_norm in fp32 without weight or bias"),
    row("cohere", "decoder", "CohereForCausalLM", 15, GROUPED, use_qk_norm=True,
        notes="hand-written LayerNorm in fp32, no bias; q, k, v, gate and up read one norm"),
    row("stablelm", "decoder", "StableLmForCausalLM", 15, GROUPED, use_qkv_bias=True, qk_layernorm=True,
        notes="layer_norm per head, concatenated"),
    row("starcoder2", "decoder", "Starcoder2ForCausalLM", 13, GROUPED, notes="bias on every linear but the head"),
    row("mpt", "decoder", "MptForCausalLM", 9, TEXT, attention="eager", expansion_ratio=2, max_seq_len=64,
        notes="layer_norm without bias; fused qkv"),
    row("nemotron", "decoder", "NemotronForCausalLM", 13, GROUPED, notes="layer_norm with weight (1+w); relu squared"),
    row("persimmon", "decoder", "PersimmonForCausalLM", 9, TEXT, notes="fused qkv; layer_norm on q and k per head"),
    # Encoders
    row("bert", "encoder", "BertModel", 13, TEXT, notes="norm after the residual add; a pooler on one token"),
    row("roberta", "encoder", "RobertaModel", 13, TEXT),
    row("distilbert", "encoder", "DistilBertModel", 12, TEXT, hidden_dim=128),
    row("electra", "encoder", "ElectraModel", 13, TEXT, embedding_size=32, notes="q, k, v read a linear"),
    row("albert", "encoder", "AlbertModel", 8, TEXT, embedding_size=32,
        notes="both layers are one module: 8 weights, 14 linears in the graph"),
    row("modernbert", "encoder", "ModernBertModel", 8, TEXT, cls_token_id=1, sep_token_id=2,
        notes="layer_norm without bias, the first layer has none; fused qkv and gelu(chunk) * chunk"),
    row("deberta_v2", "encoder", "DebertaV2Model", 16, TEXT, attention="eager", relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        notes="four linears read a parameter, the table of relative positions; masked embedding norm"),
    row("wav2vec2", "encoder", "Wav2Vec2Model", 13, TEXT, inputs=waveform, conv_dim=(32, 32), conv_kernel=(10, 3),
        conv_stride=(5, 2), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
        notes="convolutions in front, one of them weight-normed"),
    row("clip_text", "encoder", "CLIPTextModel", 12, TEXT, notes="x * sigmoid(1.702 * x)"),
    # Encoder-decoders
    row("t5", "encoder-decoder", "T5ForConditionalGeneration", 33, TEXT, inputs=token_pairs, d_ff=128, d_kv=16,
        num_layers=2, num_decoder_layers=2,
        notes="RMSNorm whose value stays bf16 until rsqrt promotes it; scalar multiple between last norm and head"),
    row("t5_gated", "encoder-decoder", "T5ForConditionalGeneration", 37, TEXT, inputs=token_pairs, d_ff=128, d_kv=16,
        num_layers=2, num_decoder_layers=2, feed_forward_proj="gated-gelu", notes="hand-written gelu, times a linear"),
    row("bart", "encoder-decoder", "BartForConditionalGeneration", 33, PAIR, inputs=token_pairs,
        notes="every decoder layer's cross k, v read the encoder's last norm"),
    row("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", 33, PAIR, inputs=token_pairs,
        notes="bart with the norms in front"),
    row("whisper", "encoder-decoder", "WhisperForConditionalGeneration", 33, PAIR, inputs=speech, num_mel_bins=16,
        max_source_positions=24, max_target_positions=32, notes="k without bias beside q and v with"),
    # Vision
    row("vit", "vision", "ViTModel", 13, PIXELS, inputs=pixels),
    row("dinov2", "vision", "Dinov2Model", 12, PIXELS, inputs=pixels, mlp_ratio=2,
        notes="layer scale: a vector multiplies each branch, after its last linear"),
    row("siglip", "vision", "SiglipVisionModel", 15, PIXELS, inputs=pixels,
        notes="pools by nn.MultiheadAttention, whose packed projection is no nn.Linear: 17 linears in the graph"),
    row("clip", "vision", "CLIPVisionModel", 12, PIXELS, inputs=pixels, notes="a norm of a norm in front"),
    row("swin", "vision", "SwinModel", 13, {}, inputs=pixels, image_size=IMAGE, patch_size=4, embed_dim=32,
        depths=[1, 1], num_heads=[2, 4], window_size=4, mlp_ratio=2.0,
        notes="pad, view and transpose (windows) between norm and q, k, v"),
    row("beit", "vision", "BeitModel", 12, PIXELS, inputs=pixels, use_relative_position_bias=True,
        notes="k without bias beside q and v with"),
    row("convnext", "vision", "ConvNextModel", 4, {}, inputs=pixels, attention=None, hidden_sizes=[32, 64],
        depths=[1, 1], num_stages=2, notes="linears on a permuted image, behind convolution and norm"),
    # Mixtures of experts: experts are 3-D parameters, and how they multiply is a setting of the config
    row("mixtral", "moe", "MixtralForCausalLM", 9, EXPERTS,
        notes="_grouped_mm, whose tracing makes Dynamo warn of lru_cache; the router is an F.linear of its own"),
    row("mixtral_batched", "moe", "MixtralForCausalLM", 9, EXPERTS, experts_implementation="batched_mm",
        notes="experts gathered per token, then bmm"),
    row("mixtral_loop", "moe", "MixtralForCausalLM", 9, EXPERTS, experts_implementation="eager", own_breaks=11,
        notes="a Python loop over the experts hit: breaks at nonzero(), and Dynamo runs one layer's graphs for both"),
    row("qwen2_moe", "moe", "Qwen2MoeForCausalLM", 17, EXPERTS, shared_expert_intermediate_size=64,
        notes="a shared expert made of linears, behind a sigmoid gate with one row"),
    row("qwen3_moe", "moe", "Qwen3MoeForCausalLM", 9, EXPERTS, notes="norms on q and k"),
    row("olmoe", "moe", "OlmoeForCausalLM", 9, EXPERTS),
    row("deepseek_v3", "moe", "DeepseekV3ForCausalLM", 17, TEXT, num_experts_per_tok=2, moe_intermediate_size=64,
        n_routed_experts=4, n_group=2, topk_group=1, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=1,
        notes="low-rank q, k, v: a norm of a slice of a linear feeds a linear; the router is fp32"),
    row("gpt_oss", "moe", "GptOssForCausalLM", 9, EXPERTS, attention="eager",
        notes="gamma before the cast; experts stored [E, K, N], biased, gate and up interleaved"),
    row("llama4", "moe", "Llama4ForCausalLM", 17, EXPERTS,
        notes="RMSNorm as a function, gamma on the right; dense bmm over all experts beside a shared expert"),
)
# fmt: on


# Architectures whose graphs torch.export and torch.onnx take in seconds; one of every family and spelling.
EXPORTED = (
    "llama", "qwen2", "gemma2", "phi3", "olmo2", "gpt2", "gpt_neox", "opt", "falcon", "starcoder2", "bert", "roberta",
    "distilbert", "t5", "vit", "dinov2",
)  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of that row, in eval mode and with its parameters redrawn, and the arguments to call it with."""
    (architecture,) = (each for each in ARCHITECTURES if each.name == name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = architecture.build().eval()
    assert count_linears(model) == architecture.linears, f"{name}: {count_linears(model)} linears"
    redraw(model)
    model.to(dtype)
    return model, architecture.inputs(model)


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Random values for every parameter, in the order of `parameters()`: the same for any transformers version."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_(noise / 10)
        else:
            parameter.copy_(noise / 8)  # 1 / sqrt(64): a matrix of the usual width keeps the scale of its input


def count_linears(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear | Conv1D) for module in model.modules())


def main_output(out: Any) -> Tensor:
    """The tensor to compare: logits where the model has a head, else the last hidden state."""
    output = out.logits if "logits" in out else out.last_hidden_state
    assert isinstance(output, Tensor)
    return output
