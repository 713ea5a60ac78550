"""The command `nbs`. Exit codes: 0 well (for `fit`: it fits), 1 not (it does not fit, something is missing or failed), 2 bad input."""
from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

GIB = 2**30


class BadInput(Exception):
    """Something the user gave that cannot be used; the message says what is accepted."""


class Parser(argparse.ArgumentParser):
    """argparse with errors as one sentence."""

    def error(self, message):
        print(f"{self.prog}: {message}\n  `{self.prog} --help` lists what it takes.", file=sys.stderr)
        raise SystemExit(2)


def whole(text: str) -> int:
    """A positive whole number, as option values are."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number of 1 or more, not {text!r}")
    return number


def _step_options(command: Parser, **model) -> None:
    """What describes a training step, for `fit` and `measure`."""
    command.add_argument("model", help="a known name (llama-3-8b) or the path of a config.json", **model)
    command.add_argument("--batch", type=whole, default=1, help="sequences per GPU and micro-batch (default: 1)")
    command.add_argument("--seq", type=whole, help="tokens per sequence (default: 2048, or the model's most if that is less)")
    command.add_argument("--precision", default="bf16", help="fp32, bf16, amp_bf16, amp_fp16 (default: %(default)s)")
    command.add_argument("--optimizer", default="adamw", help="adamw, adamw_fused, sgd, sgd_momentum, adamw_8bit (default: %(default)s)")
    command.add_argument("--attention", default="sdpa", help="sdpa or eager (default: %(default)s)")
    command.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    command.add_argument("--accumulation", type=whole, default=1, metavar="N", help="micro-batches per step (default: 1)")
    command.add_argument("--lora-rank", type=whole, metavar="R", help="train LoRA adapters of this rank")
    command.add_argument("--gpus", type=whole, default=1, metavar="N", help="how many GPUs (default: 1)")
    command.add_argument("--strategy", help="single, ddp, full_shard, shard_grad_op, hybrid_shard, zero1, zero2, zero3 (default: single, with several GPUs full_shard)")
    command.add_argument("--shard-size", type=whole, metavar="N", help="hybrid_shard: GPUs per group")
    command.add_argument("--offload", action="store_true", help="sharded: parameters and optimizer in host memory")


def parser() -> Parser:
    """The whole command line."""
    top = Parser(prog="nbs", description="Scaling, Measured: will it fit, and the course's labs, site and checks.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    fit = commands.add_parser("fit", help="will this training fit on that card, and if not, what is the cheapest change?",
                              description="Predict the peak memory of a training step and compare it with a card. Exit code 0: it fits, 1: it does not, 2: bad input.")
    _step_options(fit)
    fit.add_argument("--gpu", help="the card (default: the one in this machine, else h100-sxm)")
    fit.add_argument("--json", action="store_true", help="the answer as JSON")
    fit.add_argument("--write", type=Path, metavar="FILE", help="write a config for the plan: accelerate's (FILE.yaml) or DeepSpeed's (FILE.json)")
    fit.add_argument("--force", action="store_true", help="--write: replace a file that is there")
    fit.add_argument("--nodes", type=whole, default=1, metavar="N", help="--write: machines that the GPUs are in (default: 1)")
    fit.add_argument("--main-ip", metavar="HOST", help="--write: address of the first of several machines")
    fit.add_argument("--main-port", type=whole, default=29500, metavar="PORT", help="--write: port there (default: %(default)s)")

    measure = commands.add_parser("measure", help="run the real step on this machine's GPUs and set it beside the prediction",
                                  description="Run real training steps (random weights, no download) in processes of their own, one for each GPU, and set them beside the prediction.")
    _step_options(measure, nargs="?")
    measure.add_argument("--inference", action="store_true", help="measure generating after a prompt of --seq tokens instead")
    measure.add_argument("--card", action="store_true", help="measure what the card achieves instead, as chapter 4's predictions use it; writes --out (default: card_GPU.json)")
    measure.add_argument("--steps", type=whole, default=30, metavar="N", help="time at most so many steps, after three that warm up (default: 30)")
    measure.add_argument("--suite", type=Path, metavar="FILE", help="measure every settings of this JSON list that --out does not hold yet")
    measure.add_argument("--out", type=Path, metavar="FILE", help="append rows to this file of JSON lines (with --card: a new file)")
    measure.add_argument("--limit-seconds", type=whole, metavar="N", help="a suite begins no further row after so many seconds")
    measure.add_argument("--row-seconds", type=whole, default=300, metavar="N", help="a row that takes longer is ended (default: 300)")
    measure.add_argument("--cpu", action="store_true", help="no GPU: rehearse a small model's steps on CPU tensors and gloo ranks")
    measure.add_argument("--json", action="store_true", help="the row as JSON")

    build = commands.add_parser("build", help="build the site from stored outputs")
    build.add_argument("--out", type=Path, help="where to (default: _site in the repository)")
    build.add_argument("--watch", action="store_true", help="build again on every change")
    renderer = build.add_mutually_exclusive_group()
    renderer.add_argument("--quarto", dest="quarto", action="store_true", default=None, help="with Quarto, or not at all")
    renderer.add_argument("--pandoc", dest="quarto", action="store_false", help="with Pandoc, even where Quarto is there")

    serve = commands.add_parser("serve", help="serve the site on localhost")
    serve.add_argument("--watch", action="store_true", help="build again and reload on every change")
    serve.add_argument("--port", type=whole, default=8000)

    lab = commands.add_parser("lab", help="open a lab: your own copy, in work/")
    lab.add_argument("lab", nargs="?", help="its number or name; without one, JupyterLab opens on your folder")
    lab.add_argument("--dir", type=Path, help="your folder (default: work/ in the repository, else ./work)")
    lab.add_argument("--update", action="store_true", help="write a newer worksheet beside your copy")
    lab.add_argument("--no-open", action="store_true", help="write the copy, do not start JupyterLab")
    lab.add_argument("--port", type=whole, default=8888)

    doctor = commands.add_parser("doctor", help="what this machine can run, what is missing, how to get it")
    doctor.add_argument("--json", action="store_true")
    commands.add_parser("kernel", help="register the course's kernel with this user's Jupyter")
    course = commands.add_parser("course", help="all of it: build, serve the site and JupyterLab")
    course.add_argument("--port", type=whole, default=8000)
    course.add_argument("--lab-port", type=whole, default=8888)
    return top


def _end(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # what was started is ended on the way out


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. As a program (no argv) it ends what it started also when it is killed, or its terminal is closed."""
    if argv is None:
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup's stays
                signal.signal(number, _end)
    top = parser()
    args = top.parse_args(argv)
    if args.command is None:
        top.print_help()
        return 2
    try:
        return globals()[f"run_{args.command}"](args)
    except (BadInput, ValueError) as e:
        print(f"nbs {args.command}: {e}", file=sys.stderr)
        return 2
    except RuntimeError as e:
        print(f"nbs {args.command}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# --- fit ------------------------------------------------------------------------------------------------------------------------

def run_fit(args) -> int:
    import gc

    from .. import hardware, memory, models, roofline, verdict
    from .fit import recommended, smallest_world, ways_out, writable, write

    if args.write:
        writable(args.write, args.force)
    elif args.force or args.nodes > 1 or args.main_ip:
        raise BadInput("--force, --nodes and --main-ip say how to --write FILE; without it they have nothing to do")
    gc.disable()  # a short-lived process that makes many small objects and no cycles that matter
    model = models.arch(args.model)
    here = [] if args.gpu else hardware.detect()
    if here and here[0].gpu is None:
        raise BadInput(f"the card in this machine cannot be used as it is ({here[0].reason}); name one with --gpu")
    card = hardware.gpu(args.gpu) if args.gpu else here[0].gpu if here else hardware.gpu("h100-sxm")
    seq = args.seq or min(2048, model.max_positions)
    settings = dict(batch=args.batch, seq=seq, precision=args.precision, optimizer=args.optimizer, checkpointing=args.checkpointing,
                    attention=args.attention, accumulation=args.accumulation, strategy=args.strategy or ("full_shard" if args.gpus > 1 else "single"),
                    world_size=args.gpus, shard_size=args.shard_size, offload=args.offload, lora_rank=args.lora_rank)
    m = memory.train_memory(model, **settings, gpu=card)
    v = verdict.verdict(m)
    fits = v.answer == "fits"
    out = [] if fits else ways_out(model, card, settings)
    world = None if fits else smallest_world(model, card, settings)
    t = roofline.train_time(model, **settings, gpu=card)
    written = None
    if args.write and (new := recommended(settings, fits, out, asked=args.strategy is not None)):
        written = write(args.write, model, card, new, fits or new != settings, args.nodes, args.main_ip, args.main_port)
    if args.json:
        print(json.dumps({**({"written": written and str(written.path), "written_for": written and written.title, "commands": written and written.commands, "notes": written and written.notes} if args.write else {}),
            "model": model.name, "parameters": model.parameters, "gpu": card.name, "settings": settings, "fits": fits, "verdict": v.answer,
            "why": v.why, "capacity": v.room, "not_measured": list(v.doubts),
            "peak": m.peak, "peak_any": m.peak_any, "reserved": m.reserved, "phases": dict(m.phases), "terms": dict(m.terms),
            "ways_out": [{"options": " ".join(c.option for c in w.changes), "peak": w.peak, "price": [c.price for c in w.changes]} for w in out],
            "smallest_full_shard": world, "seconds": t.seconds, "tokens_per_second": t.tokens_per_second, "mfu": t.mfu, "bound": t.bound,
            "seconds_by_term": t.terms, "basis": t.basis}, indent=1))
    else:
        _print_fit(model, card, settings, m, v, t, out, world)
        if args.write:
            _print_written(written, args.write)
    return 0 if fits else 1


def _print_fit(model, card, settings, m, v, t, out, world) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    s = settings
    parts = [f"batch {s['batch']} × {s['seq']:,} tokens", s["precision"], s["optimizer"], s["attention"], "checkpointing" if s["checkpointing"] else "",
             f"accumulation {s['accumulation']}" if s["accumulation"] > 1 else "", s["strategy"] + (f" over {s['world_size']} GPUs" if s["world_size"] > 1 else ""),
             "offload" if s["offload"] else "", f"LoRA rank {s['lora_rank']}" if s["lora_rank"] else ""]
    console.print(Text(f"{model.name} ({model.parameters:,} parameters) on {card.name}: {', '.join(filter(None, parts))}", style="bold"))
    table = Table(box=None, pad_edge=False, show_footer=True, header_style="bold", footer_style="bold")
    table.add_column(f"at the peak ({m.peak_phase})", f"peak of a steady step")
    table.add_column("GiB", f"{m.peak / GIB:.2f}", justify="right")
    table.add_column("share", "100%", justify="right")
    for name, size in sorted(m.terms.items(), key=lambda t: -t[1]):
        if size:
            table.add_row(name.replace("_", " "), f"{size / GIB:.2f}", f"{size / m.peak:.0%}")
    console.print(table)
    if m.peak_any > m.peak:
        console.print(f"The first steps reach {m.peak_any / GIB:.2f} GiB. The allocator reserves about {m.reserved / GIB:.2f} GiB.")
    else:
        console.print(f"The allocator reserves about {m.reserved / GIB:.2f} GiB.")
    ms = 1e3 * t.seconds
    console.print(f"A step takes about {f'{ms:.3g}' if ms < 100 else f'{ms:,.0f}'} ms: {t.tokens_per_second:,.0f} tokens/s, MFU {t.mfu:.0%}, {t.bound}-bound.")
    said, style = {"fits": ("Fits", "bold green"), "out of memory": ("Does not fit", "bold red")}.get(v.answer, ("Too close to call", "bold yellow"))
    room = f"{m.peak_any / GIB:.1f} of {v.room / GIB:.1f} GiB usable (the driver reports {card.memory / GIB:.1f}; CUDA and its context keep the rest)"
    console.print(Text(f"{said}: {room}; {v.why}.", style=style))
    console.print(_trust(v, t))
    if v.answer == "fits":
        return
    for i, way in enumerate(out):
        console.print()
        console.print(Text(("Cheapest change: " if i == 0 else "Or: ") + " ".join(c.option for c in way.changes), style="bold"), Text(f"→ {way.peak / GIB:.1f} GiB"))
        reasons = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
        for change in way.changes:
            reasons.add_row("", change.option, change.price)
        console.print(reasons)
    if not out:
        console.print("\nNo set of up to three changes on this card makes it fit.")
    if world:
        console.print(f"\nOr more cards: --gpus {world} --strategy full_shard, otherwise as it is.")


def _print_written(written, path) -> None:
    """What was written, how to run it, and what it cannot say."""
    if written is None:
        print(f"\n{path} was not written: no plan for these GPUs fits. With --strategy it is written for the plan asked for.")
        return
    print(f"\nWritten: {written.path}, for {written.title}" + ("." if written.fits else ", which is not sure to fit."))
    for i, command in enumerate(written.commands):
        print(f"  {command}" if len(written.commands) == 1 else f"  on machine {i}: {command}")
    print("Not in that file:", *(f"- {note}" for note in written.notes), sep="\n  ")


def _trust(v, t) -> str:
    """How far to trust it, in a sentence or two."""
    from ..verdict import like, memory_errors

    if v.doubts:
        return f"Not in the measured range: {'; '.join(v.doubts)}. Time: {t.basis}."
    near = like(t.settings)
    median, worst = memory_errors(near)
    return f"In the measured range: on the {len(near)} measured steps most like it the peak was off by {median:.2f}% in the median, {worst:.1f}% at worst. Time: {t.basis}."


def run_measure(args) -> int:
    from . import measure

    if args.card:
        if args.model or args.suite or args.cpu or args.inference or args.json:
            raise BadInput("--card measures the card by itself and takes --out FILE only")
        print(measure.card_summary(measure.card(args.out, say=lambda line: print(line, flush=True))))
        return 0
    options = dict(cpu=args.cpu, steps=args.steps, limit=args.row_seconds)
    if args.suite:
        if args.model or not args.out:
            raise BadInput("--suite FILE takes its settings from the file, so no model is named, and needs --out ROWS.jsonl")
        if args.json:
            raise BadInput("--suite writes its rows to --out; --json is for a single row")
        count = measure.suite(args.suite, args.out, limit_seconds=args.limit_seconds, say=lambda line: print(line, flush=True), **options)
        print(f"{args.out}: " + ", ".join(f"{n} {word}" for word, n in zip(("measured", "there before", "skipped", "failed"), count.values())))
        return 1 if count["failed"] else 0
    if not args.model:
        raise BadInput("which model? A known name (gpt2), the path of a config.json, or --suite FILE")
    kind, settings = measure.complete(measure.entry_of(args))
    if args.cpu and kind == "inference":
        raise BadInput("--cpu rehearses training steps; inference is measured on a GPU")
    if args.cpu and (large := measure.too_large_for_cpu(settings)):
        raise BadInput(f"{large}. Take a smaller model, batch or --seq")
    with measure.Bench([(kind, settings)], **options) as bench:
        if not args.cpu and settings["world_size"] > bench.gpus:
            raise RuntimeError(measure.no_gpu(bench.why) if not bench.gpus else f"--gpus is {settings['world_size']}, and this machine has {bench.gpus}")
        row = bench.measure(kind, settings)
    if args.out:
        measure.append(args.out, row)
    if args.json:
        print(json.dumps(row, indent=1))
    else:
        from .measure.printed import show

        show(row, bench.card)
    return 0


# --- site -----------------------------------------------------------------------------------------------------------------------

def _repository(command: str) -> Path:
    from .render import repository

    root = repository()
    if root is None:
        raise RuntimeError(f"`nbs {command}` renders the course's notebooks and needs the repository (git clone, then `make site`); "
                           "this is an installed package, which has `nbs fit`, `nbs lab` and `nbs doctor`")
    return root


def run_build(args) -> int:
    from . import render

    root = _repository("build")
    try:
        print(render.build(root, args.out, quarto=args.quarto))
    except (render.NotebookError, render.BuildError) as e:
        print(f"nbs build: {e}\n  The site was left as it was.", file=sys.stderr)
        if not args.watch:
            return 2 if isinstance(e, render.NotebookError) else 1
    if args.watch:
        print("Watching; Ctrl-C ends it.")
        render.watch(root, print, args.out)
    return 0


def run_serve(args) -> int:
    import threading

    from . import render
    from .serve import Site, tunnel

    root = _repository("serve")
    print(render.build(root))
    site = Site(root / "_site", args.port, watching=args.watch)
    print(f"Site: {site.address}   (Ctrl-C ends it)")
    if line := tunnel(site.port):
        print(f"From your own machine: {line}")
    try:
        if args.watch:
            def rebuilt(result):
                print(result)
                site.built += 1
            render.watch(root, rebuilt)
        else:
            threading.Event().wait()
    finally:
        site.stop()
    return 0


# --- labs -----------------------------------------------------------------------------------------------------------------------

def _folder(args) -> Path:
    from .render import repository

    root = repository()
    return Path(getattr(args, "dir", None) or os.environ.get("NBS_WORK") or (root / "work" if root else Path.cwd() / "work")).absolute()


def run_lab(args) -> int:
    from . import worksheets
    from .serve import jupyterlab, tunnel

    folder, path = _folder(args), None
    if args.lab is not None:
        slug = worksheets.find(args.lab)
        copy = worksheets.own_copy(slug, folder, args.update)
        path = copy.path
        print(f"{'Written' if copy.written else 'Yours'}: {path}")
        if args.update and not copy.written:
            print("It is made from the newest worksheet; nothing was written.")
        elif copy.newer:
            print(f"There is a newer worksheet. `nbs lab {args.lab} --update` writes it beside yours.")
    else:
        for slug in worksheets.shipped():
            worksheets.own_copy(slug, folder)
    if args.no_open:
        return 0
    server = jupyterlab(folder, args.port)
    try:
        if not server.wait():
            raise RuntimeError(f"JupyterLab did not start; its log is {server.log}")
        print("JupyterLab: " + (f"{server.tree}{path.name}?token={server.token}" if path else server.address) + "   (Ctrl-C ends it)")
        if line := tunnel(server.port):
            print(f"From your own machine: {line}")
        server.process.wait()
    finally:
        server.stop()
    return 0


def run_kernel(args) -> int:
    import subprocess

    run = subprocess.run([sys.executable, "-m", "ipykernel", "install", "--user", "--name", "scaling-measured", "--display-name", "Scaling, Measured"],
                         capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the kernel could not be registered: {run.stderr.strip().splitlines()[-1] if run.stderr.strip() else 'ipykernel is not installed'}")
    print("Kernel `Scaling, Measured` is registered for this user. Reload JupyterLab's page and choose it under Kernel > Change Kernel.")
    return 0


def run_course(args) -> int:
    import threading

    from . import render, worksheets
    from .serve import Site, answers, jupyterlab, tunnel

    root = _repository("course")
    print(render.build(root))
    folder = _folder(args)
    copies = [worksheets.own_copy(slug, folder) for slug in worksheets.shipped()]
    server = jupyterlab(folder, args.lab_port)
    site = None
    try:
        if not server.wait():
            raise RuntimeError(f"JupyterLab did not start; its log is {server.log}")
        site = Site(root / "_site", args.port, lab=server)
        if not answers(f"http://127.0.0.1:{site.port}/nbs/index.html"):
            raise RuntimeError(f"the site does not answer at {site.address}")
        print(f"Site:       {site.address}\nJupyterLab: {server.address}\nYour labs:  {', '.join(c.path.name for c in copies)} in {folder}")
        if line := tunnel(site.port, server.port):
            print(f"From your own machine: {line}")
        if sys.stdout.isatty() and sys.stdin.isatty():
            print("Ctrl-C ends both.")
            threading.Event().wait()
        else:
            print("\nNo terminal, so: both answer. A first prediction, `nbs fit llama-3-8b --gpu h100-sxm`:")
            main(["fit", "llama-3-8b", "--gpu", "h100-sxm"])
    except KeyboardInterrupt:
        print("\nStopped.")
    finally:
        if site:
            site.stop()
        server.stop()
    return 0


def run_doctor(args) -> int:
    from dataclasses import asdict

    from .doctor import examine

    findings = examine()
    if args.json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("", "what", "found", "how to get it"):
            table.add_column(column)
        marks = {"ok": "[green]✓[/]", "missing": "[red]✗[/]", "note": "[yellow]·[/]"}
        for f in findings:
            table.add_row(marks[f.state], f.what, f.found.replace("[", r"\["), f.remedy.replace("[", r"\["))
        Console(highlight=False).print(table)
    return 1 if any(f.state == "missing" for f in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
