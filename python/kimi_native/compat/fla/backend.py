"""A backend for fla-core's dispatch (`fla.backends`, 0.6 or newer): fla offers each call to the backends that are registered for a
function, in the order of their priority, and computes itself what none of them takes."""

from __future__ import annotations

import logging
from typing import Any

from kimi_native.compat.fla.call import KdaCall
from kimi_native.compat.fla.functions import chunk_kda, fused_recurrent_kda_fwd, read_chunk_kda, read_fused_recurrent_kda_fwd
from kimi_native.compat.when_imported import when_imported

logger = logging.getLogger(__name__)

# FlashKDA (3), where it is installed, keeps the calls it was made for: with a bounded gate it is the faster one (docs/benchmarks.md).
PRIORITY = 4


def register() -> None:
    """Imports fla and registers our backend there; again does no harm. ImportError says why that cannot be."""
    try:
        from fla import backends
        from fla.ops.kda.chunk import chunk_kda as fla_chunk_kda
    except ImportError as error:
        raise ImportError(f"fla-core 0.6 or newer, with its fla.backends, is needed to register a backend: {error}") from error
    backend = _backend(backends.BaseBackend)
    backends.register(fla_chunk_kda)(backend)
    backends.register("kda")(backend)


def register_when_imported() -> None:
    """Registers as soon as fla's KDA is imported; where that cannot be, one line is logged and fla stays as it is."""
    when_imported("fla.ops.kda", _register_or_say_why)


def _register_or_say_why() -> None:
    try:
        register()
    except Exception as error:  # an import of fla must not fail because of us
        logger.warning("kimi_native is not used by fla: %s", error)
    else:
        logger.info("kimi_native is registered as a backend of fla (FLA_KIMI_NATIVE=0 turns it off)")


def _verdict(call: KdaCall) -> tuple[bool, str | None]:
    reason = call.unsupported()
    return reason is None, None if reason is None else f"kimi_native: {reason}"


def _backend(base: type) -> type:
    """The adapter that fla wants: for each function a method of its name, and a verifier that accepts or says why not.

    fla takes an exception of a verifier for a refusal, so what contradicts itself gets fla's own error.
    """

    class KimiNativeBackend(base):
        backend_type = "kimi_native"
        package_name = "kimi_native"
        env_var = "FLA_KIMI_NATIVE"
        default_enable = True
        priority = PRIORITY

        def chunk_kda_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            return _verdict(read_chunk_kda(*args, **kwargs))

        def chunk_kda(self, *args: Any, **kwargs: Any) -> Any:
            return chunk_kda(*args, **kwargs)

        def fused_recurrent_kda_fwd_verifier(self, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
            return _verdict(read_fused_recurrent_kda_fwd(*args, **kwargs))

        def fused_recurrent_kda_fwd(self, *args: Any, **kwargs: Any) -> Any:
            return fused_recurrent_kda_fwd(*args, **kwargs)

    return KimiNativeBackend
