// Tensor memory of 128 lanes and 512 columns of four bytes, its matrix products (tcgen05), and barriers in memory.
#pragma once
#include "matrix.h"

constexpr u32 COLUMNS = 512, UNWRITTEN = 0x7FFD7FFEu;

struct TensorAddress {  // lane in the upper half, column in the lower
    u32 raw;
    u32 lane() const { return raw >> 16; }
    u32 column() const { return raw & 0xFFFF; }
};

// One word, or the end of the launch.
inline u32* tensor_word(Frame& f, u32 lane, u32 column) {
    Machine& m = f.m;
    if (lane < 128 && column < m.tensor_columns) return &m.tensor_memory[lane * COLUMNS + column];
    f.stop("access to tensor memory that is not allocated", column);
    return nullptr;
}
inline void tensor_in_use(Frame& f, u32 first, u32 count) {
    for (const auto& [address, b] : f.m.barriers)
        for (const TensorUse& use : b.uses)
            if (first < use.last && use.first < first + count) {
                const Stamp other{f.m.program, -1, use.instruction};
                f.report("access to tensor memory that a matrix product may still write", first, 0, &other);
            }
    for (const TensorUse& use : f.m.uncommitted)
        if (first < use.last && use.first < first + count) f.stop("access to what a matrix product writes", first);
}

// a: where to put the address, offset, columns
inline void run_tensor_alloc(Frame& f) {
    const u32 count = f.a[2], address = 0;
    if (f.m.tensor_columns) return f.stop("second allocation of tensor memory");
    f.m.tensor_columns = count;
    f.m.tensor_memory.assign(128 * COLUMNS, UNWRITTEN);
    store(f, true, address_of<true>(f, 0, 0), 4, 0, &address);
}
// a: address, columns
inline void run_tensor_dealloc(Frame& f) {
    if (f.m.tensor_columns != u32(f.a[1]) || f.reg<u32>(0)[0]) return f.stop("release of other tensor memory");
    f.m.tensor_columns = 0;
}

// a: halves (two: 16 lanes, each thread of the second half `split` columns further; one: 32 lanes), registers a thread,
// split, address, offset, registers. Visits lane of the warp, register, word.
template <class F> void each_tensor_word(Frame& f, F visit) {
    const TensorAddress base{f.reg<u32>(3)[0] + u32(f.a[4])};
    const u32 count = f.a[1], split = f.a[2], lanes = f.a[0] == 2 ? 16 : 32;
    if (base.lane() / 32 != u32(f.w.id) % 4) return f.stop("access to another warp's lanes", base.raw);
    tensor_in_use(f, base.column(), count);
    if (lanes == 16) tensor_in_use(f, base.column() + split, count);
    for (u32 lane = 0; lane < LANES; ++lane)
        for (u32 i = 0; i < count; ++i) {
            u32* word = tensor_word(f, base.lane() + lane % lanes, base.column() + lane / lanes * split + i);
            if (!word) return;
            visit(lane, i, *word);
        }
}
inline void run_tensor_load(Frame& f) {
    each_tensor_word(f, [&](u32 lane, u32 i, u32& word) {
        if (word == UNWRITTEN) f.report("read of tensor memory that nobody wrote", 0, lane);
        f.reg<u32>(5 + i)[lane] = word;
    });
    f.w.tensor_load = f.instruction;
}
inline void run_tensor_store(Frame& f) {
    each_tensor_word(f, [&](u32 lane, u32 i, u32& word) { word = f.reg<u32>(5 + i)[lane]; });
    f.w.tensor_store = f.instruction;
}

// a: D's address, offset, A in tensor memory, A's descriptor or address, offset, B's descriptor, what it does, whether
// to add to D. Executed by one lane.
template <bool SINGLE> void run_tensor_product(Frame& f) {
    const int leader = f.leader();
    const bool inside = f.a[2], keep = f.predicate(7) >> leader & 1;
    const u32 how = f.reg<u32>(6)[leader], M = (how >> 24 & 31) * 16, N = (how >> 17 & 63) * 8;
    const u32 format = how >> 7 & 7;
    const int kind = SINGLE ? TF32 : format ? BF16 : F16, K = SINGLE ? 8 : 16;
    const Descriptor a(inside ? 0 : f.reg<u64>(3)[leader], how >> 15 & 1), b(f.reg<u64>(5)[leader], how >> 16 & 1);
    const bool known = (M == 64 || M == 128) && N && (how & 0x3F) == 0x10 && (how >> 10 & 7) == format
        && (SINGLE ? format == 2 && !(how >> 15 & 3) : format < 2);
    if (!known || f.mask & (f.mask - 1))
        return f.stop("matrix product of a kind that the emulator does not know", how);
    for (const Warp& w : f.m.warps)
        for (s32 access : {w.tensor_load, w.tensor_store}) {
            const Stamp other{f.m.program, w.id * LANES, access};
            if (access >= 0) f.report("matrix product while tensor memory is read or written", 0, leader, &other);
        }
    const TensorAddress d{f.reg<u32>(0)[leader] + u32(f.a[1])};
    const TensorAddress left{inside ? f.reg<u32>(3)[leader] + u32(f.a[4]) : 0};
    const double sign = (how >> 13 & 1) != (how >> 14 & 1) ? -1 : 1;
    const auto lane_of = [M](u32 row) { return M == 64 ? row / 16 * 32 + row % 16 : row; };
    std::vector<double> right(K * N), own(K), sums(N);
    for (int k = 0; k < K && !f.m.failed; ++k)
        for (u32 j = 0; j < N; ++j) right[k * N + j] = fetch(f, b, kind, j, k, f.m.unread);
    for (u32 row = 0; row < M && !f.m.failed; ++row) {
        for (int k = 0; k < K; ++k) {
            if (!inside) own[k] = fetch(f, a, kind, row, k, f.m.unread);
            else if (const u32* word = tensor_word(f, left.lane() + lane_of(row), left.column() + k * 8 / K))
                own[k] = element(kind, *word >> (SINGLE ? 0 : 16 * (k & 1)));
        }
        std::fill(sums.begin(), sums.end(), 0.0);
        add_products(own.data(), right.data(), K, N, sums.data());
        for (u32 j = 0; j < N; ++j)
            if (u32* word = tensor_word(f, d.lane() + lane_of(row), d.column() + j)) {
                if (keep && *word == UNWRITTEN) f.report("sum with tensor memory that nobody wrote", j, leader);
                *word = bits<u32>(towards_zero(sign * sums[j] + (keep ? double(bits<float>(*word)) : 0.0)));
            }
    }
    f.m.uncommitted.push_back({d.column(), d.column() + N, f.instruction});
}

inline MatrixBarrier* memory_barrier(Frame& f, int i) {
    const u64 address = address_of<true>(f, f.leader(), i);
    const auto found = f.m.barriers.find(u32(address));
    if (found != f.m.barriers.end()) return &found->second;
    return f.stop("use of a barrier in memory that is not there", address, f.leader()), nullptr;
}
// a: address, offset; then arrivals of a phase
inline void run_barrier_init(Frame& f) {
    const int lane = f.leader();
    const u64 address = address_of<true>(f, lane, 0), value = u64(f.reg<u32>(2)[lane]) << 32 | u32(f.instruction);
    if (f.m.barriers.count(u32(address))) return f.stop("a barrier in memory where there is one", address, lane);
    if (store(f, true, address, 8, lane, &value)) f.m.barriers[u32(address)].expected = f.reg<u32>(2)[lane];
}
inline void run_barrier_inval(Frame& f) {
    const int lane = f.leader();
    const u64 address = address_of<true>(f, lane, 0), value = u64(f.instruction) << 32;
    MatrixBarrier* b = memory_barrier(f, 0);
    if (!b) return;
    if (!b->uses.empty()) return f.stop("end of a barrier that a product has still to reach", address, lane);
    f.m.barriers.erase(u32(address));
    store(f, true, address, 8, lane, &value);
}
// All products of the thread so far arrive when they are done, which here is at once; who has waited knows.
inline void run_tensor_commit(Frame& f) {
    MatrixBarrier* b = memory_barrier(f, 0);
    if (!b) return;
    b->uses.insert(b->uses.end(), f.m.uncommitted.begin(), f.m.uncommitted.end());
    b->reads.insert(b->reads.end(), f.m.unread.begin(), f.m.unread.end());
    f.m.uncommitted.clear(), f.m.unread.clear();
    if (++b->arrived == b->expected) b->arrived = 0, ++b->phase;
}
// a: done, address, offset, parity
inline void run_barrier_wait(Frame& f) {
    const int lane = f.leader();
    MatrixBarrier* b = memory_barrier(f, 1);
    if (!b || !load(f, true, address_of<true>(f, lane, 1), 8, lane)) return;
    const bool done = (b->phase & 1) != (f.reg<u32>(3)[lane] & 1);
    set<bool>(f, 0, [&](int) { return done; });
    f.w.polling = !done;
    if (!done) return;
    release_reads(f, b->reads);
    b->reads.clear(), b->uses.clear();
}

#define TENSOR_OPERATIONS \
    {"=tcgen05.alloc", "", run_tensor_alloc}, {"=tcgen05.dealloc", "", run_tensor_dealloc}, \
    {"=tcgen05.ld", "", run_tensor_load}, {"=tcgen05.st", "", run_tensor_store}, \
    {"=tcgen05.wait::ld", "", [](Frame& f) { f.w.tensor_load = -1; }}, \
    {"=tcgen05.wait::st", "", [](Frame& f) { f.w.tensor_store = -1; }}, \
    {"tcgen05.mma.f16", "", run_tensor_product<false>}, {"tcgen05.mma.tf32", "", run_tensor_product<true>}, \
    {"tcgen05.commit", "", run_tensor_commit}, \
    {"mbarrier.init", "", run_barrier_init}, {"mbarrier.inval", "", run_barrier_inval}, {"mbarrier.try_wait.parity", "", run_barrier_wait},
