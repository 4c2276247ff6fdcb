"""The public peer beside our kernels: turbo-attn's decode attention (PyPI: turbo-attn, imported as tkv), timed as scripts/bench-gpu times
PyTorch's. Its tensor-core kernel over a paged cache of 16 tokens a page, random codes; the fastest of its two kinds of codebook (single values,
pairs) and of several numbers of splits."""

import sys

PAGE = 16
TILE_TOKENS = 16
SPLITS = [1, 2, 4, 8, 16, 24, 32, 48, 64]
UNITS = (64, 1024)  # sequences x KV heads x splits: what fills a card


def available():
    """turbo-attn's version, or None."""
    try:
        from importlib.metadata import version
        import tkv.kernels.turbo_attn_simt  # noqa: F401
        return version("turbo-attn")
    except Exception as error:  # its imports fail in many ways where something is missing
        print(f"# turbo-attn is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160], file=sys.stderr)
        return None


def _loader(torch, cache, pages, batch, cells, heads, layout, dims, bits, pairs):
    from tkv.kernels.loaders import TkvDecodeLoader
    each = cells // PAGE
    numbers = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
    table = torch.randn((2 * 4 ** bits if pairs else 2 ** bits), device="cuda").sort().values
    return TkvDecodeLoader.from_compressed(
        kv_cache=cache, k_centroids=table, v_centroids=table, paged_kv_indptr=numbers([i * each for i in range(batch + 1)]),
        paged_kv_indices=torch.arange(pages, pages + batch * each, dtype=torch.int32, device="cuda"),
        paged_kv_last_page_len=numbers([PAGE] * batch), page_size=PAGE, num_kv_heads=heads, k_packed_off=layout["k_packed_off"],
        k_norm_off=layout["k_norm_off"], v_packed_off=layout["v_packed_off"], v_norm_off=layout["v_norm_off"], k_packed_dim=dims, v_packed_dim=dims,
        k_bw=bits, v_bw=bits, vq_mode_k=pairs, vq_mode_v=pairs)


def decode_us(torch, graph_time, shape, heads, kv_heads, dim, bits, kinds=(False, True)):
    """(microseconds, what was fastest) of a shape (sequences, cells) at so many bits a value; raises where the peer cannot."""
    from tkv.core import packed_dim
    from tkv.kernels.cuda_compress_store import fused_cs_layout
    from tkv.kernels.turbo_attn_simt import DECODE_HPW_MMA, tq_splitk_batch_decode
    batch, cells = shape
    dims = packed_dim(bits, dim)
    layout = fused_cs_layout(kv_heads, dims, dims, page_size=PAGE)
    size = batch * cells * layout["total_bytes"]
    sets = max(1, min(16, 300_000_000 // size + 1))
    each = batch * cells // PAGE
    cache = torch.randint(0, 256, (sets * each, PAGE, layout["total_bytes"]), dtype=torch.uint8, device="cuda")
    rows = cache.view(sets * each, -1) if layout["norm_stride"] else cache.view(sets * each * PAGE, -1)
    for side in ("k", "v"):
        at = layout[f"{side}_norm_off"]
        end = at + layout[f"{side}_norm_bytes"] if not layout["norm_stride"] else rows.shape[1]
        rows[:, at:end] = torch.tensor([0x80, 0x3f], dtype=torch.uint8, device="cuda").repeat((end - at) // 2)  # bf16: 1
    q = torch.randn(batch, heads, dim, dtype=torch.bfloat16, device="cuda") * 0.1
    out = torch.empty_like(q)
    reps = max(sets, min(100, 4_000_000_000 // size) // sets * sets)
    found = []
    for pairs in kinds:
        loaders = [_loader(torch, cache, s * each, batch, cells, kv_heads, layout, dims, bits, pairs) for s in range(sets)]
        for splits in SPLITS:
            if not UNITS[0] <= batch * kv_heads * splits <= UNITS[1] or cells // splits < 64:
                continue
            calls = [lambda l=l: tq_splitk_batch_decode(q, loader=l, num_splits=splits, max_seq_len=cells, out=out, tile_tokens=TILE_TOKENS,
                                                        hpw=DECODE_HPW_MMA) for l in loaders]
            found.append((graph_time(torch, calls, reps) * 1e3, f"{'pairs' if pairs else 'values'}, {splits} splits"))
    if not torch.isfinite(out).all():
        raise RuntimeError("its results are not finite")
    return min(found)
