#!/usr/bin/env python3
"""Holds the direction of includes between the layers: a file may include its own layer and lower ones only, and the core (all below ggml)
knows neither ggml nor llama.cpp. Files over 400 lines get a warning. usage: check_layers.py [ROOT]"""

import re
import sys
from pathlib import Path

# Lowest first. Layers in one row do not include each other.
ROWS = [["codec"], ["spec"], ["attention", "planner"], ["kernels"], ["cuda"], ["cache"], ["ggml"], ["cli"]]
RANK = {layer: rank for rank, row in enumerate(ROWS) for layer in row}
CORE_RANK = RANK["cache"]
FOREIGN = re.compile(r"(ggml|gguf|llama)[-\w]*\.h$")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')
MAX_LINES = 400


def problems_of(path: Path, layer: str, lines: list[str]) -> list[str]:
    found = []
    for number, line in enumerate(lines, 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        header = match[1]
        where = f"{path}:{number}: {layer} includes {header}"
        parts = header.split("/")
        if parts[0] == "turboquant":
            if len(parts) < 3 or parts[1] not in RANK:
                found.append(f"{where}: not a known layer")
            elif parts[1] != layer and RANK[parts[1]] >= RANK[layer]:
                found.append(f"{where}: a layer may include lower ones only")
        elif RANK[layer] <= CORE_RANK and FOREIGN.search(header):
            found.append(f"{where}: the core must not know ggml or llama.cpp")
        elif '"' in line and (path.parent / header).exists():
            found.append(f'{where}: write "turboquant/{layer}/{header}"')
    return found


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent)
    problems, n_files = [], 0
    for path in sorted(p for p in (root / "turboquant").rglob("*") if p.suffix in (".h", ".cpp", ".inc", ".cu", ".cuh")):
        layer = path.relative_to(root / "turboquant").parts[0]
        lines = path.read_text().splitlines()
        n_files += 1
        if layer not in RANK:
            problems.append(f"{path}: '{layer}' is no layer; add it to ROWS in scripts/check_layers.py")
            continue
        problems += problems_of(path, layer, lines)
        if len(lines) > MAX_LINES:
            print(f"warning: {path} has {len(lines)} lines, more than {MAX_LINES}")
    print("\n".join(problems) or f"{n_files} files keep to the layers")
    return 1 if problems or not n_files else 0


if __name__ == "__main__":
    sys.exit(main())
