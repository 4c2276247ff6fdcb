// A second packer, as a container or a store of prefixes would be one: each row a record of its own of no more bytes than it needs, and
// every offset once, in a table.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "turboquant/cache/snapshot.h"

namespace turboquant::test {

struct Table {
    struct Record {
        RowKind kind;
        std::int32_t pos;
        int sequence;
        std::uint32_t mu_hash;
        std::vector<std::uint8_t> residual;
    };
    std::size_t n_embd = 0;
    RowForm form;
    std::vector<Record> rows;
    std::vector<std::uint8_t> payload;  ///< codes, or fp16 values, stride bytes apart
    std::size_t stride = 0;
    std::map<std::uint32_t, std::vector<std::uint16_t>> mus;

    Table(std::size_t n, std::size_t embd, std::size_t code_bytes)
        : n_embd(embd), rows(n), stride(std::max(code_bytes, 2 * embd) + 6) {  // no multiple of anything
        payload.resize(n * stride);
    }
};

class TableWriter final : public RowWriter {
  public:
    explicit TableWriter(Table& table) : t_(table) {}
    bool takes_exact() const override { return true; }
    void write(std::int64_t i, const RowSnapshot& s) override {
        std::copy_n(reinterpret_cast<const std::uint8_t*>(s.values.data()), 2 * s.values.size(), begin(i, s));
    }
    std::uint8_t* begin(std::int64_t i, const RowSnapshot& s) override {
        t_.rows[i] = {s.kind, s.pos, s.sequence, s.mu_hash, {s.residual.begin(), s.residual.end()}};
        if (s.form) t_.form = *s.form;
        if (!s.mu.empty()) t_.mus[s.mu_hash].assign(s.mu.begin(), s.mu.end());
        return t_.payload.data() + i * t_.stride;
    }
    std::size_t stride() const override { return t_.stride; }

  private:
    Table& t_;
};

class TableReader final : public RowReader {
  public:
    explicit TableReader(const Table& table, std::int64_t first = 0) : t_(table), first_(first) {}
    RowSnapshot read(std::int64_t i) override {
        const Table::Record& r = t_.rows[first_ + i];
        const std::uint8_t* at = t_.payload.data() + (first_ + i) * t_.stride;
        RowSnapshot s{r.kind, r.pos, r.sequence, r.mu_hash, {}, nullptr, {}, r.residual, {}};
        std::size_t codes = 0;
        for (int h = 0; h * t_.form.head_dim < static_cast<int>(t_.n_embd) && t_.form.head_dim; h++) codes += t_.form.head_bytes(h);
        if (r.kind == RowKind::codes)
            s.form = &t_.form, s.codes = {at, codes};
        else
            s.values = {reinterpret_cast<const std::uint16_t*>(at), t_.n_embd};
        return s;
    }
    std::size_t stride() const override { return t_.stride; }
    std::span<const std::uint16_t> mu(std::uint32_t hash) override {
        const auto found = t_.mus.find(hash);
        return found == t_.mus.end() ? std::span<const std::uint16_t>() : found->second;
    }

  private:
    const Table& t_;
    std::int64_t first_;
};

}  // namespace turboquant::test
