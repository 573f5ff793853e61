// A launch and where it stands: programs, their warps, memory with what the checks remember of it, findings.
#pragma once
#include <deque>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "numbers.h"

constexpr int LANES = 32;
constexpr u32 ALL = 0xFFFFFFFFu;
constexpr u64 SHARED_BASE = 1024;  // swizzles are of addresses, so its alignment counts
constexpr u32 POISON = 0x7FFD7FFDu;  // a NaN of any format; what fresh global memory holds

struct Region {  // of global memory: the bytes of an argument
    u64 first, size, element;
};

struct Finding {
    const char* what;
    s32 instruction, other;  // the other access, -1 where there is none
    s32 program, thread, other_program, other_thread;
    u64 address;
};

struct Launch {  // as Python fills it
    const s32 *code, *offsets;
    const u32* image;  // registers of a warp when it begins
    u64 words;
    s32 threads, shared, grid[3];
    s32 specials[7];  // registers of %tid.x, %ctaid.x, .y, .z, %laneid, %warpid, %nctaid.x; -1: not used
    s32 shared_granule, global_granule;  // log2 of the bytes that are checked as one
    s32 order;  // 0: all in order, copies at the last moment; 1: backwards, copies at the first
    const Region* regions;
    s32 num_regions;
    u64 watched;  // address in global memory
    Finding* findings;
    s32 max_findings;
    s32 num_findings;  // results
    s32 writer;  // the instruction that last wrote to the watched address
    u64 instructions;
};

struct Stamp {  // of an access
    s32 program = -1, thread = -1, instruction = -1;
    u32 barrier = 0, warp_barrier = 0;
    u64 time = 0;
};

struct Cell {  // a granule of memory
    Stamp wrote, read;
    s32 first_reader = -1;         // program
    u32 warps = 0, lanes = 0;      // that read since read.barrier; of the last of them, since its read.warp_barrier
    s32 copy = -1;                 // instruction of the asynchronous copy under way to here
    u32 matrix_reads = 0;          // asynchronous matrix products that may still read this
    s32 matrix_instruction = -1;   // the last of them
};

struct Space {
    u8* data = nullptr;
    u64 first = 0, size = 0;
    int element = 1, granule = 0;
    bool shared = false;
    std::vector<Cell> cells;

    bool holds(u64 address, u64 bytes) const { return address >= first && address + bytes <= first + size; }
    u8* at(u64 address) { return data + (address - first); }
    u64 cell(u64 address) const { return (address >> granule) - (first >> granule); }
};

struct Copy {
    u64 to, from;
    int size, live, lane;  // live: bytes that are copied; zeros behind
    s32 instruction;
};

struct Products {  // of matrices, under way
    std::vector<u64> reads;                     // cells of shared memory
    std::vector<std::pair<s32, s32>> registers;  // that they write, and the instruction

    bool empty() const { return reads.empty() && registers.empty(); }
};

struct Warp {
    int id = 0;
    u32* registers = nullptr;
    s32 pc = 0;
    u32 active = ALL, alive = ALL;
    std::map<s32, u32> parked;  // lanes that went another way, by where they go on
    bool waiting = false;
    s32 barrier_at = -1;  // instruction
    u32 barrier = 1;      // how many bar.warp.sync and bar.sync it has passed
    u32 together = 1;     // the same and its shuffles: all lanes have come so far, and with them their reads
    u64 fence = 0;        // time of its last fence between the proxies
    bool polling = false;
    std::vector<Copy> copies;
    std::deque<std::vector<Copy>> copy_groups;
    s32 tensor_load = -1, tensor_store = -1;  // instructions that were not waited for
    Products products;
    std::deque<Products> product_groups;
};

struct TensorUse { u32 first, last; s32 instruction; };  // columns that a matrix product writes

struct MatrixBarrier {  // in shared memory
    u32 expected = 0, arrived = 0, phase = 0;
    std::vector<TensorUse> uses;  // of products that nobody has waited for
    std::vector<u64> reads;       // cells of shared memory that they read
};

struct Machine {
    Launch& launch;
    std::vector<Space> global;
    Space shared;
    std::vector<u8> shared_bytes;
    std::vector<u32> registers;
    std::vector<Warp> warps;
    std::vector<u32> tensor_memory;  // [lane][column]
    u32 tensor_columns = 0;
    std::map<u32, MatrixBarrier> barriers;  // by address
    std::vector<TensorUse> uncommitted;     // as in a barrier, of products that reach none yet
    std::vector<u64> unread;
    s32 program = 0;
    u32 barrier = 0;  // bar.sync passed, of all programs
    u64 time = 0;
    bool failed = false;
    Space* last_global = nullptr;
    std::set<std::tuple<const char*, s32, s32>> seen;

    explicit Machine(Launch& l);
    void run();
    void begin(s32 number);
    bool advance();  // every warp to where it waits; false at the end of the program
    void release();
    void report(const char* what, s32 instruction, u64 address, s32 thread, const Stamp* other = nullptr);
    void stop(const char* what, s32 instruction, u64 address, s32 thread) {
        report(what, instruction, address, thread);
        failed = true;
    }
};

// An instruction as one warp executes it.
struct Frame {
    Machine& m;
    Warp& w;
    const s32* a;  // operands
    u32 mask;      // lanes that execute it
    s32 instruction;

    template <class T> T* reg(int i) const { return reinterpret_cast<T*>(w.registers + a[i]); }
    u32& predicate(int i) const { return w.registers[a[i]]; }
    bool has(int lane) const { return mask >> lane & 1; }
    int leader() const { return __builtin_ctz(mask); }
    int thread(int lane) const { return w.id * LANES + lane; }
    void report(const char* what, u64 address, int lane, const Stamp* other = nullptr) const {
        m.report(what, instruction, address, thread(lane), other);
    }
    void stop(const char* what, u64 address = 0, int lane = 0) const {
        m.stop(what, instruction, address, thread(lane));
    }
};

using Run = void (*)(Frame&);
struct Operation {
    const char* names;      // in PTX, or of the decoder's own
    std::string signature;  // sizes of result and operands, p for a predicate; empty: the decoder knows
    Run run;
};

// The value of an operand or result in every lane; predicates are bits of a word.
template <class T> struct Lanes {
    const T* x;
    Lanes(const Frame& f, int i) : x(f.reg<T>(i)) {}
    T operator[](int lane) const { return x[lane]; }
};
template <> struct Lanes<bool> {
    u32 x;
    Lanes(const Frame& f, int i) : x(f.predicate(i)) {}
    bool operator[](int lane) const { return x >> lane & 1; }
};
template <class T, class F> inline void set(Frame& f, int i, F value) {
    T out[LANES];
    for (int lane = 0; lane < LANES; ++lane) out[lane] = value(lane);
    if constexpr (std::is_same_v<T, bool>) {
        u32 word = 0;
        for (int lane = 0; lane < LANES; ++lane) word |= u32(out[lane]) << lane;
        f.predicate(i) = (f.predicate(i) & ~f.mask) | (word & f.mask);
    } else if (f.mask == ALL) {
        std::memcpy(f.reg<T>(i), out, sizeof out);
    } else {
        for (int lane = 0; lane < LANES; ++lane)
            if (f.has(lane)) f.reg<T>(i)[lane] = out[lane];
    }
}
template <class D, class... X, class F, size_t... I> void each_lane(Frame& f, F value, std::index_sequence<I...>) {
    const std::tuple<Lanes<X>...> operands{Lanes<X>(f, int(I) + 1)...};
    set<D>(f, 0, [&](int lane) { return value(std::get<I>(operands)[lane]...); });
}
template <class D, class... X, class F> void each_lane(Frame& f, F value) {
    each_lane<D, X...>(f, value, std::index_sequence_for<X...>());
}
template <class... T> std::string signature() {
    return {(std::is_same_v<T, bool> ? 'p' : char('0' + sizeof(T)))...};
}
