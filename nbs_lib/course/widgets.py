"""The live breakdown of a training step's memory, for a notebook with a kernel."""
from __future__ import annotations

import html

from ..hardware import gpus
from ..memory import capacity, train_memory

COLOURS = ("#1d5fa8", "#b4500f", "#27744a", "#8a3f8f", "#8a6a00", "#3a7d8c", "#a03048", "#566170", "#1d2733")
MODELS = ("gpt2", "bert-base-cased", "smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b-v0.1", "qwen2.5-7b", "qwen3-8b", "llama-3-8b", "llama-3-70b")
STRATEGIES = ("single", "ddp", "full_shard", "shard_grad_op", "zero1", "zero2", "zero3")


def breakdown(model: str, gpu: str, **settings) -> str:
    """The breakdown as HTML: the verdict, a bar and the terms; for settings that are refused, the reason."""
    try:
        card = next(g for g in gpus() if g.name == gpu)
        m = train_memory(model, gpu=card, **settings)
    except ValueError as e:
        return f"<p role='status'><strong>Not possible:</strong> {html.escape(str(e))}</p>"
    room = capacity(card)
    scale = max(room, m.peak)
    terms = sorted(((t, v) for t, v in m.terms.items() if v), key=lambda t: -t[1])
    bar = "".join(f"<span style='display:inline-block;vertical-align:top;height:30px;width:{100 * v / scale:.2f}%;background:{COLOURS[i % len(COLOURS)]}'></span>" for i, (_, v) in enumerate(terms))
    rows = "".join(f"<tr><td><span style='color:{COLOURS[i % len(COLOURS)]}'>■</span> {html.escape(t.replace('_', ' '))}</td>"
                   f"<td style='text-align:right'>{v / 2**30:.2f} GiB</td><td style='text-align:right'>{v / m.peak:.0%}</td></tr>" for i, (t, v) in enumerate(terms))
    fits = m.peak_any <= room
    verdict = f"{'Fits' if fits else 'Does not fit'}: {m.peak_any / 2**30:.1f} of {room / 2**30:.1f} GiB on {gpu}"
    return (f"<p role='status' style='color:{'#27744a' if fits else '#a03048'}'><strong>{verdict}</strong> (peak in: {m.peak_phase})</p>"
            f"<div style='border:1px solid #d9dcd6;width:100%;font-size:0;white-space:nowrap;overflow:hidden'>{bar}</div><table style='line-height:1.5'>{rows}</table>")


def memory_explorer():
    """Controls for model, batch, sequence, precision, optimizer, checkpointing, strategy and GPU over `breakdown`."""
    import ipywidgets as w

    wide = {"description_width": "9em"}
    choose = lambda options, value, label: w.Dropdown(options=options, value=value, description=label, style=wide)  # noqa: E731
    controls = dict(
        model=choose(MODELS, "llama-3-8b", "model"), gpu=choose([g.name for g in gpus() if g.flops.get("bf16")], "h100-sxm", "GPU"),
        batch=w.SelectionSlider(options=[1, 2, 3, 4, 6, 8, 12, 16, 24, 32], value=1, description="batch", style=wide),
        seq=w.SelectionSlider(options=[128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768], value=2048, description="sequence", style=wide),
        precision=choose(("bf16", "amp_bf16", "amp_fp16", "fp32"), "bf16", "precision"),
        optimizer=choose(("adamw", "adamw_fused", "sgd", "sgd_momentum", "adamw_8bit"), "adamw", "optimizer"),
        checkpointing=w.Checkbox(value=False, description="checkpointing", style=wide),
        strategy=choose(STRATEGIES, "single", "strategy"),
        world_size=w.SelectionSlider(options=[1, 2, 4, 8, 16, 32, 64], value=1, description="GPUs", style=wide))
    out = w.HTML()

    def show(_=None):
        out.value = breakdown(**{name: control.value for name, control in controls.items()})

    for control in controls.values():
        control.observe(show, "value")
    show()
    box = list(controls.values())
    return w.VBox([w.HBox([w.VBox(box[:5]), w.VBox(box[5:])]), out])


def with_still(children: list, still):
    """A box of controls that shows `still`, which has a _repr_mimebundle_, where there is no kernel to run them."""
    import ipywidgets as w

    class Box(w.VBox):
        def _repr_mimebundle_(self, **kwargs):
            bundle = super()._repr_mimebundle_(**kwargs)
            data, *rest = bundle if isinstance(bundle, tuple) else (bundle,)
            data = {**(data or {}), **still._repr_mimebundle_()}
            return (data, *rest) if rest else data

    return Box(children)
