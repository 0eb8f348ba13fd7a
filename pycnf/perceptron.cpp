// The joint dynamics of a perceptron, d(z, log p)/dt = (v, -div v), and their pullback, for the processor at hand.
//
// A batch is cut into blocks of rows that go through all layers while their numbers are in the nearest caches, so
// that memory sees the states and the slopes and nothing between. The pullback evaluates its block again instead of
// reading back what an evaluation would have had to keep.
//
// A block carries 1 + K rows for each of the batch: the value, and K tangents t_k which start at the first hidden
// layer and meet K cotangents e_k at the last, div v = sum_k t_k . e_k (pycnf/compiled.py says which). Vectors run
// along the units of a layer; widths are padded with zeros to whole vectors of 64 bytes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#if defined(__AVX512F__)
constexpr int BYTES = 64, WIDE = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, WIDE = 2;
#elif defined(__aarch64__)
constexpr int BYTES = 16, WIDE = 4;
#else
constexpr int BYTES = 16, WIDE = 2;
#endif
constexpr int DEEPEST = 16;           // hidden layers
constexpr int64_t NEAR = 256 * 1024;  // bytes that a block may take
constexpr int64_t MOST = 64;          // rows that it may have
#define INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// ---- vectors ---------------------------------------------------------------------------------

template <class T> struct Vector {
    typedef T type __attribute__((vector_size(BYTES)));
    typedef T loose __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
    static constexpr int size = BYTES / sizeof(T);
};
template <class T> using V = typename Vector<T>::type;
template <class T> constexpr int SIZE = Vector<T>::size;

template <class T> INLINE V<T> load(const T* p) { return *(const typename Vector<T>::loose*)p; }
template <class T> INLINE void store(T* p, V<T> x) { *(typename Vector<T>::loose*)p = x; }
template <class T> INLINE void add(T* p, V<T> x) { store(p, load(p) + x); }
template <class T> INLINE V<T> all(T x) { return x - V<T>{}; }
template <class T> INLINE T sum(V<T> x) {
    T s = 0;
    for (int i = 0; i < SIZE<T>; i++) s += x[i];
    return s;
}
template <class T, class F> INLINE V<T> each(V<T> x, F f) {
    for (int i = 0; i < SIZE<T>; i++) x[i] = f(x[i]);
    return x;
}
template <class T> constexpr int64_t padded(int64_t n) {
    constexpr int64_t lanes = 64 / sizeof(T);
    return (n + lanes - 1) / lanes * lanes;
}
template <class T> T* aligned(std::vector<T>& memory, int64_t size) {
    if ((int64_t)memory.size() < size + 64) memory.resize(size + 64);
    return (T*)(((uintptr_t)memory.data() + 63) / 64 * 64);
}

// ---- elementary functions: vectors of float32, each float64 by the standard library ---------

typedef Vector<float>::type F32;
typedef int32_t I32 __attribute__((vector_size(BYTES)));

template <int N> INLINE F32 polynomial(F32 x, const float (&c)[N]) {
    F32 p = all(c[0]);
    for (int i = 1; i < N; i++) p = p * x + c[i];
    return p;
}
INLINE F32 exponential(F32 x) {  // 2^n e^f with |f| <= log(2) / 2
    x = x > 88.0f ? all(88.0f) : x;
    x = x < -87.0f ? all(-87.0f) : x;
    const F32 shift = all(12582912.0f), n = (x * 1.44269504f + shift) - shift;
    const F32 f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const F32 p = polynomial(f, {1.98756915e-4f, 1.39819995e-3f, 8.33345191e-3f, 4.16657959e-2f, 1.66666655e-1f, 0.5f});
    return (p * f * f + f + 1.0f) * (F32)((__builtin_convertvector(n, I32) + 127) << 23);
}
INLINE V<double> exponential(V<double> x) { return each<double>(x, [](double a) { return std::exp(a); }); }
INLINE F32 hyperbolic_tangent(F32 x) {
    const F32 z = x * x, a = x < 0 ? -x : x, b = a > 10.0f ? all(10.0f) : a;
    const F32 p = polynomial(z, {-5.70498873e-3f, 2.06390888e-2f, -5.37397155e-2f, 1.33314422e-1f, -3.33332819e-1f});
    const F32 far = 1.0f - 2.0f / (exponential(b + b) + 1.0f);
    return a < 0.625f ? p * z * x + x : (x < 0 ? -far : far);
}
INLINE V<double> hyperbolic_tangent(V<double> x) { return each<double>(x, [](double a) { return std::tanh(a); }); }
template <class T> INLINE V<T> logistic(V<T> x) { return 1 / (1 + exponential(-x)); }
INLINE F32 softplus(F32 x) {  // max(x, 0) + log(1 + u), log(1 + u) = 2 artanh(u / (2 + u))
    const F32 u = exponential(x < 0 ? x : -x), w = u / (2 + u);
    const F32 p = polynomial(w * w, {1.f / 15, 1.f / 13, 1.f / 11, 1.f / 9, 1.f / 7, 1.f / 5, 1.f / 3, 1.f});
    return 2 * w * p + (x < 0 ? F32{} : x);
}
INLINE V<double> softplus(V<double> x) {
    return each<double>(x, [](double a) { return std::max(a, 0.0) + std::log1p(std::exp(-std::abs(a))); });
}

// ---- activations: value h(a), slope s(a, h), and gh s + gs ds/da --------------------------------

struct Tanh {
    template <class T> static INLINE V<T> value(V<T> a) { return hyperbolic_tangent(a); }
    template <class T> static INLINE V<T> slope(V<T>, V<T> h) { return 1 - h * h; }
    template <class T> static INLINE V<T> pull(V<T>, V<T> h, V<T> s, V<T> gh, V<T> gs) { return (gh - 2 * h * gs) * s; }
};
struct Softplus {
    template <class T> static INLINE V<T> value(V<T> a) { return softplus(a); }
    template <class T> static INLINE V<T> slope(V<T> a, V<T>) { return logistic<T>(a); }
    template <class T> static INLINE V<T> pull(V<T>, V<T>, V<T> s, V<T> gh, V<T> gs) { return (gh + gs * (1 - s)) * s; }
};
struct Sigmoid {
    template <class T> static INLINE V<T> value(V<T> a) { return logistic<T>(a); }
    template <class T> static INLINE V<T> slope(V<T>, V<T> h) { return h - h * h; }
    template <class T> static INLINE V<T> pull(V<T>, V<T> h, V<T> s, V<T> gh, V<T> gs) {
        return (gh + gs * (1 - 2 * h)) * s;
    }
};
struct Silu {
    template <class T> static INLINE V<T> value(V<T> a) { return a * logistic<T>(a); }
    template <class T> static INLINE V<T> slope(V<T> a, V<T> h) { return logistic<T>(a) * (1 + a - h); }
    template <class T> static INLINE V<T> pull(V<T> a, V<T>, V<T> s, V<T> gh, V<T> gs) {
        const V<T> p = logistic<T>(a);
        return gh * s + gs * (p * (1 - p) * (2 + a * (1 - 2 * p)));
    }
};
struct Sin {
    template <class T> static INLINE V<T> value(V<T> a) { return each<T>(a, [](T x) { return std::sin(x); }); }
    template <class T> static INLINE V<T> slope(V<T> a, V<T>) { return each<T>(a, [](T x) { return std::cos(x); }); }
    template <class T> static INLINE V<T> pull(V<T>, V<T> h, V<T> s, V<T> gh, V<T> gs) { return gh * s - gs * h; }
};

// ---- matrix products: C (m, n) = or += A (m, k) B (k, n), A with any strides, n whole vectors ---

template <class T, int M, int N, bool ADD>
INLINE void tile(const T* A, int64_t down, int64_t right, const T* B, int64_t ldb, T* C, int64_t ldc, int64_t k) {
    V<T> c[M][N];
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++) c[m][n] = ADD ? load(C + m * ldc + n * SIZE<T>) : V<T>{};
    for (int64_t i = 0; i < k; i++) {
        V<T> b[N];
        UNROLL for (int n = 0; n < N; n++) b[n] = load(B + i * ldb + n * SIZE<T>);
        UNROLL for (int m = 0; m < M; m++) {
            const V<T> a = all(A[m * down + i * right]);
            UNROLL for (int n = 0; n < N; n++) c[m][n] += a * b[n];
        }
    }
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++) store(C + m * ldc + n * SIZE<T>, c[m][n]);
}
template <class T, int N, bool ADD>
void strip(const T* A, int64_t down, int64_t right, const T* B, int64_t ldb, T* C, int64_t ldc, int64_t m, int64_t k) {
    for (; m >= 6; m -= 6, A += 6 * down, C += 6 * ldc) tile<T, 6, N, ADD>(A, down, right, B, ldb, C, ldc, k);
    for (; m >= 2; m -= 2, A += 2 * down, C += 2 * ldc) tile<T, 2, N, ADD>(A, down, right, B, ldb, C, ldc, k);
    if (m) tile<T, 1, N, ADD>(A, down, right, B, ldb, C, ldc, k);
}
template <bool ADD, class T>
void product(const T* A, int64_t down, int64_t right, const T* B, T* C, int64_t m, int64_t n, int64_t k) {
    const int64_t ld = n;
    for (; n >= WIDE * SIZE<T>; n -= WIDE * SIZE<T>, B += WIDE * SIZE<T>, C += WIDE * SIZE<T>)
        strip<T, WIDE, ADD>(A, down, right, B, ld, C, ld, m, k);
    if (WIDE > 2 && n >= 2 * SIZE<T>) {
        strip<T, 2, ADD>(A, down, right, B, ld, C, ld, m, k);
        n -= 2 * SIZE<T>, B += 2 * SIZE<T>, C += 2 * SIZE<T>;
    }
    if (n) strip<T, 1, ADD>(A, down, right, B, ld, C, ld, m, k);
}

// ---- what the caller describes ------------------------------------------------------------------

struct Problem {  // as declared in pycnf/compiled.py
    int64_t rows, features, layers, tangents;  // B, D, L, K
    int64_t by_row;                            // whether tangents and cotangents differ from row to row
    int64_t own;                               // whether tangents have matrices of their own
    int64_t activation, threads;
    int64_t widths[DEEPEST];
    const void *shared, *transposed;           // parameters as Parts, and the matrices among them transposed
    const void *start, *end;                   // (K, B, h_1) and (K, B, h_L) where they differ from row to row
    const void* extra;                         // (B, h_1), the context's share of the first layer, or null
};

template <class T> struct Parts {  // what all rows share, one after the other
    T *offset, *rate, *first, *last, *start, *end;  // first (D, h_1), last (D, h_L), start (K, h_1), end (K, h_L)
    T *weight[DEEPEST], *own[DEEPEST];              // l -> l+1: (h_{l+1}, h_l)
    int64_t size, offsets;

    Parts(const Problem& p, T* at) {
        T* const begin = at;
        const int64_t L = p.layers, h1 = padded<T>(p.widths[0]), hL = padded<T>(p.widths[L - 1]);
        offsets = padded<T>(p.features);
        for (int64_t l = 0; l < L; l++) offsets += padded<T>(p.widths[l]);
        auto take = [&at](int64_t n) { T* was = at; at += n; return was; };
        offset = take(offsets), rate = take(offsets);
        first = take(p.features * h1), last = take(p.features * hL);
        start = take(p.by_row ? 0 : p.tangents * h1), end = take(p.by_row ? 0 : p.tangents * hL);
        for (int64_t l = 0; l + 1 < L; l++) weight[l] = take(p.widths[l + 1] * padded<T>(p.widths[l]));
        for (int64_t l = 0; l + 1 < L; l++) own[l] = p.own ? take(p.widths[l + 1] * padded<T>(p.widths[l])) : weight[l];
        size = at - begin;
    }
};

template <class T> struct Field {
    const Problem& p;
    const Parts<T> w;
    const int64_t B, D, L, K, C;                 // C channels of the state
    int64_t h[DEEPEST], n[DEEPEST], widest = 0;  // widths, padded widths
    int64_t row_size, rows;                      // numbers that a row takes, rows of a block
    const T *flip[DEEPEST], *own_flip[DEEPEST];  // matrices transposed: (h_l, h_{l+1})

    explicit Field(const Problem& p)
        : p(p), w(p, (T*)p.shared), B(p.rows), D(p.features), L(p.layers), K(p.tangents), C(D + (K > 0)) {
        int64_t layers = 0;
        for (int64_t l = 0; l < L; l++) {
            h[l] = p.widths[l], n[l] = padded<T>(h[l]);
            widest = std::max(widest, n[l]), layers += n[l];
        }
        const T* next = (const T*)p.transposed;
        for (int64_t l = 0; l + 1 < L; l++) flip[l] = next, next += h[l] * n[l + 1];
        for (int64_t l = 0; l + 1 < L; l++) own_flip[l] = p.own ? next : flip[l], next += p.own ? h[l] * n[l + 1] : 0;
        row_size = (1 + K) * 2 * (layers + widest) + layers + padded<T>(C);
        const int64_t most = std::min<int64_t>(MOST, std::max<int64_t>(4, NEAR / (row_size * sizeof(T))));
        const int64_t blocks = ((B + most - 1) / most + p.threads - 1) / p.threads * p.threads;
        rows = (B + blocks - 1) / blocks;
    }
    std::vector<T> offsets(T t) const {
        std::vector<T> at(w.offsets);
        for (int64_t i = 0; i < w.offsets; i++) at[i] = w.offset[i] + t * w.rate[i];
        return at;
    }
    int64_t blocks() const { return (B + rows - 1) / rows; }
    int64_t place(int64_t k, int64_t row) const { return p.by_row ? k * B + row : k; }
    const T* start(int64_t k, int64_t row) const {
        return (p.by_row ? (const T*)p.start : w.start) + place(k, row) * n[0];
    }
    const T* end(int64_t k, int64_t row) const {
        return (p.by_row ? (const T*)p.end : w.end) + place(k, row) * n[L - 1];
    }
};

template <class T> struct Block {  // (1 + K, rows, width) before and after each activation, the value first
    int64_t row, rows;
    T *before[DEEPEST], *after[DEEPEST], *slope[DEEPEST], *above, *below, *stage;

    Block(const Field<T>& f, int64_t number) : row(number * f.rows), rows(std::min(f.rows, f.B - row)) {
        static thread_local std::vector<T> memory;
        T* next = aligned(memory, f.rows * f.row_size);
        auto take = [&next](int64_t n) { T* was = next; next += n; return was; };
        for (int64_t l = 0; l < f.L; l++) {
            before[l] = take((1 + f.K) * f.rows * f.n[l]);
            after[l] = take((1 + f.K) * f.rows * f.n[l]);
            slope[l] = take(f.rows * f.n[l]);
        }
        above = take((1 + f.K) * f.rows * f.widest), below = take((1 + f.K) * f.rows * f.widest);
        stage = take(f.rows * padded<T>(f.C));
    }
};

// ---- one block forward and back -------------------------------------------------------------------

template <class A, class T> void evaluate(const Field<T>& f, const T* offset, const T* y, Block<T>& b) {
    const int64_t rows = b.rows, K = f.K;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t n = f.n[0];
        const T* z = y + r * f.C;
        for (int64_t j = 0; j < n; j += SIZE<T>) {
            V<T> a = load(offset + j);
            if (f.p.extra) a += load((const T*)f.p.extra + (b.row + r) * n + j);
            for (int64_t i = 0; i < f.D; i++) a += z[i] * load(f.w.first + i * n + j);
            store(b.before[0] + r * n + j, a);
        }
        for (int64_t k = 0; k < K; k++) std::copy_n(f.start(k, b.row + r), n, b.before[0] + ((1 + k) * rows + r) * n);
    }
    for (int64_t l = 0;; l++) {
        const int64_t n = f.n[l], all_of = rows * n;
        for (int64_t i = 0; i < all_of; i += SIZE<T>) {
            const V<T> a = load(b.before[l] + i), h = A::template value<T>(a), s = A::template slope<T>(a, h);
            store(b.after[l] + i, h), store(b.slope[l] + i, s);
            for (int64_t k = 1; k <= K; k++) store(b.after[l] + k * all_of + i, s * load(b.before[l] + k * all_of + i));
        }
        if (l + 1 == f.L) return;
        const int64_t m = f.n[l + 1];
        offset += n;
        for (int64_t r = 0; r < rows; r++) std::copy_n(offset, m, b.before[l + 1] + r * m);
        product<true>(b.after[l], n, 1, f.flip[l], b.before[l + 1], rows, m, f.h[l]);
        product<false>(b.after[l] + all_of, n, 1, f.own_flip[l], b.before[l + 1] + rows * m, K * rows, m, f.h[l]);
    }
}

template <class T> void finish(const Field<T>& f, const T* offset, const Block<T>& b, T* out) {
    const int64_t n = f.n[f.L - 1], rows = b.rows;
    const T* h = b.after[f.L - 1];
    offset += f.w.offsets - padded<T>(f.D);
    for (int64_t r = 0; r < rows; r++, h += n) {
        T* const to = out + r * f.C;
        for (int64_t i = 0; i < f.D; i++) {
            V<T> v{};
            for (int64_t j = 0; j < n; j += SIZE<T>) v += load(h + j) * load(f.w.last + i * n + j);
            to[i] = offset[i] + sum<T>(v);
        }
        V<T> div{};
        for (int64_t k = 0; k < f.K; k++)
            for (int64_t j = 0; j < n; j += SIZE<T>)
                div += load(h + (1 + k) * rows * n + j) * load(f.end(k, b.row + r) + j);
        if (f.K) to[f.D] = -sum<T>(div);
    }
}

template <class T> struct Slots {  // where gradients by row go, shaped as in Problem
    T *start, *end, *extra;
};

template <class A, class T>
void pull(const Field<T>& f, T t, const T* y, const T* g, T* gy, Block<T>& b, const Parts<T>& sums,
          const Slots<T>& slots) {
    const int64_t rows = b.rows, K = f.K, L = f.L, top = f.n[L - 1];
    T* const gstart = f.p.by_row ? slots.start : sums.start;
    T* const gend = f.p.by_row ? slots.end : sums.end;
    T *goffset = sums.offset + f.w.offsets - padded<T>(f.D), *grate = sums.rate + f.w.offsets - padded<T>(f.D);
    for (int64_t r = 0; r < rows; r++) {
        const T *gv = g + r * f.C, *h = b.after[L - 1] + r * top;
        const T gdiv = K ? -gv[f.D] : 0;
        for (int64_t i = 0; i < f.D; i++) goffset[i] += gv[i], grate[i] += t * gv[i];
        for (int64_t j = 0; j < top; j += SIZE<T>) {
            V<T> gh{};
            for (int64_t i = 0; i < f.D; i++) {
                gh += gv[i] * load(f.w.last + i * top + j);
                add(sums.last + i * top + j, gv[i] * load(h + j));
            }
            store(b.above + r * top + j, gh);
            for (int64_t k = 0; k < K; k++) {
                add(gend + f.place(k, b.row + r) * top + j, gdiv * load(h + (1 + k) * rows * top + j));
                store(b.above + ((1 + k) * rows + r) * top + j, gdiv * load(f.end(k, b.row + r) + j));
            }
        }
    }
    for (int64_t l = L - 1;; l--) {
        const int64_t n = f.n[l], all_of = rows * n;
        goffset -= n, grate -= n;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < n; j += SIZE<T>) {
                const int64_t i = r * n + j;
                const V<T> s = load(b.slope[l] + i);
                V<T> gs{};
                for (int64_t k = 1; k <= K; k++) {
                    const V<T> gu = load(b.above + k * all_of + i);
                    gs += gu * load(b.before[l] + k * all_of + i);
                    store(b.below + k * all_of + i, gu * s);
                }
                const V<T> a = load(b.before[l] + i), h = load(b.after[l] + i), gh = load(b.above + i);
                const V<T> ga = A::template pull<T>(a, h, s, gh, gs);
                store(b.below + i, ga);
                add(goffset + j, ga), add(grate + j, t * ga);
            }
        if (!l) break;
        const int64_t m = f.n[l - 1];
        product<false>(b.below, n, 1, f.w.weight[l - 1], b.above, rows, m, f.h[l]);
        product<false>(b.below + all_of, n, 1, f.w.own[l - 1], b.above + rows * m, K * rows, m, f.h[l]);
        product<true>(b.below, 1, n, b.after[l - 1], sums.weight[l - 1], f.h[l], m, rows);
        product<true>(b.below + all_of, 1, n, b.after[l - 1] + rows * m, sums.own[l - 1], f.h[l], m, K * rows);
    }
    const int64_t n = f.n[0];
    for (int64_t r = 0; r < rows; r++) {
        const T *z = y + r * f.C, *ga = b.below + r * n;
        T* const to = gy + r * f.C;
        for (int64_t i = 0; i < f.D; i++) {
            V<T> gz{};
            for (int64_t j = 0; j < n; j += SIZE<T>) {
                gz += load(ga + j) * load(f.w.first + i * n + j);
                add(sums.first + i * n + j, z[i] * load(ga + j));
            }
            to[i] = sum<T>(gz);
        }
        if (K) to[f.D] = 0;
        for (int64_t k = 0; k < K; k++)
            for (int64_t j = 0; j < n; j += SIZE<T>)
                add(gstart + f.place(k, b.row + r) * n + j, load(ga + (1 + k) * rows * n + j));
        if (f.p.extra)
            for (int64_t j = 0; j < n; j += SIZE<T>) add(slots.extra + (b.row + r) * n + j, load(ga + j));
    }
}

// ---- all blocks ------------------------------------------------------------------------------------

template <class A, class T> void forward(const Problem& p, T t, const T* y, T* out) {
    const Field<T> f(p);
    const std::vector<T> at = f.offsets(t);
#pragma omp parallel for num_threads((int)p.threads) schedule(static)
    for (int64_t i = 0; i < f.blocks(); i++) {
        Block<T> b(f, i);
        evaluate<A>(f, at.data(), y + b.row * f.C, b);
        finish(f, at.data(), b, out + b.row * f.C);
    }
}

template <class T, class F> void each_part(const Field<T>& f, T* gshared, F work) {  // work(part's sums, block)
    const int64_t size = f.w.size, stride = padded<T>(size), parts = std::min(f.p.threads, f.blocks());
    std::vector<T> memory;
    T* const sums = aligned(memory, parts * stride);
#pragma omp parallel for num_threads((int)parts) schedule(static, 1)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t i = part; i < f.blocks(); i += parts) {
            Block<T> b(f, i);
            work(Parts<T>(f.p, sums + part * stride), b);
        }
    for (int64_t part = 0; part < parts; part++)
        for (int64_t i = 0; i < size; i++) gshared[i] += sums[part * stride + i];
}

template <class A, class T>
void backward(const Problem& p, T t, const T* y, const T* g, T* gy, T* gshared, const Slots<T>& slots) {
    const Field<T> f(p);
    const std::vector<T> at = f.offsets(t);
    each_part(f, gshared, [&](const Parts<T>& sums, Block<T>& b) {
        const int64_t o = b.row * f.C;
        evaluate<A>(f, at.data(), y + o, b);
        pull<A>(f, t, y + o, g + o, gy + o, b, sums, slots);
    });
}

// ---- one step of a Runge-Kutta method: Y_i = y + h sum_j a_ij k_j, k_i = f(t + c_i h, Y_i) ------------

struct Stages {  // as declared in pycnf/native.py
    int64_t count;        // of slopes
    double t, h;
    const double *c, *a;  // (count - 1) and (count - 1, count)
};

template <class T> struct Step {  // on the way of one block from stage to stage
    const Field<T>& f;
    const Stages& s;
    const T* y;
    T* slopes;  // (count, B, C)
    std::vector<std::vector<T>> offsets;

    Step(const Field<T>& f, const Stages& s, const T* y, T* slopes) : f(f), s(s), y(y), slopes(slopes) {
        for (int64_t i = 1; i < s.count; i++) offsets.push_back(f.offsets(time(i)));
    }
    T time(int64_t i) const { return (T)(s.t + s.c[i - 1] * s.h); }
    T weight(int64_t i, int64_t j) const { return (T)(s.h * s.a[(i - 1) * s.count + j]); }
    T* part(T* all, int64_t i, const Block<T>& b) const { return all + (i * f.B + b.row) * f.C; }
    template <class A> void evaluate_stage(int64_t i, Block<T>& b) const {
        const int64_t size = b.rows * f.C;
        std::copy_n(y + b.row * f.C, size, b.stage);
        for (int64_t j = 0; j < i; j++)
            for (int64_t n = 0; n < size; n++) b.stage[n] += weight(i, j) * part(slopes, j, b)[n];
        evaluate<A>(f, offsets[i - 1].data(), b.stage, b);
    }
};

template <class A, class T> void step(const Problem& p, const Stages& s, const T* y, T* slopes, T* last) {
    const Field<T> f(p);
    const Step<T> step(f, s, y, slopes);
#pragma omp parallel for num_threads((int)p.threads) schedule(static)
    for (int64_t n = 0; n < f.blocks(); n++) {
        Block<T> b(f, n);
        for (int64_t i = 1; i < s.count; i++) {
            step.template evaluate_stage<A>(i, b);
            finish(f, step.offsets[i - 1].data(), b, step.part(slopes, i, b));
        }
        std::copy_n(b.stage, b.rows * f.C, last + b.row * f.C);
    }
}

template <class A, class T>  // gy comes in as the gradient of the last stage; gslopes collects those of the slopes
void pull_step(const Problem& p, const Stages& s, const T* y, T* slopes, T* gslopes, T* gy, T* gshared,
               const Slots<T>& slots) {
    const Field<T> f(p);
    const Step<T> step(f, s, y, slopes);
    each_part(f, gshared, [&](const Parts<T>& sums, Block<T>& b) {
        const int64_t size = b.rows * f.C;
        std::vector<T> gstage(size), total(size);
        for (int64_t i = s.count - 1; i > 0; i--) {
            step.template evaluate_stage<A>(i, b);
            pull<A>(f, step.time(i), b.stage, step.part(gslopes, i, b), gstage.data(), b, sums, slots);
            for (int64_t n = 0; n < size && i + 1 == s.count; n++) gstage[n] += gy[b.row * f.C + n];
            for (int64_t n = 0; n < size; n++) total[n] += gstage[n];
            for (int64_t j = 0; j < i; j++)
                for (int64_t n = 0; n < size; n++) step.part(gslopes, j, b)[n] += step.weight(i, j) * gstage[n];
        }
        std::copy_n(total.data(), size, gy + b.row * f.C);
    });
}

template <class F> void choose(int64_t activation, F call) {
    switch (activation) {
        case 0: return call(Tanh{});
        case 1: return call(Softplus{});
        case 2: return call(Sigmoid{});
        case 3: return call(Silu{});
        default: return call(Sin{});
    }
}

#define DOORS(T, NAME)                                                                                        \
    extern "C" void NAME##_forward(const Problem* p, const T* t, const T* y, T* out) {                        \
        choose(p->activation, [&](auto a) { forward<decltype(a), T>(*p, *t, y, out); });                      \
    }                                                                                                         \
    extern "C" void NAME##_backward(const Problem* p, const T* t, const T* y, const T* g, T* gy, T* gshared,  \
                                    T* gstart, T* gend, T* gextra) {                                          \
        const Slots<T> slots{gstart, gend, gextra};                                                           \
        choose(p->activation, [&](auto a) { backward<decltype(a), T>(*p, *t, y, g, gy, gshared, slots); });   \
    }                                                                                                         \
    extern "C" void NAME##_step(const Problem* p, const Stages* s, const T* y, T* slopes, T* last) {          \
        choose(p->activation, [&](auto a) { step<decltype(a), T>(*p, *s, y, slopes, last); });                \
    }                                                                                                         \
    extern "C" void NAME##_pull_step(const Problem* p, const Stages* s, const T* y, T* slopes, T* gslopes,    \
                                     T* gy, T* gshared, T* gstart, T* gend, T* gextra) {                      \
        const Slots<T> slots{gstart, gend, gextra};                                                           \
        choose(p->activation, [&](auto a) {                                                                   \
            pull_step<decltype(a), T>(*p, *s, y, slopes, gslopes, gy, gshared, slots);                        \
        });                                                                                                   \
    }
DOORS(float, float32)
DOORS(double, float64)
