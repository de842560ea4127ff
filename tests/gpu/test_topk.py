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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_match_dense_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=generator).div(4).to(dtype)
    weight = torch.randn(20_011, 256, generator=generator).to(dtype)
    labels = torch.randint(0, 20_000, (300,), generator=generator)
    uniforms = torch.from_numpy(tail_uniforms(0, 0, 300, 4)).cuda()
    inputs = hidden.cuda(), weight.cuda(), labels.cuda()
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
        torch.cuda.set_sync_debug_mode("default")
    logits = hidden.double() @ weight[:20_000].double().T
    # Logits below 32 are rounded by up to 2^-4 in bfloat16; float32 products of 256 terms by less than 2^-16.
    tolerance = 0.13 if dtype == torch.bfloat16 and not WIDENS else 1e-4
    ids, kept = (
        found.topk_token_ids_PK.cpu().long(),
        found.topk_token_ids_PK.cpu() >= 0,
    )
    shifted = logits - logits.amax(-1, keepdim=True)
    expected = shifted.gather(1, ids.clamp(min=0))
    torch.testing.assert_close(
        found.topk_logits_PK.cpu().double()[kept],
        expected[kept],
        rtol=0,
        atol=tolerance,
    )
    torch.testing.assert_close(
        found.log_sum_exp_logits_P.cpu().double(),
        shifted.logsumexp(-1),
        rtol=0,
        atol=tolerance,
    )
    label_logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(
        found.label_logprobs_P.cpu().double(),
        label_logprobs,
        rtol=0,
        atol=2 * tolerance,
    )
    outside = torch.ones_like(logits).scatter_(1, ids.clamp(min=0), (~kept).double())
    for number, temperature in enumerate((1.0, 2.0)):
        tail = ((logits / temperature).softmax(-1) * outside).sum(-1)
        torch.testing.assert_close(
            found.tail_mass_PT[:, number].cpu().double(),
            tail,
            rtol=2 * tolerance,
            atol=0,
        )
    samples = found.tail_token_ids_PM.cpu().long()
    assert (samples >= 0).any()
    assert (outside.gather(1, samples.clamp(min=0))[samples >= 0] == 1).all()


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
