/* Loads the library named in GGML_BACKEND_PATH before main, for programs of llama.cpp's that never ask for devices themselves (LD_PRELOAD). */
#include <stdlib.h>

void* ggml_backend_load(const char* path);

__attribute__((constructor)) static void load(void) {
    const char* path = getenv("GGML_BACKEND_PATH");
    if (path) ggml_backend_load(path);
}
