"""`python -m swiftk.merge --adapters DIR --output_dir OUT`: base and LoRA adapter as one checkpoint that transformers loads.

Exit codes: 0 written; 2 bad arguments; 1 any other error."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from swiftk.model import ModelConfig
from swiftk.model.merging import ONTO, check_bytes, check_logits, merge_adapter, table
from swiftk.model.peft_files import read_adapter_config, run_arguments

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def careful(base: str, adapter: str, onto: str | None) -> str | None:
    """What to say of an adapter that its run trained over NF4: where no --base is given, and where no --base is right."""
    trained = run_arguments(adapter) or {}
    if not trained.get("quant_bits") or ModelConfig.from_hf(base).quantised:
        return None
    if str(trained.get("init_weights")).startswith("pissa"):
        return (
            "careful: the adapter was trained by PiSSA over NF4, of weights that no --base has: the source is off by their "
            "quantisation error, nf4 by its own too"
        )
    return None if onto else (
        "careful: the adapter was trained over NF4 and is merged onto the source, which is off by the quantisation error; "
        "--base nf4 gives the model that was trained"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m swiftk.merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", metavar="BASE", help="what the adapter was trained on; default: the one it names")
    parser.add_argument("--adapters", required=True, metavar="DIR", help="adapter_config.json, adapter_model.safetensors")
    parser.add_argument("--output_dir", required=True, metavar="OUT", help="absent or empty")
    parser.add_argument("--base", choices=ONTO,
                        help="onto the checkpoint's weights (the default), or (QLoRA's adapters) onto what NF4 holds of them "
                        "(the default for a checkpoint in NF4)")  # fmt: skip
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the files; default: each tensor's own in BASE")
    parser.add_argument("--max_shard_size", type=float, default=5e9, metavar="BYTES", help="of a file; default: 5e9")
    parser.add_argument("--check_logits", choices=["true", "false"], default="true",
                        help="compare with the unmerged model; holds the whole model in fp32 (default: true)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        named = read_adapter_config(args.adapters)[1]
        base = args.model or named
        if not base:
            raise ValueError(f"merge: {args.adapters} names no base, wants --model BASE")
        if named and Path(named).name != Path(base).absolute().name:
            print(f"careful: {args.adapters} names {named} as its base, and is merged onto {base}", flush=True)
        if advice := careful(base, args.adapters, args.base):
            print(advice, flush=True)
        merged = merge_adapter(
            base, args.adapters, args.output_dir, onto=args.base, dtype=DTYPES.get(args.dtype),
            max_shard_size=int(args.max_shard_size), say=print,
        )  # fmt: skip
        print("\n".join(table(merged)))
        how = "its weights as stored" if merged.onto == "source" else "the linears of its blocks as bf16(NF4(W))"
        print(f"merged onto {base}: {how}; {args.output_dir} holds {', '.join(merged.dtypes)}")
        if merged.untied:
            print("the adapter changes one of the tied embeddings: the result has tie_word_embeddings false and both")
        if args.check_logits == "true":
            size = check_bytes(args.output_dir) / 2**30
            print(f"comparing logits: holds the model in fp32, {size:.2f} GiB (--check_logits false: without)", flush=True)
            check = check_logits(base, args.adapters, args.output_dir, onto=merged.onto)
            print(
                f"largest |logit difference| merged vs unmerged: {check.difference:.3g} (fp32, {check.tokens} random tokens); "
                f"the adapter\n  moves them by up to {check.adapter:.3g}, the largest is {check.logit:.3g}; "
                f"same top token: {check.same_top:.1%}"
            )
    except (ValueError, OSError) as error:
        print(f"swiftk.merge: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
