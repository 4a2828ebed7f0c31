"""fla-core's KDA functions on our operators: a drop-in for its functions, and a backend that it chooses by itself.

Drop-in, for a program that calls ``fla.ops.kda`` (fla need not be installed)::

    from kimi_native.compat.fla import chunk_kda, fused_recurrent_kda

Backend, for a program that calls fla through a library: fla-core 0.6 or newer offers our functions each call once ``kimi_native`` and
``fla`` are both imported, in either order. ``FLA_KIMI_NATIVE=0`` turns that off. What we do not take, fla computes as ever.

docs/integrations.md says what is taken.
"""

from kimi_native.compat.fla.backend import register, register_when_imported
from kimi_native.compat.fla.functions import chunk_kda, fused_recurrent_kda, fused_recurrent_kda_fwd

__all__ = ["chunk_kda", "fused_recurrent_kda", "fused_recurrent_kda_fwd", "register", "register_when_imported"]
