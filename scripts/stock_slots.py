"""Checks of llama-server's slots with our cache: side by side, saved and restored, damaged, shifted. Each yields (passed, text)."""

import random
import re
import tempfile
import threading
from pathlib import Path

from stock_run import PLAIN, PROMPTS, common, complete


def parting(alone, other):
    """(common tokens, largest difference of the top token's log-probability over them, how near a tie the parting was; 0 if none)."""
    n = common(alone["tokens"], other["tokens"])
    tops = [[p["top_logprobs"] for p in answer["completion_probabilities"]] for answer in (alone, other)]
    difference = max((abs(a[0]["logprob"] - b[0]["logprob"]) for a, b in list(zip(*tops))[:n]), default=0)
    gap = tops[0][n][0]["logprob"] - tops[0][n][1]["logprob"] if n < len(alone["tokens"]) else 0
    return n, difference, gap


def check_parallel(stock):
    """With streams of their own, slots do not touch each other. In a unified cache the cells of all slots lie between each other, sums run in
    another order, and one code that is rounded otherwise can turn a near-tie: there the answers may part, but at a near-tie only."""
    n, least, near = 64, 16, 0.5
    for name, options in {"own streams": ["-no-kvu"], "unified": ["-kvu"]}.items():
        with stock.server(stock.device, "-np", 4, "-c", 4096, *options) as request:
            def ask(i, slot, answers):
                answers[i] = complete(request, PROMPTS[i], n, id_slot=slot, cache_prompt=False, n_probs=2)

            alone, answers = [None] * 4, [None] * 4
            for i in range(4):
                ask(i, 0, alone)
            threads = [threading.Thread(target=ask, args=(i, i, answers)) for i in range(4)]
            [t.start() for t in threads]
            [t.join() for t in threads]
        partings = [parting(a, b) for a, b in zip(alone, answers)]
        same = [p[0] for p in partings]
        if name == "own streams":
            yield min(same) >= least, f"four parallel slots ({name}) answer as alone for {same} of {n} tokens (at least {least} each)"
        else:
            worst, gap = max(p[1] for p in partings), max(p[2] for p in partings)
            yield worst <= near and gap <= near, (f"four parallel slots ({name}) answer as alone for {same} of {n} tokens, log-probabilities "
                                                  f"within {worst:.3f}, and part at ties within {gap:.3f} (at most {near} each)")


def check_slots(stock):
    """A slot saved, erased, used for another text and restored, continues as if never interrupted."""
    n = 48
    with tempfile.TemporaryDirectory() as folder, stock.server(stock.device, "-np", 2, "-c", 4096, "--slot-save-path", folder) as request:
        prompt = request("/tokenize", {"content": " ".join(PROMPTS), "add_special": True})["tokens"]
        whole = complete(request, prompt, 2 * n, id_slot=0, cache_prompt=False)["tokens"]
        request("/slots/0?action=erase", {})
        first = complete(request, prompt, n, id_slot=0)["tokens"]
        saved = request("/slots/0?action=save", {"filename": "slot.bin"})["n_saved"]
        request("/slots/0?action=erase", {})
        complete(request, "Something else entirely: " + PROMPTS[2], n, id_slot=0)
        request("/slots/0?action=erase", {})
        restored = request("/slots/0?action=restore", {"filename": "slot.bin"})["n_restored"]
        answer = complete(request, prompt + first, n, id_slot=0)
    reused = answer["timings"]["cache_n"]
    ok = first + answer["tokens"] == whole and saved == restored and reused >= len(prompt) + n - 1
    yield ok, (f"slot saved ({saved} tokens), erased and restored: {common(first + answer['tokens'], whole)} of {2 * n} tokens as if never "
               f"interrupted, {reused} taken from the restored cache")


def damaged_states(state, foreign):
    """(kind, bytes) of a slot file after an accident. Packed rows of keys and values (docs/formats.md) begin with 54 7e xx 7e, version, codec."""
    rows = [m.start() for m in re.finditer(rb"\x54\x7e.\x7e[\x01-\x06]", state, re.S)]
    length = min(b - a for a, b in zip(rows, rows[1:]))

    def flipped(at):
        out = bytearray(state)
        for row in rows:
            if row + at < len(out):
                out[row + at] ^= 0x10
        return bytes(out)

    half = len(state) // 2
    yield "cut in the middle", state[:half]
    yield "cut near the end", state[:-5000]
    yield "cut in the header", state[:10]
    yield "second half zeroed", state[:half] + bytes(len(state) - half)
    yield "header of the file flipped", bytes([state[0] ^ 1]) + state[1:]
    yield "headers of rows flipped", flipped(2)
    yield "versions flipped", flipped(4)
    yield "positions flipped", flipped(8)
    yield "hashes of offsets flipped", flipped(13)
    yield "codes flipped", flipped(40)
    yield "offset pieces flipped", flipped(length - 20)
    yield "random bytes from the middle on", state[:half] + random.Random(1).randbytes(len(state) - half)
    yield from foreign.items()


def check_damage(stock):
    """Slot files that were damaged, or are of another format: that restore may fail, or its slot has forgotten its text; all else goes on."""
    n, foreign = 16, {}
    with tempfile.TemporaryDirectory() as folder:
        other = next(dev for dev in ("tcq3", "turbo4") if dev != stock.device)
        path = Path(folder) / "slot.bin"
        for dev in (other, PLAIN):
            with stock.server(dev, "-np", 4, "-c", 4096, "--slot-save-path", folder) as request:
                complete(request, " ".join(PROMPTS), n, id_slot=0)
                request("/slots/0?action=save", {"filename": path.name})
                foreign[f"saved by {dev}"] = path.read_bytes()
        with stock.server(stock.device, "-np", 4, "-c", 4096, "--slot-save-path", folder) as request:
            def answers():
                return [complete(request, PROMPTS[i], n, id_slot=i, cache_prompt=False)["tokens"] for i in range(4)]

            before = answers()
            complete(request, " ".join(PROMPTS), n, id_slot=0)
            request("/slots/0?action=save", {"filename": path.name})
            kinds, bad = list(damaged_states(path.read_bytes(), foreign)), []
            for kind, state in kinds:
                path.write_bytes(state)
                try:
                    request("/slots/0?action=restore", {"filename": path.name})
                except RuntimeError as error:
                    if "HTTP Error" not in str(error):
                        raise
                try:
                    complete(request, " ".join(PROMPTS) + " and", n, id_slot=0)
                    if answers() != before:
                        bad.append(f"{kind}: other answers")
                except RuntimeError as error:
                    bad.append(f"{kind}: {str(error).splitlines()[0]}")
    yield not bad, f"slot files damaged in {len(kinds)} ways: every request on every slot is served as before" + "".join(f"; {b}" for b in bad)


def check_shift(stock):
    """700 tokens in a context of 512; the generated text is judged by stock llama.cpp without us, beside that of a shifted f16 cache."""
    n, ppl = 700, {}
    for dev in (PLAIN, stock.device):
        with stock.server(dev, "-np", 1, "-c", 512, "--context-shift") as request:
            texts = []
            for seed, prompt in enumerate(PROMPTS[:3], 1):
                answer = complete(request, prompt, n, temperature=0.8, seed=seed, cache_prompt=False)
                if answer["tokens_predicted"] != n or not answer["truncated"]:
                    yield False, f"-dev {dev}: {answer['tokens_predicted']} of {n} tokens generated, context shifted: {answer['truncated']}"
                    return
                texts.append(prompt + answer["content"])
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n\n".join(texts))
            file.flush()
            ppl[dev], _ = stock.perplexity(PLAIN, file.name, 256, 100)
    yield 1 / 1.5 < ppl[stock.device] / ppl[PLAIN] < 1.5, (
        f"3 x {n} tokens generated in a shifted context of 512: perplexity of that text {ppl[stock.device]:.2f}, with a shifted f16 cache "
        f"{ppl[PLAIN]:.2f} (ratio within 1.5)")
