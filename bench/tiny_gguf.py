"""Write real, tiny models: the llama architecture with random weights, in GGUF, from a few hundred KB to a GB.

    python -m bench.tiny_gguf models/tiny.gguf --layers 2 --embedding 64 --seed 1

Invariants:
- The file is a true model: llama.cpp loads it, chats and embeds with it. Its words are noise, its costs are real.
- Equal arguments give equal bytes. `TinyModel.weight_bytes` says the tensor bytes without writing.
- Weights are drawn one tensor at a time, so a large model needs no more memory than its largest tensor, doubled.
- Needs `gguf` and `numpy` (extras `test` and `demo`); nothing at run time of fleetd imports this.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHARACTERS = " etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLU0123456789.,;:!?'-()\n"
BYTE_TOKENS = 256
SPECIALS = ("<unk>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """The shape of a model. `embedding` is a multiple of `heads`; `heads` is a multiple of `kv_heads`."""

    layers: int = 2
    embedding: int = 64
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 128
    context: int = 4096
    seed: int = 1
    name: str = "tiny"
    tied: bool = False

    def __post_init__(self) -> None:
        if min(self.layers, self.embedding, self.heads, self.kv_heads, self.feed_forward, self.context) < 1:
            raise ValueError("every size of a model is at least 1")
        if self.embedding % self.heads or self.heads % self.kv_heads or (self.embedding // self.heads) % 2:
            raise ValueError("embedding must be an even multiple of heads, and heads a multiple of kv_heads")

    @property
    def vocabulary(self) -> int:
        return len(SPECIALS) + BYTE_TOKENS + len(CHARACTERS)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and numpy shapes, in the order of the file. Vectors are f32, matrices f16."""
        width, kv_width = self.embedding, self.embedding // self.heads * self.kv_heads
        yield "token_embd.weight", (self.vocabulary, width)
        yield "output_norm.weight", (width,)
        if not self.tied:
            yield "output.weight", (self.vocabulary, width)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            yield block + "attn_norm.weight", (width,)
            yield block + "attn_q.weight", (width, width)
            yield block + "attn_k.weight", (kv_width, width)
            yield block + "attn_v.weight", (kv_width, width)
            yield block + "attn_output.weight", (width, width)
            yield block + "ffn_norm.weight", (width,)
            yield block + "ffn_gate.weight", (self.feed_forward, width)
            yield block + "ffn_up.weight", (self.feed_forward, width)
            yield block + "ffn_down.weight", (width, self.feed_forward)

    @property
    def weight_bytes(self) -> int:
        total = 0
        for _, shape in self.tensors():
            total += shape[0] * 4 if len(shape) == 1 else shape[0] * shape[1] * 2
        return total


def sized(megabytes: float, *, seed: int = 1, context: int = 4096, name: str = "sized") -> TinyModel:
    """Return the shape of a model of about so many MB (1 to a few thousand), with a plain vocabulary."""
    width = 64 if megabytes < 4 else 256 if megabytes < 40 else 512 if megabytes < 200 else 1024
    heads = max(4, width // 64)
    base = TinyModel(1, width, heads, heads // 2, 2 * width, context, seed, name)
    per_layer = TinyModel(2, width, heads, heads // 2, 2 * width, context, seed, name).weight_bytes - base.weight_bytes
    layers = max(1, round((megabytes * 1e6 - base.weight_bytes) / per_layer) + 1)
    return TinyModel(layers, width, heads, heads // 2, 2 * width, context, seed, name)


def _vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Return tokens, scores and llama token types: unknown 2, control 3, byte 6, normal 1."""
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(BYTE_TOKENS))]
    kinds = [2, 3, 3] + [6] * BYTE_TOKENS
    for character in CHARACTERS:
        tokens.append("\u2581" if character == " " else character)
        kinds.append(1)
    return tokens, [-float(index) for index in range(len(tokens))], kinds


def write(path: Path, model: TinyModel | None = None, **shape: Any) -> Path:
    """Write the model (`write(path, layers=4)` is short for `TinyModel(layers=4)`); returns `path`. Replaces a file whole."""
    import numpy as np
    from gguf import GGUFWriter

    model = model or TinyModel(**shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    writer = GGUFWriter(part, "llama", use_temp_file=False)
    _describe(writer, model)
    random = np.random.default_rng(model.seed)
    for name, dims in model.tensors():
        dtype = np.dtype(np.float32 if len(dims) == 1 else np.float16)
        size = int(np.prod(dims)) * dtype.itemsize
        writer.add_tensor_info(name, dims, dtype, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, dims in model.tensors():
        if len(dims) == 1:
            writer.write_tensor_data(np.ones(dims, np.float32))
        else:
            weights = random.standard_normal(dims, np.float32)
            weights *= 0.05
            writer.write_tensor_data(weights.astype(np.float16))
    writer.close()
    part.replace(path)
    return path


def _describe(writer: Any, model: TinyModel) -> None:
    tokens, scores, kinds = _vocabulary()
    writer.add_name(model.name)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.embedding)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.feed_forward)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(model.embedding // model.heads)
    writer.add_file_type(1)  # mostly f16
    writer.add_vocab_size(model.vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tiny_gguf", description="Write a tiny real GGUF model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, help="choose the shape by size instead")
    for field in ("layers", "embedding", "heads", "kv_heads", "feed_forward", "context", "seed"):
        default = TinyModel.__dataclass_fields__[field].default
        parser.add_argument("--" + field.replace("_", "-"), type=int, default=default, help=f"default {default}")
    parser.add_argument("--tied", action="store_true", help="no output matrix of its own")
    args = vars(parser.parse_args(argv))
    out, megabytes = args.pop("out"), args.pop("megabytes")
    try:
        model = sized(megabytes, seed=args["seed"], context=args["context"], name=out.stem) if megabytes else None
        model = model or TinyModel(name=out.stem, **args)
        write(out, model)
    except (ValueError, OSError) as error:
        print(f"tiny_gguf: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {out.stat().st_size} bytes, {model.layers} layers of {model.embedding}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
