#!/usr/bin/env python3
"""Draws the page of `turboquant report` from its JSON document: one HTML file, pictures as inline SVG, every picture's numbers beside it."""
import argparse
import html
import io
import json
import re
import sys

try:
    import matplotlib
except ImportError:
    sys.exit("report.py: matplotlib is missing; install it (pip install matplotlib)")
matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# Okabe-Ito colours, told apart with any colour vision; markers differ as well.
K_COLOR, V_COLOR = "#0072B2", "#E69F00"
FAMILIES = {  # name in pictures: colour, marker
    "llama.cpp": ("#555555", "s"),
    "turbo": ("#0072B2", "o"),
    "tcq": ("#009E73", "^"),
    "planned": ("#D55E00", "D"),
    "by rules": ("#8A5FBF", "P"),
    "other": ("#CC79A7", "v"),
}
STYLE = {
    "svg.fonttype": "path",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:64rem;margin:2rem auto;padding:0 1.25rem}
h1{font-size:1.6rem;margin:0 0 .25rem}h2{font-size:1.2rem;margin:2.5rem 0 .5rem;border-bottom:1px solid #ccc;padding-bottom:.25rem}
p.note,figcaption{color:#555;font-size:.875rem}p.verdict{background:#f3f6f9;border-left:4px solid #0072B2;padding:.75rem 1rem}
figure{margin:1rem 0}figure svg{display:block;width:100%;height:auto;max-width:100%}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #e4e4e4;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #999;vertical-align:bottom}
"""


def family_of(row):
    """Key of FAMILIES: who made the format, and for ours which kind."""
    if row["family"] != "turboquant":
        return row["family"]
    return next((f for f, word in (("turbo", r"turbo\d"), ("tcq", r"tcq\d"), ("by rules", r"auto\d")) if re.fullmatch(word, row["kv"])), "other")


def number(x, digits):
    return "–" if x is None else f"{x:.{digits}f}"


def percent(x):
    return "–" if x is None else f"{100 * x:.1f} %"


def table(headings, rows):
    """First column is the row's heading."""
    cell = lambda tag, x, more="": f"<{tag}{more}>{html.escape(str(x))}</{tag}>"
    head = "".join(cell("th", h, ' scope="col"') for h in headings)
    body = "".join(f"<tr>{cell('th', r[0], ' scope=row')}{''.join(cell('td', x) for x in r[1:])}</tr>\n" for r in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def figure(fig, key, caption):
    """The picture as a figure of the page, or as an SVG file alone where that is what was asked for (Picture)."""
    if Picture.key == key:
        with plt.rc_context({"svg.hashsalt": key}):
            fig.savefig(Picture.path, format="svg", bbox_inches="tight", metadata={"Date": None})
        Picture.drawn = True
    return inline_figure(fig, key, caption)


class Picture:
    """One picture to write as a file of its own."""

    key = path = None
    drawn = False


def inline_figure(fig, key, caption):
    """The picture as SVG within the page. matplotlib numbers its ids from the same start in each picture, so they get the key before them;
    what an SVG file needs beside the drawing (XML head, namespaces, metadata) has no use in HTML."""
    out = io.StringIO()
    with plt.rc_context({"svg.hashsalt": key}):
        fig.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(fig)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'href="#', f'href="#{key}-', svg)
    svg = re.sub(r"url\(#", f"url(#{key}-", svg)
    label = html.escape(caption, quote=True)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    return f"<figure>\n{svg}<figcaption>{html.escape(caption)}</figcaption></figure>\n"


def spread_labels(fig, ax, points):
    """Labels beside (x, y, text, colour, left of it) points, moved up where they would cover each other."""
    fig.canvas.draw()
    per_pt = fig.dpi / 72
    placed = []
    for x, y, text, color, to_left in sorted(points, key=lambda p: p[1]):
        px, py = ax.transData.transform((x, y)) / per_pt
        width = 5.6 * len(text) + 10
        left_edge, right_edge = (e / per_pt for e in (ax.bbox.x0, ax.bbox.x1))
        to_left = (to_left and px - width > left_edge) or px + width > right_edge
        side, align = (-7, "right") if to_left else (7, "left")
        px -= width if to_left else 0
        at = py
        for left, right, above in sorted(placed, key=lambda b: b[2]):
            if px < right and left < px + width and abs(at - above) < 11:
                at = above + 11
        placed.append((px, px + width, at))
        ax.annotate(text, (x, y), xytext=(side, at - py), textcoords="offset points", va="center", ha=align, color=color, fontsize=9, path_effects=[withStroke(linewidth=3, foreground="white")])


def plain_ticks(axis):
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def kld_picture(rows):
    floor = next((r["mean_kld"] for r in rows if r.get("floor")), None)
    rows = [r for r in rows if r["mean_kld"] > 1e-9 and not r.get("floor")]
    if not rows:
        return ""
    fig, ax = plt.subplots(figsize=(8.6, 4.6))
    ax.set_yscale("log")
    for family, (color, marker) in FAMILIES.items():
        members = sorted((r for r in rows if family_of(r) == family), key=lambda r: r["bits_per_value"])
        if members:
            x, y = [r["bits_per_value"] for r in members], [r["mean_kld"] for r in members]
            ax.plot(x, y, color=color, marker=marker, lw=1, ls="" if family in ("llama.cpp", "other") else "-", label=family)
    ax.margins(x=0.11, y=0.08)
    if floor:
        ax.axhline(floor, color="#999999", lw=1, ls=":", label="rounding alone (quantized weights)")
    # Plans lie to the left of uniform formats of the same divergence: there is room on that side.
    spread_labels(fig, ax, [(r["bits_per_value"], r["mean_kld"], r["kv"], FAMILIES[family_of(r)][0], r["family"] == "planned") for r in rows])
    ax.set_xlabel("bits per value, everything stored counted")
    ax.set_ylabel("mean KL divergence from f16, nats")
    plain_ticks(ax.yaxis)
    ax.legend()
    return figure(fig, "kld", "Mean KL divergence against bits per value; lower and further left is better. llama.cpp's f16 is the reference: zero at 16 bits.")


def layer_axis(ax, layers):
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    ax.grid(axis="x", visible=False)


def norm_picture(layers):
    index = [l["layer"] for l in layers]
    fig, ax = plt.subplots(figsize=(8.6, 3.4))
    for side, color, marker, shift in (("k", K_COLOR, "o", -0.12), ("v", V_COLOR, "s", 0.12)):
        seen = [(l["layer"], l[f"{side}_norm"], l.get(f"{side}_norm_heads")) for l in layers if l[f"{side}_norm"] is not None]
        if not seen:
            continue
        for i, _, heads in seen:
            ax.scatter([i + shift] * len(heads or []), heads or [], s=10, color=color, alpha=0.45, lw=0)
        ax.plot([i + shift for i, _, _ in seen], [n for _, n, _ in seen], color=color, marker=marker, lw=1, ms=5, label="keys" if side == "k" else "values")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    plain_ticks(ax.yaxis)
    ax.set_ylabel("mean L2 norm")
    layer_axis(ax, index)
    ax.legend()
    return figure(fig, "norms", "Mean length of keys and values in each layer; small dots are single heads.")


def share_picture(layers, outlier_ratio):
    index = [l["layer"] for l in layers]
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8.6, 4.6), sharex=True, layout="constrained")
    for side, color, shift in (("k", K_COLOR, -0.2), ("v", V_COLOR, 0.2)):
        values = [100 * (l[f"{side}_outlier_share"] or 0) for l in layers]
        top.bar([i + shift for i in index], values, 0.38, color=color, label="keys" if side == "k" else "values")
    top.set_ylabel("outlier channels, %")
    top.set_ylim(0, max(1.0, top.get_ylim()[1]))
    top.legend()
    bottom.bar(index, [100 * l["k_offset_share"] for l in layers], 0.76, color=K_COLOR)
    bottom.set_ylabel("constant offset, %")
    bottom.set_ylim(0, 100)
    layer_axis(top, index)
    layer_axis(bottom, index)
    top.set_xlabel("")
    return figure(
        fig, "shares", f"Above: channels whose RMS is over {outlier_ratio:g} times their head's median. Below: share of the keys' energy (before RoPE) that is a constant offset."
    )


def plan_pictures(plans, bits_of):
    """Layers x sides, a row of the picture per side, KV heads of different formats one above the other; long models go on in further rows of 32 layers."""
    out = ""
    colors = ListedColormap(plt.get_cmap("YlGnBu")([0.05, 0.18, 0.31, 0.44, 0.57, 0.7, 0.83, 0.96]))
    levels = [1, 2, 3, 4, 5, 6, 8, 16]
    for n, entry in enumerate(plans):
        plan = entry["plan"]
        layers = plan["layers"]
        sides = [s for s in ("k", "v") if any(l[s] for l in layers)]
        per_row = 32
        strips = [layers[i : i + per_row] for i in range(0, len(layers), per_row)]
        columns = max(8, min(per_row, len(layers)))
        most_heads = max(len((l[s] or "").split("/")) for l in layers for s in sides)
        height = 0.33 * max(1.0, min(most_heads, 8) / 2)
        fig, axes = plt.subplots(len(strips), 1, figsize=(8.6, 0.55 + len(strips) * (height * len(sides) + 0.42)), squeeze=False, layout="constrained")
        for ax, strip in zip(axes[:, 0], strips):
            for row, side in enumerate(sides):
                for column, layer in enumerate(strip):
                    if not layer[side]:
                        continue
                    heads = layer[side].split("/")
                    for head, word in enumerate(heads):
                        bits, top, part = bits_of[word], row + head / len(heads), 1 / len(heads)
                        level = min(range(len(levels)), key=lambda i: abs(levels[i] - bits))
                        ax.add_patch(plt.Rectangle((column, top), 1, part, facecolor=colors(level), edgecolor="white", lw=1.2 if head == 0 else 0.4))
                        text = word if columns <= 16 else f"{bits}"
                        size = 8 if len(heads) == 1 else 6.5
                        if len(heads) <= 8:
                            ax.text(column + 0.5, top + part / 2, text, ha="center", va="center", fontsize=size, color="white" if level >= 4 else "#1a1a1a")
                    ax.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="white", lw=1.6))
            ax.set_xlim(0, columns)
            ax.set_ylim(len(sides), 0)
            ax.set_yticks([i + 0.5 for i in range(len(sides))], [{"k": "keys", "v": "values"}[s] for s in sides])
            ax.set_xticks([i + 0.5 for i in range(len(strip))], [str(l["layer"]) for l in strip])
            ax.tick_params(length=0)
            ax.grid(False)
            ax.spines[:].set_visible(False)
        axes[-1, 0].set_xlabel("layer")
        caption = f"{entry['kv']}: {plan['bits_per_value']:.3f} bits per value"
        if plan.get("predicted_kld") is not None:
            caption += f", predicted mean KLD {plan['predicted_kld']:.5f} on the calibration text"
        if most_heads > 1:
            caption += ". Where the KV heads of a layer differ, one above the other"
        out += figure(fig, f"plan{n}", caption + (". Darker: more bits." if len(layers) <= 16 else ". Numbers: bits of the codes; darker: more."))
        rows = [[l["layer"], l["k"] or "–", number(l.get("k_kld"), 6), l["v"] or "–", number(l.get("v_kld"), 6)] for l in layers]
        out += "<details><summary>Layer by layer</summary>" + table(["layer", "keys", "predicted KLD", "values", "predicted KLD"], rows) + "</details>\n"
    return out


def speed_picture(speeds, family):
    fig, ax = plt.subplots(figsize=(8.6, 4.6))
    ends = []
    marks = "os^Dv<>Ph*X"
    names = list(dict.fromkeys(r["kv"] for r in speeds))
    for i, kv in enumerate(names):
        points = sorted((r["depth"], r["tokens_per_s"]) for r in speeds if r["kv"] == kv)
        color = FAMILIES[family.get(kv, "other")][0]
        ax.plot(*zip(*points), color=color, marker=marks[i % len(marks)], ms=5, lw=1.2)
        ends.append((*points[-1], kv, color, False))
    ax.set_ylim(bottom=0)
    left, right = ax.get_xlim()
    ax.set_xlim(left, right + 0.16 * (right - left))
    spread_labels(fig, ax, ends)
    ax.set_xlabel("tokens in the cache")
    ax.set_ylabel("tokens per second, one at a time")
    return figure(fig, "speed", "Speed of generation against depth; higher is better.")


def page(doc):
    """Of what was measured: a document may have some of its parts only."""
    evaluated, inspect, plans, speeds = doc.get("eval"), doc.get("inspect"), doc.get("plans"), (doc.get("speed") or {}).get("rows")
    rows = evaluated["rows"] if evaluated else []
    e = html.escape
    text = f"evaluated on {e(evaluated['text'])}, context {evaluated['n_ctx']}, {evaluated['tokens']} tokens scored; " if evaluated else ""
    parts = [
        f"<h1>KV cache report: {e(doc['model'])}</h1>",
        f"<p class=note>{e(doc['file'])}; {text}{doc['threads']} threads; ggml {e(doc['ggml'])}.</p>",
    ]
    if inspect:
        parts.append(f"<p class=verdict>{e(inspect['verdict'])}</p>")
    if evaluated:
        parts += [
            "<h2>Quality against bits</h2>",
            kld_picture(rows),
            table(
                ["format", "bits/value", "KV MiB", "perplexity", "mean KLD", "+-", "median KLD", "99 % KLD", "99.9 % KLD", "1 - TV", "same top token"],
                [
                    [r["kv"] + (" (floor)" if r.get("floor") else ""), number(r["bits_per_value"], 3), number(r["kv_bytes"] / 2**20, 2), number(r["ppl"], 3)]
                    + [number(r.get(k), 5) for k in ("mean_kld", "mean_kld_error", "median_kld", "kld_99", "kld_999")]
                    + [percent(r.get("overlap")), percent(r["same_top"])]
                    for r in rows
                ],
            ),
        ]
    if rows:
        parts.append(f"<p class=note>Perplexity with llama.cpp's f16 cache: {rows[0]['ppl_f16']:.3f}. KLD in nats against the same.</p>")
    if inspect:
        layers = inspect["layers"]
        parts += ["<h2>Keys and values</h2>", norm_picture(layers), share_picture(layers, inspect.get("outlier_ratio", 3))]
        total = ["all", number(inspect["k_norm"], 3), number(inspect["v_norm"], 3), number(inspect["ratio"], 2)] + [""] * 5
        parts.append(
            table(
                ["layer", "K norm", "V norm", "K/V", "K RMS max", "K RMS median", "K outliers", "V outliers", "K offset"],
                [
                    [l["layer"], number(l["k_norm"], 3), number(l["v_norm"], 3), number(l["ratio"], 2), number(l["k_max_rms"], 3), number(l["k_median_rms"], 3)]
                    + [percent(l[k]) for k in ("k_outlier_share", "v_outlier_share", "k_offset_share")]
                    for l in layers
                ]
                + [total],
            )
        )
        if inspect.get("text"):
            parts.append(f"<p class=note>{inspect['tokens']} tokens; text {e(inspect['text'])}.</p>")
    if plans:
        parts += ["<h2>Plan</h2>", plan_pictures(plans, doc["format_bits"])]
    if speeds:
        depths = sorted({r["depth"] for r in speeds})
        speed = {(r["kv"], r["depth"]): r["tokens_per_s"] for r in speeds}
        parts += [
            "<h2>Decode speed against depth</h2>",
            speed_picture(speeds, {r["kv"]: family_of(r) for r in rows}),
            table(
                ["format"] + [f"{d:,} tokens" for d in depths],
                [[kv] + [number(speed.get((kv, d)), 1) for d in depths] for kv in dict.fromkeys(r["kv"] for r in speeds)],
            ),
            f"<p class=note>Tokens per second, from the median time of {doc['speed']['timed_tokens']} single tokens; formats took turns.</p>",
        ]
    title = f"KV cache report: {e(doc['model'])}"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", help="JSON document of `turboquant report --json`; or of `eval --json`, for the picture kld alone")
    parser.add_argument("-o", "--output", help="page to write")
    parser.add_argument("--picture", choices=["kld", "norms", "shares", "speed"], help="also write this picture alone, to --svg")
    parser.add_argument("--svg", help="file of that picture")
    args = parser.parse_args()
    if (args.picture is None) != (args.svg is None):
        parser.error("--picture and --svg go together")
    if not args.output and not args.picture:
        parser.error("nothing to write: give -o, or --picture and --svg")
    Picture.key, Picture.path = args.picture, args.svg
    try:
        with open(args.document, encoding="utf-8") as file:
            doc = json.load(file)
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: cannot read {args.document}: {error}")
    rows_alone = isinstance(doc, list)  # of `eval`: no page can be made of them
    if rows_alone and (args.output or args.picture != "kld" or not all("family" in row for row in doc)):
        sys.exit(f"report.py: of {args.document}, rows of turboquant eval, the picture kld can be made (--picture kld --svg FILE) and no page")
    if not rows_alone and doc.get("turboquant_report") != 1:
        sys.exit(f"report.py: {args.document} is no document of this version of turboquant report")
    with plt.rc_context(STYLE):
        text = kld_picture(doc) if rows_alone else page(doc)
    if Picture.key and not Picture.drawn:
        sys.exit(f"report.py: the document has no numbers for the picture {Picture.key}")
    if not args.output:
        return
    try:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        sys.exit(f"report.py: cannot write {args.output}: {error}")


if __name__ == "__main__":
    main()
