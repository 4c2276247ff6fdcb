// A block of threads on the host: each thread is a fiber, which gives way where it meets others. For turboquant/cuda/impl/simt.h.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "turboquant/codec/quantizer.h"

namespace turboquant::cuda::emulator {

struct float2 {
    float x, y;
};
inline bool kWideMetrics = true;  ///< tests run both ways

/// Runs body(thread) for threads 0..n-1 of one block, a multiple of 32, in turns: a thread runs until it has to wait for others.
class Block {
  public:
    static constexpr std::size_t kStack = 256 << 10;

    static void run(int n, const std::function<void(int)>& body) {
        Block block(n, body);
        current() = &block;
        for (block.alive_ = n; block.alive_ > 0;) {
            const int before = block.alive_;
            block.progress_ = false;
            for (int i = 0; i < n; ++i)
                if (!block.fibers_[i].done) {
                    block.now_ = i;
                    block.resume(block.fibers_[i]);
                }
            if (!block.progress_ && block.alive_ == before) throw std::logic_error("emulator: the threads of a block wait for each other");
        }
        current() = nullptr;
    }

    int thread() const { return now_; }
    /// Waits for the `count` threads from `first` on; all of them must come.
    void meet(int first, int count) {
        Meeting& m = count == 32 ? warps_[first / 32] : all_;
        const std::uint64_t round = m.rounds;
        if (++m.arrived == count)
            m.arrived = 0, ++m.rounds, progress_ = true;
        else
            while (m.rounds == round) give_way(fibers_[now_]);
    }
    /// Puts v where the warp sees it and returns the values of all 32.
    template <class T>
    const T* exchange(const T& v) {
        const int warp = now_ / 32;
        auto& slot = slots_[warp];
        std::uint64_t& turn = turns_[now_];
        unsigned char* to = slot.data() + (turn++ & 1) * 32 * 64;
        static_assert(sizeof(T) <= 64);
        std::memcpy(to + now_ % 32 * sizeof(T), &v, sizeof(T));
        meet(warp * 32, 32);
        return reinterpret_cast<const T*>(to);
    }
    int size() const { return static_cast<int>(fibers_.size()); }

    static Block*& current() {
        static Block* block = nullptr;
        return block;
    }

  private:
    // A fiber begins by its context, and from then on moves by jumps: those make no system calls.
    struct Fiber {
        ucontext_t context{};
        jmp_buf at;
        std::unique_ptr<char[]> stack;
        bool started = false, done = false;
    };
    void resume(Fiber& f) {
        if (_setjmp(main_at_)) return;
        if (f.started) _longjmp(f.at, 1);
        f.started = true;
        setcontext(&f.context);
    }
    void give_way(Fiber& f) {
        if (!_setjmp(f.at)) _longjmp(main_at_, 1);
    }
    struct Meeting {
        int arrived = 0;
        std::uint64_t rounds = 0;
    };

    Block(int n, const std::function<void(int)>& body) : body_(body), fibers_(n), warps_(n / 32), slots_(n / 32), turns_(n) {
        for (auto& s : slots_) s.resize(2 * 32 * 64);
        for (Fiber& f : fibers_) {
            f.stack = std::make_unique<char[]>(kStack);
            getcontext(&f.context);
            f.context.uc_stack = {f.stack.get(), 0, kStack};
            f.context.uc_link = nullptr;
            makecontext(&f.context, &Block::start, 0);
        }
    }
    static void start() {
        Block& b = *current();
        const int me = b.now_;
        b.body_(me);
        b.fibers_[me].done = true;
        --b.alive_;
        _longjmp(b.main_at_, 1);
    }

    const std::function<void(int)>& body_;
    std::vector<Fiber> fibers_;
    std::vector<Meeting> warps_;
    Meeting all_;
    std::vector<std::vector<unsigned char>> slots_;
    std::vector<std::uint64_t> turns_;
    jmp_buf main_at_;
    int now_ = 0, alive_ = 0;
    bool progress_ = false;
};

inline Block& block() { return *Block::current(); }
inline int lane() { return block().thread() % 32; }

inline void sync_block() { block().meet(0, block().size() == 32 ? 32 : block().size()); }
inline void sync_warp() { block().meet(block().thread() / 32 * 32, 32); }
template <class T>
T shfl(T v, int from) {
    return block().exchange(v)[from];
}
template <class T>
T shfl_xor(T v, int mask) {
    return block().exchange(v)[lane() ^ mask];
}
inline std::uint32_t ballot(bool p) {
    const int* all = block().exchange(static_cast<int>(p));
    std::uint32_t r = 0;
    for (int i = 0; i < 32; ++i) r |= static_cast<std::uint32_t>(all[i]) << i;
    return r;
}
inline void atomic_xor(std::uint32_t* p, std::uint32_t v) { *p ^= v; }
inline void atomic_or(std::uint32_t* p, std::uint32_t v) { *p |= v; }
inline std::uint16_t half_bits(float v) { return to_half(v); }
inline float half_value(std::uint16_t h) { return from_half(h); }

/// m16n8k16 as the PTX manual lays its fragments out.
inline void mma_halves(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    struct Operands {
        float a[4][2], b[2][2];
    } mine;
    for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < 4; ++i) mine.a[i][h] = from_half(static_cast<std::uint16_t>(a[i] >> 16 * h));
        mine.b[0][h] = from_half(static_cast<std::uint16_t>(b0 >> 16 * h)),
        mine.b[1][h] = from_half(static_cast<std::uint16_t>(b1 >> 16 * h));
    }
    const Operands* all = block().exchange(mine);
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2, col = 2 * t + i % 2;
        double sum = c[i];
        for (int k = 0; k < 16; ++k)
            sum += static_cast<double>(all[4 * g + k % 8 / 2].a[row + 2 * (k / 8)][k % 2]) * all[4 * col + k % 8 / 2].b[k / 8][k % 2];
        c[i] = static_cast<float>(sum);
    }
}

}  // namespace turboquant::cuda::emulator
