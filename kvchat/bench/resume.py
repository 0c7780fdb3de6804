"""Time to the first token of a question after a saved history, in a new process whose model is loaded."""

from __future__ import annotations

from typing import Any

from kvchat.bench.history import Subject, in_new_process, ratio, spread


def resume(subject: Subject) -> dict[str, Any]:
    """Seconds to the first token after the saved history, against prefilling it, and against llama.cpp's saved slot."""
    saved, llama = subject.conversation.stats(), subject.llama
    prefill_s = llama.prefill_s(subject.ids)
    save_s = spread([llama.save_s() for _ in range(subject.rounds)])
    request = {"kind": "resume", "config": subject.config.model_dump(mode="json"), "rounds": subject.rounds}
    measured = in_new_process({**request, "llama": llama.address, "llama_problem": llama.problem})
    runs = {
        name: spread(measured.pop(name)) for name in ("ttft_s", "load_s", "transformers_ttft_s", "llama.cpp_ttft_s")
    }
    if problem := measured.pop("llama_problem"):
        llama.fail(problem)
    return {
        "history_tokens": saved["num_tokens"],
        "bytes_on_disk": saved["bytes_on_disk"],
        "keep_ratio": subject.config.compress.keep_ratio,
        "codec": ",".join(subject.config.codec.names),
        **measured,
        **runs,
        "speedup_over_transformers": ratio(runs["transformers_ttft_s"], runs["ttft_s"]),
        "llama.cpp_prefill_s": prefill_s,
        "llama.cpp_slot_save_s": save_s,
        "speedup_over_llama.cpp_slot": ratio(runs["llama.cpp_ttft_s"], runs["ttft_s"]),
        "llama.cpp_problem": llama.problem,
    }
