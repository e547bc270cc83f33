"""One library loads a model in this process: `python -m purelm.bench._load_one WHO MODEL`.

Prints one line, `RESULT {json}`.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from . import _peers
from ._wait import finished

GIB = 2**30


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=LIBRARIES)
    parser.add_argument("model")
    parser.add_argument("--16bit", dest="in_16bit", action="store_true")
    args = parser.parse_args()
    # No library may ask the network while a clock runs.
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    print("RESULT " + json.dumps(measure(args.who, args.model, args.in_16bit)), flush=True)
    return 0


def measure(who: str, model: str, in_16bit: bool) -> dict[str, Any]:
    """The figures, as a flat dict."""
    start = time.perf_counter()
    import torch

    torch_s = time.perf_counter() - start
    load = LIBRARIES[who]()
    import_s = time.perf_counter() - start - torch_s
    cuda = torch.cuda.is_available()
    if cuda:
        torch.zeros(1, device="cuda")  # its context is not part of loading
        torch.cuda.reset_peak_memory_stats()
    before = _own_bytes()
    with _Watch() as watch:
        start = time.perf_counter()
        made = load(model, in_16bit)
        finished(cuda)
        seconds = time.perf_counter() - start
        after = _own_bytes()
    result: dict[str, Any] = {
        "who": who,
        "model": Path(model).name,
        "precision": "bf16" if in_16bit else "nf4",
        "parameters": made.num_parameters(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "import_torch_s": torch_s,
        "import_s": import_s,
        "load_s": seconds,
        "host_peak_gib": max(watch.most - before, 0) / GIB,
        "host_growth_gib": (after - before) / GIB,
    }
    if cuda:
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        result["model_gib"], result["peak_over_model_gib"] = held / GIB, (peak - held) / GIB
    return result


def _purelm() -> Callable[[str, bool], Any]:
    import torch

    from purelm import FastLanguageModel

    def load(model: str, in_16bit: bool) -> Any:
        made, _ = FastLanguageModel.from_pretrained(
            model,
            dtype=torch.bfloat16,
            load_in_4bit=not in_16bit,
            load_in_16bit=in_16bit,
            local_files_only=True,
        )
        return made

    return load


def _hf() -> Callable[[str, bool], Any]:
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig  # noqa: F401

    def load(model: str, in_16bit: bool) -> Any:
        AutoTokenizer.from_pretrained(model)
        return _peers.load("hf", model, in_16bit=in_16bit)

    return load


def _unsloth() -> Callable[[str, bool], Any]:
    import_module("unsloth")
    return lambda model, in_16bit: _peers.load("unsloth", model, in_16bit=in_16bit)


LIBRARIES: dict[str, Callable[[], Callable[[str, bool], Any]]] = {
    "purelm": _purelm,
    "hf": _hf,
    "unsloth": _unsloth,
}


class _Watch:
    """The most of the process's own memory while it is entered, looked at every few ms."""

    def __enter__(self) -> "_Watch":
        self.most, self._stop = _own_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.01):
            self.most = max(self.most, _own_bytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, _own_bytes())


def _own_bytes() -> int:
    """What the process holds beside mapped files (anonymous memory); 0 where not on Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
