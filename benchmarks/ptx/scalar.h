// Values: bits and numbers, conversions of 16-bit floats, and the integer instructions that are more than an operator.

static inline u32 as_u32(f32 x) { u32 y; memcpy(&y, &x, 4); return y; }
static inline f32 as_f32(u32 x) { f32 y; memcpy(&y, &x, 4); return y; }
static inline u64 as_u64(f64 x) { u64 y; memcpy(&y, &x, 8); return y; }
static inline f64 as_f64(u64 x) { f64 y; memcpy(&y, &x, 8); return y; }

static inline f32 flush(f32 x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0, x) : x; }

// A NaN becomes the canonical one (0x7fff), as cvt says.
static inline f32 bf16_to_float(u32 x) { return as_f32(x << 16); }
static inline u32 float_to_bf16(f32 x) {
    u32 y = as_u32(x);
    return x != x ? 0x7fff : (y + 0x7fff + ((y >> 16) & 1)) >> 16;
}
static inline f32 half_to_float(u32 x) { _Float16 h; u16 y = x; memcpy(&h, &y, 2); return h; }
static inline u32 double_to_half(f64 x) { _Float16 h = x; u16 y; memcpy(&y, &h, 2); return x != x ? 0x7fff : y; }
static inline u32 float_to_half(f32 x) { return double_to_half(x); }

static inline u64 PAIR(f32 low, f32 high) { return as_u32(low) | (u64)as_u32(high) << 32; }
static inline u64 rcp_high(u64 a) { return as_u64(1 / as_f64(a & ~0xffffffffull)) & ~0xffffffffull; }

static inline u64 bfe_u(u64 a, u32 at, u32 n, int bits) {
    at &= 255; n &= 255;
    if (at >= (u32)bits || n == 0) return 0;
    a >>= at;
    return n >= 64 ? a : a & ((1ull << n) - 1);
}
static inline s64 bfe_s(s64 a, u32 at, u32 n, int bits) {
    at &= 255; n &= 255;
    if (n == 0) return 0;
    if (at >= (u32)bits) at = bits - 1, n = 1;  // the sign
    else if (at + n > (u32)bits) n = bits - at;
    return (s64)((u64)a << (64 - at - n)) >> (64 - n);
}
static inline u32 bfi(u32 a, u32 b, u32 at, u32 n) {
    at &= 255; n &= 255;
    if (n == 0 || at > 31) return b;
    u32 mask = (n > 31 ? ~0u : (1u << n) - 1) << at;
    return (b & ~mask) | ((a << at) & mask);
}
static inline u32 brev(u32 a) { u32 r = 0; for (int i = 0; i < 32; i++) r |= ((a >> i) & 1) << (31 - i); return r; }
static inline u32 prmt(u32 a, u32 b, u32 c) {
    u64 both = a | (u64)b << 32;
    u32 r = 0;
    for (int i = 0; i < 4; i++) {
        u32 pick = (c >> (4 * i)) & 15, byte = (both >> (8 * (pick & 7))) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;  // its sign, repeated
        r |= byte << (8 * i);
    }
    return r;
}
static inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}
