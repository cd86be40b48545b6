// Which accesses to global memory come before others: those of a program's threads by a barrier, those of two programs
// by atomics at one address, of which one released and the other acquired (PTX ISA manual, Memory Consistency Model).
// What a program knows it passes on. Where this is not the whole model, less is in order: what a fence orders is not
// seen, and of the threads that release between two barriers only the last one's accesses between them.

// How far an access is an atomic: not at all, for its own program, for all programs.
enum { WEAK, CTA, GPU };
enum { ACQUIRES = 1, RELEASES = 2 };
#define MOST_RELEASES 63  // in an epoch: beyond, what a thread did in it is not known

// epoch << 8 | releases in it << 2 | scope
static inline u32 time_of(const Machine *m, int scope) { return m->epoch << 8 | m->releases << 2 | scope; }
static inline u32 number(const Machine *m, int thread) { return (u32)m->i_block * m->threads + thread + 1; }

static inline int knows(const Known *all, u32 program, u32 other, u32 time) {
    if (!all) return 0;
    const Known *k = &all[program];
    return time >> 8 < k->epoch || (k->thread == other && time < k->time);
}

// Of two programs: this one's access now, another's then, and how far both are atomics.
static int never_met(const Machine *m, int thread, int both, u32 other, u32 then) {
    if (both == GPU) return 0;
    if (other == MANY || !m->known) return 1;
    u32 program = ((other & ~OTHERS) - 1) / m->threads;
    return !knows(m->known, program, other, then) && !knows(m->held[thread], program, other, then);
}

// Whether an access of this thread (of this number) now and another's then are in no order, and not both atomics.
static inline int unordered(const Machine *m, int thread, u32 me, int scope, u32 other, u32 then) {
    if (!other || other == me) return 0;
    int both = scope < (int)(then & 3) ? scope : (int)(then & 3);
    if (other != MANY && then >> 8 >= m->first_epoch) return then >> 8 == m->epoch && both == WEAK;
    return never_met(m, thread, both, other, then);
}

static void add_known(const Machine *m, Known *to, const Known *from) {
    for (u32 i = 0; i < m->programs; i++) {
        if (from[i].epoch > to[i].epoch) to[i].epoch = from[i].epoch;
        if (from[i].time > to[i].time) to[i].thread = from[i].thread, to[i].time = from[i].time;
    }
}

static Known *nothing_known(const Machine *m) { return calloc(m->programs, sizeof(Known)); }

static Ticket *ticket_at(Machine *m, u64 address) {
    for (int i = 0; i < m->n_tickets; i++) if (m->tickets[i].address == address) return &m->tickets[i];
    m->tickets = realloc(m->tickets, (m->n_tickets + 1) * sizeof(Ticket));
    m->tickets[m->n_tickets] = (Ticket){address, nothing_known(m)};
    return &m->tickets[m->n_tickets++];
}

// A thread's atomic at an address: ACQUIRES, RELEASES, both or neither.
static void order(Machine *m, int thread, u64 address, int how) {
    if (!how) return;
    if (!m->known) m->known = nothing_known(m);
    Ticket *t = ticket_at(m, address);
    if (how & ACQUIRES) {
        if (!m->held[thread]) m->held[thread] = nothing_known(m), m->n_held++;
        add_known(m, m->held[thread], t->released);
    }
    if (how & RELEASES) {
        add_known(m, t->released, m->known);
        if (m->held[thread]) add_known(m, t->released, m->held[thread]);
        t->released[m->i_block] = (Known){m->epoch, number(m, thread), time_of(m, WEAK)};
    }
}

// A barrier, after which all threads know what one did; or the start of the next program, which knows nothing.
static void next_epoch(Machine *m, int is_program) {
    m->epoch++;
    m->releases = 0;
    if (is_program) {
        m->first_epoch = m->epoch;
        if (m->known) memset(m->known, 0, m->programs * sizeof(Known));
    }
    for (int i = 0; m->n_held; i++) {
        if (!m->held[i]) continue;
        if (!is_program) add_known(m, m->known, m->held[i]);
        free(m->held[i]);
        m->held[i] = 0, m->n_held--;
    }
}
