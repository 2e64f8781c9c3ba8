"""Full tuning follows transformers + torch's AdamW on the same rows, order and first weights, step by step."""

from __future__ import annotations

import pytest
import torch

from swiftk.config import DataConfig, OptimConfig
from swiftk.model import Model, ModelConfig, save_checkpoint
from swiftk.parallel.mesh import Mesh
from swiftk.trainer.data import load_dataset
from swiftk.trainer.optimizer import learning_rate
from swiftk.trainer.packing import BatchPlan
from swiftk.trainer.rows import read_rows
from swiftk.trainer.tokenizer import train_tokenizer
from tests.trainer import toy

transformers = pytest.importorskip("transformers")
STEPS, BATCH = 20, 4
SHAPE = {
    **toy.MODEL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.05,
}  # fmt: skip


def transformers_losses(model, dataset, plan, optim, dtype, steps=STEPS):
    """An ordinary loop: padded rows, an attention mask, weights in fp32 under autocast, decay as in transformers' trainer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": optim.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps)
    losses = []
    for step in range(steps):
        rows = [dataset.rows[i] for pack in plan.global_batch(step) for i in pack]
        width = max(len(row.input_ids) for row in rows)
        ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
        mask = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            n = len(row.input_ids)
            ids[i, :n] = torch.from_numpy(row.input_ids)
            labels[i, :n] = torch.where(torch.from_numpy(row.loss_mask), ids[i, :n], -100)
            mask[i, :n] = 1
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(ids, attention_mask=mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, optim)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_twenty_steps_follow_transformers(tmp_path, dtype, bound):
    rows = toy.write_rows(tmp_path / "rows.jsonl", count=60)
    data = DataConfig(dataset=(str(rows),), packing=True)
    read, _ = read_rows(data)
    tokenizer = train_tokenizer((m["content"] for row in read for m in row.messages), 300)
    config = ModelConfig.from_hf(SHAPE)
    start = tmp_path / "start"
    save_checkpoint(Model(config, Mesh.single(), seed=3), start)
    tokenizer.save_pretrained(start)

    settings = dict(learning_rate=5e-3, weight_decay=0.1, max_grad_norm=1.0, warmup_ratio=0.1)
    toy.launch(toy.arguments(
        tmp_path, model_config={}, tokenizer=None, model=str(start), tuner_type="full", dataset=(str(rows),),
        split_dataset_ratio=0.0, max_steps=STEPS, save_steps=0, global_batch_size=BATCH, micro_batch_size=2, torch_dtype=dtype,
        recompute_granularity="selective", **settings,
    ))  # fmt: skip
    ours = [line["loss"] for line in toy.logged(next((tmp_path / "out").glob("v0-*")))]

    dataset = load_dataset(data, tokenizer, config.max_position_embeddings)
    length = config.max_position_embeddings
    plan = BatchPlan(dataset.lengths, packing_length=length, micro_batch_size=2, global_batch_size=BATCH, seed=42)
    model = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="eager")
    theirs = transformers_losses(model, dataset, plan, OptimConfig(**settings), getattr(torch, dtype))
    assert len(ours) == STEPS and ours[-1] < 0.8 * ours[0]
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a == pytest.approx(b, rel=bound), f"step {step}: {a} against {b}"
