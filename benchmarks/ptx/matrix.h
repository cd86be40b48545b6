// ldmatrix, stmatrix, mma.sync and wgmma, by the fragment and descriptor layouts of the PTX ISA manual (Warp Level Matrix
// Multiply-Accumulate Instructions; Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions).
// Products are exact and added in float64, one rounding an instruction. A tensor core's own order and rounding are not
// documented, so results may differ from a chip's in the last digits.

static inline u8 *unit(const Warp *w, s32 k) { return w->registers + UNIT * (size_t)k; }

// imm: matrices, transposed, offset, whether the address has 64 bits; o: address, values
static void move_matrix(Machine *m, Warp *w, int i_warp, const Instruction *I, const s32 *o, u32 mask) {
    int n = I->imm[0], transposed = I->imm[1], loads = I->op == OP_ldmatrix;
    u16 tile[4][8][8] = {{{0}}};
    if (mask != FULL) report(m, DIVERGED, w->pc, i_warp * LANES, mask, FULL);
    // A lane holds two neighbours of a row: of the transposed matrix, of a column.
    #define EACH(k, l, h) \
        for (int k = 0; k < n; k++) for (int l = 0; l < LANES; l++) for (int h = 0; h < 2; h++)
    #define PLACE(k, l, h) (transposed ? &tile[k][l % 4 * 2 + h][l / 4] : &tile[k][l / 4][l % 4 * 2 + h])
    if (!loads) EACH(k, l, h) *PLACE(k, l, h) = ((u32 *)unit(w, o[1 + k]))[l] >> (16 * h);
    for (int k = 0; k < n; k++) {
        u32 rows[LANES] = {0};
        for (int r = 0; r < 8; r++) {  // lane 8 k + r has the address of row r of matrix k
            int l = k * 8 + r;
            rows[r] = (I->imm[3] ? (u32)((u64 *)unit(w, o[0]))[l] : ((u32 *)unit(w, o[0]))[l]) + I->imm[2];
            u8 *p = shared_at(m, w, w->pc, i_warp * LANES + l, rows[r], 16, 2, loads ? READ : WRITE, (u8 *)tile[k][r]);
            if (p && loads) memcpy(tile[k][r], p, 16);
            if (p && !loads) memcpy(p, tile[k][r], 16);
        }
        count_wavefronts(m, w->pc, 0xff, rows, 16);
    }
    if (loads)
        EACH(k, l, h) {
            u32 *d = (u32 *)unit(w, o[1 + k]) + l;
            *d = h ? *d | (u32)*PLACE(k, l, h) << 16 : *PLACE(k, l, h);
        }
    #undef EACH
    #undef PLACE
}

enum { BF16, F16, TF32, F64 };  // decode.py: _MATRIX_TYPES
// Of a float32 the tensor core takes the upper 19 bits: seen on an H100, for mma and for wgmma.
static inline f64 tf32(u32 x) { return as_f32(x & 0xffffe000); }
static inline f64 narrow(u32 x, int type) { return type == BF16 ? bf16_to_float(x) : half_to_float(x); }

static f64 element(const Warp *w, s32 register_, int lane, int half, int type) {
    if (type == F64) return ((f64 *)unit(w, register_))[lane];
    u32 x = ((u32 *)unit(w, register_))[lane];
    return type == TF32 ? tf32(x) : narrow((x >> (16 * half)) & 65535, type);
}

static inline int packed(int type) { return type == BF16 || type == F16 ? 2 : 1; }

// A [rows, k] in registers: a quad of lanes a row, 8 rows a register, then 4 (or 8 packed) columns.
static void fragment_a(const Warp *w, const s32 *a, int rows, int k, int type, f64 A[16][16]) {
    int per = packed(type), wide = 4 * per;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < k; c++)
            A[r][c] = element(w, a[r / 8 + rows / 8 * (c / wide)], r % 8 * 4 + c % wide / per, c % per, type);
}

// imm: rows, k, type; o: d, a, b, c. D [rows, 8] = A [rows, k] B [k, 8] + C
static void mma(Warp *w, const Instruction *I, const s32 *o) {
    int rows = I->imm[0], k = I->imm[1], type = I->imm[2], per = packed(type), wide = 4 * per;
    const s32 *d = o, *a = d + rows / 4, *b = a + rows / 8 * (k / wide), *c = b + k / wide;
    f64 A[16][16], B[16][8], D[16][8];
    fragment_a(w, a, rows, k, type, A);
    for (int i = 0; i < k; i++)
        for (int j = 0; j < 8; j++) B[i][j] = element(w, b[i / wide], j * 4 + i % wide / per, i % per, type);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 8; j++) {
            u8 *p = unit(w, c[r / 8 * 2 + j % 2]);
            int lane = r % 8 * 4 + j / 2;
            D[r][j] = type == F64 ? ((f64 *)p)[lane] : ((f32 *)p)[lane];
            for (int i = 0; i < k; i++) D[r][j] += A[r][i] * B[i][j];
        }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 8; j++) {
            u8 *p = unit(w, d[r / 8 * 2 + j % 2]);
            int lane = r % 8 * 4 + j / 2;
            if (type == F64) ((f64 *)p)[lane] = D[r][j];
            else ((f32 *)p)[lane] = D[r][j];
        }
}

// Element (i, k) of a matrix in shared memory, by its descriptor: i along M or N; `k_major`: neighbours are along k.
static f64 described(Machine *m, Warp *w, int thread, u64 descriptor, int i, int k, int k_major, int type) {
    static const int WIDTH[] = {16, 128, 64, 32}, SWIZZLE[] = {0, 0x70, 0x30, 0x10};
    u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    u32 stride = (descriptor >> 32 & 0x3fff) << 4, mode = descriptor >> 62, width = WIDTH[mode];
    int bytes = type == TF32 ? 4 : 2;
    u32 at = start;
    if (k_major) {
        u32 along = k * bytes;
        at += i / 8 * stride + i % 8 * width + (mode ? along : along / 16 * leading + along % 16);
    } else {
        u32 along = i * bytes, block = along / width;
        at += k % 8 * width + along % width + (mode ? block * leading + k / 8 * stride : block * stride + k / 8 * leading);
    }
    at ^= (at >> 3) & SWIZZLE[mode];
    u8 *p = shared_at(m, w, w->pc, thread, at, bytes, bytes, READ, 0);
    u32 v = 0;
    if (p) memcpy(&v, p, bytes);
    return type == TF32 ? tf32(v) : narrow(v, type);
}

// imm: n, k, type, A in registers, A k-major, B k-major; o: d (n / 2), a (4 or 1), b, whether d is kept.
// Each of the four warps has 16 rows of D [64, n] = A [64, k] B [k, n] (+ D).
static void wgmma(Machine *m, Warp *w, int i_warp, const Instruction *I, const s32 *o) {
    int n = I->imm[0], k = I->imm[1], type = I->imm[2], in_registers = I->imm[3], thread = i_warp * LANES;
    const s32 *d = o, *a = d + n / 2, *b = a + (in_registers ? 4 : 1);
    u64 b_descriptor = *(u64 *)unit(w, b[0]);
    u32 keeps = *(u32 *)unit(w, b[1]);
    f64 A[16][16];
    if (in_registers) {
        fragment_a(w, a, 16, k, type, A);
    } else {
        u64 a_descriptor = *(u64 *)unit(w, a[0]);
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < k; c++)
                A[r][c] = described(m, w, thread, a_descriptor, i_warp % 4 * 16 + r, c, I->imm[4], type);
    }
    for (int j = 0; j < n; j++) {
        f64 B[16];
        for (int i = 0; i < k; i++) B[i] = described(m, w, thread, b_descriptor, j, i, I->imm[5], type);
        for (int r = 0; r < 16; r++) {
            f32 *p = (f32 *)unit(w, d[j / 8 * 4 + r / 8 * 2 + j % 2]) + (r % 8 * 4 + j % 8 / 2);
            f64 sum = keeps ? *p : 0;
            for (int i = 0; i < k; i++) sum += A[r][i] * B[i];
            *p = sum;
        }
    }
}
