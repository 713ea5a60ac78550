"""What runs inside a rank of `nbs_lib.course.world`: its beginning, calls, and answers. Imported there, not by people."""
from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from typing import Any


def begin(namespace: dict, parent: int, store: str, ask: str, seconds: float) -> None:
    """Join the process group, and put its names into the rank's namespace. store: a file through which ranks find each other;
    ask: a named pipe on which this rank is asked where it stands; seconds: a collective's own limit.
    """
    threading.Thread(target=_watch, args=(parent, os.path.dirname(store)), daemon=True).start()
    threading.Thread(target=_tell, args=(ask,), daemon=True).start()
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    rank, world_size, backend = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["NBS_BACKEND"]
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # ranks share the cores
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds),
                            device_id=device if backend == "nccl" else None)
    namespace.update(torch=torch, dist=dist, rank=rank, world_size=world_size, device=device)


def _watch(parent: int, folder: str) -> None:
    """End with the process that started this one, however it ends; leave no files behind."""
    while os.getppid() == parent:
        time.sleep(0.3)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _tell(ask: str) -> None:
    """Whenever asked, write the frames of the thread that runs the cells, innermost first, into `ask`.json. It waits in torch without Python's
    lock, so that this thread can look.
    """
    main = threading.main_thread().ident
    while True:
        try:
            with open(ask, "rb") as f:
                f.read()
        except OSError:  # the world has ended
            return
        frame, frames = sys._current_frames().get(main), []
        while frame is not None:
            frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        with open(ask + ".new", "w") as f:
            json.dump(frames, f)
        os.replace(ask + ".new", ask + ".json")


def call(given: str, answer: str) -> None:
    """Unpickle (module, name, arguments) from the file `given`, call, and leave the result in the file `answer`."""
    from importlib import import_module

    with open(given, "rb") as f:
        module, name, args, kwargs = pickle.load(f)
    function: Any = import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    give(function(*args, **kwargs), answer)


def give(value: Any, answer: str) -> None:
    """Pickle a value into a file; tensors of a GPU as tensors of the CPU, so that the caller needs none."""
    import torch
    from torch.utils._pytree import tree_map

    plain = tree_map(lambda x: x.detach().cpu() if isinstance(x, torch.Tensor) and x.is_cuda else x, value)
    with open(answer, "wb") as f:
        pickle.dump(plain, f)
    sys.stdout.flush()
