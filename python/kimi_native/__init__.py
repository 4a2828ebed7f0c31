"""kimi_native: native kernels for Kimi-Linear (KDA linear attention, NoPE MLA, 256-expert MoE)."""

from kimi_native._loader import load_bindings, load_ops

__version__ = "0.1.0"

_C = load_bindings(load_ops().parent)

from kimi_native import ops  # noqa: E402  (needs the loaded operators)
from kimi_native.cache import KdaCache, LatentCache, SequenceCache  # noqa: E402
from kimi_native.compat import accelerate, restore  # noqa: E402
from kimi_native.compat.fla import register_when_imported  # noqa: E402
from kimi_native.config import KimiLinearConfig  # noqa: E402
from kimi_native.generate import Completion, Engine, SamplingParams, TokenEvent  # noqa: E402
from kimi_native.model import KimiLinear  # noqa: E402

register_when_imported()  # fla-core finds our KDA, without being imported here

__all__ = [
    "Completion",
    "Engine",
    "KdaCache",
    "KimiLinear",
    "KimiLinearConfig",
    "LatentCache",
    "SamplingParams",
    "SequenceCache",
    "TokenEvent",
    "__version__",
    "accelerate",
    "ops",
    "restore",
]
