"""Write a tiny but valid model in the Hugging Face layout: a two-layer Llama with random weights.

    python tests/real/tiny_hf.py FOLDER [--seed 1] [--layers 2] [--hidden 64]

It runs in the environment of vLLM, which has `tokenizers`, `safetensors` and `torch`. The head size is 32, the smallest that
the CPU attention of vLLM supports.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HEAD = 32
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def write_tokenizer(folder: Path) -> int:
    """Write tokenizer.json; return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-not-found]

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def write_weights(folder: Path, shape: dict[str, int], seed: int) -> None:
    """Write model.safetensors with normally distributed weights."""
    import torch  # type: ignore[import-not-found]
    from safetensors.torch import save_file  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(seed)
    hidden, inner, heads, kv_heads = shape["hidden"], shape["inner"], shape["heads"], shape["kv_heads"]

    def noise(*size: int) -> object:
        return (torch.randn(*size, generator=generator) * 0.05).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": noise(shape["vocabulary"], hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": noise(shape["vocabulary"], hidden),
    }
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            f"{prefix}self_attn.q_proj.weight": noise(heads * HEAD, hidden),
            f"{prefix}self_attn.k_proj.weight": noise(kv_heads * HEAD, hidden),
            f"{prefix}self_attn.v_proj.weight": noise(kv_heads * HEAD, hidden),
            f"{prefix}self_attn.o_proj.weight": noise(hidden, heads * HEAD),
            f"{prefix}mlp.gate_proj.weight": noise(inner, hidden),
            f"{prefix}mlp.up_proj.weight": noise(inner, hidden),
            f"{prefix}mlp.down_proj.weight": noise(hidden, inner),
            f"{prefix}input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{prefix}post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(asked.folder)
    shape = {
        "hidden": asked.hidden,
        "inner": 2 * asked.hidden,
        "heads": 2,
        "kv_heads": 1,
        "layers": asked.layers,
        "vocabulary": vocabulary,
    }
    write_weights(asked.folder, shape, asked.seed)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": asked.hidden,
        "intermediate_size": 2 * asked.hidden,
        "num_hidden_layers": asked.layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (asked.folder / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    main()
