"""``vblora merge`` into a GGUF file: its model is loaded, dequantised to float32, merged and saved in transformers' format."""

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel

import vblora

from ..errors import CommandError, in_options
from ..files import atomic_folder
from . import models
from .fingerprints import Fingerprint, differing, fingerprint
from .stopping import tokens


def merge_gguf(
    base: Path,
    adapter: Path,
    bank: Path | None,
    out: Path,
    trained: Fingerprint,
    template: str | None,
    ends: Iterable[int],
) -> tuple[int, list[str]]:
    """Writes the merged language model and its tokenizer into ``out``, which appears when it is complete.

    Args:
        trained: the fingerprint of the model that the adapter was trained with.
        template: the chat template to write; None is that of the base model.
        ends: the tokens that end what the adapter writes, where the merged model stops, too.

    Returns:
        The number of layers that the adapter updates, and the names of weights that differ from those of ``trained``.

    Raises:
        CommandError: the model cannot be loaded, or the adapter does not fit it.
        OSError: ``out`` cannot be written.
    """
    models.quiet()
    tokenizer = models.load_tokenizer(str(base))
    if template is not None:
        tokenizer.chat_template = template
    model = models.load_language_model(str(base), "float32")
    others = differing(trained, fingerprint(model)) if trained else []
    try:
        vblora.load(model, adapter, bank=bank)
        updated = len(model.vblora.default.targets)
        vblora.merge(model, release=True)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"ADAPTER does not fit BASE: {in_options(error, 'bank')}") from None
    vblora.eject(model)
    _forget_gguf(model)
    model.generation_config.eos_token_id = sorted({*tokens(model.generation_config.eos_token_id), *ends}) or None
    with atomic_folder(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return updated, others


def _forget_gguf(model: PreTrainedModel) -> None:
    """Makes transformers save the model, whose weights are plain ones now. It refuses to save what came from a GGUF file."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
