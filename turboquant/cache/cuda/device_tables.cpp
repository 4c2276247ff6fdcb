#include "turboquant/cache/cuda/device_tables.h"

#include <algorithm>
#include <bit>
#include <memory>

#include "turboquant/attention/turns.h"
#include "turboquant/codec/rotation.h"

namespace turboquant {

void must(const cuda::Status& status) {
    if (!status.ok()) throw std::runtime_error("GPU: " + status.message());
}

DeviceTables& DeviceTables::of(int device) {
    static std::mutex mutex;
    static auto* all = new std::map<int, std::unique_ptr<DeviceTables>>;  // never destroyed: the driver may be gone by then
    const std::scoped_lock lock(mutex);
    auto& tables = (*all)[device];
    if (!tables) tables.reset(new DeviceTables(device));
    return *tables;
}

DeviceTables::DeviceTables(int index) {
    must(cuda::query_device(index, device_));
    must(cuda::use_device(index));
}

DeviceTables::Rotation DeviceTables::rotation(int head_dim) {
    const std::scoped_lock lock(mutex_);
    Rotation& found = rotations_[head_dim];
    if (found.matrix) return found;
    const auto d = static_cast<std::size_t>(head_dim);
    std::vector<float> matrix(d * d), signs;
    for (std::size_t k = 0; k < d; k++) {
        matrix[k * d + k] = 1;
        rotation_for(head_dim).forward({matrix.data() + k * d, d});
    }
    if (std::has_single_bit(d)) {
        for (std::size_t k = 0; k < d; k++) signs.push_back(matrix[k * d]);
        for (std::size_t j = 0; j < d; j++) signs.push_back(matrix[j] / matrix[0]);
        found.signs = keep(signs);
    }
    found.matrix = keep(matrix);
    return found;
}

const cuda::AttentionTables& DeviceTables::attention(int head_dim) {
    const std::scoped_lock lock(mutex_);
    const auto [at, made] = attention_.try_emplace(head_dim);
    if (!made) return at->second;
    cuda::DeviceArray& memory = memory_.emplace_back();
    must(memory.reserve(cuda::attention_table_bytes(head_dim), nullptr));
    must(cuda::upload_attention_tables(at->second, head_dim, memory.as<void>(), nullptr));
    return at->second;
}

const float* DeviceTables::turns(std::span<const double> frequencies) {
    const std::scoped_lock lock(mutex_);
    const float*& found = turns_[{frequencies.begin(), frequencies.end()}];
    return found ? found : found = keep(make_turns(frequencies));
}

DeviceTables::Term DeviceTables::term(std::span<const double> frequencies, int max_position, int n_expected) {
    const std::scoped_lock lock(mutex_);
    Term& term = terms_[{frequencies.begin(), frequencies.end()}];
    if (max_position <= term.max_position) return term;
    // Else by doubling; the old table stays, since work under way may read it.
    term.max_position = max_position < n_expected
                            ? n_expected - 1
                            : static_cast<int>(std::bit_ceil(static_cast<unsigned>(std::max(max_position, 4095)) + 1)) - 1;
    term.turns = keep(cuda::make_term_turns(frequencies, term.max_position));
    if (!term.panel) term.panel = keep(cuda::make_term_panel(frequencies));
    return term;
}

}  // namespace turboquant
