"""A checkpoint's language model as a GGUF file: gguf_file.py CHECKPOINT OUT int8|int4

Every matrix is Q8_0 or Q4_0, embedding and head included, so that weights have as many bits as
ovfast's int8 and int4. Reads safetensors itself, tensor by tensor: the environment of llama.cpp has
no torch. The file has no tokenizer.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

KINDS = {"int8": "Q8_0", "int4": "Q4_0"}
# Names of a GGUF file by the end of those of a checkpoint.
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)$")


def write_gguf(checkpoint, out, storage):
    """Writes the file; `storage` is one of KINDS."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    if "text_config" not in config:
        raise ValueError(f"{checkpoint} has the original layout; convert its Hugging Face layout")
    text = config["text_config"]
    kind = gguf.GGMLQuantizationType[KINDS[storage]]
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(".part")
    writer = gguf.GGUFWriter(draft, "qwen2")
    _write_sizes(writer, text, kind)
    names = set()
    for name, values in _tensors(checkpoint):
        named = gguf_name(name)
        if named is None or (named == "output.weight" and text.get("tie_word_embeddings", False)):
            continue
        names.add(named)
        if values.ndim == 1:
            writer.add_tensor(named, values)
        else:
            writer.add_tensor(named, gguf.quants.quantize(values, kind), raw_dtype=kind)
    assert len(names) >= 3 + 12 * text["num_hidden_layers"] - 1, sorted(names)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    draft.replace(out)


def gguf_name(name):
    """The name of a tensor of the language model in a Hugging Face layout; None of any other."""
    if "vision_tower" in name or "multi_modal_projector" in name or "image_newline" in name:
        return None
    found = LAYER.search(name)
    if found:
        return f"blk.{found[1]}.{PARTS[found[2]]}.{found[3]}"
    return f"{WHOLE[name.split('.')[-2]]}.weight"


def main():
    checkpoint, out, storage = sys.argv[1:]
    write_gguf(Path(checkpoint), Path(out), storage)


def _write_sizes(writer, text, kind):
    import gguf

    heads, rope = text["num_attention_heads"], text.get("rope_parameters") or {}
    writer.add_name("benchmark")
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_rope_freq_base(text.get("rope_theta") or rope["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_tokenizer_model("none")
    file_types = {"Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}
    writer.add_file_type(int(file_types[kind.name]))


def _tensors(checkpoint):
    """(name, float32 values) of every tensor of every file."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        length = int(data[:8].view(np.uint64)[0])
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = (8 + length + offset for offset in entry["data_offsets"])
            raw = data[first:last]
            if entry["dtype"] == "BF16":
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                kinds = {"F32": np.float32, "F16": np.float16}
                values = raw.view(kinds[entry["dtype"]]).astype(np.float32)
            yield name, values.reshape(entry["shape"])


if __name__ == "__main__":
    main()
