"""How `nbs measure` shows a row: predicted beside measured."""
from __future__ import annotations

from typing import Any

from ...hardware import GPU
from . import GIB, held_on_cpu, predict, predicted_seconds, words


def show(row: dict[str, Any], card: GPU | None) -> None:
    """Print a row and its prediction."""
    from rich.console import Console

    console = Console(highlight=False)
    where = row["provenance"]
    console.print(f"{words(row['kind'], row['settings'])}, on {where['device']}", style="bold", markup=False)
    if row["kind"] == "cpu":
        _show_rehearsal(console, row)
    elif "oom" in row:
        o, mine = row["oom"], predict(row["kind"], row["settings"], card)
        console.print(f"Out of memory in {o['at']} of step {o['step'] + 1}, which is a result: {o['oom']}\nPredicted: {getattr(mine, 'peak_any', mine.peak) / GIB:.2f} GiB at the peak.", markup=False)
    else:
        (_show_train if row["kind"] == "train" else _show_inference)(console, row, card)
        console.print(f"The driver shows {row['driver_used'] / GIB:.2f} GiB in use, {row['context'] / GIB:.2f} of them CUDA's own. "
                      f"torch {where['torch']}, transformers {where['transformers']}, driver {where['driver']}.", markup=False)


def _table(console: Any, rows: list[tuple[str, int | None, int]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("GiB", "predicted", "measured", "off by"):
        table.add_column(column, justify="left" if column == "GiB" else "right")
    for name, mine, real in rows:
        table.add_row(name, f"{mine / GIB:.3f}" if mine else "–", f"{real / GIB:.3f}", f"{mine / real - 1:+.2%}" if mine and real else "")
    console.print(table)


def _show_train(console: Any, row: dict[str, Any], card: GPU | None) -> None:
    c, m = row["settings"], predict("train", row["settings"], card)
    rows = [(f"{phase}, so far", m.phases[phase], row["phases"][phase]) for phase in ("forward", "backward", "step")]
    rows += [("peak of a steady step", m.peak, row["peak"]), ("peak of all steps", m.peak_any, row["peak_any"])]
    rows += [("peak, replayed", m.replayed.peak, row["peak"])] if m.replayed else []
    _table(console, [*rows, ("reserved", m.reserved, row["reserved"])])
    mine = predicted_seconds(c, card)
    console.print(f"{row['seconds'] * 1000:,.1f} ms a step (median of {len(row['timed'])})"
                  + (f", predicted {mine * 1000:,.1f} ms, {mine / row['seconds'] - 1:+.1%}" if mine else "")
                  + f"; {row['tokens'] / row['seconds']:,.0f} tokens/s over all GPUs.", markup=False)
    if len(row["rank_peaks"]) > 1:
        console.print("Peak of each rank, GiB: " + ", ".join(f"{p / GIB:.3f}" for p in row["rank_peaks"]))


def _show_inference(console: Any, row: dict[str, Any], card: GPU | None) -> None:
    m = predict("inference", row["settings"], card)
    _table(console, [("prefill", m.peak, row["peak"]), (f"generate, {row['new_tokens']} tokens", m.peak, row["generate"]), ("reserved", None, row["reserved"])])
    token = row["token_seconds"]
    console.print(f"{row['seconds'] * 1000:,.1f} ms for the prompt" + (f", {token * 1000:,.1f} ms for each token after it." if token else "."))


def _show_rehearsal(console: Any, row: dict[str, Any]) -> None:
    if "oom" in row:
        console.print(f"Out of memory in {row['oom']['at']}: {row['oom']['oom']}", markup=False)
        return
    for rank, losses in enumerate(row["rank_losses"]):
        console.print((f"Rank {rank}: " if len(row["rank_losses"]) > 1 else "") + "losses of three steps " + ", ".join(f"{x:.4f}" for x in losses))
    if row["held"] is None:
        console.print("No bytes are counted where ranks share a model: this shows that the step runs, not what it needs.")
        return
    mine, reason = held_on_cpu(row["settings"])
    console.print(f"The forward pass keeps {row['held']:,} bytes for backward here; predicted for a GPU are {mine:,} ({mine / row['held'] - 1:+.2%}).")
    if reason:
        console.print(f"The two differ for a reason: {reason}.")
    console.print("Peaks and times need a GPU: a CPU has no caching allocator to ask.")
