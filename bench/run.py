"""All benchmarks of the operators in one process: one set of ceilings, one results file, then the report.

    python bench/run.py --device cuda --json --peer-libs DIR     everything, into bench/results/<gpu>.json
    python bench/run.py --device cuda --quick                    a minute: the core cases, few samples

The core cases of all operators come first, so that a run that is cut short (--budget-s) still has them. The results are
written after every case. With --report, docs/benchmarks.md and its plots are made anew from bench/results.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import ROOT, arguments, finish, run_cases  # noqa: E402

# In the order of what matters: where the model spends its time.
MODULES = (
    "kda_prefill kda_decode mla_decode mla_prefill moe_experts batch_invariant_linear moe_router short_conv rms_norm gated_rms_norm "
    "mla_cache_write mla_merge"
).split()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--report", action="store_true", help="then make docs/benchmarks.md from bench/results")
    args = parser.parse_args()
    session = run_cases([importlib.import_module(f"bench_{name}").cases for name in MODULES], args)
    if args.report:
        sys.path.insert(0, str(ROOT / "scripts"))
        importlib.import_module("bench_report").main([])
    finish(session)


if __name__ == "__main__":
    main()
