"""One step of training, merging, saving and reloading on tiny models of transformers' architectures: no silent wrong result."""

import copy
import inspect
import warnings

import pytest
import torch
import transformers
from torch import nn

import vblora
from tests.small_models import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")

# What a config's fields of these names are made, where it has them.
SMALL = (
    dict.fromkeys(("adapter_rank", "kv_lora_rank", "q_lora_rank"), 16)
    | dict.fromkeys(
        ("d_embed", "d_model", "dim", "emb_dim", "embedding_size", "embed_dim", "hidden_size", "n_embd"), 32
    )
    | dict.fromkeys(
        ("attention_head_size", "projection_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 32
    )
    | dict.fromkeys(("d_ff", "d_inner", "dff", "ffn_dim", "hidden_dim", "intermediate_size", "n_inner"), 64)
    | dict.fromkeys(
        ("decoder_ffn_dim", "encoder_ffn_dim", "max_position_embeddings", "n_ctx", "n_positions", "vocab_size"), 64
    )
    | dict.fromkeys(("max_source_positions", "max_target_positions"), 64)
    | dict.fromkeys(("decoder_layers", "encoder_layers", "n_layer", "n_layers", "num_decoder_layers"), 2)
    | dict.fromkeys(("num_feat_extract_layers", "num_hidden_layers", "num_layers"), 2)
    | dict.fromkeys(("num_conv_pos_embedding_groups", "num_key_value_heads", "type_vocab_size"), 2)
    | dict.fromkeys(
        ("decoder_attention_heads", "encoder_attention_heads", "n_head", "n_heads", "num_attention_heads"), 4
    )
    | dict.fromkeys(("attention_window", "num_conv_pos_embeddings", "num_heads", "sliding_window"), 4)
    # Each token sees all.
    | dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "num_experts_per_tok"), 4)
    | dict.fromkeys(("d_kv", "head_dim", "patch_size", "state_size"), 8)
    | {"image_size": 16, "num_mel_bins": 16, "conv_dim": (16, 16), "conv_kernel": (3, 3), "conv_stride": (2, 2)}
    | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
)
LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
DEEPSEEK = LATENT | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "image_size": 32, "patch_size": 4}
CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "patch_size": 4, "image_size": 32}

# Class names with what else their configs need.
MODELS = {
    # Encoders
    "AlbertForMaskedLM": {},
    "BertForMaskedLM": {},
    "BigBirdForMaskedLM": {"attention_type": "original_full"},
    "ConvBertForMaskedLM": {},
    "DebertaForMaskedLM": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DebertaV2ForMaskedLM": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "DistilBertForMaskedLM": {},
    "ElectraForMaskedLM": {},
    "EsmForMaskedLM": {},
    "EuroBertForMaskedLM": {},
    "FNetForMaskedLM": {},
    "FunnelForMaskedLM": {"block_sizes": [1, 1], "d_head": 8},
    "LayoutLMForMaskedLM": {},
    "LongformerForMaskedLM": {},
    "MPNetForMaskedLM": {},
    "MegatronBertForMaskedLM": {},
    "MobileBertForMaskedLM": {"intra_bottleneck_size": 32, "true_hidden_size": 32, "embedding_size": 16},
    "ModernBertForMaskedLM": {},
    "NystromformerForMaskedLM": {},
    "RemBertForMaskedLM": {},
    "RoFormerForMaskedLM": {},
    "RobertaForSequenceClassification": {},
    "SqueezeBertForMaskedLM": {},
    "XLMRobertaXLForMaskedLM": {},
    "XLMWithLMHeadModel": {},
    "YosoForMaskedLM": {},
    # Decoders
    "ApertusForCausalLM": {},
    "ArceeForCausalLM": {},
    "BitNetForCausalLM": {},
    "BloomForCausalLM": {},
    "CTRLLMHeadModel": {},
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "Cohere2ForCausalLM": {},
    "CohereForCausalLM": {},
    "DiffLlamaForCausalLM": {},
    "Exaone4ForCausalLM": {},
    "FalconForCausalLM": {},
    "GPT2LMHeadModel": {},
    "GPTBigCodeForCausalLM": {},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GPTNeoXForCausalLM": {},
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {"query_pre_attn_scalar": 8},
    "Gemma3nForCausalLM": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "laurel_rank": 8,
        "activation_sparsity_pattern": None,
        "altup_correct_scale": False,
    },
    "GemmaForCausalLM": {},
    "Glm4ForCausalLM": {},
    "GraniteForCausalLM": {},
    "HeliumForCausalLM": {},
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "MptForCausalLM": {},
    "NemotronForCausalLM": {},
    "OPTForCausalLM": {"word_embed_proj_dim": 32},
    "Olmo2ForCausalLM": {},
    "OpenAIGPTLMHeadModel": {},
    "PersimmonForCausalLM": {},
    "Phi3ForCausalLM": {},
    "PhiForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "SmolLM3ForCausalLM": {},
    "StableLmForCausalLM": {},
    "Starcoder2ForCausalLM": {},
    "XGLMForCausalLM": {},
    "XLNetLMHeadModel": {},
    # Mixtures of experts
    "DeepseekV2ForCausalLM": DEEPSEEK,
    "DeepseekV3ForCausalLM": DEEPSEEK,
    "Ernie4_5_MoeForCausalLM": {},
    "GptOssForCausalLM": {},
    "GraniteMoeForCausalLM": {},
    "JetMoeForCausalLM": {},
    "Llama4ForCausalLM": {},
    "LongcatFlashForCausalLM": LATENT,
    "MixtralForCausalLM": {},
    "OlmoeForCausalLM": {},
    "PhimoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    # Recurrent ones, and mixtures of those and attention
    "BambaForCausalLM": MAMBA2 | {"attn_layer_indices": [1]},
    "FalconH1ForCausalLM": MAMBA2 | {"mamba_d_ssm": 64},
    "FalconMambaForCausalLM": {},
    "GraniteMoeHybridForCausalLM": MAMBA2 | {"layer_types": ["mamba", "attention"]},
    "JambaForCausalLM": {},
    "Lfm2ForCausalLM": {},
    "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 2},
    "MambaForCausalLM": {},
    "NemotronHForCausalLM": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
    },
    "Qwen3NextForCausalLM": {},
    "RecurrentGemmaForCausalLM": {},
    "RwkvForCausalLM": {"rescale_every": 1},
    "Zamba2ForCausalLM": {
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 2,
    },
    # Encoders with decoders
    "BartForConditionalGeneration": {},
    "BlenderbotForConditionalGeneration": {},
    "LEDForConditionalGeneration": {},
    "LongT5ForConditionalGeneration": {},
    "M2M100ForConditionalGeneration": {},
    "MT5ForConditionalGeneration": {},
    "MarianMTModel": {},
    "NllbMoeForConditionalGeneration": {},
    "PegasusForConditionalGeneration": {},
    "SwitchTransformersForConditionalGeneration": {},
    "T5ForConditionalGeneration": {},
    "T5GemmaForConditionalGeneration": {},
    # Sounds
    "Data2VecAudioModel": {},
    "HubertModel": {},
    "SEWDModel": {},
    "UniSpeechModel": {},
    "UniSpeechSatModel": {},
    "Wav2Vec2ConformerModel": {},
    "Wav2Vec2Model": {},
    "WavLMModel": {},
    "WhisperForConditionalGeneration": {},
    # Images
    "BeitModel": {},
    "CLIPModel": {},
    "ConvNextModel": CONVNEXT | {"layer_scale_init_value": 1.0},
    "ConvNextV2Model": CONVNEXT,
    "DeiTModel": {},
    "Dinov2Model": {},
    "Dinov2WithRegistersModel": {},
    "SiglipModel": {},
    "SwinModel": SWIN,
    "Swinv2Model": SWIN,
    "ViTModel": {},
}

# Layers of which these inputs have no use, in whole models: what is called all the same, and what is not.
UNUSED = {
    "BigBirdForMaskedLM": ["pooler"],
    "EsmForMaskedLM": ["regression"],
    "FNetForMaskedLM": ["pooler.dense"],
    "LEDForConditionalGeneration": ["query_global", "key_global", "value_global"],
    "LayoutLMForMaskedLM": ["pooler.dense"],
    "LongformerForMaskedLM": ["query_global", "key_global", "value_global"],
    "SqueezeBertForMaskedLM": ["pooler.dense"],
}

# Layers that "all-linear" leaves out, by the endings of their names.
LEFT_OUT = {
    "BambaForCausalLM": ["mamba.out_proj"],
    "FalconH1ForCausalLM": ["mamba.out_proj"],
    "FalconMambaForCausalLM": ["mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"],
    "Gemma3nForCausalLM": ["altup.correction_coefs", "altup.prediction_coefs"],
    "GraniteMoeHybridForCausalLM": ["mamba.out_proj"],
    "JambaForCausalLM": ["mamba.dt_proj"],
    "Llama4ForCausalLM": ["feed_forward.router"],
    "LongcatFlashForCausalLM": ["router.classifier"],
    "Mamba2ForCausalLM": ["mixer.out_proj"],
    "MambaForCausalLM": ["mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"],
    "MobileBertForMaskedLM": ["predictions.dense"],
    "NemotronHForCausalLM": ["0.mixer.out_proj"],
    "PhimoeForCausalLM": ["mlp.router"],
    "RwkvForCausalLM": ["attention.output", "feed_forward.value"],
    "SiglipModel": ["head.attention.out_proj"],
    "WavLMModel": ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"],
    "Zamba2ForCausalLM": ["mamba.out_proj"],
}


def small_config(kind, **choice):
    """A config whose sizes are small, and with no dropout."""
    default = kind()
    names = set(vars(default)) | set(inspect.signature(kind.__init__).parameters)
    of_name = {getattr(kind, "attribute_map", {}).get(name, name): size for name, size in SMALL.items()}
    fields = {}
    for name in names:
        value = getattr(default, name, None)
        if name in of_name and isinstance(of_name[name], tuple) == isinstance(value, (list, tuple)):
            fields[name] = of_name[name]
        elif "drop" in name and isinstance(value, float):
            fields[name] = 0.0
    for name in getattr(kind, "sub_configs", {}):
        if hasattr(type(getattr(default, name, None)), "model_type"):
            fields[name] = small_config(type(getattr(default, name)))
    return kind(**fields | choice)


def build(name):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(small_config(kind.config_class, **MODELS[name])).eval()


def inputs(model):
    generator = torch.Generator().manual_seed(0)
    taken, main, config = inspect.signature(model.forward).parameters, model.main_input_name, model.config
    ids = torch.randint(3, 50, (2, 7), generator=generator)
    given = {}
    if "input_ids" in taken:
        given["input_ids"] = ids
    if "pixel_values" in taken:
        size = getattr(config, "vision_config", config).image_size
        given["pixel_values"] = torch.randn(2, 3, size, size, generator=generator)
    if main == "input_values":
        given["input_values"] = torch.randn(2, 64, generator=generator)
    if main == "input_features":
        given["input_features"] = torch.randn(2, 16, 2 * config.max_source_positions, generator=generator)
    if "decoder_input_ids" in taken:
        given["decoder_input_ids"] = ids.flip(1)
    if "use_cache" in taken:
        given["use_cache"] = False
    return given


def floats(output):
    """All floating-point tensors of an output."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in floats(part)]


@torch.no_grad()
def outputs(model, given):
    return floats(model.eval()(**given))


def distance(ones, others):
    """The largest relative error of an output; infinite where one has no such."""
    errors = [relative_error(*pair) for pair in zip(ones, others, strict=True)]
    return max(error if error == error else float("inf") for error in errors)


def train_a_step(model, given):
    """One step, after which all that had a gradient is another."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    sum(output.float().square().mean() for output in floats(model.train()(**given)) if output.requires_grad).backward()
    optimizer.step()


def layers_without_gradient(adapter):
    """The targets of whose A or B no logit has a gradient."""
    without, row = set(), 0
    for target in adapter.targets:
        for width in (target.in_features, target.out_features):
            rows = adapter.r * -(-width // adapter.bank.vector_length)
            if not adapter.logits.grad[row : row + rows].any():
                without.add(target.name)
            row += rows
    assert row == adapter.num_subvectors
    return without


def layers_without_effect(model, given, adapted):
    """The targets without whose update the outputs are the same."""
    without = set()
    injected = model._vblora_adapted_model.adapters["default"]
    for target, layer in zip(model.vblora.default.targets, injected.layers, strict=True):
        layer.set(active=[])
        if distance(outputs(model, given), adapted) == 0.0:
            without.add(target.name)
        layer.set(active=["default"])
    return without


def is_any(name, endings):
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def check(name, config, folder):
    base = build(name)
    given = inputs(base)
    before = outputs(base, given)
    torch.manual_seed(1)
    model = vblora.inject(copy.deepcopy(base), config)
    adapter = model.vblora.default
    unused = {target.name for target in adapter.targets if is_any(target.name, UNUSED.get(name, []))}
    train_a_step(model, given)
    if isinstance(config, vblora.VBLoRAConfig):
        assert layers_without_gradient(adapter) == unused
    adapted = outputs(model, given)
    assert distance(adapted, before) > 1e-4
    assert layers_without_effect(model, given, adapted) == unused
    vblora.save(model, folder / "adapter")
    reloaded = vblora.load(copy.deepcopy(base), folder / "adapter")
    assert distance(outputs(reloaded, given), adapted) <= 1e-5
    vblora.merge(model)
    assert distance(outputs(model, given), adapted) <= 1e-5
    vblora.merge(reloaded, release=True)
    assert distance(outputs(vblora.eject(reloaded), given), adapted) <= 1e-5
    return [target.name for target in adapter.targets]


CHOICE = {
    "r": 2,
    "num_vectors": 16,
    "vector_length": 8,
    "num_candidates": 8,
    "init_vector_bank_bound": 0.5,
    "pad": True,
}


@pytest.mark.parametrize("name", MODELS)
def test_all_linear(name, tmp_path):
    model = build(name)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        targets = check(name, vblora.VBLoRAConfig(target_modules="all-linear", **CHOICE), tmp_path)
    assert any('"all-linear" leaves out' in str(warning.message) for warning in said) == (name in LEFT_OUT)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    others = [
        layer
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not layer.startswith("classifier.")
    ]
    left_out = {layer for layer in others if is_any(layer, LEFT_OUT.get(name, []))}
    assert set(others) - set(targets) == left_out


@pytest.mark.parametrize(
    "name",
    [
        *("BertForMaskedLM", "DebertaForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"),
        *("BeitModel", "CLIPModel", "Dinov2Model", "SiglipModel", "SwinModel", "ViTModel"),
    ],
)
def test_default_targets(name, tmp_path):
    check(name, vblora.VBLoRAConfig(**CHOICE), tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "DebertaV2ForMaskedLM",
        "FalconForCausalLM",
        "MixtralForCausalLM",
        "WavLMModel",
        "WhisperForConditionalGeneration",
    ],
)
def test_other_methods(name, tmp_path):
    check(name, vblora.LoraConfig(target_modules="all-linear", r=2, lora_alpha=64), tmp_path)
