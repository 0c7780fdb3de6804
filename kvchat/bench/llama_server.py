"""The llama.cpp server of one GGUF file on the loopback address, alone in its process, until stdin ends.

Run as a file, not as a module, so that torch is not loaded beside it. Its argument is a JSON object {"model", "folder",
"num_tokens", "threads", "on_gpu"}; once it listens it prints {"address"}.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module


def main() -> None:
    """Serve one slot."""
    request = json.loads(sys.argv[1])
    xllamacpp = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.slot_save_path = request["model"], request["folder"]
    params.n_ctx, params.n_parallel = request["num_tokens"], 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    if not request["on_gpu"]:
        params.n_gpu_layers = 0
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.verbosity = 0
    # An erased slot must not come back from the server's own copy in memory.
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
