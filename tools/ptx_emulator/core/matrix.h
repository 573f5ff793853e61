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

// The matrix that registers of a warp hold, `where` each of its elements lies.
template <int ROWS, int COLUMNS, class F>
void gather(Frame& f, int kind, int first, int registers, F where, double (&matrix)[ROWS][COLUMNS]) {
    for (int i = 0; i < registers; ++i)
        for (int lane = 0; lane < LANES; ++lane)
            for (int half = 0; half < (kind == TF32 ? 1 : 2); ++half) {
                const Place p = where(kind, lane, i, half);
                matrix[p.row][p.column] = element(kind, f.reg<u32>(first + i)[lane] >> 16 * half);
            }
}
// To the sums of a row: a row of A times B.
inline void add_products(const double* a, const double* b, int K, int N, double* sums) {
    for (int k = 0; k < K; ++k)
        for (int j = 0; j < N; ++j) sums[j] += a[k] * b[k * N + j];
}

// a: kind, K, registers of A, of B, then D (4), A, B, C (4)
inline void run_mma(Frame& f) {
    const int kind = f.a[0], K = f.a[1], A = 8, B = A + f.a[2], C = B + f.a[3];
    double a[16][16], b[16][8], sums[16][8] = {};
    float out[4][LANES];
    gather(f, kind, A, f.a[2], left, a);
    gather(f, kind, B, f.a[3], right, b);
    for (int row = 0; row < 16; ++row) add_products(a[row], b[0], K, 8, sums[row]);
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

    Descriptor(u64 raw, bool transposed) : k_last(!transposed) {
        static const u32 rows[8] = {16, 0, 128, 0, 64, 0, 32, 0};  // by the kind of swizzle; 0: not known
        const auto part = [raw](int at) { return u32(raw >> at & 0x3FFF) << 4; };
        start = part(0), lead = part(16), stride = part(32), row = rows[raw >> 61], swizzle = row / 16 - 1;
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
    if (!d.row) return f.stop("matrix of a kind that the emulator does not know"), 0;
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

// a: kind, N, K, A in registers, transposed A, B, negated, whether to accumulate (-1 always, -2 never, or a predicate),
// descriptor of B, then A's descriptor or registers (4), D (N / 2)
inline void run_wgmma(Frame& f) {
    const int kind = f.a[0], N = f.a[1], K = f.a[2], accumulate = f.a[7];
    const bool keep = accumulate == -1 || (accumulate >= 0 && f.w.registers[accumulate] & 1);
    const double sign = f.a[6] ? -1 : 1;
    double a[16][16];
    std::vector<double> b(size_t(K) * N), sums(16 * N);
    std::vector<u64>& reads = f.w.products.reads;
    if (f.a[3]) gather(f, kind, 9, 4, left, a);
    const Descriptor other(f.reg<u64>(8)[0], f.a[5]), own(f.a[3] ? 0 : f.reg<u64>(9)[0], f.a[4]);
    for (int row = 0; row < 16 && !f.a[3] && !f.m.failed; ++row)
        for (int k = 0; k < K; ++k) a[row][k] = fetch(f, own, kind, f.w.id % 4 * 16 + row, k, reads);
    for (int k = 0; k < K && !f.m.failed; ++k)
        for (int j = 0; j < N; ++j) b[k * N + j] = fetch(f, other, kind, j, k, reads);
    for (int row = 0; row < 16; ++row) add_products(a[row], b.data(), K, N, &sums[row * N]);
    for (int i = 0; i < N / 2; ++i) f.w.products.registers.push_back({f.a[13 + i], f.instruction});
    for (int i = 0; i < N / 2; ++i)
        for (int lane = 0; lane < LANES; ++lane) {
            const Place p = accumulator(lane, i % 4);
            float& out = f.reg<float>(13 + i)[lane];
            out = towards_zero(sign * sums[p.row * N + i / 4 * 8 + p.column] + (keep ? double(out) : 0.0));
        }
}
inline void run_wgmma_commit(Frame& f) { f.w.product_groups.push_back(std::exchange(f.w.products, {})); }
inline void run_wgmma_wait(Frame& f) {
    for (; f.w.product_groups.size() > size_t(f.a[0]); f.w.product_groups.pop_front())
        release_reads(f, f.w.product_groups.front().reads);
}
