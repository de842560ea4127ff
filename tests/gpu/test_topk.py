"""Top-k rows on a GPU: against dense float64 on the CPU, their memory, and that nothing waits for the GPU."""

from __future__ import annotations

import pytest
import torch

from nemo_kd.ops.tail_sampling import tail_uniforms
from nemo_kd.ops.topk import topk_rows
from nemo_kd.ops.vocab import VocabShard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

WIDENS = "dtype_out" in torch.ops.aten.mm.overloads()


DTYPES = (torch.float32, torch.bfloat16)


def tolerances(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest errors of `errors`."""
    is_wide = dtype == torch.float32 or (WIDENS and device == "cuda")
    # Logits below 32 are rounded by up to 2^-4 in bfloat16; float32 products of 256 terms by less than 2^-16.
    tolerance = 1e-4 if is_wide else 0.13
    return {
        "logits": tolerance,
        "log-sum-exp": tolerance,
        "label": 2 * tolerance,
        "tail mass": 2 * tolerance,
        "samples": 0,
    }


def errors(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest errors, of tail masses relative ones; samples: the share of those that are kept tokens, 1 without any."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=generator).div(4).to(dtype)
    weight = torch.randn(20_011, 256, generator=generator).to(dtype)
    labels = torch.randint(0, 20_000, (300,), generator=generator)
    uniforms = torch.from_numpy(tail_uniforms(0, 0, 300, 4)).to(device)
    inputs = hidden.to(device), weight.to(device), labels.to(device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = topk_rows(
            *inputs,
            VocabShard(0, 20_000, 20_000),
            top_k=50,
            kept=lambda p: p >= 1e-4,
            temperatures=(1.0, 2.0),
            uniforms_NU=uniforms,
            block_bytes=10_000_000,
        )
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    found = found.map(torch.Tensor.cpu)
    logits = hidden.double() @ weight[:20_000].double().T
    kept = found.topk_token_ids_PK >= 0
    ids = found.topk_token_ids_PK.long().clamp(min=0)
    shifted = logits - logits.amax(-1, keepdim=True)
    label_logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    outside = torch.ones_like(logits).scatter_(1, ids, (~kept).double())
    tails = [
        ((logits / temperature).softmax(-1) * outside).sum(-1)
        for temperature in (1.0, 2.0)
    ]
    samples = found.tail_token_ids_PM.long()
    is_outside = outside.gather(1, samples.clamp(min=0))[samples >= 0]

    def largest(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found.double() - expected).abs().max())

    return {
        "logits": largest(found.topk_logits_PK[kept], shifted.gather(1, ids)[kept]),
        "log-sum-exp": largest(found.log_sum_exp_logits_P, shifted.logsumexp(-1)),
        "label": largest(found.label_logprobs_P, label_logprobs),
        "tail mass": largest(
            found.tail_mass_PT / torch.stack(tails, 1), torch.ones(1)
        ),
        "samples": 1 - float(is_outside.mean()) if len(is_outside) else 1.0,
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_match_dense_float64(dtype):
    found = errors(dtype, "cuda")
    for name, tolerance in tolerances(dtype, "cuda").items():
        assert found[name] <= tolerance, name


def test_memory_does_not_grow_with_the_rows():
    weight = torch.randn(128_256, 64, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for num_rows in (1024, 8192):
        hidden = torch.randn(num_rows, 64, device="cuda", dtype=torch.bfloat16)
        labels = torch.zeros(num_rows, dtype=torch.int64, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        topk_rows(
            hidden,
            weight,
            labels,
            VocabShard(0, 128_256, 128_256),
            top_k=8,
            kept=lambda p: p > 0,
        )
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < 600e6
    assert peaks[1] - peaks[0] < 30e6
