// An interpreter of decoded PTX: a warp at a time, 32 lanes an instruction. build.py makes operations.h (the numbers of
// the operations) and lanewise.h (a case for each line of instructions.py).
#include "machine.h"
#include "scalar.h"
#include "operations.h"
#include "order.h"
#include "memory.h"
#include "matrix.h"

#define REGISTER(k) (w->registers + UNIT * (size_t)o[k])
#define U32(k) ((u32 *)REGISTER(k))
#define U64(k) ((u64 *)REGISTER(k))
#define EACH_ACTIVE for (int l = 0; l < LANES; l++) if (mask >> l & 1)

// --- registers

static inline void put(Warp *w, s32 to, int bytes, int l, const u8 *p) {
    u8 *d = unit(w, to);
    if (bytes == 8) { memcpy(d + 8 * l, p, 8); return; }
    u32 v = 0;
    memcpy(&v, p, bytes);
    memcpy(d + 4 * l, &v, 4);
}

static inline void get(const Warp *w, s32 of, int bytes, int l, u8 *p) {
    memcpy(p, unit(w, of) + (bytes == 8 ? 8 : 4) * l, bytes);
}

static u32 lanes_of(const u32 *p) {
    u32 r = 0;
    for (int l = 0; l < LANES; l++) r |= (p[l] & 1) << l;
    return r;
}

// --- lanes that go different ways

// The lanes with the lowest pc run, but for those that wait at a collective.
static void reschedule(Warp *w) {
    u32 lowest = FULL, able = w->alive & ~w->parked;
    if (!able) able = w->alive, w->parked = 0;
    for (int l = 0; l < LANES; l++)
        if ((able >> l & 1) && w->lane_pc[l] < lowest) lowest = w->lane_pc[l];
    w->active = 0;
    for (int l = 0; l < LANES; l++)
        if ((able >> l & 1) && w->lane_pc[l] == lowest) w->active |= 1u << l;
    w->pc = lowest;
    w->diverged = w->active != w->alive;
}

static void keep_pc(Warp *w) {
    for (int l = 0; l < LANES; l++) if (w->active >> l & 1) w->lane_pc[l] = w->pc;
}

// Lanes that come to a collective wait there for the others of their warp; 0 where others run now.
static int gathered(Warp *w) {
    if (w->active == w->alive) return 1;
    u32 others = w->alive & ~w->active & ~w->parked;
    keep_pc(w);
    w->parked |= w->active;
    reschedule(w);  // where all wait, those that wait at the same place go on together
    return !others;
}

static void need_whole(Machine *m, Warp *w, int i_warp, u32 mask) {
    if (mask != w->alive || w->alive != FULL) report(m, DIVERGED, w->pc, i_warp * LANES, mask, w->alive);
}

static void branch(Warp *w, u32 mask, u32 target) {
    if (!(w->active & ~mask)) { w->pc = target; return; }
    if (!mask) { w->pc++; return; }
    for (int l = 0; l < LANES; l++)
        if (w->active >> l & 1) w->lane_pc[l] = mask >> l & 1 ? target : w->pc + 1;
    reschedule(w);
}

// --- instructions of more than a line

static u32 special(const Machine *m, int which, int i_warp, int l) {  // decode.py: _SPECIALS
    switch (which) {
    case 0: return i_warp * LANES + l;
    case 3: case 4: case 5: return m->block[which - 3];
    case 6: case 7: case 8: return m->grid[which - 6];
    case 9: return l;
    case 10: return m->threads;
    case 11: return i_warp;
    case 12: return 1;
    default: return 0;
    }
}

// Between one register (o[0]) and its parts of imm[0] bytes.
static void split_or_join(Warp *w, const Instruction *I, const s32 *o, u32 mask) {
    int part = I->imm[0], n = I->n - 1, whole = part * n == 8 ? 8 : 4;
    EACH_ACTIVE {
        u8 bytes[8] = {0};
        if (I->op == OP_split) {
            get(w, o[0], whole, l, bytes);
            for (int k = 0; k < n; k++) if (o[1 + k] >= 0) put(w, o[1 + k], part, l, bytes + k * part);
        } else {
            for (int k = 0; k < n; k++) get(w, o[1 + k], part, l, bytes + k * part);
            put(w, o[0], whole, l, bytes);
        }
    }
}

// What a lane gets that reads nowhere: a NaN in any type.
static const u8 NOTHING[64] = {0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f};

// imm: bytes, values, offset, signed, whether the address has 64 bits; o: address, values
static void load_or_store(Machine *m, Warp *w, int i_warp, const Instruction *I, const s32 *o, u32 mask) {
    int size = I->imm[0], n = I->imm[1], bytes = size * n;
    int is_global = I->op == OP_ld_global || I->op == OP_st_global, writes = I->op == OP_st_global || I->op == OP_st_shared;
    u64 address[LANES];
    u32 shared[LANES];
    for (int l = 0; l < LANES; l++) {
        address[l] = (I->imm[4] ? U64(0)[l] : U32(0)[l]) + (s64)I->imm[2];
        shared[l] = address[l];
    }
    EACH_ACTIVE {
        u8 value[64];
        int thread = i_warp * LANES + l;
        if (writes) for (int k = 0; k < n; k++) get(w, o[1 + k], size, l, value + k * size);
        u8 *p = is_global ? global_at(m, w->pc, thread, address[l], bytes, writes, WEAK)
                          : shared_at(m, w, w->pc, thread, shared[l], bytes, size, writes ? WRITE : READ, value);
        if (writes) { if (p) memcpy(p, value, bytes); continue; }
        for (int k = 0; k < n; k++) {
            if (o[1 + k] < 0) continue;
            put(w, o[1 + k], size, l, p ? p + k * size : NOTHING);
            u32 *r = U32(1 + k) + l;
            if (I->imm[3]) *r = size == 1 ? (u32)(s32)(s8)*r : (u32)(s32)(s16)*r;
        }
    }
    if (is_global) count_sectors(m, w->pc, mask, address, bytes);
    else count_wavefronts(m, w->pc, mask, shared, bytes);
}

// imm: bytes, offsets; o: shared address, global address, bytes that are read (the rest is 0; all without it)
static void copy_async(Machine *m, Warp *w, int i_warp, const Instruction *I, const s32 *o, u32 mask) {
    if (w->n_copies == MOST_COPIES) land(m, w, i_warp, FULL);
    Copy *c = &w->copies[w->n_copies++];
    c->mask = mask, c->group = w->committed, c->pc = w->pc, c->size = I->imm[0];
    u32 read = 0;
    for (int l = 0; l < LANES; l++) {
        c->to[l] = U32(0)[l] + I->imm[1];
        c->from[l] = U64(1)[l] + (s64)I->imm[2];
        c->filled[l] = I->n > 2 ? U32(2)[l] : (u32)c->size;
        if (!(mask >> l & 1)) continue;
        int thread = i_warp * LANES + l;
        if (c->filled[l] > (u32)c->size) report(m, OUTSIDE_SHARED, w->pc, thread, c->to[l], c->filled[l]);
        if (c->filled[l]) read |= 1u << l;
        if (c->from[l] & (c->size - 1)) report(m, MISALIGNED, w->pc, thread, c->from[l], c->size);
        shared_at(m, w, w->pc, thread, c->to[l], c->size, 1, ISSUE, 0);
    }
    count_sectors(m, w->pc, read, c->from, c->size);
    if (!m->config.late) land(m, w, i_warp, FULL);
}

// imm: 0 up, 1 down, 2 bfly, 3 idx; the clamp and the segment mask; o: to, from, lane, whether it was in range
static void shuffle(Warp *w, const Instruction *I, const s32 *o, u32 mask) {
    u32 value[LANES], clamp = I->imm[1] & 31, segment = (I->imm[1] >> 8) & 31;
    memcpy(value, REGISTER(1), sizeof value);
    EACH_ACTIVE {
        u32 b = U32(2)[l] & 31, least = l & segment, most = least | (clamp & ~segment);
        s32 j = I->imm[0] == 0 ? l - (s32)b : I->imm[0] == 1 ? l + (s32)b : I->imm[0] == 2 ? l ^ (s32)b
              : (s32)(least | (b & ~segment));
        int in_range = I->imm[0] == 0 ? j >= (s32)most : j <= (s32)most;
        U32(0)[l] = value[in_range ? j : l];
        if (I->n > 3) U32(3)[l] = in_range ? FULL : 0;
    }
}

// imm: 0 ballot, 1 any, 2 all
static void vote(const Instruction *I, Warp *w, const s32 *o, u32 mask) {
    u32 found = lanes_of(U32(1)) & mask;
    u32 value = I->imm[0] == 0 ? found : (I->imm[0] == 1 ? found != 0 : found == mask) ? FULL : 0;
    EACH_ACTIVE U32(0)[l] = value;
}

// Of decode.py's _REDUCTIONS; integers of less than 64 bits come extended by their sign, if they have one.
static u64 combined(int which, int is_signed, u64 a, u64 b) {
    int is_less = is_signed ? (s64)a < (s64)b : a < b;
    switch (which) {
    case 0: return a + b;
    case 1: return is_less ? a : b;
    case 2: return is_less ? b : a;
    case 3: return a & b;
    case 4: return a | b;
    default: return a ^ b;
    }
}

static u64 extended(u32 x, int is_signed) { return is_signed ? (u64)(s64)(s32)x : x; }

// imm: decode.py's _REDUCTIONS; signed
static void reduce(const Instruction *I, Warp *w, const s32 *o, u32 mask) {
    u64 r = extended(U32(1)[__builtin_ctz(mask)], I->imm[1]);
    u32 others = mask & (mask - 1);
    for (int l = 0; l < LANES; l++)
        if (others >> l & 1) r = combined(I->imm[0], I->imm[1], r, extended(U32(1)[l], I->imm[1]));
    EACH_ACTIVE U32(0)[l] = r;
}

// imm: bytes, _REDUCTIONS, signed, offset, scope, how it orders; o: address, value, what was there (if asked for)
static void atomic(Machine *m, Warp *w, int i_warp, const Instruction *I, const s32 *o, u32 mask) {
    int size = I->imm[0], is_signed = I->imm[2], how = m->config.check_global ? I->imm[5] : 0;
    u64 address[LANES];
    if ((how & RELEASES) && m->releases < MOST_RELEASES) m->releases++;
    EACH_ACTIVE {
        int thread = i_warp * LANES + l;
        address[l] = U64(0)[l] + (s64)I->imm[3];
        u8 *p = global_at(m, w->pc, thread, address[l], size, 1, I->imm[4]);
        if (p) {
            u64 before = 0, value = 0;
            memcpy(&before, p, size);
            get(w, o[1], size, l, (u8 *)&value);
            if (size == 4) before = extended(before, is_signed), value = extended(value, is_signed);
            u64 after = combined(I->imm[1], is_signed, before, value);
            memcpy(p, &after, size);
            order(m, thread, address[l], how);
            if (I->n > 2 && o[2] >= 0) put(w, o[2], size, l, (u8 *)&before);
        } else if (I->n > 2 && o[2] >= 0) put(w, o[2], size, l, NOTHING);
    }
    count_sectors(m, w->pc, mask, address, size);
}

// --- a warp, a launch

// Runs until the warp stands at a barrier (1) or has ended (0).
static int run_warp(Machine *m, Warp *w, int i_warp) {
    for (;;) {
        const Instruction *I = &m->code[w->pc];
        if (w->diverged && I->leader && !(w->parked & w->active)) {  // others may have come here: the lowest goes on
            keep_pc(w);
            reschedule(w);
            I = &m->code[w->pc];
        }
        if (I->collective && w->diverged) {
            u32 here = w->pc;
            if (!gathered(w)) continue;
            if (w->pc != here || w->active != w->alive) report(m, DIVERGED, w->pc, i_warp * LANES, w->active, w->alive);
            I = &m->code[w->pc];
        }
        const s32 *o = m->operands + I->operands;
        const int pc = w->pc;
        u32 mask = w->active;
        if (I->guard >= 0) {
            u32 g = lanes_of((u32 *)unit(w, I->guard));
            mask &= I->negated ? ~g : g;
        }
        m->counts[pc].warps++;
        m->counts[pc].lanes += __builtin_popcount(mask);
        if (++m->executed > m->config.limit) { report(m, TOO_LONG, pc, i_warp * LANES, 0, 0); return 0; }
        if (!mask && I->op >= FIRST_SKIPPED) { w->pc++; continue; }
        switch (I->op) {
        case OP_bra: branch(w, mask, I->imm[0]); continue;
        case OP_ret:
            if (w->n_copies) land(m, w, i_warp, FULL);
            w->alive &= ~mask;
            if (!w->alive) return 0;
            w->active &= ~mask;
            if (!w->active) { reschedule(w); continue; }
            break;
        case OP_bar:
            if (mask != w->alive) report(m, DIVERGED, pc, i_warp * LANES, mask, w->alive);
            w->pc++;
            w->barrier = 1 + I->imm[0];
            return 1;
        case OP_nop: break;
        case OP_warpsync: w->time = (w->time + 1) & 255; break;
        case OP_commit: w->committed++; break;
        case OP_wait:
            if (m->config.late)
                land(m, w, i_warp, I->imm[0] < 0 ? FULL : w->committed > (u32)I->imm[0] ? w->committed - I->imm[0] : 0);
            break;
        case OP_special: EACH_ACTIVE U32(0)[l] = special(m, I->imm[0], i_warp, l); break;
        case OP_ldparam: EACH_ACTIVE put(w, o[0], I->imm[0], l, m->params + I->imm[1]); break;
        case OP_split: case OP_join: split_or_join(w, I, o, mask); break;
        case OP_ld_global: case OP_st_global: case OP_ld_shared: case OP_st_shared:
            load_or_store(m, w, i_warp, I, o, mask);
            break;
        case OP_atom: atomic(m, w, i_warp, I, o, mask); break;
        case OP_cp_async: copy_async(m, w, i_warp, I, o, mask); break;
        case OP_shfl: need_whole(m, w, i_warp, mask); shuffle(w, I, o, mask); break;
        case OP_vote: vote(I, w, o, mask); break;
        case OP_elect: EACH_ACTIVE U32(0)[l] = l == __builtin_ctz(mask) ? FULL : 0; break;
        case OP_redux: need_whole(m, w, i_warp, mask); reduce(I, w, o, mask); break;
        case OP_ldmatrix: case OP_stmatrix: move_matrix(m, w, i_warp, I, o, mask); break;
        case OP_mma: need_whole(m, w, i_warp, mask); mma(w, I, o); break;
        case OP_wgmma: need_whole(m, w, i_warp, mask); wgmma(m, w, i_warp, I, o); break;
        #include "lanewise.h"
        }
        w->pc++;
    }
}

static u64 draw(u64 *state) {
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return *state >> 33;
}

// The order in which programs run, and warps until their next barrier: 0 first to last, 1 last to first, 2 drawn anew
// each time.
static void arrange(const Machine *m, u32 *turns, u32 n, u64 *random) {
    for (u32 i = 0; i < n; i++) turns[i] = m->config.order == 1 ? n - 1 - i : i;
    if (m->config.order == 2)
        for (u32 i = n; i > 1; i--) {
            u32 j = draw(random) % i, t = turns[i - 1];
            turns[i - 1] = turns[j], turns[j] = t;
        }
}

static void run_program(Machine *m, Warp *warps, u32 *turns, u64 *random) {
    next_epoch(m, 1);
    memset(m->shared, 0xcd, m->shared_size);
    for (int i = 0; i < m->warps; i++) {
        Warp *w = &warps[i];
        int threads = m->threads - i * LANES;
        w->alive = w->active = threads >= LANES ? FULL : (1u << threads) - 1;
        w->pc = w->diverged = w->parked = w->time = w->committed = w->barrier = w->n_copies = 0;
    }
    for (;;) {
        u32 at = 0;
        int living = 0, agree = 1;
        arrange(m, turns, m->warps, random);
        for (int k = 0; k < m->warps; k++) {
            Warp *w = &warps[turns[k]];
            if (!w->alive) continue;
            if (!run_warp(m, w, turns[k])) { w->alive = 0; continue; }
            living++;
            if (at && at != w->barrier) agree = 0;
            at = w->barrier;
        }
        if (!living) return;
        if (!agree) { report(m, DEADLOCK, 0, 0, 0, living); return; }
        for (int i = 0; i < m->warps; i++) warps[i].barrier = 0;
        next_epoch(m, 0);
    }
}

int run_launch(const Instruction *code, const s32 *operands, int units, const u8 *constants, int constant_units,
               const u8 *params, const u32 *grid, int threads, u32 shared_size, const Region *regions, int n_regions,
               const Config *config, Count *counts, Error *errors) {
    Machine m = {code, operands, units, threads, (threads + LANES - 1) / LANES, params, {grid[0], grid[1], grid[2]}};
    m.regions = regions, m.n_regions = n_regions, m.config = *config, m.counts = counts, m.errors = errors;
    m.shared_size = shared_size;
    m.shared = calloc(shared_size + 16, 1);
    m.shadow = calloc(shared_size + 16, sizeof(SharedShadow));
    m.epoch = 1, m.programs = grid[0] * grid[1] * grid[2];
    m.held = calloc(threads, sizeof(Known *));
    m.global_shadow = calloc(n_regions + 1, sizeof(void *));
    if (config->check_global)
        for (int i = 0; i < n_regions; i++)
            m.global_shadow[i] = calloc(regions[i].high - regions[i].low + 1, sizeof(GlobalShadow));
    Warp *warps = calloc(m.warps, sizeof(Warp));
    for (int i = 0; i < m.warps; i++) {
        warps[i].registers = aligned_alloc(UNIT, UNIT * (size_t)units);
        memset(warps[i].registers, 0x7f, UNIT * (size_t)units);  // read before it is written: far away
        memcpy(warps[i].registers, constants, UNIT * (size_t)constant_units);
        warps[i].copies = malloc(MOST_COPIES * sizeof(Copy));
    }
    u32 *turns = malloc(m.warps * sizeof(u32)), *programs = malloc(m.programs * sizeof(u32));
    u64 random = config->seed * 2 + 1;
    arrange(&m, programs, m.programs, &random);
    for (u32 k = 0; k < m.programs && m.executed <= config->limit; k++) {
        u32 i = m.i_block = programs[k];
        m.block[0] = i % grid[0], m.block[1] = i / grid[0] % grid[1], m.block[2] = i / grid[0] / grid[1];
        run_program(&m, warps, turns, &random);
    }
    next_epoch(&m, 1);
    for (int i = 0; i < m.warps; i++) free(warps[i].registers), free(warps[i].copies);
    for (int i = 0; i < n_regions; i++) free(m.global_shadow[i]);
    for (int i = 0; i < m.n_tickets; i++) free(m.tickets[i].released);
    free(m.global_shadow), free(warps), free(turns), free(programs), free(m.shared), free(m.shadow);
    free(m.held), free(m.known), free(m.tickets);
    return m.n_errors;
}
