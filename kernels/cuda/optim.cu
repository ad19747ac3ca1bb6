// Equal to kernels/src/scalar/optim.rs: update, word for word. One pass that un-scales the gradient, moves parameter and
// states, and writes the compute copy, so that each is read and written once.
#define RESIDENT 3 // adam has four rows and nine numbers to keep at hand
#include "floats.cuh"

DEVICE float root(float x) { return __fsqrt_rn(x); }
DEVICE double root(double x) { return __dsqrt_rn(x); }

// Every rule, in the accumulator C: the numbers of a Rule rounded to it, and one element's step. `first` and `second` are
// the states, at most STATES of them; read() and written() say how many of them it does read and write.
template <class C> struct Sgd {
    static const u32 STATES = 1;
    C lr, momentum, rest, weight_decay;
    bool maximize, nesterov, first_step, has_buffer, decays;

    METHOD explicit Sgd(const Rule& rule)
        : lr((C)rule.lr), momentum((C)rule.a), rest((C)rule.b), weight_decay((C)rule.c),
          maximize(rule.flags & FLAG_MAXIMIZE), nesterov(rule.flags & FLAG_NESTEROV),
          first_step(rule.flags & FLAG_FIRST), has_buffer(rule.flags & FLAG_MOMENTUM), decays(rule.c != 0) {}

    METHOD u32 read() const { return has_buffer && !first_step ? 1 : 0; }
    METHOD u32 written() const { return has_buffer ? 1 : 0; }

    METHOD C step(C p, C g, C& m, C&) const {
        if (maximize) g = -g;
        if (decays) g = g + weight_decay * p;
        if (!has_buffer) return p - lr * g;
        m = first_step ? g : momentum * m + rest * g;
        return p - lr * (nesterov ? g + momentum * m : m);
    }
};

template <class C> struct Adam {
    static const u32 STATES = 2;
    C lr, beta1, beta1_rest, beta2, beta2_rest, decay, correction, eps;
    bool decoupled, decays;

    METHOD explicit Adam(const Rule& rule)
        : lr((C)rule.lr), beta1((C)rule.a), beta1_rest((C)rule.a_rest), beta2((C)rule.b), beta2_rest((C)rule.b_rest),
          decay((C)rule.c), correction((C)rule.d), eps((C)rule.e), decoupled(rule.flags & FLAG_DECOUPLED),
          decays(rule.c != 0) {}

    METHOD u32 read() const { return 2; }
    METHOD u32 written() const { return 2; }

    METHOD C step(C p, C g, C& m, C& v) const {
        if (decoupled) {
            p = p * decay;
        } else if (decays) {
            g = g + decay * p;
        }
        m = beta1 * m + beta1_rest * g;
        v = beta2 * v + beta2_rest * (g * g);
        return p - lr * (m / (root(v) / correction + eps));
    }
};

template <class C> struct Lion {
    static const u32 STATES = 1;
    C lr, beta1, beta1_rest, beta2, beta2_rest, decay;

    METHOD explicit Lion(const Rule& rule)
        : lr((C)rule.lr), beta1((C)rule.a), beta1_rest((C)rule.a_rest), beta2((C)rule.b), beta2_rest((C)rule.b_rest),
          decay((C)rule.c) {}

    METHOD u32 read() const { return 1; }
    METHOD u32 written() const { return 1; }

    METHOD C step(C p, C g, C& m, C&) const {
        const C mean = beta1 * m + beta1_rest * g;
        const C sign = mean > 0 ? (C)1 : mean < 0 ? (C)-1 : mean;
        m = beta2 * m + beta2_rest * g;
        return p * decay - lr * sign;
    }
};

// V elements, in instructions of up to 16 bytes.
template <class T, u32 V, class C> DEVICE void load_as(u64 address, C* x) {
    const u32 PART = V * T::SIZE > 16 ? 16 / T::SIZE : V;
    UNROLL
    for (u32 part = 0; part < V; part += PART) {
        decode<T, PART>(load<PART * T::SIZE>(address + part * T::SIZE), x + part);
    }
}

template <class T, u32 V, class C> DEVICE void store_as(u64 address, const C* x) {
    const u32 PART = V * T::SIZE > 16 ? 16 / T::SIZE : V;
    UNROLL
    for (u32 part = 0; part < V; part += PART) {
        store<PART * T::SIZE>(address + part * T::SIZE, encode<T, PART>(x + part));
    }
}

// Elements of a dtype known at run time, which a whole grid has in common.
const u32 F64 = 0, F32 = 1, F16 = 2, BF16 = 3, F8E4M3 = 4;

DEVICE u32 size_of(u32 dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : dtype < F8E4M3 ? 2 : 1; }

template <u32 V, class C> DEVICE void load_any(u32 dtype, u64 base, u64 index, C* x) {
    const u64 address = base + index * size_of(dtype);
    switch (dtype) {
    case F64: load_as<f64, V>(address, x); break;
    case F32: load_as<f32, V>(address, x); break;
    case F16: load_as<f16, V>(address, x); break;
    case BF16: load_as<bf16, V>(address, x); break;
    case F8E4M3: load_as<f8e4m3, V>(address, x); break;
    default: load_as<f8e5m2, V>(address, x);
    }
}

template <u32 V, class C> DEVICE void store_any(u32 dtype, u64 base, u64 index, const C* x) {
    const u64 address = base + index * size_of(dtype);
    switch (dtype) {
    case F64: store_as<f64, V>(address, x); break;
    case F32: store_as<f32, V>(address, x); break;
    case F16: store_as<f16, V>(address, x); break;
    case BF16: store_as<bf16, V>(address, x); break;
    case F8E4M3: store_as<f8e4m3, V>(address, x); break;
    default: store_as<f8e5m2, V>(address, x);
    }
}

template <class T> struct AsFloat;
template <> struct AsFloat<float> { typedef f32 Tag; };
template <> struct AsFloat<double> { typedef f64 Tag; };

// The step of V neighbours from number `index` of an entry on.
template <class P, u32 V, class R>
DEVICE void step_some(const R& rule, const Rule& numbers, const Update& entry, u64 index) {
    typedef typename P::Acc C;
    typedef typename AsFloat<C>::Tag State;
    C p[V], g[V], first[V] = {}, second[V] = {};
    load_as<P, V>(entry.param + index * P::SIZE, p);
    load_any<V>(numbers.grad_dtype, entry.grad, index, g);
    if (rule.read() > 0) load_as<State, V>(entry.state0 + index * State::SIZE, first);
    if (rule.read() > 1) load_as<State, V>(entry.state1 + index * State::SIZE, second);
    const C grad_scale = (C)numbers.grad_scale;
    UNROLL
    for (u32 v = 0; v < V; ++v) p[v] = rule.step(p[v], g[v] * grad_scale, first[v], second[v]);
    if (rule.written() > 0) store_as<State, V>(entry.state0 + index * State::SIZE, first);
    if (rule.written() > 1) store_as<State, V>(entry.state1 + index * State::SIZE, second);
    const Raw<V * P::SIZE> moved = encode<P, V>(p);
    store<V * P::SIZE>(entry.param + index * P::SIZE, moved);
    if (entry.copy != 0) {
        // What a cast of the stored parameter would give.
        decode<P, V>(moved, p);
        store_any<V>(numbers.copy_dtype, entry.copy, index, p);
    }
}

// Elements before the first at which V of everything are aligned, or all if there is none.
template <class P, u32 V> DEVICE u32 head_of(const Rule& numbers, const Update& entry, u64 start, u32 len) {
    if (V == 1) return len;
    const u32 phase = (u32)(entry.param / P::SIZE) % V;
    const u32 state_size = sizeof(typename P::Acc);
    bool together = (u32)(entry.grad / size_of(numbers.grad_dtype)) % V == phase;
    if (entry.state0 != 0) together = together && (u32)(entry.state0 / state_size) % V == phase;
    if (entry.state1 != 0) together = together && (u32)(entry.state1 / state_size) % V == phase;
    if (entry.copy != 0) together = together && (u32)(entry.copy / size_of(numbers.copy_dtype)) % V == phase;
    const u32 head = (V - (phase + (u32)(start % V)) % V) % V;
    return together && head < len ? head : len;
}

template <class P, class R> DEVICE void update(const Update* table, u32 count, u64 chunks, const Rule& numbers) {
    // The numbers of adam in f64 leave too few registers for two elements.
    const u32 V = R::STATES == 2 && sizeof(typename P::Acc) == 8 ? 1 : 16 / sizeof(typename P::Acc);
    const R rule(numbers);
    u32 at = 0;
    for (u64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        at = find(table, count, chunk, at);
        const Update entry = table[at];
        const u64 start = (chunk - entry.first) * CHUNK;
        const u32 len = chunk_len(entry.numel, start, CHUNK);
        const u32 head = head_of<P, V>(numbers, entry, start, len), vectors = (len - head) / V;
        for (u32 unit = threadIdx.x; V > 1 && unit < vectors; unit += THREADS) {
            step_some<P, V>(rule, numbers, entry, start + head + unit * V);
        }
        for (u32 edge = threadIdx.x; edge < len - vectors * V; edge += THREADS) {
            step_some<P, 1>(rule, numbers, entry, start + (edge < head ? edge : edge + vectors * V));
        }
    }
}

#define UPDATE(NAME, RULE, P) \
    KERNEL(NAME##_##P, (const Update* table, u32 count, u64 chunks, Rule rule), \
           (update<P, RULE<typename P::Acc>>(table, count, chunks, rule)))

#define UPDATES(P) UPDATE(sgd, Sgd, P) UPDATE(adam, Adam, P) UPDATE(lion, Lion, P)

UPDATES(f64)
UPDATES(f32)
UPDATES(f16)
UPDATES(bf16)
