"""Our operators behind the interfaces of other libraries and inside their models. Nothing here imports those libraries before they
are there or asked for."""

from __future__ import annotations

from typing import TypeVar

Model = TypeVar("Model")


def accelerate(model: Model) -> Model:
    """Puts our operators under a Kimi-Linear model of transformers, in place. :func:`restore` undoes it.

    ``generate``, left-padded batches, beam search and the model's own cache objects keep working. No weight is copied, moved or
    changed: projections, convolution, norms, router and experts are read where the model holds them. Decoding attends in the latent
    space instead of expanding the keys and values of the whole context at every step.

    Ours runs when no gradient is wanted: under ``torch.no_grad()`` or ``torch.inference_mode()`` (as in ``generate``), or with
    parameters that do not require any. Otherwise, and for what the operators do not do (autocast, a mask that is neither causal nor
    left padding, ``output_attentions``, static or quantised caches), the library's own code runs; docs/integrations.md has the table.

    Args:
        model: ``KimiLinearForCausalLM`` or ``KimiLinearModel`` of transformers, loaded, on one device: float32 or bfloat16 (on a GPU
            also float16). Accelerating it again changes nothing.

    Returns:
        ``model`` itself.

    Raises:
        ImportError: transformers is missing or has no Kimi-Linear.
        TypeError: another class: the hub's own modelling code (``trust_remote_code=True``), a wrapped or compiled model.
        ValueError: quantised weights, weights that are offloaded, on the meta device, sharded or spread over devices, modules that
            something else has patched already, or sizes that the operators do not take. The model is as it was.
    """
    from kimi_native.compat.transformers import accelerate as _accelerate

    return _accelerate(model)


def restore(model: Model) -> Model:
    """Gives an accelerated model its own code back: the same bits as before :func:`accelerate`. Caches in use may be used on.

    Returns ``model`` itself; one that is not accelerated is left as it is.
    """
    from kimi_native.compat.transformers import restore as _restore

    return _restore(model)
