// Global and shared memory: where an access leads, what is wrong with it, and what it costs.

// --- global memory

// scope: how far the access is an atomic (order.h); atomics write.
static void watch_global(Machine *m, GlobalShadow *s, int pc, int thread, u64 address, int bytes, int writes,
                         int scope) {
    u32 me = number(m, thread), now = time_of(m, scope);
    for (int b = 0; b < bytes; b++, s++) {
        u32 other = unordered(m, thread, me, scope, s->writer, s->write_time) ? s->writer
                  : writes && unordered(m, thread, me, scope, s->reader, s->read_time) ? s->reader : 0;
        if (other) report(m, GLOBAL_RACE, pc, thread, address + b, (other & ~OTHERS) - 1);
        if (writes) {
            s->writer = me, s->write_time = now;
        } else {
            if (!unordered(m, thread, me, WEAK, s->reader, s->read_time)) s->reader = me;
            else s->reader = s->reader != MANY && s->read_time >> 8 >= m->first_epoch ? me | OTHERS : MANY;
            s->read_time = now;
        }
    }
}

static u8 *global_at(Machine *m, int pc, int thread, u64 address, int bytes, int writes, int scope) {
    u64 i = (address >> 40) - 1;
    if (i >= (u64)m->n_regions) { report(m, OUT_OF_BOUNDS, pc, thread, address, 0); return 0; }
    const Region *r = &m->regions[i];
    u64 host = (r->host & ~0xfffffull) + (address & 0xffffffffffull);
    if (host < r->low || host + bytes > r->high) {
        report(m, OUT_OF_BOUNDS, pc, thread, address, host - r->low);
        return 0;
    }
    if (host & (bytes - 1)) { report(m, MISALIGNED, pc, thread, host, bytes); return 0; }
    if (m->config.check_global)
        watch_global(m, m->global_shadow[i] + (host - r->low), pc, thread, address, bytes, writes, scope);
    return (u8 *)host;
}

static int by_value(const void *a, const void *b) {
    u64 x = *(u64 *)a, y = *(u64 *)b;
    return x < y ? -1 : x > y;
}

// Sectors of 32 bytes that a request touches, beside the fewest that hold as many bytes.
static void count_sectors(Machine *m, int pc, u32 mask, const u64 *address, int bytes) {
    u64 sectors[LANES * 2];
    int n = 0, kept = 0, sorted = 1;
    for (int l = 0; l < LANES; l++)
        if (mask >> l & 1)
            for (u64 s = address[l] >> 5; s <= (address[l] + bytes - 1) >> 5; s++) {
                if (n && sectors[n - 1] == s) continue;
                if (n && sectors[n - 1] > s) sorted = 0;
                sectors[n++] = s;
            }
    if (!sorted) qsort(sectors, n, 8, by_value);
    for (int i = 0; i < n; i++) kept += i == 0 || sectors[i] != sectors[i - 1];
    m->counts[pc].units += kept;
    m->counts[pc].ideal += (__builtin_popcount(mask) * bytes + 31) / 32;
}

// --- shared memory

// Two accesses are ordered by a barrier of the program between them, or of the warp for lanes of one warp.
static inline int concurrent(const Machine *m, u32 me, u32 now, u32 other, u32 then) {
    if (other == 0 || other == me || (then >> 8) < m->first_epoch) return 0;
    if (other < SEVERAL && (other - 1) / LANES == (me - 1) / LANES) return then == now;
    return (then >> 8) == (now >> 8);
}

// ISSUE and LAND are the two ends of a cp.async's write: when it is asked for, and when it is waited for.
enum { READ, WRITE, ISSUE, LAND };

// Whether two values are the same, or both NaN: a chip gives all NaNs the same bits, and the processor here does not.
static int is_same(const u8 *a, const u8 *b, int size) {
    if (!memcmp(a, b, size)) return 1;
    f32 x, y; f64 v, w;
    if (size == 4) { memcpy(&x, a, 4), memcpy(&y, b, 4); return x != x && y != y; }
    if (size == 8) { memcpy(&v, a, 8), memcpy(&w, b, 8); return v != v && w != w; }
    return 0;
}

// size: of an element; value: what is written, where two lanes may write the same.
static u8 *shared_at(Machine *m, const Warp *w, int pc, int thread, u32 address, int bytes, int size, int how,
                     const u8 *value) {
    u32 at = address - SHARED_BASE;
    if (at > m->shared_size || at + bytes > m->shared_size) {
        report(m, OUTSIDE_SHARED, pc, thread, address, bytes);
        return 0;
    }
    if (address & (bytes - 1)) { report(m, MISALIGNED, pc, thread, address, bytes); return 0; }
    u8 *p = m->shared + at;
    if (!m->config.check_shared) return p;
    u32 me = thread + 1, now = m->epoch << 8 | w->time;
    for (int b = 0; b < bytes; b++) {
        SharedShadow *s = &m->shadow[at + b];
        if (how != LAND && s->pending) report(m, PENDING, pc, thread, address, s->pending - 1);
        if (how == READ) {
            if (!s->writer || (s->write_time >> 8) < m->first_epoch) report(m, UNINITIALISED, pc, thread, address, b);
            if (concurrent(m, me, now, s->writer, s->write_time)) report(m, SHARED_RACE, pc, thread, address, s->writer - 1);
            s->reader = (s->read_time >> 8) == (now >> 8) && s->reader != me ? SEVERAL : me;
            s->read_time = now;
        } else {
            int agrees = value && is_same(p + b / size * size, value + b / size * size, size);
            if (!agrees && concurrent(m, me, now, s->writer, s->write_time))
                report(m, SHARED_RACE, pc, thread, address, s->writer - 1);
            if (concurrent(m, me, now, s->reader, s->read_time)) report(m, SHARED_RACE, pc, thread, address, s->reader - 1);
            s->pending = how == ISSUE ? me : 0;
            if (how != ISSUE) s->writer = me, s->write_time = now;
        }
    }
    return p;
}

// Wavefronts of a request: 8 bytes a lane go by half warps, 16 by quarters; in each, the most different words of a bank.
static void count_wavefronts(Machine *m, int pc, u32 mask, const u32 *address, int bytes) {
    int phases = bytes <= 4 ? 1 : bytes / 4, each = LANES / phases;
    for (int p = 0; p < phases; p++) {
        u32 words[LANES][LANES];
        int n[LANES] = {0}, most = 0;
        for (int l = p * each; l < (p + 1) * each; l++) {
            if (!(mask >> l & 1)) continue;
            for (int k = 0; k < (bytes + 3) / 4; k++) {
                u32 word = address[l] / 4 + k, bank = word & 31;
                int i = 0;
                while (i < n[bank] && words[bank][i] != word) i++;
                if (i == n[bank] && n[bank] < LANES) words[bank][n[bank]++] = word;
                if (n[bank] > most) most = n[bank];
            }
        }
        m->counts[pc].units += most;
        m->counts[pc].ideal += most > 0;
    }
}

// --- asynchronous copies

// The copies of groups before `up_to` are made now.
static void land(Machine *m, Warp *w, int i_warp, u32 up_to) {
    int kept = 0;
    for (int i = 0; i < w->n_copies; i++) {
        Copy *c = &w->copies[i];
        if (c->group >= up_to) { if (kept != i) w->copies[kept] = *c; kept++; continue; }
        for (int l = 0; l < LANES; l++) {
            if (!(c->mask >> l & 1)) continue;
            u8 value[16] = {0};
            int thread = i_warp * LANES + l;
            if (c->filled[l]) {
                u8 *from = global_at(m, c->pc, thread, c->from[l], c->filled[l] == (u32)c->size ? c->size : 1, 0, WEAK);
                if (from) memcpy(value, from, c->filled[l]);
            }
            u8 *to = shared_at(m, w, c->pc, thread, c->to[l], c->size, 1, LAND, value);
            if (to) memcpy(to, value, c->size);
        }
    }
    w->n_copies = kept;
}
