"""What stands between a causal language model's final hidden states and its logits."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from taid.errors import TaidError
from taid.fused import HeadOptions


def head_weight(model: Any) -> Tensor:
    """The weight ``[V, H]`` of the model's output head.

    Raises:
        TaidError: the model has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise TaidError(f"{type(model).__name__} has no output head; give a causal language model.")
    return _whole(head.weight)


def head_options(model: Any) -> HeadOptions:
    """Bias, scale and soft-capping of the model's logits, read from its head and configuration."""
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return HeadOptions(
        bias=None if bias is None else _whole(bias),
        logit_scale=scale,
        softcap=None if softcap is None else float(softcap),
    )


def trim(weight: Tensor, options: HeadOptions, vocabulary_size: int) -> tuple[Tensor, HeadOptions]:
    """Head weight and options of the first ``vocabulary_size`` rows; views, no copies.

    Raises:
        TaidError: the head has fewer rows.
    """
    if weight.shape[0] < vocabulary_size:
        raise TaidError(
            f"A head of {weight.shape[0]} rows cannot stand for {vocabulary_size} shared tokens; "
            "teacher and student must share the vocabulary."
        )
    if weight.shape[0] == vocabulary_size:
        return weight, options
    bias = None if options.bias is None else options.bias[:vocabulary_size]
    return weight[:vocabulary_size], HeadOptions(bias, options.logit_scale, options.softcap)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder's list of layers.

    Raises:
        TaidError: the model has none under the usual name ``layers``.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise TaidError(
            f"{type(model).__name__} keeps no list of layers named `layers`; "
            "it can be neither pruned nor sharded."
        )
    return layers


def final_hidden_states(model: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Hidden states ``[B, T, H]`` after the final norm, without a projection by the head."""
    decoder: nn.Module = model.get_decoder()
    return decoder(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state


def at_head(
    model: Any, unwrapped: Any, compute: Callable[[Tensor], Tensor | None], **inputs: Any
) -> Tensor | None:
    """Runs a model as far as its head and computes something from the hidden states that reach it.

    ``compute`` runs inside the model's forward pass: there DDP, FSDP and autocast act, a sharded head is
    whole, and its gradient takes the wrapper's way.

    Args:
        model: a `transformers` causal language model, wrapped or not.
        unwrapped: the model without its wrapper.
        compute: from hidden states ``[B, T, H]`` to a scalar, or nothing.
        inputs: of the model's forward pass.

    Returns:
        What ``compute`` returned.
    """
    results: list[Tensor | None] = []

    def before_head(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        results.append(compute(arguments[0]))
        # One position's logits are the least that a head can be asked for.
        return (arguments[0][:, :1],)

    handle = unwrapped.get_output_embeddings().register_forward_pre_hook(before_head)
    try:
        logits = model(use_cache=False, **inputs).logits
    finally:
        handle.remove()
    (result,) = results
    # Wrappers begin their backward pass at the model's output, so that is part of the graph, empty.
    return None if result is None else result + logits[..., :0].sum()


def _whole(parameter: Any) -> Tensor:
    """A parameter that FSDP2 or tensor parallelism has sharded, gathered."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
