"""Makes docs/benchmarks.md, and a roofline plot for each machine, from the records in bench/results.

python scripts/bench_report.py            writes the page; the plots too when matplotlib is installed
python scripts/bench_report.py --check    exit code 1 when the page is not what the records say
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs"
PAGE = DOCS / "benchmarks.md"
Record = dict[str, Any]

FAMILIES = {
    "The model": ("model", "transformers"),
    "KDA": ("kda_prefill", "kda_decode", "kda_decode_fused"),
    "MLA": ("mla_prefill", "mla_decode", "mla_cache_write", "mla_merge"),
    "MoE": ("moe_experts", "moe_router"),
    "Dense": ("batch_invariant_linear",),
    "Convolution and norms": ("short_conv", "short_conv_update", "rms_norm", "gated_rms_norm"),
}

INTRODUCTION = """\
# Benchmarks

Made by `python scripts/bench_report.py` from [bench/results](../bench/results); edit neither by hand. The cases are in
`bench/bench_<op>.py`, the way they are run in `bench/harness.py`.

Every output is checked against fp64 before it is timed, on a GPU the peers' outputs too; a wrong case is FAILED and has no
time. Times are medians, and every call is behind a flush of the last-level cache. "% roof" is the time that the machine's
measured ceilings allow, max(flops / matrix product, bytes / copy), over the time taken, with the flops and bytes of the
problem and not of the implementation. A kernel that mostly reads can pass 100: the ceiling is that of a copy. A peer's column
is its time and, in parentheses, how many times faster ours is, **bold** where the peer is faster.

On a GPU a time is that between two events around the replay of a CUDA graph of the one call, so that launch gaps count for
nobody. `e` marks a peer that was timed without a graph, because it cannot be captured, is slower in one, or takes more than 20
ms. `s` marks a peer of the whole model that was run with fewer layers: its time is scaled to all of them. `r` marks a peer's time
from another run than ours, on the same kind of GPU. "failed": it raised,
or its output was too far from fp64 to be the same function. An empty kernel, measured the same way, takes what the table of
runs says: that is in every figure. `fla` is fla-core's Triton kernels, tuned on the machine; FlashKDA and FlashMLA are the
libraries in vLLM's wheel; `sdpa` and `torch` are torch's own.
"""

# Why a peer is faster where it is, on a GPU. tests/test_bench.py asks for a reason for every such pair.
REASONS = {
    (
        "kda_prefill",
        "FlashKDA",
    ): "takes the bounded gate alone, whose sums cannot overflow, and keeps its state in bfloat16; ours is one kernel for every gate",
    ("kda_decode", "fla"): "at batch 1 and 4 both are latency; ours waits for the slot before it loads the state",
    ("mla_prefill", "sdpa cuDNN"): "uses wgmma and TMA; mma.sync, which runs on every card, reaches about half of Hopper's matrix rate",
    ("mla_decode", "FlashMLA"): "uses wgmma and TMA; ours is bound by mma.sync and shared memory from a few sequences on",
    ("mla_decode", "torch unpaged"): "reads a cache without pages, all sequences of one length, in two library products",
    (
        "batch_invariant_linear",
        "torch",
    ): "cuBLAS uses wgmma and another order of summation for every size, which is what this operator is there to avoid",
    ("short_conv_update", "fla"): "at batch 1 and 4 both are latency; ours reads the slot first, theirs has no slots",
    ("rms_norm", "fla"): "within 10 %: both are one launch and one round trip to memory",
    ("rms_norm", "torch"): "as beside fla",
    ("gated_rms_norm", "fla"): "within 5 %: both are one launch and one round trip to memory",
}


def natural(text: str) -> list[Any]:
    """Sorts T=512 before T=2048."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The first column is text, the others are figures."""
    return [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def runs_table(headers: list[Record], cases: list[Record]) -> list[str]:
    rows = []
    for h in headers:
        ops = sorted({c["op"] for c in cases if c["run"] == h["run"]})
        versions = ", ".join(f"{name} {value}" for name, value in h["versions"].items() if name != "kimi_native")
        if "driver" in h:
            versions = f"driver {h['driver']}, CUDA {h['cuda']}, {versions}"
        card = [number(h["us_empty_kernel"])] if "us_empty_kernel" in h else []
        if "driver" in h:
            card.append("; ".join(f"{h.get(f'{when}_sm_mhz', '?')} MHz, {h.get(f'{when}_power_w', '?')} W" for when in ("before", "after")))
        what = ", ".join(ops) if len(ops) <= 3 else f"{len(ops)} operators"
        rows.append(
            [
                f"{h['date'][:10]} {h['date'][11:16]}",
                what,
                f"`{h['commit']}`",
                f"`{h['command']}`",
                versions,
                f"{h['ceiling_tflops']:.4g}",
                f"{h['ceiling_gbps']:,.0f}",
                *card,
            ]
        )
    gemm = headers[0]["ceiling_gemm"].replace("^3", "³") if headers else ""
    head = ["run (UTC)", "of", "commit", "command", "versions", f"matrix product {gemm}, TFLOP/s", "copy, GB/s"]
    if headers and "driver" in headers[0]:
        head += ["empty kernel, us", "card before; after"]
    return table(head, rows)


def op_table(op: str, records: list[Record]) -> list[str]:
    cases = sorted((r for r in records if r["record"] in ("case", "failed") and r["op"] == op), key=lambda r: natural(r["case"]))
    peers: dict[tuple[str, str], Record] = {(r["case"], r["peer"]): r for r in records if r["record"] == "peer" and r["op"] == op}
    names = list(dict.fromkeys(name for _, name in sorted(peers, key=lambda key: key[1])))
    on_gpu = any(c.get("path", "cpu") != "cpu" for c in cases)
    with_tokens = any("tokens_per_s" in c for c in cases)

    def row(c: Record) -> list[str]:
        extra = [""] * (on_gpu + with_tokens)
        if c["record"] == "failed":
            return [c["case"], "FAILED", "", "", "", *extra, *[""] * len(names)]
        extra = [c["path"]] if on_gpu else []
        if with_tokens:
            extra.append(number(c["tokens_per_s"]))
        figures = [number(c["us"]), f"{c['tflops']:.3g}", number(c["gbps"]), f"{c['roof_pct']:.0f}"]
        return [c["case"], *figures, *extra, *(peer_cell(peers.get((c["case"], name)), c["run"]) for name in names)]

    head = ["case", "us", "TFLOP/s", "GB/s", "% roof", *["path"] * on_gpu, *["tokens/s"] * with_tokens, *(f"{name}, us" for name in names)]
    return [f"#### `{op}`", "", *table(head, map(row, cases)), *facts(op, records)]


def peer_cell(peer: Record | None, run: int) -> str:
    if peer is None:
        return ""
    if "peer_us" not in peer:
        return "failed"
    mark = " e" if peer["timing"] == "events" else " s" if peer.get("scaled") else ""
    mark += " r" if peer["run"] != run else ""
    if peer.get("ratio") is None:
        return f"{number(peer['peer_us'])}{mark}"
    ratio = f"({peer['ratio']:.2f}x)"
    return f"{number(peer['peer_us'])}{mark} {ratio if peer['ratio'] >= 1 else f'**{ratio}**'}"


def facts(op: str, records: list[Record]) -> list[str]:
    """What was found besides times: one line each."""
    lines = []
    for r in records:
        if r["record"] == "fact" and r["op"] == op:
            values = {name: value for name, value in r.items() if name not in ("record", "run", "op", "case")}
            text = ", ".join(
                f"{name} {value:,}" if isinstance(value, (int, float)) else f"{name} {value}" for name, value in values.items()
            )
            lines.append(f"- {r['case']}: {text}")
    return [*lines, ""] if lines else []


def summary(records: list[Record]) -> list[str]:
    """Where we stand beside each peer, over all cases that both ran."""
    rows = []
    for ops in FAMILIES.values():
        for op in ops:
            ratios: dict[str, list[float]] = {}
            for r in records:
                if r["record"] == "peer" and r["op"] == op and r.get("ratio") and r["peer"] != "batch_invariant":  # a mode of our own
                    ratios.setdefault(r["peer"], []).append(max(r["ratio"], 0.01))
            for name, found in sorted(ratios.items()):
                mean = math.exp(sum(math.log(x) for x in found) / len(found))
                faster = sum(x >= 1 for x in found)
                rows.append([f"`{op}`", name, f"{mean:.2f}x", f"{min(found):.2f}x", f"{max(found):.2f}x", f"{faster} of {len(found)}"])
    return table(["operator", "peer", "geometric mean", "least", "most", "faster in"], rows) if rows else []


def behind(records: list[Record]) -> dict[tuple[str, str], list[str]]:
    """(operator, peer): the cases in which the peer is faster."""
    found: dict[tuple[str, str], list[str]] = {}
    for r in records:
        if r["record"] == "peer" and r.get("ratio") and r["ratio"] < 1:
            found.setdefault((r["op"], r["peer"]), []).append(r["case"])
    return found


def reasons(records: list[Record]) -> list[str]:
    rows = [[f"`{op}`", peer, str(len(cases)), REASONS.get((op, peer), "?")] for (op, peer), cases in sorted(behind(records).items())]
    return ["Where a peer is faster, and why:", "", *table(["operator", "peer", "cases", "why"], rows)] if rows else []


def section(stem: str, records: list[Record], with_plot: bool) -> list[str]:
    headers = [r for r in records if r["record"] == "header"]
    cases = [r for r in records if r["record"] in ("case", "failed")]
    last = headers[-1]
    what = f"{last['threads']} threads, {last['isa']}" if "threads" in last else f"{last['multiprocessors']} multiprocessors"
    lines = [f"## {last['machine']}, {what}", "", f"Records: [{stem}.json](../bench/results/{stem}.json).", "", *runs_table(headers, cases)]
    lines += ["How many times faster ours is:", "", *summary(records)]
    if stem != "cpu":
        lines += reasons(records)
    if with_plot:
        lines += [f"![Roofline of {last['machine']}]({plot_of(stem).name})", ""]
    known = {r["op"] for r in cases}
    families = dict(FAMILIES) | {"Others": tuple(sorted(known - {op for ops in FAMILIES.values() for op in ops}))}
    for family, ops in families.items():
        present = [op for op in ops if op in known]
        if present:
            lines += [f"### {family}", ""]
        for op in present:
            lines += op_table(op, records)
    return lines


def plot_of(stem: str) -> Path:
    return DOCS / f"roofline-{stem}.png"


def page(results: dict[str, list[Record]], plots: Iterable[str]) -> str:
    """The whole page: GPUs first."""
    plots, lines = set(plots), [INTRODUCTION]
    for stem in sorted(results, key=lambda s: (s == "cpu", s)):
        lines += section(stem, results[stem], stem in plots)
    return "\n".join(lines).rstrip() + "\n"


def draw(stem: str, records: list[Record]) -> bool:
    """A roofline plot; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    header = [r for r in records if r["record"] == "header"][-1]
    tflops, gbps = header["ceiling_tflops"], header["ceiling_gbps"]
    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=110)
    intensities: list[float] = []
    for family, ops in FAMILIES.items():
        cases = [r for r in records if r["record"] == "case" and r["op"] in ops and r.get("flops")]
        if cases:
            x, y = [c["flops"] / c["bytes"] for c in cases], [c["flops"] / c["us"] / 1e6 for c in cases]
            axes.scatter(x, y, s=22, alpha=0.75, label=family)
            intensities += x
    edge = tflops * 1e3 / gbps
    low, high = min(intensities, default=edge) / 1.5, max([*intensities, 4 * edge]) * 1.5
    axes.plot([low, edge, high], [low * gbps / 1e3, tflops, tflops], color="black", linewidth=1)
    axes.set(
        xscale="log", yscale="log", xlabel="flops per byte, of the problem", ylabel="TFLOP/s", xlim=(low, high), ylim=(tflops / 1e5, None)
    )
    axes.set_title(f"{header['machine']}: copy {gbps:,.0f} GB/s, matrix product {tflops:.4g} TFLOP/s")
    axes.grid(alpha=0.25, which="both")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(plot_of(stem), metadata={"Software": None})
    plt.close(figure)
    return True


def load() -> dict[str, list[Record]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is stale")
    args = parser.parse_args(argv)
    results = load()
    if not args.check:
        drawn = [stem for stem in results if stem != "cpu" and draw(stem, results[stem])]
        print("plots: " + (", ".join(plot_of(stem).name for stem in drawn) or "none (no matplotlib, or no GPU results)"))
    text = page(results, [stem for stem in results if plot_of(stem).exists()])
    if args.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit(f"{PAGE.relative_to(ROOT)} is not what bench/results says: run python scripts/bench_report.py")
    else:
        PAGE.write_text(text)
        print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
