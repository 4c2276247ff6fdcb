/* For programs of llama.cpp's that never ask for devices themselves (LD_PRELOAD): loads the library named in GGML_BACKEND_PATH before main, and has their
 * log written to its end. llama.cpp's log is a thread's work, and test-llama-archs exits without waiting for it; but it sets back the log before that. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>

void* ggml_backend_load(const char* path);

__attribute__((constructor)) static void load(void) {
    const char* path = getenv("GGML_BACKEND_PATH");
    if (path) ggml_backend_load(path);
}

__attribute__((visibility("default"))) void llama_log_set(void* callback, void* user_data) {
    void* (*log_of_program)(void) = (void* (*)(void))dlsym(RTLD_DEFAULT, "_Z15common_log_mainv");
    void (*flush)(void*) = (void (*)(void*))dlsym(RTLD_DEFAULT, "_Z16common_log_flushP10common_log");
    if (log_of_program && flush) flush(log_of_program());
    ((void (*)(void*, void*))dlsym(RTLD_NEXT, "llama_log_set"))(callback, user_data);
}
