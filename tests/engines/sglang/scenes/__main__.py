"""Run one function, and print what it returns as JSON."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
sys.path[0:1] = [str(HERE.parent), str(HERE.parents[1])]  # scenes, harness; weights

if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    module, name = sys.argv[1].split(".")
    result = getattr(import_module(f"scenes.{module}"), name)(**json.loads(sys.argv[2]))
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # SGLang's own threads and sockets need not be waited for
