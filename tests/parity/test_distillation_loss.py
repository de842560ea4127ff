"""The loss for other trainers, over rows of a cache, against plain float64 formulas."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nemo_kd.cache.reader import CacheReader
from nemo_kd.config.loss import LossConfig
from nemo_kd.data.batches import collate, pack
from nemo_kd.ops.distillation import distillation_loss
from tests.tiny_cache import write

VOCAB_SIZE = 50


def plain_loss(logits_BSV, rows, config, starts) -> torch.Tensor:
    """The mean of `sft_loss_weight` * CE + `kd_loss_weight` * forward KL with a tail bucket or renormalised."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    flat_AV, temperature = logits_BSV.flatten(0, 1), config.temperature or 1.0
    for row, start in zip(rows, starts, strict=True):
        targets = row.loss_rows()
        for p, s in enumerate(targets.positions_P.tolist()):
            z_V = flat_AV[start + s, :VOCAB_SIZE]
            ids = torch.tensor(targets.topk_token_ids_PK[p]).long()
            t_K = (
                torch.tensor(targets.topk_logits_PK[p]).double()[ids >= 0]
                / temperature
            )
            ids = ids[ids >= 0]
            if config.support == "label":
                p_E = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
                tail = float(targets.tail_mass_PT[p, 0])
                p_E[ids] = t_K.softmax(0) * (1 - tail)
                p_E[int(row.example.labels_S[s])] += tail
                given = p_E > 0
                p_E, q_E = p_E[given], z_V.softmax(0)[given]
            elif config.support == "renormalize":
                p_E, q_E = t_K.softmax(0), (z_V[ids] / temperature).softmax(0)
            else:
                tail = float(targets.tail_mass_PT[p, 0])
                q_K = (z_V / temperature).softmax(0)[ids]
                p_E = torch.cat([t_K.softmax(0) * (1 - tail), torch.tensor([tail])])
                q_E = torch.cat([q_K, 1 - q_K.sum(0, keepdim=True)])
            kd = (p_E * (p_E / q_E).log()).sum()
            if config.multiply_by_squared_temperature:
                kd = kd * temperature**2
            ce = -z_V.log_softmax(0)[int(row.example.labels_S[s])]
            total = total + config.sft_loss_weight * ce + config.kd_loss_weight * kd
            count += 1
    return total / count


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(sft_loss_weight=0.5),
        LossConfig(
            temperature=2.0,
            multiply_by_squared_temperature=True,
            support="renormalize",
            kd_loss_weight=0.7,
        ),
        LossConfig(support="label", kd_loss_weight=0.7),
    ],
    ids=["tail", "renormalize", "label"],
)
def test_value_and_gradient_match_plain_float64(tmp_path, packed, config):
    reader = CacheReader(str(write(tmp_path)))
    rows = [reader[position] for position in (0, 3, 5)]
    batch = pack(rows, 0, 8) if packed else collate(rows, 0, 8)
    lengths = [row.example.num_tokens for row in rows]
    starts = [0, lengths[0], sum(lengths[:2])] if packed else [0, 8, 16]
    generator = torch.Generator().manual_seed(0)
    shape = (*batch.tokens_BS.shape, VOCAB_SIZE + 6)  # 6 columns of padding
    logits = torch.randn(
        shape, generator=generator, dtype=torch.float64
    ).requires_grad_()
    loss = distillation_loss(logits, batch, config, vocab_size=VOCAB_SIZE)
    (found,) = torch.autograd.grad(loss, logits)
    expected = plain_loss(logits, rows, config, starts)
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(
        loss, expected, rtol=1e-6, atol=0
    )  # the cache is float32
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-9)
    total = distillation_loss(
        logits, batch, config, vocab_size=VOCAB_SIZE, reduction="sum"
    )
    torch.testing.assert_close(total / len(batch.loss_positions_N), loss)


def test_a_batch_without_teacher_or_with_a_custom_loss_is_refused(tmp_path):
    reader = CacheReader(str(write(tmp_path)))
    batch = collate([reader[0].example], 0)
    logits = torch.zeros(1, 8, VOCAB_SIZE)
    with pytest.raises(ValueError, match="batch.teacher: None"):
        distillation_loss(logits, batch)
    loss = distillation_loss(
        logits, batch, LossConfig(kd_loss_weight=0, sft_loss_weight=1)
    )
    assert float(loss) == pytest.approx(torch.tensor(50.0).log().item())
    custom = LossConfig(kd_loss="custom", custom_loss="a.b")
    with pytest.raises(ValueError, match="kd_loss: custom"):
        distillation_loss(logits, batch, custom)
    with pytest.raises(ValueError, match="tail_mass_PT: missing at temperature 2"):
        distillation_loss(logits, collate([reader[0]], 0), LossConfig(temperature=2.0))


def test_the_losses_need_torch_and_numpy_only():
    program = (
        "import sys; import nemo_kd.ops.distillation, nemo_kd.ops.student_logits, nemo_kd.ops.topk, nemo_kd.data.batches; "
        "print(*{name.split('.')[0] for name in sys.modules} & {'omegaconf', 'megatron', 'lightning', 'nemo', 'transformers'})"
    )
    assert (
        subprocess.check_output([sys.executable, "-c", program], text=True).split()
        == []
    )
