/* What libggml-turboquant.so offers beyond ggml's backend interface, through ggml_backend_reg_get_proc_address(reg, NAME). Plain C.
 *
 * The registry is named "turboquant"; its devices are named by SPEC words: turbo4, turbo3, turbo2, turbo5, turbo6, turbo8, raw, tcq4, tcq3,
 * tcq2, tcq5, tcq1, and auto4, auto3, auto2: formats chosen by rules within 4.25, 3.25, 2.25 bits a value. The first is the default: auto4 on
 * a CPU, turbo4 on a GPU. If the environment variable TURBOQUANT_KV is set when the library is loaded, a device
 * "turboquant" with that SPEC, plan file or auto:BITS (config.h) comes first.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* NAME "turboquant_device": the device for any SPEC text (also "k=turbo4,v=turbo3"), made on first use and kept for the life of the
 * process. Use it in llama_model_params.devices. NULL on a bad SPEC; then `error` (if not NULL) holds the reason, truncated to error_size.
 */
typedef ggml_backend_dev_t (*turboquant_device_t)(const char* spec, char* error, size_t error_size);

/* NAME "turboquant_new_device": a device of its own that no other caller gets, SPEC turbo4, kept for the life of the process. */
typedef ggml_backend_dev_t (*turboquant_new_device_t)(void);

/* NAME "turboquant_new_device_at": the same at a place: "cpu", "cuda0", .., or "": the first GPU where there is one that this library can use,
 * else the CPU. NULL if there is no such place; then `error` holds the reason.
 */
typedef ggml_backend_dev_t (*turboquant_new_device_at_t)(const char* place, char* error, size_t error_size);

/* NAME "turboquant_place": where a device is: "CUDA0 (NVIDIA H100 80GB HBM3)"; on the CPU with the reason, if it was not asked for: "CPU (no CUDA
 * backend of llama.cpp is loaded)". Valid until the next call. */
typedef const char* (*turboquant_place_t)(ggml_backend_dev_t dev);

/* NAME "turboquant_set_spec": the SPEC of caches made from now on on a device of turboquant_new_device, so that one loaded model serves contexts of
 * many formats. Caches that exist keep theirs. Not while a context is being made on the device. False on a bad SPEC, with `error` as above.
 * NULL: such caches are llama.cpp's own, uncompressed or of its types (type_k, type_v), computed on where the device is.
 */
typedef bool (*turboquant_set_spec_t)(ggml_backend_dev_t dev, const char* spec, char* error, size_t error_size);

/* Memory of all live KV tensors that belong to a device. */
struct turboquant_kv_stats {
    size_t n_tensors;      /* KV tensors (K and V of each layer) */
    size_t reserved_bytes; /* address space asked for by llama.cpp (worst case over head sizes; untouched pages cost nothing) */
    size_t format_bytes;   /* bytes that the formats need for all cells, everything counted (codes, scales, positions): the formula */
    size_t touched_bytes;  /* bytes of the pages that hold cells written so far */
    double bits_per_value; /* 8 * format_bytes / (cells * values per cell), 0 before the first token */
    double f16_bytes;      /* the same cells in f16 */
};
/* NAME "turboquant_kv_stats" */
typedef void (*turboquant_kv_stats_t)(ggml_backend_dev_t dev, struct turboquant_kv_stats* out);

/* NAME "turboquant_last_error": text of the last refusal on this device ("" if none); valid until the next call. */
typedef const char* (*turboquant_last_error_t)(ggml_backend_dev_t dev);

/* NAME "turboquant_config": one line naming the effective configuration of a device (formats, SIMD level, threads). */
typedef const char* (*turboquant_config_t)(ggml_backend_dev_t dev);

/* Exported by name (dlsym), since there is no registry to ask then: why ggml_backend_load gave NULL; "" if it did not. */
typedef const char* (*turboquant_load_error_t)(void);

#ifdef __cplusplus
}
#endif
