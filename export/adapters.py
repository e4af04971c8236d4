"""Adapters of peft: merged into their model, which is then a Hugging Face folder like any other."""

import json
import tempfile
from pathlib import Path
from typing import Any

from export.errors import ExportError
from export.untrusted import check_model_folder

MERGED_KL = 1e-4
"""Mean KL, in nats, up to which a merged model is the model with its adapter apart: both are float32."""

PROBE_TOKENS = 64


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a model."""
    return (Path(folder) / "adapter_config.json").is_file()


def merge_adapter(folder: Path, output_dir: Path) -> None:
    """Merges an adapter into its model, in float32.

    Args:
        folder: an adapter as peft saves it, with ``adapter_model.safetensors``; its own tokenizer, if it
            holds one, is taken in place of the model's.
        output_dir: the Hugging Face folder to make.

    Raises:
        ExportError: the adapter or its model is missing, cannot be loaded, has no safetensors, they do not
            fit together, or the folder made is another model than the two apart.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from export.torch_runtime import load_in_torch

    config_file = folder / "adapter_config.json"
    if not (folder / "adapter_model.safetensors").is_file():
        raise ExportError(
            f"{folder}: no adapter_model.safetensors; pickled adapters are not read, so save it anew."
        )
    check_model_folder(folder)
    base = json.loads(config_file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ExportError(f"{config_file}: names no base_model_name_or_path; add the model's folder or name.")
    # peft writes the path as it was given: seen from where the training was started, or from here.
    places = [place for place in (Path(base), folder / base) if place.is_dir()]
    source: Path | str = places[0] if places else base
    if places:
        check_model_folder(places[0])
        if not list(places[0].glob("*.safetensors")):
            raise ExportError(f"{places[0]}: no .safetensors file; the adapter's model needs safetensors.")
    own = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder if own else source)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        adapted: Any = PeftModel.from_pretrained(model, folder).eval()
        probe = torch.randint(len(tokenizer), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            apart = adapted(probe, use_cache=False).logits.double().log_softmax(-1)
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ExportError(f"{folder}: the adapter cannot be merged into {base} ({reason}).") from error
    output_dir = Path(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".merged-") as temporary:
        made = Path(temporary) / "model"
        merged.save_pretrained(made)
        tokenizer.save_pretrained(made)
        del model, adapted, merged  # no two of a large model
        with torch.no_grad():
            together = load_in_torch(made)(probe, use_cache=False).logits.double().log_softmax(-1)
        divergence = float((apart.exp() * (apart - together)).sum(-1).mean())
        if not divergence <= MERGED_KL:
            raise ExportError(
                f"{folder}: merged into {base} it is another model than the adapter apart (mean KL "
                f"{divergence:.3g}, at most {MERGED_KL:g} is rounding); an adapter of a head that shares its "
                "weights with the embedding cannot be merged, so train it without lm_head and embed_tokens."
            )
        made.rename(output_dir)
