// What the interpreter is made of. Everything is per program (CUDA's block): programs run one after the other, each to
// its end.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;
typedef u32 pred;  // all bits, or none

#define LANES 32
#define FULL 0xffffffffu
#define UNIT (4 * LANES)  // bytes of a register of 32 bits, for all lanes
#define MOST_ERRORS 64
#define MOST_COPIES 512
#define SHARED_BASE 1024u  // decode.py has the same

// decode.py: INSTRUCTION, driver.py: ERROR and COUNT.
typedef struct { s32 op, guard, negated, leader, collective, operands, n, imm[6]; } Instruction;
typedef struct { s32 kind, pc, block, thread; u64 address, other; } Error;
typedef struct { u64 warps, lanes, units, ideal; } Count;  // units: sectors or wavefronts; ideal: the fewest possible

// A tensor's memory. Addresses in a kernel are (region + 1) << 40 | the low 20 bits of the host's and on, so that what
// is past the end of one tensor is in no other.
typedef struct { u64 host, low, high; } Region;
typedef struct { s32 order, late, check_shared, check_global; u64 seed, limit; } Config;

// A cp.async that has not landed.
typedef struct { u32 mask, group; s32 pc, size; u32 to[LANES], filled[LANES]; u64 from[LANES]; } Copy;

// Who touched a byte last, and when: thread + 1, or SEVERAL threads of this program. Times grow by barriers of the
// program (epoch << 8) and of the warp.
typedef struct { u32 writer, write_time, reader, read_time, pending; } SharedShadow;
#define SEVERAL (FULL - 1)

// The same of global memory, with the times of order.h: the number of a thread of any program + 1, with OTHERS where
// others of its program read too, or MANY programs.
typedef struct { u32 writer, write_time, reader, read_time; } GlobalShadow;
#define MANY FULL
#define OTHERS (1u << 31)

// What is known to come before, of a program: all before an epoch, and what one thread did before a time.
typedef struct { u32 epoch, thread, time; } Known;
// An address that atomics released at, and what is known to who acquires there, of each program.
typedef struct { u64 address; Known *released; } Ticket;

typedef struct {
    u8 *registers;
    u32 alive, active, parked;  // lanes: not ended; running now; waiting at a collective for others of the warp
    u32 lane_pc[LANES], pc, diverged;
    u32 time, committed, barrier;  // barriers of the warp; groups of copies; 1 + the barrier it stands at, or 0
    Copy *copies;
    int n_copies;
} Warp;

typedef struct {
    const Instruction *code;
    const s32 *operands;
    int units, threads, warps;
    const u8 *params;
    u32 grid[3], block[3];
    s32 i_block;
    u8 *shared;
    u32 shared_size;
    SharedShadow *shadow;
    u32 epoch, first_epoch;  // first_epoch: of the program that runs now
    const Region *regions;
    GlobalShadow **global_shadow;
    int n_regions;
    u32 programs, releases;  // releases: in this epoch
    Known *known, **held;  // what all threads of this program know; what one acquired since the last barrier
    int n_held, n_tickets;
    Ticket *tickets;
    Config config;
    Count *counts;
    Error *errors;
    int n_errors;
    u64 executed;
} Machine;

// driver.py: KINDS.
enum {
    OUT_OF_BOUNDS = 1, MISALIGNED, UNINITIALISED, SHARED_RACE, PENDING, DIVERGED, OUTSIDE_SHARED, DEADLOCK, TOO_LONG,
    GLOBAL_RACE
};

static void report(Machine *m, int kind, int pc, int thread, u64 address, u64 other) {
    for (int i = 0; i < m->n_errors && i < MOST_ERRORS; i++)
        if (m->errors[i].kind == kind && m->errors[i].pc == pc) return;  // one of a kind an instruction
    if (m->n_errors < MOST_ERRORS) m->errors[m->n_errors++] = (Error){kind, pc, m->i_block, thread, address, other};
}
