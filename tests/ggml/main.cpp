// Options of these tests beside GoogleTest's:
//   --gpu-backend FILE  a machine with a GPU: llama.cpp's backend for it, which is loaded first, as a program would load it
//   --plugin FILE       this library instead of the one that was built: ggml-turboquant-as-gpu
#include <iostream>
#include <string_view>

#include "tests/ggml/support.h"

int main(int argc, char** argv) {
    testing::InitGoogleTest(&argc, argv);
    turboquant::conformance::Options& options = turboquant::conformance::options();
    for (int i = 1; i < argc; i += 2) {
        const std::string_view option = argv[i];
        std::string* value = option == "--gpu-backend" ? &options.gpu_backend : option == "--plugin" ? &options.plugin : nullptr;
        if (!value || i + 1 == argc) {
            std::cerr << "test_ggml: " << option << " is no option with a file; those are --gpu-backend and --plugin\n";
            return 2;
        }
        *value = argv[i + 1];
    }
    return RUN_ALL_TESTS();
}
