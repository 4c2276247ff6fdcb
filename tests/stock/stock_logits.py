#!/usr/bin/env python3
"""llama_cpp as it comes from PyPI, with the library loaded into it: decodes a text on a device and writes all logits (float32) to a file.
usage: stock_logits.py LIBRARY MODEL DEVICE TEXT-FILE N-CTX LOGITS-FILE; DEVICE `f16` means llama.cpp's own cache. Prints the KV buffers'
size in MiB, ggml's version and the number of tokens."""

import ctypes
import re
import sys
from pathlib import Path

import llama_cpp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
import turboquant


def main(library, model_file, device, text_file, n_ctx, logits_file):
    kv_mib = []

    @llama_cpp.llama_log_callback
    def log(level, text, _):
        if size := re.search(rb"KV buffer size = +([\d.]+) MiB", text):
            kv_mib.append(float(size[1]))
        if level >= 4:  # error
            sys.stderr.write(text.decode(errors="replace"))

    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    ggml = llama_cpp.llama_cpp._lib
    ggml.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    ggml.ggml_version.restype = ctypes.c_char_p
    params = llama_cpp.llama_model_default_params()
    devices = (ctypes.c_void_p * 2)()
    if device != "f16":
        turboquant.load(library)
        devices[0] = ggml.ggml_backend_dev_by_name(device.encode())
        if not devices[0]:
            sys.exit(f"no device {device}")
    params.devices = ctypes.cast(devices, ctypes.c_void_p)  # an empty list: no device but the CPU
    params.n_gpu_layers = 999
    model = llama_cpp.llama_model_load_from_file(model_file.encode(), params)
    if not model:
        sys.exit("the model does not load")

    text = Path(text_file).read_bytes()
    vocab = llama_cpp.llama_model_get_vocab(model)
    tokens = (llama_cpp.llama_token * (len(text) + 8))()
    n = llama_cpp.llama_tokenize(vocab, text, len(text), tokens, len(tokens), True, True)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch = int(n_ctx), 2048
    params.n_threads = params.n_threads_batch = 2
    params.flash_attn_type = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        sys.exit("no context")
    batch = llama_cpp.llama_batch_init(n, 0, 1)
    batch.n_tokens = n
    for i in range(n):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = tokens[i], i, 1, 1
        batch.seq_id[i][0] = 0
    if llama_cpp.llama_decode(context, batch) != 0:
        sys.exit("decoding failed")
    n_values = n * llama_cpp.llama_vocab_n_tokens(vocab)
    Path(logits_file).write_bytes(ctypes.string_at(llama_cpp.llama_get_logits(context), 4 * n_values))
    print(f"{sum(kv_mib):.2f} {ggml.ggml_version().decode()} {llama_cpp.llama_vocab_n_tokens(vocab)}")
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    if len(sys.argv) != 7:
        sys.exit(__doc__)
    main(*sys.argv[1:])
