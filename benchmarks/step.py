"""One optimizer step of training, ours and the peer's: the same configuration, initial weights, adapters, rows and optimizer.

    full    every weight, fp32 masters; peer: transformers, under autocast where the compute dtype is bf16
    lora    adapters on all linears of the blocks, the base frozen in the compute dtype; peer: transformers + peft
    qlora   the same over NF4 weights; peer: transformers + peft + bitsandbytes' Linear4bit, given our codes and absmax

Ours is the trainer's step on one token-first batch of rows (no padding); the peer gets the same rows padded to the longest
one, with an attention mask, and its own loss (logits of every position). Neither model is ever whole in fp32 beside what it
holds: weights are drawn, and quantised, one after the other.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from swiftk.config import OptimConfig, TunerConfig
from swiftk.kernels.nf4 import nf4_quantize, nf4_to_bitsandbytes
from swiftk.model import Model, ModelConfig
from swiftk.model.adapter import is_adapter, resolve
from swiftk.model.parameters import initial_value, param_specs
from swiftk.parallel.mesh import Mesh
from swiftk.parallel.spec import ParamSpec
from swiftk.trainer.data import Dataset
from swiftk.trainer.loss import token_loss
from swiftk.trainer.optimizer import build_optimizer, clip_gradients_, gradient_norm, set_learning_rate
from swiftk.trainer.packing import IGNORE_INDEX, Batch, collate
from swiftk.trainer.template import Encoded

TUNERS = ("full", "lora", "qlora")
PEER = {"full": "transformers", "lora": "transformers + peft", "qlora": "transformers + peft + bitsandbytes"}
PACKAGES = {tuner: tuple(peer.split(" + ")) for tuner, peer in PEER.items()}
RATE = 1e-4
RANK, ALPHA = 16, 32
OPTIM = OptimConfig()
SEED = 0  # of the initial weights
QUICK = ModelConfig(
    model_type="qwen3", vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True, qk_norm=True,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Everything that a process needs to make the same batches and models."""

    config: ModelConfig
    tuner: str  # of TUNERS
    dtype: torch.dtype
    isa: str
    recompute: str
    threads: int
    lengths: tuple[tuple[int, ...], ...]  # of the rows of each batch
    dropout: float = 0.0  # of the adapters' inputs
    peer_checkpointing: bool = False  # the peer computes each block again in the backward
    device: str = "cpu"
    drawn_there: bool = False  # weights as `drawn_model` has them


def drawn(spec: ParamSpec, std: float, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A first value from the device's generator."""
    if len(spec.shape) == 1:
        return initial_value(spec, SEED, std).to(device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(spec.name.encode()))
    return torch.empty(spec.shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)


def first_value(spec: ParamSpec, setting: Setting) -> torch.Tensor:
    """Of a parameter that is no adapter's, on the device: the same one for ours and the peer."""
    std = setting.config.initializer_range
    if setting.drawn_there:
        return drawn(spec, std, setting.dtype, setting.device)
    return initial_value(spec, SEED, std).to(setting.device)


def missing_packages(tuner: str) -> list[str]:
    return [package for package in PACKAGES[tuner] if importlib.util.find_spec(package) is None]


def tuner_config(setting: Setting) -> TunerConfig:
    if setting.tuner == "full":
        return TunerConfig(tuner_type="full")
    quant = (None, None) if setting.tuner == "lora" else ("bnb", 4)
    return TunerConfig(
        tuner_type="lora", lora_rank=RANK, lora_alpha=ALPHA, lora_dropout=setting.dropout, quant_method=quant[0],
        quant_bits=quant[1],
    )  # fmt: skip


def make_batches(setting: Setting) -> list[Batch]:
    random = np.random.default_rng(1)
    batches = []
    for lengths in setting.lengths:
        rows = [Encoded(random.integers(0, setting.config.vocab_size, n).astype(np.int32), np.ones(n, bool)) for n in lengths]
        batches.append(collate(Dataset(rows, {}), [tuple(range(len(rows)))]).to(torch.device(setting.device)))
    return batches


# --- ours --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    step: Callable[[Batch], tuple[float, float]]  # one optimizer step: loss per trained token, gradient norm before the clip
    model: Any
    optimizer: torch.optim.Optimizer


@torch.no_grad()
def drawn_model(config: ModelConfig, dtype: torch.dtype, device: str, tuner: TunerConfig, **options: Any) -> Model:
    """On the device, its weights from the device's generator: numpy would take minutes for 8e9 of them."""
    with torch.device(device):  # where its empty tensors are made
        model = Model(config, Mesh.single(), compute_dtype=dtype, seed=None, tuner=tuner, **options)
    model.to(device)  # the adapters, which are drawn as ever
    params, leaves = dict(model.named_parameters()), model.linears()
    for name, spec in model.specs.items():
        module = name.removesuffix(".weight")
        if module in model.tuning.quantised:
            leaves[module].set_nf4(nf4_quantize(drawn(spec, config.initializer_range, dtype, device)))
        elif not is_adapter(name):
            params[name].copy_(drawn(spec, config.initializer_range, dtype, device))
    return model


def our_model(setting: Setting) -> Model:
    tuner = tuner_config(setting)
    options: dict[str, Any] = {"isa": setting.isa, "recompute": setting.recompute}
    if setting.drawn_there:
        return drawn_model(setting.config, setting.dtype, setting.device, tuner, **options)
    model = Model(setting.config, Mesh.single(), compute_dtype=setting.dtype, seed=SEED, tuner=tuner, **options)
    return model.to(setting.device)


def ours(setting: Setting) -> Candidate:
    model = our_model(setting)
    params = dict(model.named_parameters())
    optimizer = build_optimizer(params, OPTIM)
    set_learning_rate(optimizer, RATE)
    seed_step = torch.tensor([SEED, 0], device=setting.device)

    def step(batch: Batch) -> tuple[float, float]:
        trained = batch.num_loss_tokens
        seed_step[1] += 1
        loss = token_loss(model, batch, seed_step=seed_step, isa=setting.isa).total
        (loss / trained).backward()
        norm = gradient_norm(params.values())
        clip_gradients_(params.values(), norm, OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()) / trained, norm

    return Candidate(step, model, optimizer)


# --- the peer ----------------------------------------------------------------------------------------------------


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """The rows as (rows, longest) with a mask; the peer shifts the labels itself, so they are the input ids."""
    rows = batch.input_ids.split((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist())

    def pad(value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    labels = pad(IGNORE_INDEX)
    return {"input_ids": pad(0), "attention_mask": (labels != IGNORE_INDEX).long(), "labels": labels}


def linear_4bit(weight: torch.Tensor, dtype: torch.dtype) -> torch.nn.Module:
    """bitsandbytes' layer with the codes and absmax that our layer has for the weight."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    state = nf4_to_bitsandbytes(nf4_quantize(weight), weight.dtype)
    codes = state.pop("weight")
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(codes, state, device=weight.device, module=layer)
    return layer


def peer_name(name: str) -> str:
    """Our parameter's name as peft has it."""
    return f"base_model.model.{name}.default.weight" if is_adapter(name) else f"base_model.model.{name}"


def peer_model(setting: Setting) -> Any:
    """The peer's model with the initial weights of ours."""
    import transformers

    tuner = tuner_config(setting)
    tuning, lora = resolve(setting.config, tuner), setting.tuner != "full"
    specs = param_specs(setting.config, Mesh.single(), tuning)
    dtype = setting.dtype if lora else torch.float32
    hf = transformers.AutoConfig.for_model(**setting.config.to_hf(), use_cache=False)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(hf, dtype=dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(hf)  # its tables are in no checkpoint
    for name, spec in specs.items():
        if is_adapter(name):
            continue
        module, kind = name.rsplit(".", 1)
        value = first_value(spec, setting).to(dtype)
        if module in tuning.quantised:
            model.set_submodule(module, linear_4bit(value, dtype))
        else:
            setattr(model.get_submodule(module), kind, torch.nn.Parameter(value, requires_grad=not lora))
    model.tie_weights()
    if setting.peer_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        import peft

        model.is_loaded_in_4bit = setting.tuner == "qlora"
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=setting.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
        params = dict(model.named_parameters())
        for name, spec in specs.items():
            if is_adapter(name):
                params[peer_name(name)].data.copy_(initial_value(spec, 0, setting.config.initializer_range))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a tensor of the peer without a value"
    return model.to(setting.device).train()


def peer(setting: Setting) -> Candidate:
    model = peer_model(setting)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params, lr=RATE, betas=(OPTIM.adam_beta1, OPTIM.adam_beta2), eps=OPTIM.adam_eps, weight_decay=OPTIM.weight_decay,
        fused=True,
    )  # fmt: skip

    def step(batch: Batch) -> tuple[float, float]:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.dtype == torch.bfloat16):
            loss = model(**padded(batch)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    return Candidate(step, model, optimizer)


CANDIDATES: dict[str, Callable[[Setting], Candidate]] = {"swiftk": ours, "peer": peer}


# --- both --------------------------------------------------------------------------------------------------------


def check_values(setting: Setting, batch: Batch) -> None:
    """Both models, from one set of weights and without dropout: loss and gradient norm on one batch.

    Bounds, relative: 2 % in bf16, 1e-4 in fp32; NF4 under fp32: 0.3 % (tried: 0.06 %), since our weight is the product of
    value and absmax rounded to bf16, whatever the compute dtype, and bitsandbytes' is not rounded.
    """
    bare = replace(setting, dropout=0.0)
    mine, theirs = ours(bare), peer(bare)
    found = dict(theirs.model.named_parameters())
    with torch.no_grad():
        for name, p in mine.model.named_parameters():
            if name.endswith(".lora_B"):  # zero at first, which hides A
                p.copy_(torch.empty(p.shape).normal_(0.0, 0.05, generator=torch.Generator().manual_seed(len(name))))
                found[peer_name(name)].copy_(p)
    bound = 0.02 if setting.dtype == torch.bfloat16 else 0.003 if setting.tuner == "qlora" else 1e-4
    for what, a, b in zip(("loss", "gradient norm"), mine.step(batch), theirs.step(batch), strict=True):
        wrong = f"{what}: swiftk {a:.6g}, {PEER[setting.tuner]} {b:.6g}, bound {bound} relative"
        assert abs(a - b) <= bound * abs(b), wrong


def _child(pipe, threads: int, f: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    pipe.send(f(*args))


def in_own_process(threads: int, f: Callable[..., Any], *args: Any) -> Any:
    """f(*args) in a fresh process; f is a function of a module."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, threads, f, args))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"bench: the process of {f.__name__}{args[:1]} ended with exit code {process.exitcode}") from None
    finally:
        process.join()


def warm_up(name: str, setting: Setting) -> None:
    """Two steps of a tiny model: what is imported and started on the first step is not counted as memory of the next model."""
    setting = replace(setting, config=QUICK, lengths=((8, 8), (8, 8)))
    candidate = CANDIDATES[name](setting)
    for batch in make_batches(setting):
        candidate.step(batch)
    del candidate
    gc.collect()
