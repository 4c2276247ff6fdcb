// Quantizes a vector and checks that it comes back at the error that 4 bits must have.
#include <cstdio>
#include <vector>

#include "turboquant/codec/quantizer.h"

int main() {
    const turboquant::Quantizer quantizer(turboquant::CodecId::turbo4, 128);
    std::vector<float> x(128), y(128);
    for (std::size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i * i % 31) - 15;
    quantizer.dequantize(quantizer.quantize(x), y);
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < x.size(); i++) error += (x[i] - y[i]) * (x[i] - y[i]), norm += x[i] * x[i];
    std::printf("relative squared error %.5f\n", error / norm);
    return error / norm > 0.003 && error / norm < 0.02 ? 0 : 1;
}
