"""Students made from their teacher by dropping the layers that change the hidden states least.

Block influence: one minus the mean cosine similarity of a layer's input and output (ShortGPT, Men et al.
2024), measured on text apart from the evaluation's.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taid.errors import TaidError
from taid.heads import decoder_layers, final_hidden_states, head_weight


@torch.no_grad()
def block_influence(model: Any, token_blocks: np.ndarray | Tensor, batch_size: int = 8) -> list[float]:
    """How much each layer changes the hidden states: 0 not at all, 1 to something orthogonal.

    Args:
        model: a `transformers` causal language model.
        token_blocks: ``[N, T]`` token ids of calibration text.
        batch_size: blocks at a time.

    Returns:
        One number a layer, in the layers' order.

    Raises:
        TaidError: there is no calibration text.
    """
    blocks = torch.as_tensor(np.asarray(token_blocks)).long()
    if blocks.ndim != 2 or blocks.numel() == 0:
        raise TaidError(
            f"Calibration blocks have shape {list(blocks.shape)}; give at least one block, [N, T]."
        )
    layers = decoder_layers(model)
    similarities = [0.0] * len(layers)

    def hook(number: int) -> Any:
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            similarities[number] += float(cosine.double().sum())

        return measure

    handles = [
        layer.register_forward_hook(hook(number), with_kwargs=True) for number, layer in enumerate(layers)
    ]
    was_training = model.training
    model.eval()
    try:
        device = head_weight(model).device
        for start in range(0, len(blocks), batch_size):
            final_hidden_states(model, blocks[start : start + batch_size].to(device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return [1 - similarity / blocks.numel() for similarity in similarities]


def drop_layers(model: Any, keep: list[int]) -> Any:
    """Leaves only the named layers, in their order, and corrects the configuration.

    Args:
        model: a `transformers` causal language model; it is changed.
        keep: numbers of the layers that remain, rising.

    Returns:
        The same model.

    Raises:
        TaidError: ``keep`` is empty, not rising, or names a layer that does not exist.
    """
    layers = decoder_layers(model)
    count = len(layers)
    if not keep or sorted(set(keep)) != list(keep) or keep[0] < 0 or keep[-1] >= count:
        raise TaidError(f"Layers to keep are {keep}; give rising numbers from 0 to {count - 1}.")
    model.get_decoder().layers = nn.ModuleList([layers[number] for number in keep])
    for position, layer in enumerate(model.get_decoder().layers):
        for module in layer.modules():
            # The key-value cache finds a layer's entry by this number.
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        if getattr(config, "num_hidden_layers", None) == count:
            # layer_types, no_rope_layers and the like hold one entry a layer.
            for name, value in list(vars(config).items()):
                if isinstance(value, (list, tuple)) and len(value) == count and "layer" in name:
                    setattr(config, name, [value[number] for number in keep])
            config.num_hidden_layers = len(keep)
    return model


def prune_by_influence(
    model: Any, token_blocks: np.ndarray | Tensor, layers: int, batch_size: int = 8
) -> tuple[Any, list[float], list[int]]:
    """Drops the layers of least block influence until ``layers`` remain.

    Args:
        model: a `transformers` causal language model; it is changed.
        token_blocks: ``[N, T]`` token ids of calibration text.
        layers: how many layers remain.
        batch_size: blocks at a time.

    Returns:
        The model, the influence of every former layer, and the numbers of the dropped ones, rising.

    Raises:
        TaidError: ``layers`` is not between 1 and the model's number of layers.
    """
    count = len(decoder_layers(model))
    if not 1 <= layers <= count:
        raise TaidError(f"{layers} layers cannot remain of {count}; choose 1 to {count}.")
    influences = block_influence(model, token_blocks, batch_size)
    dropped = sorted(sorted(range(count), key=lambda number: influences[number])[: count - layers])
    drop_layers(model, [number for number in range(count) if number not in set(dropped)])
    return model, influences, dropped


def freeze_embeddings(model: Any) -> Any:
    """Keeps the embedding and a head that is tied to it out of training; returns the model.

    An untied head keeps learning.
    """
    model.get_input_embeddings().requires_grad_(False)
    return model
