"""Engine arguments with which real engines run on a CPU."""

from __future__ import annotations

SGLANG = {
    "device": "cpu",
    "dtype": "float32",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 32768,
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    # Named in pairs: alone, intel_amx becomes torch_native on a CPU without AMX, which cannot
    # verify drafts.
    "attention_backend": "torch_native",
    "prefill_attention_backend": "intel_amx",
    "decode_attention_backend": "intel_amx",
}
