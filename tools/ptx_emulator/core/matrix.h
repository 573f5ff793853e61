// Matrix products of a warp (mma), of four warps with operands in shared memory (wgmma), and their layouts.
#pragma once
#include "memory.h"

enum Element { BF16, F16, TF32 };

inline float element(int kind, u32 raw) {
    return kind == BF16 ? wide(bf16{u16(raw)}) : kind == F16 ? wide(f16{u16(raw)}) : from_tf32(raw);
}

// Row and column of what a lane holds in a register of the left operand, of 16 rows; `half` of the register's two.
struct Place { int row, column; };
inline Place left(int kind, int lane, int i, int half) {
    const int k = kind == TF32 ? lane % 4 + 4 * (i / 2) : 2 * (lane % 4) + half + 8 * (i / 2);
    return {lane / 4 + 8 * (i % 2), k};
}
inline Place right(int kind, int lane, int i, int half) {
    return {kind == TF32 ? lane % 4 + 4 * i : 2 * (lane % 4) + half + 8 * i, lane / 4};
}
inline Place accumulator(int lane, int i) { return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2}; }

template <class F> void each_operand(int kind, int registers, F visit) {
    for (int lane = 0; lane < LANES; ++lane)
        for (int i = 0; i < registers; ++i)
            for (int half = 0; half < (kind == TF32 ? 1 : 2); ++half) visit(lane, i, half);
}

// a: kind, K, registers of A, of B, then D (4), A, B, C (4)
inline void run_mma(Frame& f) {
    const int kind = f.a[0], K = f.a[1], in_a = f.a[2], in_b = f.a[3], A = 8, B = A + in_a, C = B + in_b;
    double a[16][16], b[16][8];
    float out[4][LANES];
    each_operand(kind, in_a, [&](int lane, int i, int half) {
        const Place p = left(kind, lane, i, half);
        a[p.row][p.column] = element(kind, f.reg<u32>(A + i)[lane] >> 16 * half);
    });
    each_operand(kind, in_b, [&](int lane, int i, int half) {
        const Place p = right(kind, lane, i, half);
        b[p.row][p.column] = element(kind, f.reg<u32>(B + i)[lane] >> 16 * half);
    });
    double sums[16][8] = {};
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < K; ++k)
            for (int j = 0; j < 8; ++j) sums[row][j] += a[row][k] * b[k][j];
    for (int i = 0; i < 4; ++i)
        for (int lane = 0; lane < LANES; ++lane) {
            const Place p = accumulator(lane, i);
            out[i][lane] = towards_zero(sums[p.row][p.column] + f.reg<float>(C + i)[lane]);
        }
    for (int i = 0; i < 4; ++i) std::memcpy(f.reg<float>(4 + i), out[i], sizeof out[i]);
}

// Where the element of row or column `outer` and depth k of an operand in shared memory lies. `start`, `lead` and
// `stride` are bytes; a row of the swizzle has `row` of them.
struct Descriptor {
    u32 start, lead, stride, row, swizzle;
    bool k_last;  // the depth is contiguous

    static Descriptor wgmma(u64 raw, bool transposed) {
        static const u32 rows[4] = {16, 128, 64, 32};
        return make(raw, rows[raw >> 62], transposed);
    }
    static Descriptor make(u64 raw, u32 row, bool transposed) {
        const auto part = [raw](int at) { return u32(raw >> at & 0x3FFF) << 4; };
        return {part(0), part(16), part(32), row, row / 16 - 1, !transposed};
    }
    u32 address(int outer, int k, int size) const {
        const u32 across = k_last ? k * size : outer * size, down = k_last ? outer : k;
        // Without a swizzle, blocks of 8 rows of 16 bytes: `lead` apart along the depth, `stride` across it.
        const u32 step = row == 16 && !k_last ? stride : lead, jump = row == 16 && !k_last ? lead : stride;
        const u32 plain = start + across / row * step + across % row + down / 8 * jump + down % 8 * row;
        return plain ^ (plain >> 7 & swizzle) << 4;
    }
};

// An operand in shared memory as a matrix product that does not wait reads it.
inline float fetch(Frame& f, const Descriptor& d, int kind, int outer, int k, std::vector<u64>& reads) {
    const int size = kind == TF32 ? 4 : 2;
    const u64 address = d.address(outer, k, size);
    const u8* p = load(f, true, address, size, 0);
    if (!p) return 0;
    Space& s = f.m.shared;
    for (u64 i = s.cell(address); i <= s.cell(address + size - 1); ++i) {
        Cell& c = s.cells[i];
        ++c.matrix_reads, c.matrix_instruction = f.instruction;
        reads.push_back(i);
        const Warp* writer = c.wrote.program == f.m.program ? &f.m.warps[c.wrote.thread / LANES] : nullptr;
        if (writer && writer->fence < c.wrote.time && f.w.fence < c.wrote.time)
            f.report("matrix product of what was stored without a fence.proxy.async", address, 0, &c.wrote);
    }
    u32 raw = 0;
    std::memcpy(&raw, p, size);
    return element(kind, raw);
}
inline void release_reads(Frame& f, const std::vector<u64>& reads) {
    for (u64 i : reads) --f.m.shared.cells[i].matrix_reads;
}

// a: kind, N, K, A in registers, transposed A, B, negated A, B, whether to accumulate (-1 always, -2 never, or a
// predicate), descriptor of B, then A's descriptor or registers (4), D (N / 2)
inline void run_wgmma(Frame& f) {
    const int kind = f.a[0], N = f.a[1], K = f.a[2], accumulate = f.a[8];
    const bool keep = accumulate == -1 || (accumulate >= 0 && f.w.registers[accumulate] & 1);
    double sign = f.a[6] == f.a[7] ? 1 : -1;
    double a[16][16];
    std::vector<double> b(size_t(K) * N), sums(16 * N);
    if (f.a[3])
        each_operand(kind, 4, [&](int lane, int i, int half) {
            const Place p = left(kind, lane, i, half);
            a[p.row][p.column] = element(kind, f.reg<u32>(10 + i)[lane] >> 16 * half);
        });
    const Descriptor right = Descriptor::wgmma(f.reg<u64>(9)[0], f.a[5]);
    if (!f.a[3]) {
        const Descriptor own = Descriptor::wgmma(f.reg<u64>(10)[0], f.a[4]);
        for (int row = 0; row < 16 && !f.m.failed; ++row)
            for (int k = 0; k < K; ++k) a[row][k] = fetch(f, own, kind, f.w.id % 4 * 16 + row, k, f.w.products.reads);
    }
    for (int k = 0; k < K && !f.m.failed; ++k)
        for (int j = 0; j < N; ++j) b[k * N + j] = fetch(f, right, kind, j, k, f.w.products.reads);
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < K; ++k)
            for (int j = 0; j < N; ++j) sums[row * N + j] += a[row][k] * b[k * N + j];
    for (int i = 0; i < N / 2; ++i) f.w.products.registers.push_back({f.a[14 + i], f.instruction});
    for (int i = 0; i < N / 2; ++i)
        for (int lane = 0; lane < LANES; ++lane) {
            const Place p = accumulator(lane, i % 4);
            float& out = f.reg<float>(14 + i)[lane];
            out = towards_zero(sign * sums[p.row * N + i / 4 * 8 + p.column] + (keep ? double(out) : 0.0));
        }
}
inline void run_wgmma_commit(Frame& f) {
    f.w.product_groups.push_back(std::move(f.w.products));
    f.w.products = {};
}
inline void run_wgmma_wait(Frame& f) {
    for (; f.w.product_groups.size() > size_t(f.a[0]); f.w.product_groups.pop_front())
        release_reads(f, f.w.product_groups.front().reads);
}
