"""Small frozen dataclasses, one per consumer; a component receives its own part, never the whole. No torch here.

Keys are the field names below, the same on the command line and in YAML; aliases and parsing are swiftk/train.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DataConfig:
    """Read by trainer/data.py, template.py and packing.py."""

    stage: str = "sft"  # pt: every token is trained; sft: assistant turns only
    dataset: tuple[str, ...] = ()  # files (jsonl, json, csv, parquet, txt in pt) or builtin names; path#N takes N rows
    val_dataset: tuple[str, ...] = ()
    split_dataset_ratio: float = 0.0  # share of the rows of `dataset` held out where val_dataset is empty
    columns: dict[str, str] = field(default_factory=dict)  # {"column in the file": "query"}
    system: str | None = None  # system message for rows that have none
    max_length: int | None = None  # tokens of a row; None: the model's max_position_embeddings
    truncation_strategy: str | None = None  # delete | left | right | split; None: delete (sft), split (pt)
    packing: bool = False  # several rows per sequence of packing_length tokens
    packing_length: int | None = None  # None: max_length
    padding_free: bool = True  # always: there is no padding
    strict: bool = True  # False: rows that fit no format are skipped and counted
    seed: int = 42


@dataclass(frozen=True)
class TunerConfig:
    """Read by swiftk/model: which parameters there are, which of them are trained, how the base is stored."""

    tuner_type: str | None = None  # full | lora | qlora (lora, quant_bits 4); None: lora with model, full with model_config
    lora_rank: int = 8
    lora_alpha: float = 32  # the adapter is scaled by alpha / rank
    lora_dropout: float = 0.05  # of the adapter's input
    target_modules: tuple[str, ...] = ("all-linear",)  # of the blocks; or names (q_proj, lm_head, embed_tokens), regexes
    use_rslora: bool = False  # scaled by alpha / sqrt(rank)
    use_dora: bool = False  # rows of weight + adapter are rescaled to a trained magnitude
    modules_to_save: tuple[str, ...] = ()  # trained whole and saved beside the adapter: names like those of target_modules
    init_weights: str = "true"  # of A, with B 0: true (uniform, as in PEFT) | gaussian; of both: pissa | pissa_niter_N
    adapters: tuple[str, ...] = ()  # a checkpoint with an adapter to go on from; its base and settings need not be named
    quant_method: str | None = None  # bnb: the linears of the blocks are held in NF4
    quant_bits: int | None = None  # 4
    freeze_parameters: tuple[str, ...] = ()  # full: names that start with one of these are not trained
    freeze_parameters_regex: str | None = None  # full: nor those in which this is found
    freeze_parameters_ratio: float = 0.0  # full: nor the first ones in the checkpoint, up to this share of all elements
    trainable_parameters: tuple[str, ...] = ()  # full: prefixes of what is trained after all
    trainable_parameters_regex: str | None = None


@dataclass(frozen=True)
class OptimConfig:
    """Read by trainer/optimizer.py and galore.py."""

    optim: str = "adamw"  # adamw | adamw_8bit (8-bit moments) | galore | q_galore (matrices' gradients projected to a low rank)
    learning_rate: float | None = None  # None: 1e-4 (lora), 1e-5 (full)
    parameter_lr: dict[str, float] = field(default_factory=dict)  # {"regex": rate} in place of learning_rate, by name
    lorap_lr_ratio: float | None = None  # LoRA+: B, magnitudes and other vectors learn this times faster (4 to 16); None: off
    lorap_emb_lr: float = 1e-6  # with LoRA+, the rate of an embedding's adapter
    min_lr: float = 0.0
    warmup_ratio: float = 0.05
    lr_scheduler_type: str = "cosine"  # cosine | linear | constant
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    lr_decay_steps: int | None = None  # length of the schedule; None: the run's last step. Fix it to extend a run later
    galore_rank: int = 128  # of the projected gradients
    galore_update_proj_gap: int = 200  # steps between two projections; q_galore: the least, doubled where a layer's has settled
    galore_scale: float = 0.25  # of the update in the projected matrices


@dataclass(frozen=True)
class ParallelConfig:
    """Read by parallel/mesh.py; data parallelism is the rest of the world."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    ddp_timeout: float = 600.0  # seconds a collective may wait before the run ends with the name of the late rank
    heartbeat_timeout: float = 20.0  # seconds without a sign of life before a rank is taken for dead


@dataclass(frozen=True)
class RunConfig:
    """Read by trainer/run.py, loop.py, checkpoint.py and metrics.py."""

    model: str | None = None  # directory of a Hugging Face checkpoint
    model_config: dict[str, object] = field(default_factory=dict)  # in place of model: a config.json; random initial weights
    tokenizer: str | None = None  # directory | train: byte-level BPE of model_config's vocab_size on the dataset; None: model's
    output_dir: str | None = None  # None: output/<model>
    add_version: bool = True  # a new v{N}-{time} folder under output_dir for each run
    micro_batch_size: int = 1  # packs (rows without packing) per forward and rank
    global_batch_size: int = 16  # packs (rows) per optimizer step over all ranks
    num_train_epochs: float = 1.0
    max_steps: int = -1  # > 0: instead of num_train_epochs
    save_steps: int = 500  # and after the last step; 0: only then
    save_total_limit: int | None = None  # checkpoints kept; the last valid and the best always are
    logging_steps: int = 5
    eval_steps: int | None = None  # and before the first and after the last step; None: save_steps
    report_to: tuple[str, ...] = ("tensorboard",)  # tensorboard | none; logging.jsonl is always written
    resume_from_checkpoint: str | None = None  # directory | auto: newest valid one of an equal run under output_dir
    recompute_granularity: str = "selective"  # none | selective | full
    torch_dtype: str | None = None  # bfloat16 | float32 | float64, of compute; None: bf16 if the GPU or CPU has it, else fp32
    device: str = "auto"  # auto: the CUDA device of the rank where torch sees one, else the CPU | cpu | cuda
    isa: str = "auto"  # of the CPU: auto | avx512 | avx2 | portable
    numerics: str = "auto"  # of a GPU's forward products: auto (the vendor's) | invariant (a row's do not depend on other rows)
    torch_compile: bool = False  # each block through torch.compile; the first steps take minutes
    peak_tflops: float | None = None  # of one rank, for MFU; None: measured with a matmul at the start
    check_trained: bool = False  # an error after the first step, and at the end, if a trained tensor has not moved
    seed: int = 42
    preview: int = 0  # > 0: print that many packed rows with their loss mask and stop
