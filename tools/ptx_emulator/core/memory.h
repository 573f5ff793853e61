// Loads, stores, copies and matrices of 8 x 8 in memory, and what is checked at each of them.
#pragma once
#include "machine.h"

// Which two accesses were not ordered: in the order of Machine::conflict's results.
static const char* const RACES[3][3] = {
    {"read after another lane's write without a barrier of the warp",
     "read after another warp's write without a barrier", "read of what another program wrote"},
    {"write after another lane's write without a barrier of the warp",
     "write after another warp's write without a barrier", "write where another program wrote"},
    {"write after another lane's read without a barrier of the warp",
     "write after another warp's read without a barrier", "write where another program read"},
};

inline void races(Frame& f, Space& s, const Stamp& old, const char* const kinds[3], u64 address, int lane) {
    const int thread = f.thread(lane);
    int kind;
    if (old.program < 0 || (s.shared && old.program != f.m.program)) return;
    if (old.program != f.m.program) kind = 2;
    else if (old.thread == thread) return;
    else if (old.thread / LANES != f.w.id) kind = old.barrier == f.m.barrier ? 1 : -1;
    else kind = old.warp_barrier == f.w.barrier ? 0 : -1;
    if (kind >= 0) f.m.report(kinds[kind], f.instruction, address, thread, &old);
}

inline void under_way(Frame& f, const Cell& c, u64 address, int lane, bool writes) {
    Stamp other{f.m.program, f.thread(lane), c.copy};
    if (c.copy >= 0) f.report("access to where an asynchronous copy is under way", address, lane, &other);
    other.instruction = c.matrix_instruction;
    if (writes && c.matrix_reads)
        f.report("write to what an asynchronous matrix product may still read", address, lane, &other);
}

inline Stamp stamp(const Frame& f, int lane) {
    return {f.m.program, f.thread(lane), f.instruction, f.m.barrier, f.w.barrier, f.m.time};
}

// Until when a lane's read and another's write are not ordered. In global memory a shuffle, where all lanes meet, is
// enough: what was read may have passed through it. Shared memory is held to barriers.
inline u32 reads(const Frame& f, const Space& s) { return s.shared ? f.w.barrier : f.w.together; }

inline void note_read(Frame& f, Space& s, u64 address, int size, int lane) {
    for (u64 i = s.cell(address); i <= s.cell(address + size - 1); ++i) {
        Cell& c = s.cells[i];
        under_way(f, c, address, lane, false);
        if (s.shared && c.wrote.program != f.m.program)
            f.report("read of shared memory that nobody wrote", address, lane);
        races(f, s, c.wrote, RACES[0], address, lane);
        const bool same = c.read.program == f.m.program;
        if (!same || c.read.barrier != f.m.barrier) c.warps = 0;
        if (!same || c.read.thread / LANES != f.w.id || c.read.warp_barrier != reads(f, s)) c.lanes = 0;
        c.warps |= 1u << f.w.id, c.lanes |= 1u << lane;
        if (c.first_reader < 0) c.first_reader = f.m.program;
        c.read = stamp(f, lane);
        c.read.warp_barrier = reads(f, s);
    }
}

// Whether a write to a cell is in order. What is there already may be stored again: replicas do.
inline void check_write(Frame& f, Space& s, Cell& c, u64 address, int lane, bool same_value) {
    under_way(f, c, address, lane, true);
    if (same_value) return;
    races(f, s, c.wrote, RACES[1], address, lane);
    const bool here = c.read.program == f.m.program, now = here && c.read.barrier == f.m.barrier;
    const bool same_warp = c.read.thread / LANES == f.w.id;
    Stamp other = c.read;
    if (!s.shared && c.first_reader >= 0 && (c.first_reader != f.m.program || !here)) {
        if (here) other.program = c.first_reader, other.thread = -1;
        f.report(RACES[2][2], address, lane, &other);
    } else if (now && c.warps & ~(1u << f.w.id)) {
        f.report(RACES[2][1], address, lane, &other);
    } else if (here && same_warp && c.read.warp_barrier == reads(f, s) && c.lanes & ~(1u << lane)) {
        f.report(RACES[2][0], address, lane, &other);
    }
}

inline void note_write(Frame& f, Space& s, u64 address, int size, int lane, const u8* value) {
    const bool same = value && std::memcmp(s.at(address), value, size) == 0;
    for (u64 i = s.cell(address); i <= s.cell(address + size - 1); ++i) {
        Cell& c = s.cells[i];
        check_write(f, s, c, address, lane, same);
        if (!same || (s.shared && c.wrote.program != f.m.program)) c.wrote = stamp(f, lane);
    }
}

// Where bytes lie; null, and the end of the launch, if they are not all there or not aligned.
inline Space* find(Frame& f, bool shared, u64 address, int size, int lane) {
    Space* found = nullptr;
    if (shared) {
        address = u32(address);
        if (f.m.shared.holds(address, size)) found = &f.m.shared;
    } else {
        if (f.m.last_global && f.m.last_global->holds(address, size)) found = f.m.last_global;
        for (Space& s : f.m.global)
            if (!found && s.holds(address, size)) found = f.m.last_global = &s;
    }
    const char* const outside = shared ? "access beyond shared memory" : "access to memory that is no argument's";
    if (!found) f.stop(outside, address, lane);
    else if (address % size) f.stop("misaligned access", address, lane), found = nullptr;
    return found;
}

inline const u8* load(Frame& f, bool shared, u64 address, int size, int lane) {
    Space* s = find(f, shared, address, size, lane);
    if (!s) return nullptr;
    note_read(f, *s, address, size, lane);
    const u8* p = s->at(address);
    if (!shared && s->element > 1)
        for (int i = 0; i + s->element <= size; i += s->element)
            if (std::memcmp(p + i, &POISON, std::min(s->element, 4)) == 0)
                f.report("read of global memory that nobody wrote", address + i, lane);
    return p;
}

inline bool store(Frame& f, bool shared, u64 address, int size, int lane, const void* value) {
    Space* s = find(f, shared, address, size, lane);
    if (!s) return false;
    note_write(f, *s, address, size, lane, static_cast<const u8*>(value));
    std::memcpy(s->at(address), value, size);
    return true;
}

// a: bytes an element, elements, bytes of a register, address, offset, registers
template <bool SHARED> u64 address_of(const Frame& f, int lane, int i) {
    const s64 offset = f.a[i + 1];
    return SHARED ? u32(f.reg<u32>(i)[lane] + u32(offset)) : f.reg<u64>(i)[lane] + u64(offset);
}
template <bool SHARED> void run_load(Frame& f) {
    const int element = f.a[0], count = f.a[1], width = f.a[2];
    for (int lane = 0; lane < LANES && !f.m.failed; ++lane) {
        if (!f.has(lane)) continue;
        const u8* p = load(f, SHARED, address_of<SHARED>(f, lane, 3), element * count, lane);
        for (int i = 0; p && i < count; ++i) {
            u8* target = reinterpret_cast<u8*>(f.reg<u32>(5 + i)) + lane * width;
            std::memset(target, 0, width);
            std::memcpy(target, p + i * element, element);
        }
    }
}
template <bool SHARED> void run_store(Frame& f) {
    const int element = f.a[0], count = f.a[1], width = f.a[2];
    for (int i = 0; i < LANES && !f.m.failed; ++i) {
        const int lane = f.m.launch.order == 1 ? LANES - 1 - i : i;  // which one wins is open
        if (!f.has(lane)) continue;
        u8 value[32];
        for (int i = 0; i < count; ++i)
            std::memcpy(value + i * element, reinterpret_cast<u8*>(f.reg<u32>(5 + i)) + lane * width, element);
        store(f, SHARED, address_of<SHARED>(f, lane, 3), element * count, lane, value);
    }
}

inline void finish_copy(Frame& f, const Copy& c) {
    u8 value[16] = {};
    if (const u8* p = c.live ? load(f, false, c.from, c.size, c.lane) : value) std::memmove(value, p, c.live);
    Space& s = f.m.shared;
    for (u64 i = s.cell(c.to); i <= s.cell(c.to + c.size - 1); ++i) {
        s.cells[i].copy = -1;
        s.cells[i].wrote = stamp(f, c.lane);
        s.cells[i].wrote.instruction = c.instruction;
    }
    std::memcpy(s.at(c.to), value, c.size);
}
// a: to, offset, from, offset, bytes, bytes that are copied in a register (-1: all)
inline void run_copy(Frame& f) {
    for (int lane = 0; lane < LANES; ++lane) {
        if (!f.has(lane)) continue;
        const int size = f.a[4], live = f.a[5] < 0 ? size : int(f.reg<u32>(5)[lane]);
        const Copy c{address_of<true>(f, lane, 0), address_of<false>(f, lane, 2), size, live, lane, f.instruction};
        Space* s = find(f, true, c.to, size, lane);
        if (live < 0 || live > size) f.stop("copy of more bytes than it has", c.to, lane);
        if (!s || f.m.failed || (live && !find(f, false, c.from, size, lane))) return;
        const u64 begin = s->cell(c.to), end = s->cell(c.to + size - 1) + 1;
        for (u64 i = begin; i < end; ++i) check_write(f, *s, s->cells[i], c.to, lane, false);
        if (f.m.launch.order == 1) finish_copy(f, c);  // at the first moment; still not to be touched before the last
        for (u64 i = begin; i < end; ++i) s->cells[i].copy = f.instruction;
        f.w.copies.push_back(c);
    }
}
inline void run_copy_commit(Frame& f) { f.w.copy_groups.push_back(std::exchange(f.w.copies, {})); }
inline void finish_copies(Frame& f, s32 groups) {  // all but the last so many
    for (; s32(f.w.copy_groups.size()) > groups && !f.m.failed; f.w.copy_groups.pop_front())
        for (const Copy& c : f.w.copy_groups.front()) finish_copy(f, c);
}
inline void run_copy_wait(Frame& f) { finish_copies(f, f.a[0]); }
inline void run_copy_wait_all(Frame& f) { run_copy_commit(f), finish_copies(f, 0); }

// Row r of matrix i begins where lane 8i + r says. Lane l holds columns 2(l mod 4) and the next of row l / 4;
// transposed, of column l / 4.
template <class F> void each_pair(Frame& f, int count, bool transposed, int address, F visit) {
    for (int i = 0; i < count && !f.m.failed; ++i)
        for (int lane = 0; lane < LANES; ++lane)
            for (int e = 0; e < 2; ++e) {
                const int outer = lane >> 2, inner = 2 * (lane & 3) + e;
                const int row = transposed ? inner : outer, column = transposed ? outer : inner;
                const u64 begin = address_of<true>(f, 8 * i + row, address);
                if (begin % 16) return f.stop("misaligned row of a matrix", begin, lane);
                visit(i, lane, e, begin + 2 * column);
                if (f.m.failed) return;
            }
}
// a: matrices, transposed, address, offset, registers
inline void run_load_matrix(Frame& f) {
    u16 values[4][LANES][2];
    each_pair(f, f.a[0], f.a[1], 2, [&](int i, int lane, int e, u64 address) {
        if (const u8* p = load(f, true, address, 2, lane)) std::memcpy(&values[i][lane][e], p, 2);
    });
    for (int i = 0; i < f.a[0] && !f.m.failed; ++i) std::memcpy(f.reg<u32>(4 + i), values[i], sizeof values[i]);
}
inline void run_store_matrix(Frame& f) {
    each_pair(f, f.a[0], f.a[1], 2, [&](int i, int lane, int e, u64 address) {
        store(f, true, address, 2, lane, f.reg<u16>(4 + i) + 2 * lane + e);
    });
}
