"""Decoders that ours is timed against, on the same weights, each with as many threads as ours and at its best known settings.

    transformers   `generate` (one sequence, or a padded batch) and continuous batching, under torch.inference_mode, with the
                   faster of its attentions (sdpa, eager) for the work at hand
    llama.cpp      Q4_0 linears, embedding and head (blocks of 32 weights with an fp16 scale), through llama-cpp-python's C
                   calls: no Python but the choice of the greedy token is between two tokens; activations in 8 bits

Each gives the new tokens and when each one came, in seconds since the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swiftk.model import Model, ModelConfig

ATTENTIONS = ("sdpa", "eager")
CB_PAGE, CB_TOKENS = 32, 512  # of continuous batching; tried: 60 tokens/s where pages of 256, the default, give 48


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


@dataclass
class Decoded:
    """Of one call: new tokens per sequence, and when they came."""

    tokens: list[list[int]]
    stamps: list[list[float]] = field(default_factory=list)  # empty where only the whole was timed
    seconds: float = 0.0

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))


# --- transformers ------------------------------------------------------------------------------------------------


def _on_our_tensors(ours: Model) -> Any:
    import transformers

    hf = transformers.AutoConfig.for_model(**ours.config.to_hf())
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(hf, dtype=ours.compute_dtype)
    model.model.rotary_emb = type(model.model.rotary_emb)(hf).to(ours.device)  # its tables are in no checkpoint
    for name, p in ours.named_parameters():
        module, kind = name.rsplit(".", 1)
        setattr(model.get_submodule(module), kind, torch.nn.Parameter(p.detach(), requires_grad=False))
    model.tie_weights()
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a tensor of the peer without a value"
    return model


class _Stamps:
    """A streamer of transformers that only looks at the clock."""

    def __init__(self) -> None:
        self.begin, self.found = time.perf_counter(), list[float]()

    def put(self, value: Any) -> None:
        self.found.append(time.perf_counter() - self.begin)

    def end(self) -> None:
        pass


class Transformers:
    """On a checkpoint, or on the very tensors of a model of ours."""

    def __init__(self, source: str | Path | Model, dtype: torch.dtype) -> None:
        import transformers

        if isinstance(source, Model):
            model = _on_our_tensors(source)
        else:
            with _quiet_transformers():
                model = transformers.AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype)
        self.model = model.eval()
        self.device = self.model.device
        self.attention = ""

    def choose(self, attention: str) -> None:
        if attention != self.attention:
            self.model.set_attn_implementation(attention)
            self.attention = attention

    def best(self, trial: Callable[[], Any]) -> str:
        """Keeps the attention under which the trial took less time, the better of two."""
        taken = {}
        for attention in ATTENTIONS:
            self.choose(attention)
            trial()
            begin = time.perf_counter()
            trial()
            taken[attention] = time.perf_counter() - begin
        self.choose(min(taken, key=lambda a: taken[a]))
        return self.attention

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """(len(tokens) - 1,): of each token after the first."""
        ids = torch.tensor([tokens], device=self.device)
        return self.model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> Decoded:
        """Greedy, `new` tokens for each; several prompts are padded on the left."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        stamps = _Stamps() if len(prompts) == 1 else None
        begin = time.perf_counter()
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, streamer=stamps
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        found = [] if stamps is None else [stamps.found[1:]]  # the first is the prompt's
        return Decoded(out[:, longest:].tolist(), found, seconds)

    def static_batches(self, prompts: Sequence[Sequence[int]], new: Sequence[int], size: int) -> Decoded:
        """Requests in their order, `size` at a time; each batch runs until its longest is done, the surplus is cut."""
        done, seconds = Decoded([]), 0.0
        for i in range(0, len(prompts), size):
            part = self.generate(prompts[i : i + size], max(new[i : i + size]))
            done.tokens += [row[:n] for row, n in zip(part.tokens, new[i : i + size], strict=True)]
            seconds += part.seconds
        done.seconds = seconds
        return done

    def continuous(self, prompts: Sequence[Sequence[int]], new: Sequence[int]) -> Decoded:
        """Its continuous batching with each request's own length; starting and stopping it is not counted."""
        import transformers

        settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=max(new), eos_token_id=-1, pad_token_id=0)
        # a cache that just holds them: left to itself it takes most of the memory, and a minute to start
        blocks = sum(-(-(len(p) + n) // CB_PAGE) for p, n in zip(prompts, new, strict=True)) + 1
        sizes = transformers.ContinuousBatchingConfig(page_size=CB_PAGE, num_blocks=blocks, max_batch_tokens=CB_TOKENS)
        found: dict[str, list[int]] = {}
        attention = self.attention
        running = self.model.continuous_batching_context_manager(
            settings, block=True, timeout=5, continuous_batching_config=sizes
        )
        with _quiet_transformers(), running as manager:
            begin = time.perf_counter()
            names = [manager.add_request(list(p), max_new_tokens=n) for p, n in zip(prompts, new, strict=True)]
            while len(found) < len(names):
                result = manager.get_result(timeout=1)
                assert result is not None or manager.is_running(), "continuous batching ended early"
                if result is not None and result.is_finished():
                    assert result.error is None, f"continuous batching: {result.error}"
                    found[result.request_id] = list(result.generated_tokens)
            seconds = time.perf_counter() - begin
        self.attention = ""  # it has switched to its own
        self.choose(attention)
        return Decoded([found[name] for name in names], [], seconds)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as messages

    level = messages.get_verbosity()
    messages.set_verbosity(logging.CRITICAL)
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        messages.enable_progress_bar()


# --- llama.cpp ---------------------------------------------------------------------------------------------------

_GGUF = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def gguf_name(name: str) -> str:
    """Our parameter's name as llama.cpp has it."""
    module = name.removesuffix(".weight")
    if module in _GGUF_TOP:
        return f"{_GGUF_TOP[module]}.weight"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_GGUF[rest]}.weight"


def q4_0(weight: torch.Tensor) -> np.ndarray:
    """Its bytes (rows, bytes of a row), by gguf's own quantiser."""
    import gguf

    return gguf.quants.quantize(weight.detach().float().numpy(), gguf.GGMLQuantizationType.Q4_0)


def q4_0_values(weight: torch.Tensor) -> torch.Tensor:
    """What those bytes stand for."""
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(q4_0(weight), gguf.GGMLQuantizationType.Q4_0))


def write_gguf(model: Model, path: Path) -> tuple[int, int]:
    """The weights of a dense Qwen3 model as llama.cpp reads them: matrices in Q4_0, norms in fp32, a tied head a tensor of its
    own (as its converter's --pure Q4_0 of an untied one: both can then be repacked for the CPU). No vocabulary.

    Returns: how many tensors are quantised, and their bytes.
    """
    import gguf

    c = model.config
    assert c.model_type == "qwen3" and c.qk_norm, f"write_gguf: model_type has {c.model_type}, wants qwen3"
    writer = gguf.GGUFWriter(str(path), "qwen3", use_temp_file=False)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    quantised = size = 0
    for name, p in model.named_parameters():
        if p.dim() == 1:
            writer.add_tensor(gguf_name(name), p.detach().float().numpy())
            continue
        data = q4_0(p)
        for target in [gguf_name(name)] + (["output.weight"] if name == "model.embed_tokens.weight" else []):
            writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
            quantised, size = quantised + 1, size + data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quantised, size


class LlamaCpp:
    """A context of llama.cpp over one file. `close` when done."""

    def __init__(self, path: Path, config: ModelConfig, max_tokens: int, batch: int) -> None:
        import llama_cpp

        self.c, self.vocab, self.facts = llama_cpp, config.vocab_size, dict[str, str]()
        self._ignore = llama_cpp.llama_log_callback(lambda level, text, data: None)  # its loader writes hundreds of lines
        llama_cpp.llama_log_set(self._ignore, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max_tokens, batch, batch
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, "llama.cpp makes no context"

    def close(self) -> None:
        self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)

    def _decode(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after the last token, llama.cpp's own memory."""
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self.c.llama_batch_get_one(ids, len(tokens))
        code = self.c.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode returned {code}"
        return np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, -1), (self.vocab,))

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """(vocab,) after the last of the tokens."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        return torch.from_numpy(self._decode(tokens).copy())

    def generate(self, prompt: Sequence[int], new: int) -> Decoded:
        """Greedy."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        begin, found, stamps = time.perf_counter(), list[int](), list[float]()
        feed = list(prompt)
        while len(found) < new:
            feed = [int(self._decode(feed).argmax())]
            found += feed
            stamps.append(time.perf_counter() - begin)
        return Decoded([found], [stamps], stamps[-1])
