"""The default target modules for each `model_type` of a transformers config, and for timm's models."""

# Vision transformers, for which PEFT has no defaults: queries and values. Newer versions of transformers rename these layers.
_VISION = ["query", "value", "q_proj", "v_proj"]
FOR_VISION = {
    "beit": _VISION,
    "clip": _VISION,
    "deit": _VISION,
    "dinov2": _VISION,
    "siglip": _VISION,
    "swin": _VISION,
    "timm": ["qkv"],  # of a model whose class is timm's
    "vit": _VISION,
    "vit_mae": _VISION,
    "vit_msn": _VISION,
}
# PEFT's defaults for VB-LoRA.
FOR_VBLORA = FOR_VISION | {
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "bert": ["query", "value"],
    "bloom": ["query_key_value"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "distilbert": ["q_lin", "v_lin"],
    "electra": ["query", "value"],
    "gemma": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gemma3_text": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neo": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value"],
    "gptj": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
    "llama4": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "roberta": ["query", "value"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "xlm-roberta": ["query", "value"],
}
# PEFT's defaults for its other methods, where they differ.
FOR_OTHERS = FOR_VBLORA | {
    "bart": ["q_proj", "v_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "falcon": ["query_key_value"],
    "mt5": ["q", "v"],
    "opt": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}
