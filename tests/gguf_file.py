"""A random Llama in a GGUF file, for the tests that read one."""

import struct

import gguf
import numpy as np

TYPE = gguf.GGMLQuantizationType
L, D, N, K, H, F = 2, 128, 4, 2, 32, 96  # every row a multiple of the 32 weights that share a scale
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]


def write_gguf(path, kind=TYPE.F32, tied=True, seed=0, extra=None, architecture="llama",
               pre="smollm", tensor=None):
    """A random Llama with a byte-level vocabulary, as llama.cpp's converter lays it out."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = SPECIAL + sorted(
        ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(L)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(H)
    writer.add_vocab_size(len(vocabulary))
    for key, value in (extra or {}).items():
        writer.add_uint32(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary) - len(SPECIAL)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")

    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (len(vocabulary), D)
              } | ({} if tied else {"output": (len(vocabulary), D)})
    for i in range(L):
        shapes |= {
            f"blk.{i}.attn_q": (N*H, D), f"blk.{i}.attn_k": (K*H, D), f"blk.{i}.attn_v": (K*H, D),
            f"blk.{i}.attn_output": (D, N*H), f"blk.{i}.ffn_gate": (F, D),
            f"blk.{i}.ffn_up": (F, D), f"blk.{i}.ffn_down": (D, F)
        }
    for name, shape in shapes.items():
        data = gguf.quants.quantize(rng.normal(0, 0.1, shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    for name in [
            "output_norm", *(f"blk.{i}.{kind}_norm" for i in range(L) for kind in ("attn", "ffn"))
    ]:
        writer.add_tensor(f"{name}.weight", rng.normal(1, 0.1, D).astype(np.float32))
    if tensor:
        writer.add_tensor(*tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed_value(value):
    """A value of the metadata with its type, from the specification; bytes are taken as they are,
    with the type in them."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        parts = [packed_value(each) for each in value]
        return struct.pack("<I", 9) + (parts[0][:4] if parts else struct.pack("<I", 4)) + (
            struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts))
    if isinstance(value, str):
        content = value.encode()
        return struct.pack("<IQ", 8, len(content)) + content
    kind, code = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{code}", kind, value)


def pack_gguf(path, change=None, tensors=None):
    """A Llama of one layer and width 32 byte by byte, with some of its metadata changed (None: left
    out), and some tensors, each (dims, type, bytes)."""
    width, vocabulary = 32, ["a", "b", "ab", "<s>", "</s>", "<eot>"]
    said = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64,
        "llama.embedding_length": width, "llama.feed_forward_length": width,
        "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1, 1, 1, 3, 3, 3],
        "tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 4} | (change or {})
    rows = {"token_embd": len(vocabulary), "output_norm": 0, "blk.0.attn_norm": 0,
            "blk.0.ffn_norm": 0, "blk.0.attn_q": 32, "blk.0.attn_k": 16, "blk.0.attn_v": 16,
            "blk.0.attn_output": 32, "blk.0.ffn_gate": 32, "blk.0.ffn_up": 32, "blk.0.ffn_down": 32}
    rng, held = np.random.default_rng(0), {}
    for name, count in rows.items():
        values = rng.normal(0, 0.2, (count or 1, width)).astype("<f4")
        held[f"{name}.weight"] = (width, count) if count else (width,), 0, values.tobytes()
    held |= tensors or {}
    said = {key: value for key, value in said.items() if value is not None}
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(held), len(said))
    out += b"".join(packed_value(key)[4:] + packed_value(value) for key, value in said.items())
    body = b""
    for name, (dims, kind, content) in held.items():
        out += packed_value(name)[4:] + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind,
                                                    len(body))
        body += content + bytes(-len(content) % 32)
    path.write_bytes(out + bytes(-len(out) % 32) + body)
    return path
