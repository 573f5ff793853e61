// Executes a PTX program that Python decoded: one warp after the other, each from barrier to barrier, every instruction
// in all its lanes at once. Python calls `operations` for what there is, and `launch` for each launch.
#include <string>

#include "memory.h"
#include "matrix.h"
#include "tensor_memory.h"

#define OP1(NAMES, D, X, VALUE) \
    {NAMES, signature<D, X>(), [](Frame& f) { each_lane<D, X>(f, [](X x) -> D { return VALUE; }); }},
#define OP2(NAMES, D, X, Y, VALUE) \
    {NAMES, signature<D, X, Y>(), [](Frame& f) { each_lane<D, X, Y>(f, [](X x, Y y) -> D { return VALUE; }); }},
#define OP3(NAMES, D, X, Y, Z, VALUE) {NAMES, signature<D, X, Y, Z>(), [](Frame& f) { \
    each_lane<D, X, Y, Z>(f, [](X x, Y y, Z z) -> D { return VALUE; }); }},

static void go_on(Warp& w) {  // where the lanes are that are furthest behind
    w.pc = w.parked.begin()->first;
    w.active = w.parked.begin()->second;
    w.parked.erase(w.parked.begin());
}
static void park(Warp& w, s32 pc, u32 lanes) { w.parked[pc] |= lanes; }

// a: where to go on
static void run_branch(Frame& f) {
    if (f.mask != f.w.active) park(f.w, f.w.pc, f.w.active & ~f.mask);
    f.w.active = f.mask;
    f.w.pc = f.a[0];
}
static void run_return(Frame& f) {
    f.w.alive &= ~f.mask;
    f.w.active &= ~f.mask;
    if (f.w.alive) return;
    if (f.w.copies.size() + f.w.copy_groups.size()) f.stop("end with an asynchronous copy under way");
    if (f.w.tensor_store >= 0 || f.w.tensor_load >= 0) f.stop("end with an access to tensor memory under way");
    if (!f.w.products.empty() || f.w.product_groups.size()) f.stop("end with an asynchronous matrix product under way");
}
static void run_barrier(Frame& f) {
    if (f.mask != f.w.alive) return f.stop("barrier that a part of the warp does not reach");
    f.w.waiting = true;
    f.w.barrier_at = f.instruction;
    ++f.w.barrier, ++f.w.together;
}
// a: mode, result, predicate, value, lane, clamp
static void run_shuffle(Frame& f) {
    u32 out[LANES], inside = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        const int by = f.reg<u32>(4)[lane] & 31, clamp = f.reg<u32>(5)[lane] & 31;
        const int segment = f.reg<u32>(5)[lane] >> 8 & 31, first = lane & segment, last = first | (clamp & ~segment);
        const int from[4] = {lane ^ by, first | (by & ~segment), lane - by, lane + by}, j = from[f.a[0]];
        const bool good = f.a[0] == 2 ? j >= last : j <= last;
        if (good && !f.has(j)) return f.stop("shuffle from a lane that takes no part", 0, lane);
        out[lane] = f.reg<u32>(3)[good ? j : lane];
        inside |= u32(good) << lane;
    }
    set<u32>(f, 1, [&](int lane) { return out[lane]; });
    set<bool>(f, 2, [&](int lane) { return inside >> lane & 1; });
    f.w.together += f.mask == ALL;
}
// a: leading lane, predicate
static void run_elect(Frame& f) {
    set<u32>(f, 0, [&](int) { return f.leader(); });
    set<bool>(f, 1, [&](int lane) { return lane == f.leader(); });
}

// Names that begin with "=" want the whole warp.
static const std::vector<Operation>& table() {
    static const std::vector<Operation> all = {
#include "registers.inc"
        {"bra", "", run_branch}, {"ret exit", "", run_return}, {"nop", "", [](Frame&) {}},
        {"trap", "", [](Frame& f) { f.stop("trap"); }}, {"bar.sync", "", run_barrier},
        {"=bar.warp.sync", "", [](Frame& f) { ++f.w.barrier, ++f.w.together; }},
        {"fence.proxy.async", "", [](Frame& f) { f.w.fence = f.m.time; }}, {"shfl.sync", "", run_shuffle}, {"elect.sync", "", run_elect},
        {"ld.global", "", run_load<false>}, {"ld.shared", "", run_load<true>},
        {"st.global", "", run_store<false>}, {"st.shared", "", run_store<true>},
        {"cp.async", "", run_copy}, {"cp.async.commit_group", "", run_copy_commit},
        {"cp.async.wait_group", "", run_copy_wait}, {"cp.async.wait_all", "", run_copy_wait_all},
        {"=ldmatrix", "", run_load_matrix}, {"=stmatrix", "", run_store_matrix}, {"=mma", "", run_mma},
        {"=wgmma.mma_async", "", run_wgmma}, {"=wgmma.commit_group", "", run_wgmma_commit},
        {"=wgmma.wait_group", "", run_wgmma_wait},
        TENSOR_OPERATIONS
    };
    return all;
}

Machine::Machine(Launch& l) : launch(l) {
    for (int i = 0; i < l.num_regions; ++i) {
        const Region& r = l.regions[i];
        Space s{reinterpret_cast<u8*>(r.first), r.first, r.size, int(r.element), l.global_granule, false, {}};
        s.cells.resize(s.cell(r.first + r.size - 1) + 1);
        global.push_back(std::move(s));
    }
    shared_bytes.resize(l.shared + 16);
    shared = {shared_bytes.data(), SHARED_BASE, u64(l.shared), 1, l.shared_granule, true, {}};
    shared.cells.resize(shared.cell(SHARED_BASE + l.shared) + 1);
    warps.resize((l.threads + LANES - 1) / LANES);
    registers.resize(warps.size() * l.words + 16);
}

void Machine::report(const char* what, s32 instruction, u64 address, s32 thread, const Stamp* other) {
    const Stamp none, &o = other ? *other : none;
    if (launch.num_findings == launch.max_findings || !seen.insert({what, instruction, o.instruction}).second) return;
    launch.findings[launch.num_findings++] = {
        what, instruction, o.instruction, program, thread, o.program, o.thread, address};
}

void Machine::begin(s32 number) {
    program = number;
    ++barrier;
    barriers.clear(), uncommitted.clear(), unread.clear();
    tensor_columns = 0;
    std::fill(shared_bytes.begin(), shared_bytes.end(), 0xFF);
    for (Cell& c : shared.cells) c.copy = -1, c.matrix_reads = 0;
    const u64 begin = (reinterpret_cast<u64>(registers.data()) + 63) & ~63ull;
    const s32 *grid = launch.grid, x = number % grid[0], y = number / grid[0] % grid[1], z = number / grid[0] / grid[1];
    for (size_t i = 0; i < warps.size(); ++i) {
        Warp& w = warps[i] = Warp();
        w.id = int(i);
        w.registers = reinterpret_cast<u32*>(begin) + i * launch.words;
        std::memcpy(w.registers, launch.image, launch.words * sizeof(u32));
        for (s32 lane = 0; lane < LANES; ++lane) {
            const s32 values[7] = {w.id * LANES + lane, x, y, z, lane, w.id, grid[0]};
            for (int k = 0; k < 7; ++k)
                if (launch.specials[k] >= 0) w.registers[launch.specials[k] + lane] = u32(values[k]);
        }
    }
}

// Arithmetic on registers that a product may still write. To copy them is allowed: the assembler waits then.
static void check_registers(Frame& f, const Operation& operation) {
    if (operation.signature.empty() || std::strncmp(operation.names, "mov", 3) == 0) return;
    const auto check = [&](const Products& products) {
        for (const auto& [place, instruction] : products.registers)
            if (std::find(f.a, f.a + operation.signature.size(), place) != f.a + operation.signature.size()) {
                const Stamp other{f.m.program, f.thread(0), instruction};
                f.report("use of a register that a matrix product may still write", 0, 0, &other);
            }
    };
    check(f.w.products);
    for (const Products& group : f.w.product_groups) check(group);
}

// Until the warp waits, ends or fails.
static void step(Machine& m, Warp& w) {
    const std::vector<Operation>& operations = table();
    while (!m.failed && !w.waiting && !w.polling && w.alive) {
        if (!w.parked.empty()) {
            if (!w.active) go_on(w);
            else if (w.parked.begin()->first < w.pc) park(w, w.pc, w.active), go_on(w);
            if (auto met = w.parked.find(w.pc); met != w.parked.end()) w.active |= met->second, w.parked.erase(met);
        }
        const s32 at = w.pc++, *code = m.launch.code + m.launch.offsets[at];
        Frame f{m, w, code + 3, w.active, at};
        if (code[1] >= 0) f.mask &= code[2] ? ~w.registers[code[1]] : w.registers[code[1]];
        ++m.launch.instructions, ++m.time;
        if (!f.mask) continue;
        const Operation& operation = operations[code[0]];
        if (!w.products.empty() || !w.product_groups.empty()) check_registers(f, operation);
        if (*operation.names == '=' && f.mask != ALL) f.stop("instruction of a whole warp that a part of it executes");
        else operation.run(f);
    }
}

// The i-th of n programs, warps or lanes in the launch's order.
static s32 in_order(const Launch& launch, s32 i, s32 n) { return launch.order ? n - 1 - i : i; }

bool Machine::advance() {
    bool running = false, moved = false;
    for (s32 i = 0; i < s32(warps.size()); ++i) {
        Warp& w = warps[in_order(launch, i, s32(warps.size()))];
        if (!w.alive || w.waiting) continue;
        const bool polled = w.polling;
        const s32 pc = w.pc;
        w.polling = false;
        step(*this, w);
        running |= w.alive && !w.waiting;
        moved |= !polled || w.waiting || w.pc != pc;
    }
    if (failed) return false;
    if (!running) release();
    else if (!moved) stop("deadlock: all warps wait for barriers in memory", warps[0].pc, 0, 0);
    return !failed && std::any_of(warps.begin(), warps.end(), [](const Warp& w) { return w.alive; });
}

void Machine::release() {
    const Warp* first = nullptr;
    for (const Warp& w : warps)
        if (w.waiting && (!first || w.barrier_at == first->barrier_at)) first = first ? first : &w;
        else if (w.waiting) report("warps wait at different barriers", w.barrier_at, 0, w.id * LANES);
    if (!first) return;
    for (Warp& w : warps) {
        if (!w.alive) return stop("barrier that an ended warp does not reach", first->barrier_at, 0, w.id * LANES);
        w.waiting = false;
    }
    ++barrier;
}

void Machine::run() {
    const s32 programs = launch.grid[0] * launch.grid[1] * launch.grid[2];
    for (s32 i = 0; i < programs; ++i) {
        begin(in_order(launch, i, programs));
        while (advance()) {}
        if (tensor_columns) report("end without a release of tensor memory", warps[0].pc - 1, 0, 0);
        if (failed) return;
    }
    for (const Space& s : global)
        if (s.holds(launch.watched, 1)) launch.writer = s.cells[s.cell(launch.watched)].wrote.instruction;
}

extern "C" void launch(Launch* l) { Machine(*l).run(); }

extern "C" const char* operations() {
    static const std::string text = [] {
        std::string lines;
        for (const Operation& o : table()) lines += std::string(o.names + (*o.names == '=')) + ":" + o.signature + "\n";
        return lines;
    }();
    return text.c_str();
}
