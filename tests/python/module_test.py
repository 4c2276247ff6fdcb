#!/usr/bin/env python3
"""The Python module in llama-cpp-python as it is installed, each case in a process of its own. usage: module_test.py PYTHON LIBRARY MODEL"""

import re
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON, LIBRARY, MODEL = sys.argv[1:4]
PREFIX = f"""
import ctypes, pathlib, sys
sys.path.insert(0, {str(ROOT / "python")!r})
import llama_cpp, turboquant
library, model = {LIBRARY!r}, {MODEL!r}
def use(**options):
    llm = llama_cpp.Llama(model, n_ctx=1024, **{{"flash_attn": True, **options}})
    print("answer", len(llm("The old house", max_tokens=4)["choices"][0]["text"]) > 0)
"""


def run(code):
    """(exit code, what it printed, its log)."""
    done = subprocess.run([PYTHON, "-c", PREFIX + code], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def cache_line(log):
    found = re.search(r"turboquant: (\w+): KV cache of 6 layers, 1024 cells: ([\d.]+) MiB, ([\d.]+) bits a value \(f16: ([\d.]+) MiB\)", log)
    return found and (found[1], float(found[2]), float(found[3]), float(found[4]))


class Module(unittest.TestCase):
    def test_the_cache_is_compressed(self):
        code, out, log = run("print(turboquant.load(library)[:2]); print(turboquant.load(library)[0]); use(n_gpu_layers=-1)")
        self.assertEqual(code, 0, log)
        self.assertIn("['auto4', 'turbo4']\nauto4\nanswer True", out)
        name, mib, bits, f16 = cache_line(log) or self.fail(log)
        self.assertEqual(name, "auto4")
        self.assertTrue(4 < bits <= 4.25, bits)
        self.assertAlmostEqual(mib / f16, bits / 16, delta=0.02)
        sizes = [float(x) for x in re.findall(r"KV buffer size = +([\d.]+) MiB", log)]
        # Of a budget what it could come to at most is reserved (and not touched) until the formats are chosen.
        self.assertTrue(sizes and sum(sizes) < 0.45 * f16, f"llama.cpp's own figure: {sizes}")

    def test_other_formats(self):
        code, out, log = run("print(turboquant.load(library, kv='k=tcq3,v=tcq2')[:2]); use(n_gpu_layers=-1)")
        self.assertEqual(code, 0, log)
        self.assertIn("['turboquant', 'auto4']", out)
        self.assertIn("keys tcq3, values tcq2", log)

    def test_flash_attention_off_is_refused_with_the_remedy(self):
        code, _, log = run("turboquant.load(library); use(n_gpu_layers=-1, flash_attn=False)")  # llama-cpp-python's default
        self.assertEqual(code, 1)
        self.assertIn("flash_attn=True", log)

    def test_layers_that_are_not_offloaded_are_named(self):
        code, _, log = run("turboquant.load(library); use()")  # n_gpu_layers is 0 by default
        self.assertEqual(code, 0, log)
        self.assertIsNone(cache_line(log))
        self.assertRegex(log, r"cache of 6 of 6 layers \(0-5\) is NOT compressed.*n_gpu_layers=-1")

    def test_a_second_copy_of_ggml_is_noticed(self):
        second = "ggml = ctypes.CDLL(str(pathlib.Path(llama_cpp.__file__).parent / 'lib/libggml.so'))\nggml.ggml_backend_load.restype = ctypes.c_void_p\n"
        code, out, _ = run(second + "first = llama_cpp.llama_cpp._lib\n"
                           "print(*(ctypes.cast(g.ggml_backend_load, ctypes.c_void_p).value for g in (ggml, first)))")
        self.assertEqual(code, 0)
        if len(set(out.split())) == 1:
            self.skipTest("libggml.so and libggml.so.0 are one file here")
        code, out, log = run(second + "ggml.ggml_backend_load(library.encode())\nprint(llama_cpp.llama_supports_gpu_offload())\n"
                             "turboquant.load(library); use(n_gpu_layers=-1)")
        self.assertEqual(code, 0, log)
        self.assertIn("False\n", out)
        self.assertRegex(log, r"libggml\.so, but libllama in this process uses .*libggml\.so\.0: no model will see .*turboquant\.load\(\)")
        self.assertIsNotNone(cache_line(log), "load() mends it")

    def test_errors_say_what_to_do(self):
        for call, words in (("turboquant.load('/no/such.so')", ("/no/such.so", "make build")),
                            ("turboquant.load(library, kv='turbo9')", ("turbo9", "turbo4")),
                            ("turboquant.load(library); turboquant.load(library, kv='turbo3')", ("first call",)),
                            ("turboquant.load(__file__ if '__file__' in globals() else '/etc/passwd')", ("/etc/passwd",))):
            code, out, log = run(f"try:\n    {call}\nexcept turboquant.LoadError as e:\n    print('cause', e)")
            self.assertEqual(code, 0, log)
            self.assertIn("cause", out, call)
            for word in words:
                self.assertIn(word, out, call)


if __name__ == "__main__":
    if not shutil.which(PYTHON) or subprocess.run([PYTHON, "-c", "import llama_cpp"], capture_output=True).returncode:
        print("Skipped: no llama_cpp in", PYTHON, "(with LLAMA_PREFIX, scripts/setup makes none)")
        sys.exit(77)
    unittest.main(argv=sys.argv[:1], verbosity=2)
